"""Folders as people have them: weights on the disk, what the tokenizer adds or lacks, odd generation configs."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_level_tokenizer, tiny_llama
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from config.errors import UserError
from config.settings import DatasetSettings, GenerationSettings, ModelSettings
from preference_datasets import build_stores
from safer_instruct.generation.decoding import say_what_is_not_read
from safer_instruct.generation.hf import READ_ENTRIES, HFGenerator
from safer_instruct.generation.models import load_causal_lm, load_tokenizer
from tests.test_models import assert_weights, refuse, weights
from tests.test_packing import in_order, microbatch
from trainers.data.token_store import TokenStore
from trainers.kernels.attention import use_packed_attention
from trainers.kernels.logps import sequence_logps

EOS = 2


@pytest.fixture
def folder(tiny_model_folder: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def settings_of(folder: Path, **changes: Any) -> ModelSettings:
    return ModelSettings(name_or_path=str(folder), **changes)


def edit(file: Path, **changes: Any) -> None:
    """Change entries of a JSON file; None removes one."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


# Weights


def test_shards_with_an_index_are_one_model(folder: Path, tiny_model_folder: str) -> None:
    (folder / "model.safetensors").unlink()
    tiny_llama(400).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert (folder / "model.safetensors.index.json").is_file()
    assert_weights(load_causal_lm(settings_of(folder)), weights(tiny_model_folder))


@pytest.mark.parametrize("num_shards", [1, 2])
def test_pickled_weights_alone_are_read(folder: Path, tiny_model_folder: str, num_shards: int) -> None:
    (folder / "model.safetensors").unlink()
    state = list(weights(tiny_model_folder).items())
    if num_shards == 1:
        torch.save(dict(state), folder / "pytorch_model.bin")
    else:
        names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
        parts = [state[:5], state[5:]]
        for name, part in zip(names, parts, strict=True):
            torch.save(dict(part), folder / name)
        places = {key: name for name, part in zip(names, parts, strict=True) for key, _ in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_weights(load_causal_lm(settings_of(folder)), weights(tiny_model_folder))
    if num_shards == 2:
        (folder / names[1]).unlink()
        assert names[1] in refuse(settings_of(folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_trained_in_the_dtype_of_the_policy(folder: Path, dtype: torch.dtype) -> None:
    tiny_llama(400).to(dtype).save_pretrained(folder)
    stored = weights(folder)
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert_weights(load_causal_lm(settings_of(folder)), {name: tensor.float() for name, tensor in stored.items()})
    kept = load_causal_lm(settings_of(folder, policy_dtype=str(dtype).removeprefix("torch.")))
    assert_weights(kept, stored)


def test_gguf_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "only" / "x").mkdir(parents=True)
    file = tmp_path / "only" / "model.Q4_1.gguf"
    file.write_bytes(b"GGUF")
    for settings in (settings_of(file), settings_of(file.parent), settings_of(folder, archive=str(file))):
        message = refuse(settings)
        assert "is GGUF, the format of llama.cpp: give the folder it was converted from" in message
    (folder / file.name).write_bytes(b"GGUF")
    load_causal_lm(settings_of(folder))  # beside a model, as on many a hub page


def test_two_tables_under_a_config_that_says_one_are_refused(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    load_causal_lm(settings_of(tmp_path))
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"] + 1
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "tie_word_embeddings: true, but input and output embedding are two" in refuse(settings_of(tmp_path))
    edit(tmp_path / "config.json", tie_word_embeddings=False)
    assert_weights(load_causal_lm(settings_of(tmp_path)), stored)


# Tokenizers


def stored_pair(folder: Path, tmp_path: Path, template: str = "alpaca") -> TokenStore:
    """One pair, encoded with the folder's own tokenizer, as training does."""
    row = {"instruction": "the cat?", "chosen": "the mat", "rejected": "apple", "label": "none"}
    (tmp_path / "pair.jsonl").write_text(json.dumps(row) + "\n")
    data = DatasetSettings(str(tmp_path / "pair.jsonl"), "si", template=template, eval_fraction=0.0)
    return build_stores(
        {"si": data}, loss="preference", tokenizer=load_tokenizer(settings_of(folder)), max_length=128,
        max_prompt_length=100, cache_dir=tmp_path / "cache",
    ).train  # fmt: skip


def token_logps(folder: Path, store: TokenStore) -> list[torch.Tensor]:
    """Plain transformers: log p of each token of chosen and rejected."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    prompt, *responses = (part.long() for part in store.row(0))
    logps = [model(torch.cat([prompt, one])[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for one in responses]
    return [one.gather(1, tokens[:, None]).squeeze(1) for one, tokens in zip(logps, responses, strict=True)]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("pad", [None, "</s>"])
def test_the_end_of_an_answer_is_learned_where_padding_is_the_same_token(
    folder: Path, tmp_path: Path, pad: str | None, packing: bool
) -> None:
    edit(folder / "tokenizer_config.json", pad_token=pad)
    tokenizer = load_tokenizer(settings_of(folder))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS
    store = stored_pair(folder, tmp_path)
    assert [int(part[-1]) for part in store.row(0)[1:]] == [EOS, EOS]
    model = load_causal_lm(settings_of(folder, policy_dtype="float64"))
    if packing:
        use_packed_attention(model)
    batch = microbatch(store, packing=packing)
    if not packing:
        batch["input_ids"][~batch["attention_mask"]] = EOS  # as the cutter of such a tokenizer does
    found, counts = sequence_logps(model, batch)
    parts = token_logps(folder, store)
    assert in_order(batch, counts).tolist() == [[len(part) for part in parts]]
    torch.testing.assert_close(in_order(batch, found)[0], torch.stack([part.sum() for part in parts]))
    without = torch.stack([part[:-1].sum() for part in parts])
    assert (in_order(batch, found)[0] - without).abs().min() > 1  # the comparison would see an end left out


def test_a_vocabulary_that_is_padded_beyond_the_tokenizers(folder: Path, tmp_path: Path) -> None:
    """Its rows have no text: a model that writes one is read as if it had written nothing there."""
    model = tiny_llama(448)
    with torch.no_grad():
        model.lm_head.weight[447] = 50 * model.lm_head.weight[5:9].sum(0)
    model.save_pretrained(folder)
    tokenizer = load_tokenizer(settings_of(folder))
    assert len(tokenizer) == 400
    loaded = load_causal_lm(settings_of(folder))
    generator = HFGenerator(loaded, tokenizer, GenerationSettings(max_new_tokens=8, temperature=1.0))
    prompts = {f"r{i}": stored_pair(folder, tmp_path).row(0)[0].tolist()[: 20 + i] for i in range(4)}
    found = [generator._decode([id], [prompt])[0] for id, prompt in prompts.items()]
    assert any(447 in tokens for tokens in found)
    for tokens in found:
        assert generator._text(tokens) == generator._text([token for token in tokens if token != 447])


@pytest.mark.parametrize(("add_bos", "add_eos"), [(True, False), (False, True), (True, True), (False, False)])
def test_what_a_tokenizer_adds_stands_once_and_never_inside(
    folder: Path, tmp_path: Path, add_bos: bool, add_eos: bool
) -> None:
    byte_level_tokenizer(add_bos=add_bos, add_eos=add_eos).save_pretrained(folder)
    prompt, *responses = (part.tolist() for part in stored_pair(folder, tmp_path).row(0))
    assert (prompt.count(1), prompt[0] == 1) == (int(add_bos), add_bos)
    assert EOS not in prompt
    for response in responses:
        assert (response.count(EOS), response[-1], response.count(1)) == (1, EOS, 0)


def test_no_chat_template_is_said_before_training(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no chat template"):
        stored_pair(folder, tmp_path, template="chat")


# generation_config.json


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"eos_token_id": "2"}', '{"max_new_tokens": 0}', '{"watermarking_config": {"a": 1}}']
)
def test_a_generation_config_that_cannot_be_used_is_named(folder: Path, text: str) -> None:
    (folder / "generation_config.json").write_text(text)
    assert "generation_config.json cannot be used" in refuse(settings_of(folder))


def test_what_is_not_used_of_a_generation_config_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    config = GenerationConfig(repetition_penalty=1.37, top_k=3, suppress_tokens=[4], eos_token_id=[2, 3])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            say_what_is_not_read(config, READ_ENTRIES)
        say_what_is_not_read(GenerationConfig(eos_token_id=2), READ_ENTRIES)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("safer_instruct")] == [
        "note: ignored entries of generation_config.json (only the command's generation.* apply): "
        "repetition_penalty=1.37, top_k=3"
    ]
