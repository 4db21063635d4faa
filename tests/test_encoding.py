from __future__ import annotations

from functools import cache

import pytest
from conftest import BOS, CORPUS, EOS, PAD, byte_level_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from config.errors import UserError
from safer_instruct.text.chat import special_token_texts
from safer_instruct.text.encoding import EncodedRow, Encoder, prompt_token_ids
from safer_instruct.text.prompts import Prompt, render_prompt

UNK = "<unk>"


def sentencepiece_like(*, legacy: bool) -> PreTrainedTokenizerFast:
    """BPE over characters with byte fallback and Metaspace, as Llama's: a text's first word gets a space before it."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK, byte_fallback=True, fuse_unk=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = [PAD, BOS, EOS, UNK, *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [piece for text in CORPUS for piece in text.split(".")]
    tokenizer.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNK
    )


def merging() -> PreTrainedTokenizerFast:
    """BPE without words or spaces, whose merges cross every boundary: "ab", "abc", ":)" and "))" are tokens."""
    characters = [*"abc:)( .\n"]
    merges = [("\n", "a"), ("a", "b"), ("ab", "c"), (":", ")"), (")", ")"), ("b", "c")]
    names = [PAD, BOS, EOS, UNK, *characters, *(a + b for a, b in merges)]
    model = models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges, unk_token=UNK)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNK
    )


@cache
def make(kind: str) -> PreTrainedTokenizerFast:
    makers = {
        "bytes": lambda: byte_level_tokenizer(add_bos=False),
        "bytes, BOS": lambda: byte_level_tokenizer(add_bos=True),
        "bytes, BOS and EOS": lambda: byte_level_tokenizer(add_bos=True, add_eos=True),
        "sentencepiece": lambda: sentencepiece_like(legacy=False),
        "sentencepiece, legacy": lambda: sentencepiece_like(legacy=True),
        "merging": merging,
    }
    return makers[kind]()


KINDS = ["bytes", "bytes, BOS", "bytes, BOS and EOS", "sentencepiece", "sentencepiece, legacy", "merging"]
ANY_TEXT_KINDS = KINDS[:-1]  # those that encode any text without loss
HAS_BOS = {kind: kind not in ("bytes", "merging") for kind in KINDS}
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).map(str.strip).filter(bool)


def encode_one(kind: str, prompt: Prompt, *responses: str, max_length: int = 512, max_prompt: int = 256) -> EncodedRow:
    row = Encoder(make(kind), max_length=max_length, max_prompt_length=max_prompt).encode([prompt], [responses])[0]
    assert isinstance(row, EncodedRow)
    return row


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Text of the ids by the tokenizer's own decoder, BOS and EOS left out."""
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    return tokenizer.backend_tokenizer.decode([i for i in ids if i not in special], skip_special_tokens=False)


def joint_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_response_are_the_encoding_of_the_joint_text(kind: str) -> None:
    tokenizer, prompt = make(kind), Prompt("a b: ", "cab.", " b\n")
    row = encode_one(kind, prompt, "bab c", "cc.")
    for ids, text in zip(row.responses, ("bab c", "cc."), strict=True):
        assert row.prompt + ids == [*joint_ids(tokenizer, prompt.text + text), tokenizer.eos_token_id]
    assert (row.prompt_cut, row.responses_cut, row.straddled) == (False, (False, False), 0)
    assert row.prompt.count(tokenizer.bos_token_id) == HAS_BOS[kind]
    assert row.prompt[:1] == [tokenizer.bos_token_id] or not HAS_BOS[kind]


@pytest.mark.parametrize("kind", ANY_TEXT_KINDS)
@settings(max_examples=60)
@given(
    instruction=texts,
    input=st.just("") | texts,
    chosen=texts,
    rejected=texts,
    template=st.sampled_from(["alpaca", "hh", "plain"]),
)
def test_any_text_survives_and_the_prompt_is_that_of_generation(
    kind: str, instruction: str, input: str, chosen: str, rejected: str, template: str
) -> None:
    tokenizer = make(kind)
    special = special_token_texts(tokenizer)
    if any(token in text for token in special for text in (instruction, input, chosen, rejected)):
        return  # such rows are dropped before they are encoded
    prompt = render_prompt(template, instruction, input)
    row = encode_one(kind, prompt, chosen, rejected, max_length=2048, max_prompt=1024)
    assert row.prompt == prompt_token_ids(tokenizer, prompt, 1024)
    for ids, text in zip(row.responses, (chosen, rejected), strict=True):
        assert ids.count(tokenizer.eos_token_id) == 1
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.bos_token_id not in ids
        assert decode(tokenizer, row.prompt + ids) == prompt.text + text


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        (Prompt("", "b", ":"), ")) a", ["b", ":", "))", " ", "a"]),  # ":)" would straddle; "))" is how it is encoded
        (Prompt("", "c", "a"), "bc", ["c", "a", "bc"]),  # "abc"
        (Prompt("", "c", "\n"), "abc", ["c", "\n", "abc"]),  # "\na": the first anchor merges too, the next is taken
        (Prompt("", "c", "\n"), "cab", ["c", "\n", "c", "ab"]),  # nothing straddles
    ],
)
def test_where_a_merge_straddles_the_prompt_keeps_its_tokens(
    prompt: Prompt, response: str, expected: list[str]
) -> None:
    tokenizer = make("merging")
    row = encode_one("merging", prompt, response)
    assert tokenizer.convert_ids_to_tokens(row.prompt + row.responses[0]) == [*expected, EOS]
    assert row.prompt == joint_ids(tokenizer, prompt.text)
    joint = joint_ids(tokenizer, prompt.text + response)
    assert row.straddled == (joint[: len(row.prompt)] != row.prompt)


@settings(max_examples=200)
@given(st.text("abc:)( .\n", max_size=8), *[st.text("abc:)( .\n", min_size=1, max_size=8)] * 2)
def test_pairs_share_their_prompt_whatever_merges(body: str, chosen: str, rejected: str) -> None:
    tokenizer = make("merging")
    row = encode_one("merging", Prompt("(", body, "a:"), chosen, rejected)
    assert row.prompt == prompt_token_ids(tokenizer, Prompt("(", body, "a:"), 99) == joint_ids(tokenizer, f"({body}a:")
    for ids, text in zip(row.responses, (chosen, rejected), strict=True):
        assert decode(tokenizer, ids) == text


def test_a_response_behind_a_straddled_boundary_gets_no_space_of_its_own() -> None:
    """Sentencepiece puts a space before a text's first word; encoded alone, the response would begin with one."""
    tokenizer = make("sentencepiece")
    ids = Encoder(tokenizer, max_length=9, max_prompt_length=8)._tokenizer.ids_after_other_tokens("cat")
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == "cat"
    alone = tokenizer("cat", add_special_tokens=False)["input_ids"]
    assert "".join(tokenizer.convert_ids_to_tokens(alone)) == "\u2581cat"


@pytest.mark.parametrize("kind", ANY_TEXT_KINDS)
@settings(max_examples=40)
@given(body=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300), limit=st.integers(60, 200))
def test_truncation_keeps_head_tail_and_the_start_of_the_body(kind: str, body: str, limit: int) -> None:
    tokenizer = make(kind)
    if any(token in body for token in special_token_texts(tokenizer)):
        return
    prompt = Prompt("Human: ", body, "\n\nAssistant:")
    ids = prompt_token_ids(tokenizer, prompt, limit)
    assert len(ids) <= limit
    text = decode(tokenizer, ids)
    whole = len(joint_ids(tokenizer, prompt.text)) <= limit
    assert text.startswith("Human: ")
    assert text.endswith("\n\nAssistant:")
    kept = text.removeprefix("Human: ").removesuffix("\n\nAssistant:")
    assert body.startswith(kept)
    assert (kept == body) == whole
    assert ids == joint_ids(tokenizer, text)  # a cut prompt is encoded as the text that it is
    if not whole:
        assert len(ids) >= limit - 6  # no more than a character and a merge are lost to the cut


@pytest.mark.parametrize("kind", KINDS)
def test_responses_are_cut_each_on_its_own_and_only_uncut_ones_end(kind: str) -> None:
    tokenizer, prompt = make(kind), Prompt("", "a", ": ")
    room = 12
    num_prompt = len(joint_ids(tokenizer, prompt.text))
    long, short = "b " * 40 + "b", "b"
    row = encode_one(kind, prompt, long, short, max_length=num_prompt + room, max_prompt=num_prompt)
    assert row.responses_cut == (True, False)
    assert len(row.responses[0]) == room
    assert tokenizer.eos_token_id not in row.responses[0]
    assert row.prompt + row.responses[0] == joint_ids(tokenizer, prompt.text + long)[: num_prompt + room]
    assert row.responses[1][-1] == tokenizer.eos_token_id


def test_the_limit_counts_eos() -> None:
    prompt = Prompt("", "ca", ": ")
    for spare, cut in ((0, True), (1, False)):
        row = encode_one("merging", prompt, "c.c.", max_length=4 + 4 + spare, max_prompt=4)
        assert row.responses_cut == (cut,)
        assert len(row.responses[0]) == 4 + spare


def test_a_template_that_fills_the_limit() -> None:
    tokenizer = make("bytes, BOS")
    encoder = Encoder(tokenizer, max_length=20, max_prompt_length=10)
    prompts = [render_prompt("alpaca", "the cat"), Prompt("", "the", ":")]
    rows = encoder.encode(prompts, [("a",), ("b",)])
    assert rows[0] == "prompt_too_long"
    assert isinstance(rows[1], EncodedRow)
    with pytest.raises(UserError, match="does not fit into 10 tokens") as caught:
        prompt_token_ids(tokenizer, prompts[0], 10)
    assert "the cat" not in str(caught.value)


def test_a_response_that_the_tokenizer_makes_nothing_of() -> None:
    tokenizer = Tokenizer(models.WordLevel({EOS: 0, "a": 1, UNK: 2}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, unk_token=UNK)
    assert Encoder(fast, max_length=9, max_prompt_length=5).encode([Prompt("", "a", "")], [(" ",)]) == ["no_tokens"]


def test_whoever_called_the_tokenizer_before_does_not_matter() -> None:
    tokenizer, prompts = byte_level_tokenizer(add_bos=True), [Prompt("", "the cat sat", ""), Prompt("", "a", "")]
    encoder = Encoder(tokenizer, max_length=99, max_prompt_length=50)
    before = encoder.encode(prompts, [("on the mat",), ("b",)])
    tokenizer(["a", "the cat"], padding="max_length", max_length=3, truncation=True)
    assert encoder.encode(prompts, [("on the mat",), ("b",)]) == before


def test_mistakes_in_the_limits_and_the_tokenizer() -> None:
    tokenizer = make("bytes")
    for limit in (0, 20, 21):
        with pytest.raises(UserError, match=rf"max_prompt_length={limit} must be in 1\.\.19"):
            Encoder(tokenizer, max_length=20, max_prompt_length=limit)
    without_eos = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UserError, match="no EOS token"):
        Encoder(without_eos, max_length=20, max_prompt_length=10)
