"""Chat templates of model families, in the forms that are published with them, and tokenizers that have their tokens.

Written anew and short: without tools, pictures and dates that change, so that a rendering is the published one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from conftest import byte_level_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast


class Family(NamedTuple):
    """A family's template and tokens, and what a question and its answer look like by its documentation.

    Attributes:
        template: Jinja.
        tokens: Special tokens beside BOS and EOS.
        eos: The tokenizer's EOS, which is not always what ends a turn.
        asked: The prompt of the question "Why?", written out; None: no answer can be trained behind it.
        answered: What is trained for the answer "So.", written out.
        bos: The tokenizer's BOS, None where there is none.
        adds_bos: Whether the tokenizer puts BOS before a text.
        variables: Of `model.chat_template_kwargs`.
        pieces: A tokenizer of sentencepiece's kind.
    """

    template: str
    tokens: tuple[str, ...]
    eos: str
    asked: str | None
    answered: str = ""
    bos: str | None = None
    adds_bos: bool = False
    variables: dict[str, Any] = {}  # noqa: RUF012 - never changed
    pieces: bool = False


def chatml(system: str = "", sep: str = "\n", end: str = "\n") -> str:
    """ChatML with the sentence that stands in the place of a system prompt, and what follows role and turn."""
    default = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system" + sep + system + "<|im_end|>" + end + "{% endif %}"
    )
    return (
        (default if system else "")
        + ("{% for m in messages %}<|im_start|>{{ m['role'] }}" + sep + "{{ m['content'] }}<|im_end|>" + end)
        + ("{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant" + sep + "{% endif %}")
    )


IM = ("<|im_start|>", "<|im_end|>")
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% set told = messages[0]['content'] | trim if messages[0]['role'] == 'system' else '' %}"
    "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: "
    "{{ date_string }}\n\n{{ told }}<|eot_id|>{% for m in messages if m['role'] != 'system' %}<|start_header_id|>"
    "{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def deepseek(text: str) -> str:
    """DeepSeek writes its tokens with a bar and blanks of its own."""
    return text.replace("|", "\uff5c").replace("_of_", "\u2581of\u2581")


R1 = deepseek(
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}<|User|>{{ m['content'] }}{% else %}<|Assistant|>"
    "{{ m['content'].split('</think>')[-1] }}<|end_of_sentence|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>THOUGHT{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set told = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set told = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ told if loop.first }}"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL3 = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('After the optional system message, conversation roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]{% else %} {{ m['content'] | trim }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
OLMO2 = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '' if loop.last and m['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GRANITE = (
    "{% for m in messages %}<|start_of_role|>{{ m['role'] }}<|end_of_role|>{{ m['content'] }}<|end_of_text|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
GPT_OSS = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "\nReasoning: medium\n\n# Valid channels: analysis, commentary, final. Channel must be included for every message."
    "<|end|>{% for m in messages %}{% if m.role == 'system' %}<|start|>developer<|message|># Instructions\n\n"
    "{{ m.content }}\n\n<|end|>{% elif m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>{% else %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
OSS_HEAD = GPT_OSS[: GPT_OSS.index("{%")]

PHI3_TOKENS = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
QWEN3_ASKED = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
NO_THOUGHT = "<think>\n\n</think>\n\n"
R1_BOS, R1_EOS = deepseek("<|begin_of_sentence|>"), deepseek("<|end_of_sentence|>")
R1_TOKENS = (deepseek("<|User|>"), deepseek("<|Assistant|>"))

FAMILIES = {
    "llama 3": Family(
        LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|end_of_text|>",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "So.<|eot_id|>", bos="<|begin_of_text|>", adds_bos=True, variables={"date_string": "26 Jul 2024"},
    ),
    "qwen 2.5": Family(
        chatml(QWEN), IM, "<|endoftext|>", f"<|im_start|>system\n{QWEN}<|im_end|>\n{QWEN3_ASKED}", "So.<|im_end|>"
    ),
    "qwen 3": Family(QWEN3, IM, "<|endoftext|>", QWEN3_ASKED, f"{NO_THOUGHT}So.<|im_end|>"),
    "qwen 3, not thinking": Family(
        QWEN3, IM, "<|endoftext|>", QWEN3_ASKED + NO_THOUGHT, "So.<|im_end|>", variables={"enable_thinking": False}
    ),
    "r1": Family(R1.replace("THOUGHT", "<think>\n"), R1_TOKENS, R1_EOS, asked=None, bos=R1_BOS, adds_bos=True),
    "r1, as first published": Family(  # before the thought was opened for the model
        R1.replace("THOUGHT", ""), R1_TOKENS, R1_EOS, f"{R1_BOS}{R1_TOKENS[0]}Why?{R1_TOKENS[1]}", f"So.{R1_EOS}",
        bos=R1_BOS, adds_bos=True,
    ),
    "gemma 3": Family(
        GEMMA3, ("<start_of_turn>", "<end_of_turn>"), "<eos>",
        "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n", "So.<end_of_turn>", bos="<bos>",
        adds_bos=True,
    ),
    "phi 3": Family(
        PHI3, PHI3_TOKENS, "<|endoftext|>", "<|user|>\nWhy?<|end|>\n<|assistant|>\n", "So.<|end|>"
    ),
    "phi 4": Family(
        chatml(sep="<|im_sep|>", end=""), (*IM, "<|im_sep|>"), "<|endoftext|>",
        "<|im_start|>user<|im_sep|>Why?<|im_end|><|im_start|>assistant<|im_sep|>", "So.<|im_end|>",
    ),
    "mistral v3": Family(
        MISTRAL3, ("[INST]", "[/INST]"), "</s>", "<s>[INST] Why?[/INST]", " So.</s>", bos="<s>", adds_bos=True,
        pieces=True,
    ),
    "smollm 2": Family(
        chatml(SMOLLM), IM, "<|im_end|>", f"<|im_start|>system\n{SMOLLM}<|im_end|>\n{QWEN3_ASKED}", "So.<|im_end|>",
        bos="<|im_start|>",
    ),
    "olmo 2": Family(  # roles are plain text, and one token begins and ends
        OLMO2, (), "<|endoftext|>", "<|endoftext|><|user|>\nWhy?\n<|assistant|>\n", "So.<|endoftext|>",
        bos="<|endoftext|>",
    ),
    "granite 3": Family(
        GRANITE, ("<|start_of_role|>", "<|end_of_role|>"), "<|end_of_text|>",
        "<|start_of_role|>user<|end_of_role|>Why?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
        "So.<|end_of_text|>", bos="<|end_of_text|>",
    ),
    "gpt-oss": Family(
        GPT_OSS, ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>"), "<|return|>",
        f"{OSS_HEAD}<|start|>user<|message|>Why?<|end|><|start|>assistant",
        "<|channel|>final<|message|>So.<|return|>", bos="<|startoftext|>",
    ),
}  # fmt: skip


def build_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A small tokenizer with the special tokens of a family, its BOS and its template."""
    tokenizer = sentencepiece_like() if family.pieces else byte_level_tokenizer(add_bos=False)
    # Phi 3 reads blanks behind its special tokens as part of them.
    added = [AddedToken(token, rstrip=family.template is PHI3, special=True) for token in family.tokens]
    ends = {"eos_token": family.eos} | ({"bos_token": family.bos} if family.bos else {})
    tokenizer.add_special_tokens({**ends, "additional_special_tokens": added})
    if not family.bos:
        tokenizer.bos_token = None
    if family.adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, tokenizer.bos_token_id)]
        )
    tokenizer.chat_template = family.template
    return tokenizer


def sentencepiece_like(texts: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Llama 2's kind: a blank becomes a mark, also before the first word, bytes as a fallback, BOS before each text."""
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    corpus = ["".join(chr(c) for c in range(33, 127)), "the cat sat on the mat", *texts]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", "<s>", "</s>", *alphabet]
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=420, special_tokens=specials, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
