"""Loading models: what is read is what was saved, and what does not fit is refused with one message."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from config.errors import UserError
from config.settings import ModelSettings
from safer_instruct.generation.models import load_causal_lm, load_tokenizer, meta_causal_lm
from safer_instruct.generation.weights import model_fingerprint, resolve_archive
from safer_instruct.text.chat import special_token_texts
from tests.conftest import byte_level_tokenizer, tiny_llama


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder, read without transformers."""
    with safe_open(Path(folder) / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def assert_weights(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    own = dict(model.named_parameters())
    assert own.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(own[name], tensor), name


@pytest.fixture
def folder(tiny_model_folder, tmp_path):
    """A copy of the tiny model's folder that a test may damage."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


@pytest.fixture
def trained(tmp_path):
    """Other weights of the same architecture, as a model in memory."""
    return tiny_llama(400, seed=7)


def save_policy_pt(path: Path, model: torch.nn.Module, **options) -> Path:
    torch.save({"step_idx": 8, "state": model.state_dict(), "metrics": {"loss": 0.5}}, path, **options)
    return path


def refuse(settings: ModelSettings) -> str:
    """The message with which loading the model fails."""
    with pytest.raises(UserError) as refused:
        load_causal_lm(settings)
    return str(refused.value)


def test_loads_what_is_stored(tiny_model_folder):
    model = load_causal_lm(ModelSettings(name_or_path=tiny_model_folder))
    assert_weights(model, weights(tiny_model_folder))
    assert model.dtype == torch.float32
    assert not model.training


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float64", torch.float64)])
def test_dtype_of_the_policy_and_the_argument(tiny_model_folder, name, dtype):
    assert load_causal_lm(ModelSettings(name_or_path=tiny_model_folder, policy_dtype=name)).dtype == dtype
    assert load_causal_lm(ModelSettings(name_or_path=tiny_model_folder), dtype=name).dtype == dtype


def test_tokenizer_pads_and_never_cuts(folder):
    backend = json.loads((folder / "tokenizer.json").read_text())
    backend["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(ModelSettings(name_or_path=str(folder)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert len(tokenizer("the cat sat on the mat " * 20)["input_ids"]) > 60


def test_archives_of_all_kinds_give_the_same_weights(tiny_model_folder, trained, tmp_path):
    run = tmp_path / "runs" / "a"
    trained.save_pretrained(run / "checkpoints" / "step-8" / "model")
    (run / "LATEST").symlink_to("checkpoints/step-8")
    expected = weights(run / "LATEST" / "model")
    dpo = tmp_path / "LATEST_of_dpo"
    dpo.mkdir()
    plain = tmp_path / "plain.pt"
    torch.save(trained.state_dict(), plain)
    archives = [
        run,
        run / "checkpoints" / "step-8",
        run / "LATEST" / "model",
        save_policy_pt(dpo / "policy.pt", trained),
        dpo,
        save_policy_pt(tmp_path / "old.pt", trained, _use_new_zipfile_serialization=False),
        plain,
    ]
    for archive in archives:
        model = load_causal_lm(ModelSettings(name_or_path=tiny_model_folder, archive=str(archive)))
        assert_weights(model, expected)


def test_a_run_can_be_the_model_itself(trained, tmp_path, tokenizer):
    trained.save_pretrained(tmp_path / "run" / "checkpoints" / "step-8" / "model")
    tokenizer.save_pretrained(tmp_path / "run" / "checkpoints" / "step-8" / "model")
    (tmp_path / "run" / "LATEST").symlink_to("checkpoints/step-8")
    settings = ModelSettings(name_or_path=str(tmp_path / "run"))
    assert_weights(load_causal_lm(settings), weights(tmp_path / "run" / "LATEST" / "model"))
    assert len(load_tokenizer(settings)) == len(tokenizer)


@pytest.mark.parametrize("as_policy_pt", [False, True])
def test_tied_weights_stay_tied(tmp_path, as_policy_pt):
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    stored = LlamaForCausalLM(config)
    stored.save_pretrained(tmp_path / "tied")
    archive = str(save_policy_pt(tmp_path / "policy.pt", stored)) if as_policy_pt else None
    model = load_causal_lm(ModelSettings(name_or_path=str(tmp_path / "tied"), archive=archive))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, stored.lm_head.weight)


def test_an_untied_archive_of_a_tied_model_is_refused(tmp_path):
    for tied in (True, False):
        config = LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            tie_word_embeddings=tied,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(tmp_path / str(tied))
    message = refuse(ModelSettings(name_or_path=str(tmp_path / "True"), archive=str(tmp_path / "False")))
    assert "tie_word_embeddings: False there, True here" in message


def test_generation_config_of_the_model_is_kept_with_an_archive(folder, trained, tmp_path):
    (folder / "generation_config.json").write_text(json.dumps({"suppress_tokens": [5, 6], "eos_token_id": 2}))
    archive = save_policy_pt(tmp_path / "policy.pt", trained)
    model = load_causal_lm(ModelSettings(name_or_path=str(folder), archive=str(archive)))
    assert model.generation_config.suppress_tokens == [5, 6]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_all_dropout_is_off_in_training(tmp_path, kind):
    """Functional dropouts too: two forward passes in training mode are equal, though the config asks for dropout."""
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            attention_dropout=0.5,
        )  # fmt: skip
        stored = LlamaForCausalLM(config)
    else:
        config = GPT2Config(
            vocab_size=50,
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=32,
            resid_pdrop=0.5,
            embd_pdrop=0.5,
            attn_pdrop=0.5,
        )
        stored = GPT2LMHeadModel(config)
    stored.save_pretrained(tmp_path / "model")
    tokens = torch.arange(12)[None]
    stored.train()
    assert not torch.equal(stored(tokens).logits, stored(tokens).logits)
    model = load_causal_lm(ModelSettings(name_or_path=str(tmp_path / "model"))).train()
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    rates = {key: value for key, value in model.config.to_dict().items() if "drop" in key and "summary" not in key}
    assert rates
    assert not any(rates.values())


def test_dropout_in_a_models_code_is_off_where_the_weights_are_filled_in_later_too(folder, monkeypatch):
    """FSDP trains the model that is made without weights; a rate that no config knows must be off in it as well."""

    def init(self, config, original=LlamaMLP.__init__):
        original(self, config)
        self.hard_coded = torch.nn.Dropout(0.5)

    monkeypatch.setattr(LlamaMLP, "__init__", init)
    settings = ModelSettings(name_or_path=str(folder))
    for model in (load_causal_lm(settings), meta_causal_lm(settings)):
        rates = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
        assert rates
        assert not any(rates)


def test_fingerprint_follows_the_content(folder, tiny_model_folder):
    first = model_fingerprint(ModelSettings(name_or_path=tiny_model_folder))
    assert model_fingerprint(ModelSettings(name_or_path=str(folder))) == first  # a copy elsewhere
    tiny_llama(400, seed=1).save_pretrained(folder)
    assert model_fingerprint(ModelSettings(name_or_path=str(folder))) != first
    assert model_fingerprint(ModelSettings(name_or_path=tiny_model_folder, policy_dtype="bfloat16")) != first


# What is refused


def test_missing_folder(tmp_path):
    for load in (load_causal_lm, load_tokenizer):
        with pytest.raises(UserError, match=r"no such folder.*model\.name_or_path=FOLDER"):
            load(ModelSettings(name_or_path=str(tmp_path / "nowhere")))


def test_hub_id_that_cannot_be_had(monkeypatch):
    """The tests run with HF_HUB_OFFLINE; without it, an endpoint that refuses connections is as unreachable."""
    message = refuse(ModelSettings(name_or_path="nobody/no-such-model"))
    assert "HF_HUB_OFFLINE" in message
    assert "model.name_or_path=FOLDER" in message
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    message = refuse(ModelSettings(name_or_path="nobody/no-such-model"))
    assert "cannot be reached" in message
    assert "model.name_or_path=FOLDER" in message


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "no file named model.safetensors" in refuse(ModelSettings(name_or_path=str(folder)))


def test_folder_without_model(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    assert "holds no model" in refuse(ModelSettings(name_or_path=str(tmp_path)))


def test_config_that_is_no_model(folder):
    typed = json.dumps(json.loads((folder / "config.json").read_text()) | {"rms_norm_eps": 0})
    for text in ('{"a": 1}', '{"a":', "[]", '{"a":' * 20_000 + "1" + "}" * 20_000, typed):
        (folder / "config.json").write_text(text)
        assert "config.json cannot be used" in refuse(ModelSettings(name_or_path=str(folder)))


def test_a_model_without_sdpa_says_what_to_write(tmp_path):
    AutoConfig.for_model("gpt_oss", num_hidden_layers=1).save_pretrained(tmp_path)
    wanted = r"GptOssForCausalLM has no sdpa .*model.attn_implementation=eager and, to train it, packing=false"
    with pytest.raises(UserError, match=wanted):
        load_causal_lm(ModelSettings(name_or_path=str(tmp_path)))


def test_missing_shard(folder):
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "1 of 2 weight files are missing, first model-2.safetensors" in refuse(
        ModelSettings(name_or_path=str(folder))
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda one: one.view(-1).__setitem__(0, float("inf")) or one, "embed_tokens.weight holds NaN or infinite"),
        (lambda one: one.to(torch.int8), r"embed_tokens.weight holds integers (I8)"),
    ],
)
def test_weights_that_are_no_weights(folder, spoil, message):
    file, name = folder / "model.safetensors", "model.embed_tokens.weight"
    weights = load_file(file)
    save_file({**weights, name: spoil(weights[name])}, file, metadata={"format": "pt"})
    assert message in refuse(ModelSettings(name_or_path=str(folder)))


@pytest.mark.parametrize("length", [4, 60, -100])
def test_truncated_safetensors(folder, length):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    message = refuse(ModelSettings(name_or_path=str(folder)))
    assert f"{file}: damaged or truncated ({file.stat().st_size} bytes" in message


def test_tokenizer_larger_than_the_vocabulary(folder, tmp_path):
    byte_level_tokenizer(add_bos=True, vocab_size=420).save_pretrained(tmp_path / "larger")
    larger = len(byte_level_tokenizer(add_bos=True, vocab_size=420))
    with pytest.raises(UserError, match=rf"{larger} tokens, but the model .* has embeddings for \d+"):
        load_tokenizer(ModelSettings(name_or_path=str(folder), tokenizer_name_or_path=str(tmp_path / "larger")))


def test_a_special_token_without_an_embedding_is_of_no_use(folder):
    """As Gemma's for images; rows that hold it are dropped, as those with any other special token."""
    tokenizer = byte_level_tokenizer(add_bos=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    loaded = load_tokenizer(ModelSettings(name_or_path=str(folder)))
    assert loaded.convert_tokens_to_ids("<image>") == len(loaded) - 1
    assert "<image>" in special_token_texts(loaded)
    tokenizer.pad_token = "<image>"
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(ModelSettings(name_or_path=str(folder))).pad_token_id == 2  # EOS, which has an embedding
    tokenizer.eos_token = "<image>"
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="do not belong together"):
        load_tokenizer(ModelSettings(name_or_path=str(folder)))
    plain = byte_level_tokenizer(add_bos=True)
    plain.add_tokens(["word"])  # not special: a text may hold it
    plain.save_pretrained(folder)
    with pytest.raises(UserError, match="do not belong together"):
        load_tokenizer(ModelSettings(name_or_path=str(folder)))


def test_an_adapter_beside_weights_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    message = refuse(ModelSettings(name_or_path=str(folder)))
    assert "holds an adapter (adapter_config.json)" in message
    assert "move adapter_config.json away" in message


def test_token_ids_beyond_the_vocabulary_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": config["vocab_size"]}))
    assert "the model cannot be loaded" in refuse(ModelSettings(name_or_path=str(folder)))


def test_tokenizer_that_is_not_there(folder):
    config = folder / "tokenizer_config.json"
    for spoil in (lambda: config.write_text('{"a":' * 20_000), (folder / "tokenizer.json").unlink):
        spoil()
        with pytest.raises(UserError, match=r"holds no tokenizer.*model\.tokenizer_name_or_path=FOLDER"):
            load_tokenizer(ModelSettings(name_or_path=str(folder)))


def test_tokenizer_without_eos(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no EOS token"):
        load_tokenizer(ModelSettings(name_or_path=str(folder)))


@pytest.mark.parametrize("length", [0, 1, 5000, -10])
def test_truncated_policy_pt(tiny_model_folder, trained, tmp_path, length):
    whole = save_policy_pt(tmp_path / "policy.pt", trained).read_bytes()
    (tmp_path / "policy.pt").write_bytes(whole[:length])
    message = refuse(ModelSettings(name_or_path=tiny_model_folder, archive=str(tmp_path / "policy.pt")))
    assert "truncated" in message or "not a PyTorch file" in message
    assert str(tmp_path / "policy.pt") in message


def test_archive_of_another_architecture(tiny_model_folder, tmp_path):
    other = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    other.save_pretrained(tmp_path / "gpt2")
    message = refuse(ModelSettings(name_or_path=tiny_model_folder, archive=str(tmp_path / "gpt2")))
    assert "is a gpt2 model" in message
    assert "is a llama model" in message
    archive = save_policy_pt(tmp_path / "policy.pt", other)
    message = refuse(ModelSettings(name_or_path=tiny_model_folder, archive=str(archive)))
    assert "20 tensors are missing, such as model.embed_tokens.weight" in message
    assert "not part of the model" in message


def test_archive_with_another_depth_or_width(tiny_model_folder, tmp_path):
    for name, changes, words in (
        ("deep", {"num_hidden_layers": 3}, "9 tensors are not part of the model, such as model.layers.2."),
        ("shallow", {"num_hidden_layers": 1}, "9 tensors are missing, such as model.layers.1."),
        ("wide", {"intermediate_size": 80}, "[32, 80] there, [32, 64] in the model"),
    ):
        config = LlamaConfig.from_pretrained(tiny_model_folder, **changes)
        archive = save_policy_pt(tmp_path / f"{name}.pt", LlamaForCausalLM(config))
        message = refuse(ModelSettings(name_or_path=tiny_model_folder, archive=str(archive)))
        assert words in message, message


def test_archive_with_equal_shapes_but_another_head_count(tiny_model_folder, tmp_path):
    """Every tensor fits, and the model would compute something else."""
    config = LlamaConfig.from_pretrained(tiny_model_folder)
    config.num_attention_heads = config.num_key_value_heads = 4
    config.head_dim = 8
    LlamaForCausalLM(config).save_pretrained(tmp_path / "heads")
    message = refuse(ModelSettings(name_or_path=tiny_model_folder, archive=str(tmp_path / "heads")))
    assert "num_attention_heads: 4 there, 2 here" in message


class _Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("form", ["torch.save", "pickle", "pytorch_model.bin"])
def test_malicious_pickle_is_refused_and_not_run(folder, tmp_path, form):
    canary = tmp_path / "canary"
    content = {"state": _Malicious(canary)}
    settings = ModelSettings(name_or_path=str(folder), archive=str(tmp_path / "policy.pt"))
    if form == "torch.save":
        torch.save(content, tmp_path / "policy.pt")
    elif form == "pickle":
        (tmp_path / "policy.pt").write_bytes(pickle.dumps(content, protocol=2))
    else:
        (folder / "model.safetensors").unlink()
        torch.save(content, folder / "pytorch_model.bin")
        settings = ModelSettings(name_or_path=str(folder))
    assert "refused" in refuse(settings)
    assert not canary.exists()
    with (tmp_path / "check").open("wb") as file:  # the canary works: unpickling it does touch the file
        pickle.dump(content, file)
    with (tmp_path / "check").open("rb") as file:
        pickle.load(file)
    assert canary.exists()


def test_policy_pt_without_state(tiny_model_folder, tmp_path):
    torch.save({"state": [1, 2]}, tmp_path / "policy.pt")
    message = refuse(ModelSettings(name_or_path=tiny_model_folder, archive=str(tmp_path / "policy.pt")))
    assert "entry `state`" in message


def test_policy_pt_as_the_model(tmp_path, trained):
    path = save_policy_pt(tmp_path / "policy.pt", trained)
    assert f"model.archive={path}" in refuse(ModelSettings(name_or_path=str(path)))


def test_archive_that_is_not_there_or_empty(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        resolve_archive(str(tmp_path / "nowhere"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("a: 1")
    with pytest.raises(UserError, match="a run without a checkpoint yet"):
        resolve_archive(str(tmp_path / "run"))
