"""An adapter in the policy: what it computes, what of it is trained and saved, and who can read that."""

import json
import os
import shutil
import signal
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM

import train
from config.checks_lora import check_lora
from config.errors import UserError
from config.schema import compose_config
from config.settings import (
    CheckpointSettings,
    DPOSettings,
    EvaluatedModelSettings,
    LikelihoodLossSettings,
    LoraSettings,
    ModelSettings,
    TrainerSettings,
)
from safer_instruct.evaluation.respondents import check_model
from safer_instruct.generation.models import load_causal_lm, resolve_archive
from tests.commands import write_pairs
from tests.conftest import tiny_llama
from tests.ranks import Ranks
from tests.tiny_models import SUPPORTED, VOCABULARY, tiny_model
from tests.tiny_runs import tiny_settings, tiny_trainer
from tests.warm import fork_server
from trainers.distributed.launch import launch
from trainers.distributed.layout import Layout
from trainers.distributed.parallelize import parallelize
from trainers.distributed.sharding import full_parameters
from trainers.kernels.flops import head_flops_per_target, training_flops_per_token
from trainers.kernels.logps import sequence_logps
from trainers.lora import adapter_of, add_adapter, merged, targets
from trainers.run.checkpoint import exporter_of
from trainers.run.run_dir import RunDir

HERE = Layout(0, 1, torch.device("cpu"))
LORA = LoraSettings(r=4)
LOSSES = {
    "dpo": DPOSettings(name="dpo", nll_weight=0.3),
    "sft": LikelihoodLossSettings(name="sft"),
    "reverse": LikelihoodLossSettings(name="reverse", reduction="token_mean"),
}


def adapted(name: str = "llama", lora: LoraSettings = LORA, **options) -> torch.nn.Module:
    """A model with an adapter that is far from zero."""
    model = tiny_model(name, **options)
    add_adapter(model, lora, base="", seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def padded_batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(2))
    real = torch.arange(12) < torch.tensor([[12], [7], [9]])
    return {"input_ids": ids, "attention_mask": real, "response_mask": real & (torch.arange(12) >= 4)}


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_adapter_and_base_compute_what_the_merged_weights_do(name, kind):
    lora = replace(LORA, use_rslora=kind == "rslora", use_dora=kind == "dora")
    policy = adapted(name, lora, dtype=torch.float64)
    expected = sequence_logps(policy, padded_batch())[0]
    plain = tiny_model(name, dtype=torch.float64)
    assert (sequence_logps(plain, padded_batch())[0] - expected).abs().max() > 0.1
    adapter = adapter_of(policy)
    state = torch.random.get_rng_state()
    weights = merged(exporter_of(policy), adapter, full_parameters(policy, HERE))
    assert torch.equal(torch.random.get_rng_state(), state)  # of a run that trains on meanwhile
    plain.load_state_dict(weights)
    torch.testing.assert_close(sequence_logps(plain, padded_batch())[0], expected, rtol=0, atol=1e-9)


def test_a_new_adapter_changes_nothing_and_draws_no_random_numbers():
    for use_dora in (False, True):
        model = tiny_model()
        expected = sequence_logps(model, padded_batch())[0]
        state = torch.random.get_rng_state()
        add_adapter(model, replace(LORA, use_dora=use_dora, dropout=0.5), base="", seed=3)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(sequence_logps(model.train(), padded_batch())[0], expected)


def test_an_adapter_is_float32_in_a_base_of_16_bits():
    model = adapted(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert model.dtype == torch.bfloat16
    assert model.base_model(padded_batch()["input_ids"]).last_hidden_state.dtype == torch.bfloat16


@pytest.mark.parametrize("name", SUPPORTED)
def test_targets_are_all_linear_layers_but_the_head(name):
    model = tiny_model(name)
    found = targets(model, None)
    assert len(found) >= 3
    assert not {"lm_head", "embed_out"} & set(found)
    for wrong in ("lm_head", "embed_tokens", "quary_proj"):
        with pytest.raises(UserError, match=f"ends in {wrong}; it has {', '.join(found)}"):
            targets(model, [found[0], wrong])


def test_only_named_targets_are_trained():
    model = tiny_model()
    add_adapter(model, replace(LORA, target_modules=["layers.1.self_attn.q_proj", "down_proj"]), base="", seed=0)
    layers = {name.split(".lora_")[0] for name, one in model.named_parameters() if one.requires_grad}
    assert layers == {"model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}


def test_frozen_weights_cost_four_flops_and_trained_ones_six():
    model = tiny_model()
    everything, head = training_flops_per_token(model) / 6, head_flops_per_target(model) / 6
    add_adapter(model, LORA, base="", seed=0)
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    assert training_flops_per_token(model) == 4 * everything + 6 * trained
    assert head_flops_per_target(model) == 4 * head


def trained(folder: Path, name: str, settings, **arguments) -> list[dict]:
    """A run to its end; its metrics."""

    def work(layout):
        with RunDir.open(folder / name, config=asdict(settings), manifest={}) as run:
            tiny_trainer(folder, layout, run, settings, **arguments).train()

    launch(work, settings)
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def lora_settings(loss: str = "dpo", **changes):
    changes = {"n_epochs": 2, "optimizer": "AdamW", **changes}
    model = ModelSettings(lora=changes.pop("lora", LORA))
    return tiny_settings(loss=LOSSES[loss], model=model, **changes)


def adapter_vector(run: Path) -> torch.Tensor:
    tensors = load_file(run / "LATEST" / "adapter" / "adapter_model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("loss", LOSSES)
def test_packed_equals_padded(tmp_path, loss):
    rows = {packing: trained(tmp_path, f"{packing}", lora_settings(loss, packing=packing)) for packing in (True, False)}
    for packed, padded in zip(*rows.values(), strict=True):
        for key in packed.keys() & {"loss/train", "loss/eval", "grad_norm"}:
            assert packed[key] == pytest.approx(padded[key], abs=1e-4 if key == "grad_norm" else 1e-5), key
    torch.testing.assert_close(adapter_vector(tmp_path / "True"), adapter_vector(tmp_path / "False"), rtol=0, atol=1e-3)


def test_what_is_trained_saved_and_read_elsewhere(tmp_path):
    """One run of DPO: its reference, its optimizer, its two folders."""
    settings = lora_settings(checkpoint=CheckpointSettings(merge=True), lora=replace(LORA, dropout=0.3))
    kept = {}

    def work(layout):
        with RunDir.open(tmp_path / "run", config=asdict(settings), manifest={}) as run:
            trainer = tiny_trainer(tmp_path, layout, run, settings)
            before = {name: one.detach().clone() for name, one in trainer.policy.named_parameters()}
            trainer.train()
            kept.update(trainer=trainer, before=before)

    launch(work, settings)
    trainer, before = kept["trainer"], kept["before"]
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    rewards = [value for key, value in first.items() if key.startswith("rewards_eval/") and "accuracies" not in key]
    assert len(rewards) >= 3
    assert not any(rewards)

    moved = {name for name, one in trainer.policy.named_parameters() if not torch.equal(one, before[name])}
    assert moved == {name for name, one in trainer.policy.named_parameters() if one.requires_grad}
    assert moved == set(adapter_of(trainer.policy).names.values())
    assert len(trainer.optimizer.state) == len(moved)

    policy, ids = trainer.policy.eval(), padded_batch()["input_ids"]
    latest = tmp_path / "run" / "LATEST"
    plain = peft.PeftModel.from_pretrained(tiny_model(), str(latest / "adapter")).eval()
    expected = policy(input_ids=ids).logits  # whose norms round in another order
    torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    whole = AutoModelForCausalLM.from_pretrained(latest / "model").eval()
    difference = sequence_logps(whole, padded_batch())[0] - sequence_logps(policy, padded_batch())[0]
    assert difference.abs().max() < 1e-5
    files = json.loads((latest / "checksums.xxh3.json").read_text())["files"]
    assert {"adapter/adapter_model.safetensors", "adapter/base.json", "model/model.safetensors"} <= files.keys()

    # The reference is the base: training all weights from it finds its log-probabilities computed.
    references = set((tmp_path / "cache" / "reference").iterdir())
    trained(tmp_path, "full", replace(settings, model=ModelSettings(), checkpoint=CheckpointSettings()))
    assert set((tmp_path / "cache" / "reference").iterdir()) == references


@pytest.mark.parametrize("how", ["full", "selective"])
def test_recomputed_activations_give_the_same_gradients(how):
    gradients = []
    for checkpointing in (False, how):
        model = adapted().train()
        trainer = TrainerSettings(name="BasicTrainer")
        parallelize(model, HERE, trainer=trainer, packing=False, activation_checkpointing=checkpointing)
        sequence_logps(model, padded_batch())[0].sum().backward()
        gradients.append([one.grad for one in model.parameters() if one.requires_grad])
        assert all(one.grad is None for one in model.parameters() if not one.requires_grad)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def first_gradients(folder: Path, settings, *, model: torch.nn.Module | None = None, evaluate: bool):
    """A trainer with the gradients of its first batch, its adapter far from zero; that batch, and its mean loss.

    A new adapter's B is zero, and so would the gradients of A be.
    """
    kept = []

    def work(layout):
        with RunDir.open(folder / "run", config={}, manifest={}) as run:
            trainer = tiny_trainer(folder, layout, run, settings, model=model)
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in trainer.policy.parameters():
                    if parameter.requires_grad:
                        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            if evaluate:
                trainer.evaluate()
            trainer.policy.train()
            trainer.reference.is_policy = lambda examples: False  # its rewards are not 0
            batch = next(trainer.train_loader.batches())
            loss = trainer.accumulate_gradients(batch, float(batch.num_examples))[1] / batch.num_examples
            kept.extend([trainer, batch, loss.item()])

    launch(work, settings)
    return kept


def test_compiled_blocks_give_the_same_gradients(tmp_path, monkeypatch):
    """Their graphs, differentiated; what Inductor makes of a graph is Inductor's. Packed attention lies between two."""
    torch.compiler.reset()  # of what other tests had compiled by another backend
    compilations = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compilations))
    found = []
    for compile in (False, True):
        settings = lora_settings("sft", trainer=TrainerSettings(name="BasicTrainer", compile=compile))
        trainer, _, loss = first_gradients(tmp_path / str(compile), settings, evaluate=False)
        assert (compilations.frame_count > 0) == compile
        found.append((loss, [one.grad for one in trainer.policy.parameters() if one.requires_grad]))
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-6)
    for plain, compiled in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(compiled, plain, rtol=0, atol=float(1e-5 * plain.abs().max()))


SHARDED = {"dpo": "llama", "sft": "gpt_neox"}  # loss -> model


def sharded_settings(loss: str, **changes):
    """SFT with DoRA and activation checkpointing, DPO without."""
    return lora_settings(
        loss, lora=replace(LORA, use_dora=loss == "sft"), activation_checkpointing=loss == "sft", lr=3e-4, n_epochs=1,
        gradient_accumulation_steps=2, checkpoint=CheckpointSettings(merge=True), **changes,
    )  # fmt: skip


def sharded(layout, folder: Path) -> None:
    trainer = TrainerSettings(name="FSDPTrainer", num_processes=2)
    for loss, model in SHARDED.items():
        settings = sharded_settings(loss, trainer=trainer)
        path = folder / f"two-{loss}"
        opened = layout.main_only(lambda path=path, of=settings: RunDir.open(path, config=asdict(of), manifest={}))
        with opened or RunDir(path, None) as run:
            tiny_trainer(folder, layout, run, settings, model=model).train()


def test_two_processes_train_the_adapter_of_one(tmp_path):
    settings = sharded_settings("dpo", trainer=TrainerSettings(name="FSDPTrainer", num_processes=2))
    assert Ranks(sharded, 2, settings, tmp_path).join() == [0, 0]
    for loss, model in SHARDED.items():
        one = trained(tmp_path, f"one-{loss}", sharded_settings(loss), model=model)
        runs = [tmp_path / f"{name}-{loss}" for name in ("one", "two")]
        two = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
        for here, there in zip(one, two, strict=True):
            for key in here.keys() & {"loss/train", "loss/eval"}:
                assert there[key] == pytest.approx(here[key], abs=1e-5)
        difference = (adapter_vector(runs[1]) - adapter_vector(runs[0])).abs()
        print(f"{loss}: mean {difference.mean():.1e} largest {difference.max():.1e}")
        assert difference.mean() < 1e-5
        merged = [load_file(run / "LATEST" / "model" / "model.safetensors") for run in runs]
        for name, tensor in merged[0].items():
            torch.testing.assert_close(merged[1][name], tensor, rtol=0, atol=1e-3)


def killed_run(folder: Path, name: str, settings, kill_at: int | None) -> None:
    """One command that is killed on entering its n-th step."""
    torch.set_num_threads(1)
    original, count = torch.optim.AdamW.step, [0]

    def step(*arguments, **keywords):
        count[0] += 1
        if count[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)

    torch.optim.AdamW.step = step
    trained(folder, name, settings)


def test_killed_and_started_again(tmp_path):
    """With dropout in the adapter, whose random numbers go on, too."""
    settings = lora_settings(
        n_epochs=3, lora=replace(LORA, dropout=0.2), checkpoint=CheckpointSettings(every_examples=10, merge=True)
    )
    process = fork_server().Process(target=killed_run, args=(tmp_path, "killed", settings, 6))
    process.start()
    trained(tmp_path, "straight", settings)
    process.join(240)
    assert process.exitcode == -signal.SIGKILL
    assert list((tmp_path / "killed" / "checkpoints").glob("step-*"))
    trained(tmp_path, "killed", settings)
    for file in ("adapter/adapter_model.safetensors", "model/model.safetensors", "adapter/adapter_config.json"):
        files = [tmp_path / name / "LATEST" / file for name in ("straight", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes(), file


# Commands of train.py, in this process.


@pytest.fixture
def words(tmp_path, tiny_model_folder):
    return [
        "model=blank_model", f"model.name_or_path={tiny_model_folder}", "wandb.enabled=false",
        f"datasets.si.path={write_pairs(tmp_path / 'pairs.jsonl', 24)}", "datasets=[si]",
        "model.lora.r=4", "lr=1e-2", "optimizer=AdamW", "warmup_steps=0",
    ]  # fmt: skip


def test_sft_then_dpo_then_evaluation(here, words, tmp_path, tiny_model_folder):
    text = here(*words, "loss=sft", "exp_name=sft")
    assert "weights: runs/sft/LATEST/adapter" in text
    assert "model.archive=runs/sft model.lora.r=4 'datasets=[si]'" in text
    assert resolve_archive("runs/sft").name == "adapter"
    # DPO trains the adapter of SFT further: the start is its reference.
    here(*words, "loss=dpo", "exp_name=dpo", "model.archive=runs/sft", "checkpoint.merge=true")
    first = json.loads(Path("runs/dpo/metrics.jsonl").read_text().splitlines()[0])
    assert first["rewards_eval/margins"] == 0.0
    before, after = (adapter_vector(Path("runs") / name) for name in ("sft", "dpo"))
    assert 0 < (after - before).abs().max() < 0.5

    # The adapter, its base named by peft's own file, and the merged model are one.
    ids = torch.arange(3, 30)[None]
    respondent = check_model("dpo", EvaluatedModelSettings(path="runs/dpo/LATEST/adapter"))
    assert Path(respondent.model.name_or_path) == Path(tiny_model_folder).resolve()
    policy = load_causal_lm(respondent.model).eval()
    whole = AutoModelForCausalLM.from_pretrained("runs/dpo/LATEST/model").eval()
    plain = peft.AutoPeftModelForCausalLM.from_pretrained("runs/dpo/LATEST/adapter").eval()
    expected = plain(input_ids=ids).logits
    for model in (policy, whole):
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    assert adapter_of(policy) is None
    assert all(parameter.requires_grad for parameter in policy.parameters())
    assert respondent.fingerprint != check_model("sft", EvaluatedModelSettings(path="runs/sft")).fingerprint

    # Trained whole from the adapter: the merged model is the start.
    text = here(*(word for word in words if "lora" not in word), "loss=sft", "exp_name=more", "model.archive=runs/sft")
    assert "weights: runs/more/LATEST/model" in text
    # The adapter of another base.
    other = tmp_path / "other"
    tiny_llama(400, seed=5).save_pretrained(other)
    with pytest.raises(UserError, match="was trained on other weights than those of"):
        load_causal_lm(ModelSettings(name_or_path=str(other), archive="runs/dpo/LATEST/adapter"))
    tiny_llama(300).save_pretrained(other)
    with pytest.raises(UserError, match="vocab_size: 400 there, 300 here"):
        load_causal_lm(ModelSettings(name_or_path=str(other), archive="runs/dpo/LATEST/adapter"))


def test_a_base_that_has_changed_ends_a_resumed_run(here, words, tmp_path, tiny_model_folder):
    folder = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model_folder).save_pretrained(folder)
    words = [*words, "loss=sft", "exp_name=a", f"model.name_or_path={folder}", "checkpoint.every_examples=8"]
    words += [f"model.tokenizer_name_or_path={tiny_model_folder}", "run_dir=runs/a"]
    here(*words)
    for checkpoint in sorted(Path("runs/a/checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))[1:]:
        shutil.rmtree(checkpoint)
    tiny_llama(400, seed=5).save_pretrained(folder)
    with pytest.raises(UserError, match=r"its inputs have changed:\n  base: \w+ at its start, \w+ now"):
        train.main(compose_config("config", words))


def test_an_archive_that_is_another_adapter_is_refused(here, words):
    here(*words, "loss=sft", "exp_name=sft")
    words = [*words, "loss=dpo", "exp_name=dpo", "model.archive=runs/sft", "run_dir=runs/dpo"]
    for change, message in {
        "model.lora.r=8": "model.lora.r=8, and it has 4; model.lora.alpha=16, and it has 8",
        "model.lora.use_rslora=true": "model.lora.use_rslora=True, and it has False",
        "model.lora.target_modules=[q_proj]": "does not fit the model and model.lora: 24 tensors are missing",
    }.items():
        with pytest.raises(UserError, match=message):
            train.main(compose_config("config", [*words, change]))


FAULTS = [
    (["model.lora.alpha=32"], "model.lora.alpha=32: without a rank there is no adapter; write model.lora.r=16, too"),
    (["model.lora.quantize=nf4"], "model.lora.quantize=nf4: without a rank there is no adapter"),
    (["checkpoint.merge=true"], "without an adapter (model.lora.r=16) there is nothing to merge"),
    (["model.lora.r=4", "model.lora.target_modules=[]"], "name some layers, or write null for all of them"),
    (["model.lora.r=4", "model.archive=policy.pt"], "archive=policy.pt: peft (model.lora.r=4) cannot load a policy.pt"),
    (["model.lora.r=4", "checkpoint.policy_pt=true"], "write checkpoint.merge=true, too"),
    (["model.lora.r=4", "model.lora.quantize=nf4", "checkpoint.merge=true"], "would round the result to 4 bits"),
    (["model.lora.r=4", "model.lora.quantize=nf4", "trainer=FSDPTrainer"], "4-bit weights cannot be sharded"),
    (["model.lora.r=4", "model.lora.quantize=nf4", "model.policy_dtype=float64"], "cannot quantise float64 weights"),
]


@pytest.mark.parametrize(("words", "message"), FAULTS)
def test_what_does_not_go_with_an_adapter(tmp_path, monkeypatch, words, message):
    monkeypatch.setattr("config.checks_lora.find_spec", lambda package: package)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy.pt").write_bytes(b"")
    config = compose_config("config", ["model=tiny", "loss=sft", "exp_name=a", *words])
    (fault,) = check_lora(config)
    assert message in fault.message


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("config.checks_lora.find_spec", lambda package: None)
    words = ["model=tiny", "loss=sft", "exp_name=a", "model.lora.r=4", "model.lora.quantize=nf4"]
    peft_is_missing, bitsandbytes_is_missing = check_lora(compose_config("config", words))
    assert "model.lora.r=4: it needs the package peft, which is not installed: pip install peft" in str(peft_is_missing)
    assert str(bitsandbytes_is_missing).endswith("pip install bitsandbytes")


def peft_folder(folder: Path, model, lora: LoraSettings = LORA, base: str = "") -> Path:
    """A folder as peft itself writes it."""
    config = peft.LoraConfig(r=lora.r, target_modules=["q_proj", "v_proj"])
    peft.get_peft_model(model, config).save_pretrained(folder)
    stored = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**stored, "base_model_name_or_path": base or None}))
    return folder


def test_an_adapter_of_other_origin(tmp_path, tiny_model_folder, monkeypatch):
    settings = ModelSettings(name_or_path=tiny_model_folder)
    folder = peft_folder(tmp_path / "adapter", load_causal_lm(settings))
    with_adapter = replace(settings, archive=str(folder))
    load_causal_lm(with_adapter)
    with pytest.raises(UserError, match="does not name the base of the adapter; give it"):
        check_model("a", EvaluatedModelSettings(path=str(folder)))
    assert check_model("a", EvaluatedModelSettings(path=str(folder), base=tiny_model_folder)).model == with_adapter
    with pytest.raises(UserError, match=r"holds an adapter, not a model: write model\.name_or_path=x"):
        load_causal_lm(ModelSettings(name_or_path=str(peft_folder(tmp_path / "named", tiny_llama(400), base="x"))))

    wide = tiny_llama(400)
    wide = type(wide)(type(wide.config)(**{**wide.config.to_dict(), "intermediate_size": 32, "hidden_size": 16}))
    with pytest.raises(UserError, match="cannot be put into"):
        load_causal_lm(replace(settings, archive=str(peft_folder(tmp_path / "wide", wide))))
    wide.save_pretrained(tmp_path / "base")
    archive = str(peft_folder(tmp_path / "wide2", wide, base=str(tmp_path / "base")))
    with pytest.raises(UserError, match="hidden_size: 16 there, 32 here"):
        load_causal_lm(replace(settings, archive=archive))

    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: one for name, one in tensors.items() if "q_proj" in name}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="4 tensors are missing or have no place there"):
        load_causal_lm(with_adapter)
    (folder / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="damaged or truncated"):
        load_causal_lm(with_adapter)
    monkeypatch.setattr("safer_instruct.generation.adapters.find_spec", lambda package: None)
    with pytest.raises(UserError, match="peft, which reads it, is not installed: pip install peft"):
        load_causal_lm(with_adapter)
