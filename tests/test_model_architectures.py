"""Architectures as people have them, from a folder by train.py's way: packed = padded = transformers, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_level_tokenizer
from safetensors.torch import load_file
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
)
from transformers import logging as transformers_logging
from transformers.masking_utils import sdpa_mask

from config.errors import UserError
from config.settings import ModelSettings, TrainConfig
from preference_datasets import TrainEval
from safer_instruct.generation.decoding import context_of
from safer_instruct.generation.models import load_causal_lm
from tests.test_packing import PAIRS, SHARED, in_order, logps_and_gradients, microbatch, store_of
from tests.tiny_models import GROUPED
from train import require_context
from trainers.data.token_store import TokenStore
from trainers.distributed.parallelize import find_blocks
from trainers.kernels.attention import use_packed_attention
from trainers.kernels.head_check import check_head, check_training
from trainers.kernels.logps import sequence_logps
from trainers.kernels.self_check import check_packed_attention, packed_and_alone
from trainers.kernels.shortcuts import use_needed_positions

SMALL = {**GROUPED, "head_dim": 16, "max_position_embeddings": 64}
# One block that sees six tokens, then one that sees all: rows are longer than six.
BY_LAYER = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
PACKED: dict[str, dict[str, Any]] = {
    "qwen3": SMALL,  # QK-norm
    "gemma3_text": {**SMALL, **BY_LAYER},  # QK-norm, scaled embeddings, two kinds of rotary embedding
    "gemma3": {  # images, too: the whole model is taken, and only its text is trained on
        "text_config": {**SMALL, **BY_LAYER}, "vision_config": VISION, "image_token_index": 60,
        "mm_tokens_per_image": 4,
    },
    "mixtral": {**SMALL, "num_local_experts": 4},
    "qwen2_moe": {**SMALL, **EXPERTS, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1},
    "qwen3_moe": {**SMALL, **EXPERTS},
    "olmoe": {**SMALL, "num_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
MIXING = {  # beside attention, what no mask keeps apart: convolutions, states that go on from token to token
    "lfm2": {**SMALL, "layer_types": ["conv", "full_attention"]},
    "qwen3_next": {
        **SMALL, **EXPERTS, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "shared_expert_intermediate_size": 24, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
}  # fmt: skip
EAGER = {
    "gemma2": {**SMALL, "sliding_window": 64, "final_logit_softcapping": 3.0},  # and soft caps in its attention
    "gpt_oss": {**SMALL, **BY_LAYER, "num_local_experts": 4, "num_experts_per_tok": 2},  # sinks
}


def saved(name: str, arguments: dict[str, Any], folder: Path, attention: str = "sdpa") -> Any:
    """Save a random model; return transformers' own reading of it in float64."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **arguments), dtype=torch.float64)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms, biases, sinks: other than at the start, where some of them do nothing
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    transformers_logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation=attention, experts_implementation="eager"
    ).eval()


def plain_logps(model: Any, store: TokenStore) -> torch.Tensor:
    """Each sequence by itself, straight from the logits: (rows, 2)."""

    def logp(prompt: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
        logps = model(torch.cat([prompt, response]).long()[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return logps.gather(1, response.long()[:, None]).sum()

    rows = [store.row(i) for i in range(len(store))]
    return torch.stack([torch.stack([logp(prompt, response) for response in rest]) for prompt, *rest in rows])


def loaded(folder: Path, attention: str = "sdpa") -> Any:
    model = load_causal_lm(
        ModelSettings(name_or_path=str(folder), policy_dtype="float64", attn_implementation=attention)
    )
    check_head(model)
    return model


@pytest.mark.parametrize("name", PACKED)
def test_packed_is_padded_is_plain_transformers(name: str, tmp_path: Path) -> None:
    plain = saved(name, PACKED[name], tmp_path / "model")
    store = store_of(tmp_path / "store", PAIRS, shared=SHARED)
    model = loaded(tmp_path / "model")
    assert context_of(model) == 64
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == ("vision" not in key and "multi_modal" not in key)
    padded, _, truth = logps_and_gradients(model, microbatch(store, packing=False))
    use_packed_attention(model)
    use_needed_positions(find_blocks(model, None)[-1])
    check_packed_attention(*packed_and_alone(model, device=torch.device("cpu")), name=name)
    packed, _, gradients = logps_and_gradients(model, microbatch(store, packing=True))
    with torch.no_grad():
        expected = plain_logps(plain, store)
    torch.testing.assert_close(padded, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-11)
    for key, gradient in gradients.items():  # norms round to float32 inside, and so do their gradients
        scale = truth[key].abs().max().item()
        torch.testing.assert_close(gradient, truth[key], rtol=1e-5, atol=1e-6 * scale, msg=key)


@pytest.mark.parametrize("name", EAGER)
def test_what_packed_rows_cannot_do_is_refused_and_padded_is_plain_transformers(name: str, tmp_path: Path) -> None:
    """Soft caps and sinks are in eager attention alone; Gemma 2's logits have a soft cap, too."""
    plain = saved(name, EAGER[name], tmp_path / "model", "eager")
    with pytest.raises(UserError, match=r"has no sdpa .*attn_implementation=eager and, to train it, packing=false"):
        loaded(tmp_path / "model")
    store = store_of(tmp_path / "store", PAIRS, shared=SHARED)
    model = loaded(tmp_path / "model", "eager")
    with pytest.raises(UserError, match="needs packing=false"):
        use_packed_attention(model)
    batch = microbatch(store, packing=False)
    expected = plain_logps(plain, store)
    weights = torch.linspace(-1, 2, expected.numel(), dtype=torch.float64).view(expected.shape)
    (expected * weights).sum().backward()
    found, _, gradients = logps_and_gradients(model, batch)
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-6)  # eager attention rounds to float32 inside
    for key, parameter in plain.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(gradients[key], parameter.grad, rtol=1e-5, atol=1e-6 * scale, msg=key)


def test_a_soft_cap_is_used_and_one_that_the_config_does_not_name_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    saved("gemma2", EAGER["gemma2"], tmp_path / "model", "eager")
    model = loaded(tmp_path / "model", "eager")
    batch = microbatch(store_of(tmp_path / "store", PAIRS), packing=False)
    with torch.no_grad():
        capped = in_order(batch, sequence_logps(model, batch)[0])
        for room in ("logps", "head_check"):
            monkeypatch.setattr(f"trainers.kernels.{room}.soft_cap", lambda model: None)
        assert (in_order(batch, sequence_logps(model, batch)[0]) - capped).abs().max() > 1
    with pytest.raises(UserError, match="changes its logits after the output embedding"):
        check_head(model)


def test_a_capped_head_in_parts_changes_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    saved("gemma2", EAGER["gemma2"], tmp_path / "model", "eager")
    results = []
    for limit in (1 << 26, 3 * 64):
        monkeypatch.setattr("trainers.kernels.logps.MAX_LOGITS", {"cpu": limit})
        model, batch = loaded(tmp_path / "model", "eager"), microbatch(store_of(tmp_path / "s", PAIRS), packing=False)
        found, _, gradients = logps_and_gradients(model, batch)
        results.append([found, *gradients.values()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_model_without_a_causal_language_model_is_refused_by_its_type(name: str, tmp_path: Path) -> None:
    AutoConfig.for_model(name).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"no causal language model of type {name}"):
        load_causal_lm(ModelSettings(name_or_path=str(tmp_path)))


def test_a_multi_modal_folder_is_trained_on_text_and_goes_on(here: Callable[..., str], tmp_path: Path) -> None:
    """What sees images stays bit for bit, in the checkpoint too, from which a stopped run goes on."""
    tokenizer = byte_level_tokenizer(add_bos=True)
    arguments = {**PACKED["gemma3"], "image_token_index": 399}
    arguments["text_config"] = {**arguments["text_config"], "vocab_size": 400, "max_position_embeddings": 512}
    saved("gemma3", arguments, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"instruction": f"the {word}?", "output": word} for word in ("cat", "mat", "sum", "task")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = [
        "loss=sft", "model=blank_model", f"model.name_or_path={tmp_path / 'model'}", "datasets=[alpaca]",
        "datasets.alpaca.path=rows.json", "datasets.alpaca.eval_fraction=0", "exp_name=a", "batch_size=2", "lr=1e-2",
        "device=cpu", "wandb.enabled=false", "warmup_steps=0", "optimizer=AdamW", "n_epochs=2",
        "checkpoint.every_examples=4", "checkpoint.keep_last=null",
    ]  # fmt: skip
    here(*command)
    folder = tmp_path / "runs" / "a"
    trained = load_file(folder / "checkpoints" / "step-8" / "model" / "model.safetensors")
    before = load_file(tmp_path / "model" / "model.safetensors")
    assert trained.keys() == before.keys()
    for key, tensor in before.items():
        assert torch.equal(trained[key], tensor.float()) == ("vision" in key or "multi_modal" in key), key
    shutil.rmtree(folder / "checkpoints" / "step-8")
    (folder / "LATEST").unlink()
    (folder / "LATEST").symlink_to("checkpoints/step-4")
    here(*command)
    again = load_file(folder / "checkpoints" / "step-8" / "model" / "model.safetensors")
    assert all(torch.equal(again[key], tensor) for key, tensor in trained.items())


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_rows_is_refused_and_padded_is_plain_transformers(name: str, tmp_path: Path) -> None:
    plain = saved(name, MIXING[name], tmp_path / "model")
    store = store_of(tmp_path / "store", PAIRS, shared=SHARED)
    model = loaded(tmp_path / "model")
    with torch.no_grad():
        padded = microbatch(store, packing=False)
        found = in_order(padded, sequence_logps(model, padded)[0])
        torch.testing.assert_close(found, plain_logps(plain, store), rtol=0, atol=1e-5)  # float32 inside
    use_packed_attention(model)
    with pytest.raises(UserError, match="computes other states for packed rows"):
        check_packed_attention(*packed_and_alone(model, device=torch.device("cpu")), name=name)


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModelForMaskedLM])
@pytest.mark.parametrize("name", ["bert", "roberta", "electra"])
def test_an_encoder_is_refused(name: str, kind: Any, tmp_path: Path) -> None:
    """Transformers makes a causal LM of it, whose tokens see the ones behind them, which they are to predict."""
    arguments = {key: value for key, value in SMALL.items() if "head" not in key}
    config = AutoConfig.for_model(name, **arguments, num_attention_heads=2)
    kind.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="lets a token see the one behind it, as an encoder does"):
        loaded(tmp_path / "model")


def test_a_router_with_noise_is_refused(tmp_path: Path) -> None:
    saved("phimoe", {**SMALL, "num_local_experts": 4}, tmp_path / "model")
    model = loaded(tmp_path / "model")
    with pytest.raises(UserError, match="PhimoeForCausalLM computes other states in training than in evaluation"):
        check_training(model)
    saved("mixtral", PACKED["mixtral"], tmp_path / "without")
    check_training(loaded(tmp_path / "without"))


def test_an_attention_that_is_asked_for_more_than_packed_rows_have_is_refused(tmp_path: Path) -> None:
    """Such as sparse attention, whose blocks leave nothing out in the short rows of the check."""
    saved("qwen3", PACKED["qwen3"], tmp_path / "model")
    model = loaded(tmp_path / "model")
    use_packed_attention(model)
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "block_indices": torch.zeros(1)}), with_kwargs=True
        )
    with pytest.raises(UserError, match="Qwen3Attention uses block_indices"):
        packed_and_alone(model, device=torch.device("cpu"))
    without = {key: value for key, value in SMALL.items() if key != "head_dim"}
    saved("falcon", without, tmp_path / "falcon")
    with pytest.raises(UserError, match="FalconForCausalLM takes no attention from outside"):
        use_packed_attention(loaded(tmp_path / "falcon"))


def test_a_head_in_float32_over_states_of_16_bits(tmp_path: Path) -> None:
    """As some models keep it in whatever dtype they are loaded: its products are of float32."""
    saved("qwen3", PACKED["qwen3"], tmp_path / "model")
    model = loaded(tmp_path / "model").bfloat16()
    model.lm_head.float()
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    check_head(model)
    batch = microbatch(store_of(tmp_path / "store", PAIRS), packing=False)
    logps, _, agreements = sequence_logps(model, batch, agreements=True)
    with torch.no_grad():
        expected = plain_logps(model, store_of(tmp_path / "store", PAIRS))
    torch.testing.assert_close(in_order(batch, logps), expected.double(), rtol=0, atol=0.2)
    assert agreements.isfinite().all()


def test_a_kernel_of_a_gpu_does_not_run_in_the_checks(tmp_path: Path) -> None:
    """The model is on the CPU when its head is looked at; it attends as asked for afterwards."""

    def on_a_gpu(*arguments: Any, **keywords: Any) -> None:
        raise RuntimeError("needs a GPU")

    AttentionInterface.register("on_a_gpu", on_a_gpu)
    AttentionMaskInterface.register("on_a_gpu", sdpa_mask)
    saved("qwen3", PACKED["qwen3"], tmp_path / "model")
    model = loaded(tmp_path / "model")
    model.set_attn_implementation("on_a_gpu")
    check_head(model)
    check_training(model)
    assert model.config._attn_implementation == "on_a_gpu"


def test_rows_beyond_which_a_rotary_embedding_depends_on_the_micro_batch_are_refused(tmp_path: Path) -> None:
    """Longrope takes other frequencies for all rows of a micro-batch that has one longer row (some nats for each)."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope |= {"original_max_position_embeddings": 40, "factor": 1.6}
    plain = saved("llama", {**SMALL, "rope_parameters": rope}, tmp_path / "model")
    model, config = loaded(tmp_path / "model"), TrainConfig()
    config.model.name_or_path = "FOLDER"
    for name, longest in (("fits", 20), ("beyond", 40)):
        store = store_of(tmp_path / name, [(4, 3, 5), (10, longest, 20)])
        batch = microbatch(store, packing=False)
        with torch.no_grad():
            error = in_order(batch, sequence_logps(model, batch)[0]) - plain_logps(plain, store)
        stores = TrainEval(store, store.select(torch.empty(0, dtype=torch.int64)), {})
        if name == "fits":
            assert error.abs().max() < 1e-11
            require_context(config, stores, model)
            continue
        assert error[0].abs().max() > 0.1
        with pytest.raises(UserError, match="the longest row has 50 tokens, and the context of FOLDER is 40"):
            require_context(config, stores, model)
