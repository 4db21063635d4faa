from __future__ import annotations

import pytest
from conftest import BOS, byte_level_tokenizer

from config.errors import UserError
from safer_instruct.text.prompts import (
    TEMPLATE_NAMES,
    Prompt,
    answer_turn,
    render_prompt,
    render_reversed,
    reversed_target,
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] | trim }}<end>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_the_published_reversed_template_byte_for_byte() -> None:
    published = (
        "Below is a response to a certain instruction. Write the instruction that the response is trying to "
        "complete.\n\n### response:\n{output}\n\n### Instruction:"
    )
    prompt = render_reversed("Take two eggs.")
    assert prompt.text == published.format(output="Take two eggs.")
    assert prompt.body == "Take two eggs."


def test_the_published_alpaca_templates_byte_for_byte() -> None:
    plain = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{instruction}\n\n### Response:"
    )
    with_input = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}"
        "\n\n### Response:"
    )
    assert render_prompt("alpaca", "Add.").text == plain.format(instruction="Add.")
    for instruction, input in (("Add.", "1 and a much longer input"), ("A much longer instruction", "1")):
        prompt = render_prompt("alpaca", instruction, input)
        assert prompt.text == with_input.format(instruction=instruction, input=input)
        assert prompt.body == max(instruction, input, key=len)


def test_hh_and_plain() -> None:
    assert render_prompt("hh", "Why?").text == "\n\nHuman: Why?\n\nAssistant:"
    dialogue = "Hi\n\nAssistant: Hello, how can I help you?\n\nHuman: Why?"
    prompt = render_prompt("hh", dialogue)
    assert prompt.text == f"\n\nHuman: {dialogue}\n\nAssistant:"
    assert prompt.tail == "\n\nHuman: Why?\n\nAssistant:"
    assert answer_turn("hh") == (" ", "", "")
    assert render_prompt("plain", "Why?", "x") == Prompt("", "Why?\n\nx", "\n")
    assert [answer_turn(name) for name in TEMPLATE_NAMES if name not in ("hh", "chat")] == [("", "", "")] * 2


def test_reversed_target_appends_the_input() -> None:
    assert reversed_target("Add.", "") == "Add."
    assert reversed_target("Add.", "1 2") == "Add.\n\n1 2"


@pytest.mark.parametrize("add_bos", [True, False])
def test_chat_has_bos_exactly_once(add_bos: bool) -> None:
    tokenizer = byte_level_tokenizer(add_bos=add_bos)
    tokenizer.chat_template = CHAT_TEMPLATE
    prompt = render_prompt("chat", "Why?", tokenizer=tokenizer)
    assert prompt.text == ("" if add_bos else BOS) + "<user>Why?<end><assistant>"
    assert tokenizer(prompt.text)["input_ids"].count(tokenizer.bos_token_id) == 1


def test_unknown_templates_and_tokenizers_without_one() -> None:
    with pytest.raises(UserError, match=r"template=alpacca: .* did you mean alpaca\?"):
        render_prompt("alpacca", "Why?")
    with pytest.raises(UserError, match="no chat template"):
        render_prompt("chat", "Why?", tokenizer=byte_level_tokenizer(add_bos=True))
