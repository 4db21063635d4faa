"""Conversations: prompts of training and of generation are the same tokens, and all answers train as a loop would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import sentencepiece_like
from conftest import EOS, byte_level_tokenizer, tiny_llama
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from config.errors import UserError
from config.settings import DatasetSettings
from preference_datasets import build_stores
from safer_instruct.text.encoding import prompt_token_ids
from safer_instruct.text.example_encoder import each_answer
from safer_instruct.text.examples import Example, Message
from safer_instruct.text.prompts import Unusable, render_prompt
from trainers.data.batching import BatchLoader
from trainers.data.cutters import PackedCutter, PaddedCutter
from trainers.data.packing import num_target_tokens, num_tokens
from trainers.data.token_store import TokenStore
from trainers.kernels.attention import use_packed_attention
from trainers.kernels.logps import sequence_logps

IM = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Refuses a system prompt, as Gemma's template does.
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + IM
# Writes earlier answers without the thought that it puts before the last one, as Qwen 3's template does.
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}<think>\n\n"
    "</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>"
    "assistant\n<think>\n\n</think>\n\n{% endif %}"
)
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]
TALK = [("user", "Hi, the cat?"), ("assistant", "the mat :)"), ("user", "What is 12?"), ("assistant", "A sum.")]
TALK += [("user", "Why?"), ("assistant", "So.")]


def with_chat(tokenizer: PreTrainedTokenizerFast, template: str = IM) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens({"additional_special_tokens": CHAT_TOKENS})
    tokenizer.chat_template = template
    return tokenizer


def unigram() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    texts = ["".join(chr(c) for c in range(32, 127)) + "\n", *(content for _, content in TALK)] * 3
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", EOS], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, unk_token="<unk>")


def split_by(pattern: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE that cuts words first: by GPT-4's and Llama 3's rules, or digit by digit."""
    tokenizer = byte_level_tokenizer(add_bos=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


FAMILIES = {
    "gpt2": lambda: byte_level_tokenizer(add_bos=False),
    "bos": lambda: byte_level_tokenizer(add_bos=True),
    "bos_and_eos": lambda: byte_level_tokenizer(add_bos=True, add_eos=True),
    "llama3": lambda: split_by(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"),
    "qwen2": lambda: split_by(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
    "merges_lines": lambda: byte_level_tokenizer(add_bos=False, vocab_size=500),
    "llama2": lambda: sentencepiece_like(tuple(content for _, content in TALK)),
    "unigram": unigram,
}


def write(path: Path, conversations: list[list[tuple[str, str]]]) -> Path:
    rows = [{"messages": [{"role": r, "content": c} for r, c in talk]} for talk in conversations]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def store_of(
    tmp_path: Path, tokenizer: Any, *, all_answers: bool, template: str = "chat", **changes: Any
) -> TokenStore:
    limits = {name: changes.pop(name) for name in ("max_length", "max_prompt_length") if name in changes}
    talks = changes.pop("talks", [TALK, TALK[:2], TALK[2:]])
    settings = DatasetSettings(
        path=str(write(tmp_path / "talks.jsonl", talks)), schema="sharegpt", template=template, eval_fraction=0.0,
        **changes,
    )  # fmt: skip
    return build_stores(
        {"talks": settings}, loss="likelihood", tokenizer=tokenizer, cache_dir=tmp_path / "cache",
        all_answers=all_answers, **{"max_length": 512, "max_prompt_length": 256, **limits},
    ).train  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", ["alpaca", "hh", "plain", "vicuna", "chat"])
def test_training_and_generation_have_the_same_prompt_tokens(family: str, template: str, tmp_path: Path) -> None:
    """Of the last answer, and of each answer of a conversation whose answers are all trained on."""
    tokenizer = with_chat(FAMILIES[family]())
    talk = TALK[:2] if template in ("alpaca", "plain") else TALK
    last = Example("x", talk[-2][1], chosen=talk[-1][1], history=tuple(Message(*turn) for turn in talk[:-2]))
    asked = [
        prompt_token_ids(
            tokenizer, render_prompt(template, str(one.instruction), tokenizer=tokenizer, history=one.history), 512
        )
        for one in each_answer(last)
    ]
    prompt, _ = store_of(tmp_path, tokenizer, all_answers=False, template=template, talks=[talk]).row(0)
    assert prompt.tolist() == asked[-1]
    store = store_of(tmp_path, tokenizer, all_answers=True, template=template, talks=[talk])
    found = []
    for i in range(len(store)):
        prompt, response = store.row(i)
        ids = [*prompt.tolist(), *(token if token >= 0 else ~token for token in response.tolist())]
        given = [True] * len(prompt) + (response < 0).tolist()
        found += [ids[:n] for n in range(1, len(ids)) if given[n - 1] and not given[n]]
    assert found == asked


def test_a_conversation_is_one_row_whose_answers_end(tmp_path: Path) -> None:
    tokenizer = with_chat(byte_level_tokenizer(add_bos=True))
    store = store_of(tmp_path, tokenizer, all_answers=True, talks=[TALK[:4]])
    assert len(store) == 1
    prompt, response = store.row(0)
    targets = tokenizer.decode(response[response >= 0])
    assert tokenizer.decode(prompt) == "<s><|im_start|>user\nHi, the cat?<|im_end|>\n<|im_start|>assistant\n"
    assert targets == "the mat :)<|im_end|>A sum.<|im_end|>"
    between = "\n<|im_start|>user\nWhat is 12?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(~response[response < 0]) == between


@pytest.mark.parametrize(("template", "chat"), [("chat", THINKS), ("hh", IM)])
def test_answers_that_are_written_otherwise_later_are_rows_of_their_own(
    template: str, chat: str, tmp_path: Path
) -> None:
    """A thought that only the last answer has, or an end that only the last answer has: nothing is trained amiss."""
    tokenizer = with_chat(byte_level_tokenizer(add_bos=True), chat)
    store = store_of(tmp_path, tokenizer, all_answers=True, template=template, talks=[TALK])
    assert len(store) == 3
    assert all((store.row(i)[1] >= 0).all() for i in range(3))
    assert len({store.ids(i) for i in range(3)}) == 3


def test_what_does_not_fit_is_counted(tmp_path: Path) -> None:
    tokenizer = with_chat(byte_level_tokenizer(add_bos=True))
    whole = store_of(tmp_path, tokenizer, all_answers=True, talks=[TALK])
    length = int(whole.lengths[0, 0] + (whole.row(0)[1] >= 0).int().argmin())  # of the first turn with its answer
    cut = store_of(tmp_path, tokenizer, all_answers=True, talks=[TALK], max_length=length + 3, max_prompt_length=20)
    assert cut.meta["report"]["datasets"]["talks"]["noted"]["answers_left_out"] == 2
    assert (cut.row(0)[1] >= 0).all()


def gradients(model: Any, batches: Any) -> tuple[float, torch.Tensor, int]:
    """Sum of log-probabilities, all gradients in one vector, and the number of targets."""
    model.zero_grad()
    total, targets = 0.0, 0
    for batch in batches:
        for microbatch in batch.microbatches:
            logps, _ = sequence_logps(model, microbatch)
            logps.sum().backward()
            total += float(logps.sum())
            targets += int(num_target_tokens(microbatch))
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), targets


@pytest.mark.parametrize("packed", [True, False])
def test_all_answers_train_as_a_loop_over_the_turns_does(packed: bool, tmp_path: Path) -> None:
    """The truth: plain transformers on each answer by itself, prompt and answer as tokens, one after the other."""
    tokenizer = with_chat(byte_level_tokenizer(add_bos=True))
    store = store_of(tmp_path, tokenizer, all_answers=True)
    assert len(store) == 3
    model = tiny_llama(len(tokenizer)).double()
    truth, num_truth = torch.zeros((), dtype=torch.float64), 0
    model.zero_grad()
    for talk in (TALK, TALK[:2], TALK[2:]):
        for number in range(1, len(talk), 2):
            messages = [{"role": role, "content": content} for role, content in talk[:number]]
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(prompt)["input_ids"]
            answer = tokenizer(talk[number][1] + "<|im_end|>", add_special_tokens=False)["input_ids"]
            logits = model(torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            logp = logits.gather(1, torch.tensor(answer)[:, None]).sum()
            logp.backward()
            truth += logp.detach()
            num_truth += len(answer)
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    if packed:
        use_packed_attention(model)
    cutter = PackedCutter(max_tokens=200) if packed else PaddedCutter(pad_token_id=0)
    total, found, num_found = gradients(model, BatchLoader(store, cutter, batch_size=2).batches())
    assert num_found == num_truth
    assert total == pytest.approx(float(truth), abs=1e-9)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_counts_of_tokens_are_those_of_the_padded_path(tmp_path: Path) -> None:
    store = store_of(tmp_path, with_chat(byte_level_tokenizer(add_bos=True)), all_answers=True)
    counts = []
    for cutter in (PackedCutter(max_tokens=10_000), PaddedCutter(pad_token_id=0)):
        (batch,) = BatchLoader(store, cutter, batch_size=3).batches()
        (microbatch,) = batch.microbatches
        counts.append((int(num_tokens(microbatch)), int(num_target_tokens(microbatch))))
    assert counts[0] == counts[1]


def test_templates_that_have_no_place_for_it_say_so() -> None:
    tokenizer = with_chat(byte_level_tokenizer(add_bos=True), NO_SYSTEM)
    history = (Message("user", "Hi"), Message("assistant", "Hello"))
    for template, reason, words in (
        ("alpaca", "no_place_for_turns", {"history": history}),
        ("plain", "no_place_for_turns", {"history": history}),
        ("alpaca", "no_place_for_system", {"system": "Be brief."}),
        ("hh", "no_place_for_system", {"system": "Be brief.", "history": history}),
        ("chat", "template_refuses", {"system": "Be brief."}),
    ):
        with pytest.raises(Unusable) as caught:
            render_prompt(template, "Why?", tokenizer=tokenizer, **words)
        assert caught.value.reason == reason


def test_a_system_prompt_of_the_command_is_refused_at_once_and_one_of_a_row_is_counted(tmp_path: Path) -> None:
    tokenizer = with_chat(byte_level_tokenizer(add_bos=True), NO_SYSTEM)
    with pytest.raises(UserError, match="System role not supported"):
        store_of(tmp_path, tokenizer, all_answers=False, system="Be brief.")
    talks = [TALK, [("system", "Be brief."), *TALK]]
    store = store_of(tmp_path, tokenizer, all_answers=False, talks=talks)
    assert store.meta["report"]["datasets"]["talks"]["dropped"] == {"template_refuses": 1}
    asked = store_of(tmp_path, with_chat(byte_level_tokenizer(add_bos=False)), all_answers=False, system="Be brief.")
    assert tokenizer.decode(asked.row(0)[0]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_vicuna_as_fastchat_writes_it() -> None:
    """The system sentence, a blank, turns with blanks between, and the end token behind each answer."""
    tokenizer = byte_level_tokenizer(add_bos=True)
    history = (Message("user", "Hi"), Message("assistant", "Hello"))
    head = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    )
    prompt = render_prompt("vicuna", "Why?", tokenizer=tokenizer, history=history)
    assert prompt.text == f"{head} USER: Hi ASSISTANT: Hello</s>USER: Why? ASSISTANT:"
    assert render_prompt("vicuna", "Why?", tokenizer=tokenizer).text == f"{head} USER: Why? ASSISTANT:"
    assert render_prompt("vicuna", "Why?", system="Be brief.").text == "Be brief. USER: Why? ASSISTANT:"


def test_reversed_tuning_reads_the_first_turn(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(add_bos=True)
    settings = DatasetSettings(path=str(write(tmp_path / "a.jsonl", [TALK])), schema="sharegpt", eval_fraction=0.0)
    stores = build_stores(
        {"a": settings}, loss="reverse", tokenizer=tokenizer, max_length=512, max_prompt_length=256,
        cache_dir=tmp_path / "cache",
    )  # fmt: skip
    prompt, target = stores.train.row(0)
    assert tokenizer.decode(prompt).endswith("### response:\nthe mat :)\n\n### Instruction:")
    assert tokenizer.decode(target) == f"Hi, the cat?{EOS}"
    assert stores.report["datasets"]["a"]["noted"] == {"first_turn_only": 1}


def test_a_conversation_is_split_and_excluded_by_its_turns(tmp_path: Path) -> None:
    """Any user's turn of a test set keeps the conversation out; the first turn alone decides about the split."""
    tokenizer = with_chat(byte_level_tokenizer(add_bos=True))
    (tmp_path / "test.jsonl").write_text('{"instruction": "what is  12?"}\n')
    kept = [TALK[:2], TALK[4:]]
    store = store_of(tmp_path, tokenizer, all_answers=False, talks=[TALK, *kept], exclude=str(tmp_path / "test.jsonl"))
    assert len(store) == 2
    assert store.meta["report"]["datasets"]["talks"]["dropped"] == {"excluded": 1}


def test_a_run_on_all_answers_from_the_command_line(here: Any, tmp_path: Path) -> None:
    """Training, evaluation and sampling read rows whose responses hold given tokens."""
    tokenizer = with_chat(byte_level_tokenizer(add_bos=True))
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    talks = write(tmp_path / "talks.jsonl", [[*TALK[:1], ("assistant", f"the {i}"), *TALK[2:]] for i in range(6)])
    held = write(tmp_path / "held.jsonl", [[("user", "Where?"), *TALK[1:]]])
    said = here(
        "loss=sft", "loss.on=all", "model=blank_model", f"model.name_or_path={tmp_path / 'model'}",
        "datasets=[sharegpt]",
        f"datasets.sharegpt.path={talks}", f"datasets.sharegpt.eval_path={held}", "exp_name=a", "batch_size=3",
        "eval_batch_size=1", "sample_during_eval=true", "n_eval_model_samples=1", "max_new_tokens=2", "device=cpu",
        "wandb.enabled=false", "lr=1e-3", "warmup_steps=0",
    )  # fmt: skip
    assert "7 rows read, 6 train, 1 eval" in said
    metrics = [json.loads(line) for line in (tmp_path / "runs" / "a" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss/eval"] for row in metrics if "loss/eval" in row]
    assert losses[-1] < losses[0]
    (sample, *_) = (tmp_path / "runs" / "a" / "samples.jsonl").read_text().splitlines()
    assert json.loads(sample)["prompt"] == "user\nWhere?\nassistant\n"
