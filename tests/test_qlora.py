"""An adapter over a base in 4 bits (QLoRA), by the CPU's part of bitsandbytes."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from config.settings import (
    EvaluatedModelSettings,
    LoraSettings,
    ModelSettings,
)
from safer_instruct.evaluation.respondents import check_model
from safer_instruct.generation.models import load_causal_lm
from tests.commands import write_pairs
from tests.test_lora import first_gradients
from tests.tiny_models import GROUPED, exact_norms
from tests.tiny_runs import tiny_settings
from trainers.lora import adapter_of, start_adapter

bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install 'bitsandbytes>=0.46'")
# bitsandbytes' other kernel for CPUs, which must not run, takes multiples of 32 alone.
SIZES = {**GROUPED, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


def settings_of(folder: Path, kind: str = "nf4", **changes):
    lora = LoraSettings(r=4, quantize=kind)
    model = ModelSettings(name_or_path=str(folder), lora=lora)
    return tiny_settings(model=model, optimizer="AdamW", lr=1e-2, warmup_steps=0, **changes)


@pytest.fixture
def base(tmp_path) -> Path:
    """The folder of a model whose rows of 64 are a block of 4-bit codes each."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def dequantised(policy: torch.nn.Module) -> peft.PeftModel:
    """Plain transformers and peft in float64: the weights that the 4 bits of a policy stand for, and its adapter."""
    plain = exact_norms(LlamaForCausalLM(LlamaConfig(**SIZES)).double())
    layers = {name.replace(".base_layer", ""): one for name, one in policy.named_modules()}
    for name, module in plain.named_modules():
        if (weight := getattr(module, "weight", None)) is None:
            continue
        stored = layers[name].weight
        if isinstance(stored, bitsandbytes.nn.Params4bit):
            stored = bitsandbytes.functional.dequantize_4bit(stored, stored.quant_state)
        weight.data.copy_(stored)
    adapter = adapter_of(policy)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=adapter.config.target_modules)
    adapted = peft.get_peft_model(plain, config).double()
    parameters = dict(policy.named_parameters())
    peft.set_peft_model_state_dict(adapted, {key: parameters[name] for key, name in adapter.names.items()})
    return adapted


def dpo_loss(plain: torch.nn.Module, store, rows: list[int]) -> torch.Tensor:
    """-log sigmoid(0.1 h), a row at a time; the reference is the adapter switched off."""

    def logp(prompt: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([prompt, response])[None]
        logps = plain(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        return logps[len(prompt) - 1 :].sum()

    losses = []
    for row in rows:
        prompt, chosen, rejected = store.row(row)
        h = logp(prompt, chosen) - logp(prompt, rejected)
        with torch.no_grad(), plain.disable_adapter():
            reference = logp(prompt, chosen) - logp(prompt, rejected)
        losses.append(-F.logsigmoid(0.1 * (h - reference)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("packing", [True, False])
def test_gradients_after_an_evaluation_are_those_of_the_weights_that_the_four_bits_stand_for(
    tmp_path, base, packing, kind
):
    """An evaluation is what makes bitsandbytes change its weights, on some CPUs."""
    settings = settings_of(base, kind, packing=packing)
    trainer, batch, found = first_gradients(tmp_path, settings, model=load_causal_lm(settings.model), evaluate=True)
    policy = trainer.policy
    plain = dequantised(policy)
    loss = dpo_loss(plain, trainer.train_loader.store, batch.rows.tolist())
    loss.backward()
    assert found == pytest.approx(loss.item(), abs=1e-6)
    expected = peft.get_peft_model_state_dict(plain, state_dict={n: p.grad for n, p in plain.named_parameters()})
    parameters = dict(policy.named_parameters())
    assert len(expected) == len(adapter_of(policy).names) == 28
    for key, name in adapter_of(policy).names.items():
        scale = expected[key].abs().max()
        assert scale > 1e-4
        torch.testing.assert_close(parameters[name].grad.double(), expected[key], rtol=0, atol=float(1e-4 * scale))


@pytest.fixture
def words(tmp_path, tokenizer) -> list[str]:
    """Of a command of train.py, but for its name and its loss."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": len(tokenizer)})).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return [
        "model=blank_model", f"model.name_or_path={tmp_path / 'base'}", "wandb.enabled=false", "device=cpu",
        f"datasets.si.path={write_pairs(tmp_path / 'pairs.jsonl', 24)}", "datasets=[si]", "model.lora.r=4",
        "model.lora.quantize=nf4", "lr=1e-2", "optimizer=AdamW", "warmup_steps=0", "checkpoint.every_examples=8",
    ]  # fmt: skip


def test_a_run_that_was_cut_ends_as_one_that_was_not(here, words):
    """With dropout, evaluations and samples in between, and recomputed activations."""
    words = [*words, "loss=dpo", "model.lora.dropout=0.2", "activation_checkpointing=true", "eval_every=8"]
    words += ["sample_during_eval=true", "n_eval_model_samples=2", "max_new_tokens=4"]
    here(*words, "exp_name=whole")
    shutil.copytree("runs/whole", "runs/cut", symlinks=True)
    for folder in sorted(Path("runs/cut/checkpoints").iterdir(), key=lambda one: int(one.name[5:]))[1:]:
        shutil.rmtree(folder)
    here(*words, "exp_name=cut")
    ends = [load_file(f"runs/{name}/LATEST/adapter/adapter_model.safetensors") for name in ("whole", "cut")]
    for name, tensor in ends[0].items():
        assert torch.equal(ends[1][name], tensor), name


def test_the_adapter_is_read_by_peft_over_four_bits_and_merged_into_the_base_on_disk(here, words):
    here(*words, "loss=sft", "exp_name=sft")
    here(*words, "loss=dpo", "exp_name=dpo", "model.archive=runs/sft")  # which trains that adapter further
    first = json.loads(Path("runs/dpo/metrics.jsonl").read_text().splitlines()[0])
    assert first["rewards_eval/margins"] == 0.0
    folder, ids = Path("runs/dpo/LATEST/adapter"), torch.arange(3, 30)[None]

    def logits(model: torch.nn.Module) -> torch.Tensor:
        return model.train()(input_ids=ids).logits.detach()  # not eval(): plain models would take that kernel

    merged = check_model("dpo", EvaluatedModelSettings(path=str(folder))).model
    expected = logits(peft.AutoPeftModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(logits(load_causal_lm(merged)), expected, rtol=0, atol=1e-4)
    lora = LoraSettings(r=4, quantize="nf4")
    policy = load_causal_lm(ModelSettings(name_or_path=merged.name_or_path, lora=lora))
    start_adapter(policy, lora, folder, base="", seed=0)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    plain = AutoModelForCausalLM.from_pretrained(merged.name_or_path, quantization_config=four_bits)
    torch.testing.assert_close(logits(policy), logits(peft.PeftModel.from_pretrained(plain, folder)), rtol=0, atol=1e-4)
    assert (logits(policy) - expected).abs().max() > 0.1
