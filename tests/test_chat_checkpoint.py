"""SFT and DPO on chats, then transformers alone generates from the checkpoint: turns end, and the tokens are ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import byte_level_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from config.settings import GenerationSettings, ModelSettings
from safer_instruct.generation.hf import HFGenerator
from safer_instruct.generation.models import load_causal_lm, load_tokenizer
from tests.test_turns import with_chat

ANSWERS = {"the cat?": "on the mat.", "the sum of 12?": "The sum is 42.", "fruits?": "apple, banana.", "a task?": "No."}
NEW_TOKENS = 32


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trained_on_chats(train: Callable[..., str], folder: Path, model: Path, *lr: str) -> Path:
    """Tune with the chats, prefer the answers over each other's; return the folder of the last checkpoint's model."""
    chats = write_rows(folder / "chats.jsonl", [{"messages": turns(*row)} for row in ANSWERS.items()])
    others = [*list(ANSWERS.values())[1:], "apple"]
    pairs = zip(ANSWERS.items(), others, strict=True)
    rows = [{"chosen": turns(asked, answer), "rejected": turns(asked, other)} for (asked, answer), other in pairs]
    common = [
        "model=blank_model", f"model.name_or_path={model}", "batch_size=4", "device=cpu", "wandb.enabled=false",
        "warmup_steps=0", "max_length=64", "max_prompt_length=40", "optimizer=AdamW",
    ]  # fmt: skip
    train(
        "loss=sft", "exp_name=sft", "datasets=[sharegpt]", f"datasets.sharegpt.path={chats}",
        "datasets.sharegpt.template=chat", "datasets.sharegpt.eval_fraction=0", *common, *lr,
    )  # fmt: skip
    train(
        "loss=dpo", "exp_name=dpo", "model.archive=runs/sft", "datasets=[custom]", "datasets.custom.template=chat",
        f"datasets.custom.path={write_rows(folder / 'pairs.jsonl', rows)}", "datasets.custom.eval_fraction=0", *common,
        "lr=1e-6", "n_epochs=1",
    )  # fmt: skip
    return folder / "runs" / "dpo" / "LATEST" / "model"


@torch.no_grad()
def plain_answers(folder: Path) -> list[list[int]]:
    """What a stranger gets from the folder, with its defaults and greedy."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    answers = []
    for asked in ANSWERS:
        prompt = tokenizer.apply_chat_template(
            turns(asked, "")[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**prompt, do_sample=False, max_new_tokens=NEW_TOKENS)
        answers.append(output[0, prompt["input_ids"].shape[1] :].tolist())
    return answers


def our_answers(folder: Path) -> list[list[int]]:
    settings = ModelSettings(name_or_path=str(folder))
    tokenizer = load_tokenizer(settings)
    generator = HFGenerator(load_causal_lm(settings), tokenizer, GenerationSettings(max_new_tokens=NEW_TOKENS))
    texts = [
        tokenizer.apply_chat_template(turns(asked, "")[:1], add_generation_prompt=True, tokenize=False)
        for asked in ANSWERS
    ]
    return generator._decode(list(ANSWERS), [tokenizer(text)["input_ids"] for text in texts])


def test_a_base_model_that_is_tuned_on_chats_ends_its_turns_anywhere(here: Callable[..., str], tmp_path: Path) -> None:
    """Its own end token is another than its chat template's; the folder's odd decoding is kept as it was."""
    tokenizer = with_chat(byte_level_tokenizer(add_bos=False))
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    odd = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": 2}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(odd))
    folder = trained_on_chats(here, tmp_path, tmp_path / "base", "lr=1e-2", "n_epochs=40")
    found = plain_answers(folder)
    assert found == our_answers(folder)
    assert [tokenizer.decode(answer) for answer in found] == [f"{answer}<|im_end|>" for answer in ANSWERS.values()]
    written = json.loads((folder / "generation_config.json").read_text())
    ends = sorted([2, tokenizer.convert_tokens_to_ids("<|im_end|>")])
    assert {name: written[name] for name in odd} == {**odd, "eos_token_id": ends}


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_smollm2_that_is_tuned_on_chats_ends_its_turns_anywhere(
    here: Callable[..., str], tmp_path: Path, smollm2: Path
) -> None:
    folder = trained_on_chats(here, tmp_path, smollm2, "lr=1e-4", "n_epochs=8")
    end = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|im_end|>")
    found = plain_answers(folder)
    assert found == our_answers(folder)
    assert [answer[-1] for answer in found] == [end] * len(ANSWERS)
