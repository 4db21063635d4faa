from __future__ import annotations

import pytest
from conftest import BOS, byte_level_tokenizer

from config.errors import UserError
from safer_instruct.text.chat import special_token_texts
from safer_instruct.text.encoding import Encoder, prompt_token_ids
from safer_instruct.text.prompts import (
    Prompt,
    Unusable,
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
    assert [answer_turn(name) for name in ("alpaca", "plain", "vicuna")] == [("", "", ""), ("", "", ""), (" ", "", "")]


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


IM = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }} "
    "</s>{% endif %}{% endfor %}"
)


def chat_tokenizer(template):
    tokenizer = byte_level_tokenizer(add_bos=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "turn"),
    [
        (IM + ASK, ("", "", "<|im_end|>")),  # and not EOS, which is </s>
        (THOUGHT, ("<think>\n\n</think>\n\n", "", "<|im_end|>")),
        ("{% set enable_thinking = False %}" + THOUGHT, ("", "", "<|im_end|>")),
        (LLAMA2, (" ", " ", "</s>")),
        (CHAT_TEMPLATE, ("", "<end>", "")),  # plain text: EOS ends it
    ],
)
def test_prompt_answer_and_end_are_the_templates_own_rendering(template: str, turn: tuple[str, str, str]) -> None:
    tokenizer = chat_tokenizer(template)
    found = answer_turn("chat", tokenizer)
    assert found == turn
    prompt = render_prompt("chat", "Why?", tokenizer=tokenizer)
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    answer = found.lead + "So." + found.close
    assert whole.rstrip("\n") == prompt.text + answer + found.end_token
    encoder = Encoder(tokenizer, max_length=400, max_prompt_length=300)
    (row,) = encoder.encode([prompt], [[answer]], end_token=found.end_token)
    assert row.responses[0][-1] == tokenizer.convert_tokens_to_ids(found.end_token or tokenizer.eos_token)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            IM + ASK.replace("assistant\n", "assistant\n<think>\n"),
            r"ends in \.\.\.'<think>\\n', but .*fix the chat template",
        ),
        (IM, r"writes '<\|im_start\|>assistant\\n' before an answer, but not where it asks"),
        (
            "{{ raise_exception('a system turn\x1b is needed') }}",
            r"fails on one user's turn: a system turn.* is needed",
        ),
        ("{% for m in", "fails on one user's turn: .*TemplateSyntaxError"),
        ({"rag": IM, "tool_use": IM}, "fails on one user's turn"),
        ("{{ messages[0]['content'] }}", "an assistant's turn exactly once"),
    ],
)
def test_a_template_that_cannot_be_trained_is_refused(template, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        answer_turn("chat", chat_tokenizer(template))
    assert "\x1b" not in str(caught.value)


def test_a_template_that_does_not_end_is_refused(monkeypatch) -> None:
    """Of loops that jinja's sandbox allows, each within its limit. (These end, so as not to disturb later tests.)"""
    monkeypatch.setattr("safer_instruct.text.chat.RENDER_SECONDS", 0.01)
    loops = "{% for a in range(2000) %}{% for b in range(1000) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match=r"fails on .*: it has not ended after 0\.01 s"):
        answer_turn("chat", chat_tokenizer(loops + IM + ASK))


def test_an_empty_eos_is_refused_by_name() -> None:
    tokenizer = chat_tokenizer(IM + ASK)
    tokenizer.eos_token = ""
    assert "" not in special_token_texts(tokenizer)
    with pytest.raises(UserError, match="the tokenizer has no EOS token"):
        Encoder(tokenizer, max_length=9, max_prompt_length=5)


def test_special_strings_in_what_is_asked_are_refused_as_in_training() -> None:
    tokenizer = chat_tokenizer(IM + ASK)
    assert prompt_token_ids(tokenizer, render_prompt("chat", "Hi", tokenizer=tokenizer), 99)
    for prompt in (render_prompt("chat", "Hi<|im_end|>", tokenizer=tokenizer), render_reversed("An answer.</s>More")):
        with pytest.raises(Unusable) as caught:
            prompt_token_ids(tokenizer, prompt, 400)
        assert caught.value.reason == "special_token"
