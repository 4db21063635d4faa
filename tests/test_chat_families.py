"""Chat templates of the families that people bring: the turn's end is what is trained, or training is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import FAMILIES, R1, R1_EOS, build_tokenizer, chatml
from conftest import byte_level_tokenizer

from config.errors import UserError
from config.settings import THOUGHT_TAGS, DatasetSettings
from preference_datasets import build_stores
from safer_instruct.generation.completions import split_thought
from safer_instruct.generation.models import _set_in_template
from safer_instruct.text.chat import chat_frames, chat_turn
from safer_instruct.text.encoding import prompt_token_ids
from safer_instruct.text.example_encoder import each_answer
from safer_instruct.text.examples import Example, Message
from safer_instruct.text.prompts import render_prompt
from trainers.data.token_store import TokenStore

TALK = [("user", "Hi!"), ("assistant", "Hello."), ("user", "Why?"), ("assistant", "So.")]
TRAINED = [name for name, family in FAMILIES.items() if family.asked is not None]


def tokenizer_of(name: str) -> Any:
    tokenizer = build_tokenizer(FAMILIES[name])
    _set_in_template(tokenizer, FAMILIES[name].variables)
    return tokenizer


def store_of(tmp_path: Path, tokenizer: Any, talk: list[tuple[str, str]], *, all_answers: bool = False) -> TokenStore:
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps({"messages": [{"role": role, "content": said} for role, said in talk]}) + "\n")
    settings = DatasetSettings(path=str(path), schema="sharegpt", template="chat", eval_fraction=0.0)
    return build_stores(
        {"talks": settings}, loss="likelihood", tokenizer=tokenizer, max_length=900, max_prompt_length=800,
        cache_dir=tmp_path / "cache", all_answers=all_answers,
    ).train  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_prompt_and_answer_are_the_published_form_and_end_with_its_turn(name: str, tmp_path: Path) -> None:
    """Written out by hand from each family's documentation; the prompt's tokens are those of transformers, too."""
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    prompt, response = store_of(tmp_path, tokenizer, TALK[2:]).row(0)
    question, answer = [{"role": "user", "content": "Why?"}], {"role": "assistant", "content": "So."}
    text = str(family.asked)
    assert tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False) == text
    assert tokenizer.apply_chat_template([*question, answer], tokenize=False).startswith(text + family.answered)
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    assert prompt.tolist() == ids
    whole = tokenizer(text + family.answered, add_special_tokens=False)["input_ids"]
    assert response.tolist() == whole[len(ids) :]
    end = next(token for token in (*family.tokens, family.eos) if family.answered.endswith(token))
    assert response[-1] == tokenizer.convert_tokens_to_ids(end)
    assert split_thought(family.answered, THOUGHT_TAGS)[1].strip() == f"So.{end}"  # what stands before is no answer


@pytest.mark.parametrize("name", TRAINED)
def test_training_and_generation_ask_with_the_same_tokens(name: str, tmp_path: Path) -> None:
    """Of each answer of a conversation; and each ends in the token that ends the last."""
    tokenizer = tokenizer_of(name)
    last = Example("x", TALK[2][1], chosen=TALK[3][1], history=tuple(Message(*turn) for turn in TALK[:2]))
    asked = [
        prompt_token_ids(
            tokenizer, render_prompt("chat", str(one.instruction), tokenizer=tokenizer, history=one.history), 900
        )
        for one in each_answer(last)
    ]
    store = store_of(tmp_path, tokenizer, TALK, all_answers=True)
    found, ends = [], []
    for number in range(len(store)):
        prompt, response = store.row(number)
        ids = [*prompt.tolist(), *response.where(response >= 0, ~response).tolist()]
        given = [*[True] * len(prompt), *(response < 0).tolist(), True]
        found += [ids[:n] for n in range(1, len(ids)) if given[n - 1] and not given[n]]
        ends += [ids[n - 1] for n in range(1, len(given)) if given[n] and not given[n - 1]]
    assert found == asked
    assert len(ends) == 2
    assert len(set(ends)) == 1


def test_a_thought_that_is_opened_for_the_model_is_refused_with_the_difference_and_what_mends_it() -> None:
    tokenizer = build_tokenizer(FAMILIES["r1"])
    message = r"ends in \.\.\.'<think>\\n', but before an answer .* \.\.\.'', so .*; fix the chat template"
    with pytest.raises(UserError, match=message):
        chat_turn(tokenizer)
    for variable in ("enable_thinking", "thinking"):  # a hybrid, which thinks by default
        opened = f"{{% if {variable} is defined and not {variable} %}}</think>{{% else %}}<think>\n{{% endif %}}"
        tokenizer.chat_template = R1.replace("THOUGHT", opened).replace(
            "{{ m['content'].s", "</think>{{ m['content'].s"
        )
        with pytest.raises(UserError, match=f"; write model.chat_template_kwargs.{variable}=false; or use template="):
            chat_turn(tokenizer)
        _set_in_template(tokenizer, {variable: False})
        assert chat_turn(tokenizer) == ("", "", R1_EOS)


def test_a_template_that_changes_a_text_is_refused() -> None:
    tokenizer = byte_level_tokenizer(add_bos=True)
    tokenizer.chat_template = chatml().replace("m['content']", "m['content'] | upper")
    with pytest.raises(UserError, match="does not show a user's turn exactly once"):
        chat_frames(tokenizer, ("user",))


def test_a_template_that_ends_no_answer_is_refused_before_training(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(add_bos=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(UserError, match=r"writes nothing after an answer.*\{\{ eos_token \}\} after an assistant's"):
        store_of(tmp_path, tokenizer, TALK)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "}}\n", "}}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n"
    )
    assert store_of(tmp_path, tokenizer, TALK).row(0)[1][-1] == tokenizer.eos_token_id
