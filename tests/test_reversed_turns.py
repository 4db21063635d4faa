"""Reversed tuning on all turns of a conversation: each instruction from its response, behind what was said before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EOS, byte_level_tokenizer, tiny_llama
from test_turns import TALK, gradients, write

from config.settings import DatasetSettings
from preference_datasets import build_stores
from trainers.data.batching import BatchLoader
from trainers.data.cutters import PackedCutter, PaddedCutter
from trainers.data.token_store import TokenStore
from trainers.kernels.attention import use_packed_attention

FIRST = (
    "Below is a response to a certain instruction. Write the instruction that the response is trying to complete.\n\n"
    "### response:\n{response}\n\n### Instruction:"
)
LATER = (
    "Below is a conversation, and a response to the instruction that follows it. Write the instruction that the "
    "response is trying to complete.\n\n### conversation:\n{before}\n\n### response:\n{response}\n\n### Instruction:"
)


def expected_rows(talk: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The texts of prompt and target, turn by turn, written out."""
    rows = []
    for number in range(0, len(talk), 2):
        (_, asked), (_, response) = talk[number : number + 2]
        before = "\n\n".join(f"{role}: {said}" for role, said in talk[:number])
        rows.append(((LATER if before else FIRST).format(before=before, response=response), asked))
    return rows


def store_of(tmp_path: Path, tokenizer: Any, max_length: int = 512) -> TokenStore:
    path = write(tmp_path / "talks.jsonl", [TALK, TALK[:2]])
    return build_stores(
        {"talks": DatasetSettings(path=str(path), schema="sharegpt", eval_fraction=0.0)}, loss="reverse",
        tokenizer=tokenizer, max_length=max_length, max_prompt_length=max_length // 2, cache_dir=tmp_path / "cache",
        all_answers=True,
    ).train  # fmt: skip


def test_each_instruction_stands_behind_its_response_and_the_turns_before(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(add_bos=True)
    store = store_of(tmp_path, tokenizer)
    found = [[tokenizer.decode(ids) for ids in store.row(number)] for number in range(len(store))]
    expected = [*expected_rows(TALK), *expected_rows(TALK[:2])]
    assert found == [[f"<s>{prompt}", target + EOS] for prompt, target in expected]
    assert len({store.ids(number) for number in range(len(store))}) == 4
    assert "first_turn_only" not in store.meta["report"]["datasets"]["talks"]["noted"]


def test_turns_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(add_bos=True)
    longest = len(tokenizer(expected_rows(TALK)[2][0])["input_ids"])
    store = store_of(tmp_path, tokenizer, max_length=longest)
    assert len(store) == 3
    assert store.meta["report"]["datasets"]["talks"]["noted"]["answers_left_out"] == 1


@pytest.mark.parametrize("packed", [True, False])
def test_the_gradients_are_those_of_a_loop_over_the_turns(packed: bool, tmp_path: Path) -> None:
    """The truth: plain transformers on each turn by itself, in float64."""
    tokenizer = byte_level_tokenizer(add_bos=True)
    store = store_of(tmp_path, tokenizer)
    model = tiny_llama(len(tokenizer)).double()
    model.zero_grad()
    truth, num_truth = 0.0, 0
    for prompt, target in [*expected_rows(TALK), *expected_rows(TALK[:2])]:
        asked = tokenizer(prompt)["input_ids"]
        answer = tokenizer(target + EOS, add_special_tokens=False)["input_ids"]
        logits = model(torch.tensor([[*asked, *answer]])).logits[0, len(asked) - 1 : -1].log_softmax(-1)
        logp = logits.gather(1, torch.tensor(answer)[:, None]).sum()
        logp.backward()
        truth, num_truth = truth + float(logp.detach()), num_truth + len(answer)
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    if packed:
        use_packed_attention(model)
    cutter = PackedCutter(max_tokens=900) if packed else PaddedCutter(pad_token_id=0)
    total, found, num_found = gradients(model, BatchLoader(store, cutter, batch_size=4).batches())
    assert num_found == num_truth
    assert total == pytest.approx(truth, abs=1e-9)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_the_key_of_the_command_line(here: Any, tmp_path: Path) -> None:
    write(tmp_path / "talks.jsonl", [TALK] * 2)
    command = ["loss=reverse", "model=tiny", "datasets=[sharegpt]", "datasets.sharegpt.path=talks.jsonl", "exp_name=a"]
    command += ["datasets.sharegpt.eval_fraction=0", "max_length=900", "dry_run=data", "wandb.enabled=false"]
    assert "2 rows read, 2 train" in here(*command)
    assert "2 rows read, 6 train" in here(*command, "loss.on=all")
