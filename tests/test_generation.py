"""Generation: a row's text depends on (seed, id, prompt) alone, and equals that of a literal loop of one row."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from config.errors import UserError
from config.settings import THOUGHT_TAGS, GenerationSettings
from safer_instruct.generation.completions import Request, split_thought
from safer_instruct.generation.hf import HFGenerator, nucleus, row_uniforms
from safer_instruct.text.prompts import Prompt

WORDS = [f"w{i}" for i in range(60)]
PAD, BOS, EOS = 0, 1, 2


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 3, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=160, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(12)  # a peaked distribution whose mode moves with the context
        model.model.embed_tokens.weight.mul_(20)
    return model.eval()


def encode(tokenizer, prompt: Prompt) -> list[int]:
    return tokenizer.encode(prompt.text, add_special_tokens=False)


def some_requests(count: int) -> list[Request]:
    random = torch.Generator().manual_seed(5)
    requests = []
    for i in range(count):
        words = torch.randint(0, len(WORDS), (1 + 3 * i % 17,), generator=random).tolist()
        requests.append(Request(f"row{i}", Prompt("w1 ", " ".join(WORDS[w] for w in words), " w2")))
    return requests


@pytest.fixture(scope="module")
def literals() -> dict[tuple, list[int]]:
    """What `literal` has found for the other sizes of a batch, which it knows nothing of."""
    return {}


def literal(model, prompt: list[int], settings: GenerationSettings, id: str) -> list[int]:
    """One row, no padding, no cache: the definition."""
    uniforms = row_uniforms(settings.seed, id, settings.max_new_tokens).tolist()
    tokens: list[int] = []
    while len(tokens) < settings.max_new_tokens and (not tokens or tokens[-1] != EOS):
        with torch.no_grad():
            scores = model(torch.tensor([prompt + tokens])).logits[0, -1]
        if settings.temperature == 0:
            tokens.append(int(scores.argmax()))
            continue
        probabilities = (scores.double() / settings.temperature).softmax(-1).tolist()
        ranked = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])
        kept, mass = set(), 0.0
        for i in ranked:
            if mass >= settings.top_p:
                break
            kept.add(i)
            mass += probabilities[i]
        threshold, running = uniforms[len(tokens)] * mass, 0.0
        for i, probability in enumerate(probabilities):
            running += probability if i in kept else 0.0
            if running > threshold:
                tokens.append(i)
                break
    return tokens


@pytest.mark.parametrize(
    "settings",
    [
        GenerationSettings(max_new_tokens=70),
        GenerationSettings(max_new_tokens=70, temperature=1.0, seed=3),
        GenerationSettings(max_new_tokens=70, temperature=0.7, top_p=0.8, seed=4),
    ],
    ids=["greedy", "temperature", "top_p"],
)
@pytest.mark.parametrize("max_batch_tokens", [1, 400, 100_000])
def test_a_row_is_the_same_in_any_batch(model, tokenizer, literals, settings, max_batch_tokens) -> None:
    settings.max_batch_tokens = max_batch_tokens
    requests = some_requests(23)
    results = {g.id: g for g in HFGenerator(model, tokenizer, settings).generate(requests)}
    assert set(results) == {request.id for request in requests}
    ended = 0
    for request in requests:
        prompt = encode(tokenizer, request.prompt)
        drawn = (settings.temperature, settings.top_p, settings.seed, request.id)
        if drawn not in literals:
            literals[drawn] = literal(model, prompt, settings, request.id)
        expected = literals[drawn]
        got = results[request.id]
        assert got.new_tokens == len(expected)
        assert got.prompt_tokens == len(prompt)
        assert got.truncated == (expected[-1] != EOS)
        assert not got.prompt_cut
        assert got.text == tokenizer.decode(expected, skip_special_tokens=True)
        ended += not got.truncated
    if settings.temperature == 1.0:
        assert 3 <= ended < 23, "the fixture must hold rows that end and rows that do not"


def test_seed_and_id_decide_the_sample(model, tokenizer) -> None:
    prompt = Prompt("w1 ", "w5 w6", " w2")

    def sample(id: str, seed: int) -> str:
        settings = GenerationSettings(max_new_tokens=20, temperature=1.5, seed=seed)
        (generation,) = HFGenerator(model, tokenizer, settings).generate([Request(id, prompt)])
        return generation.text

    assert sample("a", 0) == sample("a", 0)
    assert sample("a", 0) != sample("b", 0)
    assert sample("a", 0) != sample("a", 1)


def test_sampled_frequencies_are_the_models_probabilities(model, tokenizer) -> None:
    settings = GenerationSettings(max_new_tokens=1, temperature=1.3, max_batch_tokens=10**6)
    prompt = Prompt("w1 ", "w5 w6", " w2")
    requests = [Request(str(i), prompt) for i in range(4000)]
    texts = [g.text for g in HFGenerator(model, tokenizer, settings).generate(requests)]
    counts = torch.tensor([texts.count(word) for word in WORDS], dtype=torch.float64)
    with torch.no_grad():
        scores = model(torch.tensor([encode(tokenizer, prompt)])).logits[0, -1].double()
    expected = (scores / 1.3).softmax(-1)[3:]  # the three special tokens leave no text
    error = (counts / 4000 - expected).abs()
    assert (error < 5 * (expected * (1 - expected) / 4000).sqrt() + 2e-3).all()


def test_nucleus_keeps_the_smallest_sufficient_set() -> None:
    probabilities = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]], dtype=torch.float64)
    assert nucleus(probabilities, 0.7).tolist() == [[0.0, 0.5, 0.0, 0.25], [0.97, 0.0, 0.0, 0.0]]


def test_a_long_prompt_loses_its_body_and_says_so(model, tokenizer) -> None:
    long = Request("long", Prompt("w1 ", " ".join(["w7"] * 500), " w2"))
    short = Request("short", Prompt("w1 ", "w7", " w2"))
    generator = HFGenerator(model, tokenizer, GenerationSettings(max_new_tokens=60))
    results = {g.id: g for g in generator.generate([long, short])}
    assert (results["long"].prompt_cut, results["short"].prompt_cut) == (True, False)
    assert results["long"].prompt_tokens == 100  # context 160 - 60


def test_no_room_for_a_prompt_is_the_users_error(model, tokenizer) -> None:
    with pytest.raises(UserError, match=r"generation\.max_new_tokens .* 160, .* 160 tokens"):
        HFGenerator(model, tokenizer, GenerationSettings(max_new_tokens=160))


def test_generation_config_of_the_model_is_respected(model, tokenizer) -> None:
    requests = some_requests(8)
    settings = GenerationSettings(max_new_tokens=40)
    generator = HFGenerator(model, tokenizer, settings)
    plain = " ".join(g.text for g in generator.generate(requests)).split()
    banned = max(set(plain), key=plain.count)
    number = tokenizer.convert_tokens_to_ids(banned)
    before = model.generation_config.suppress_tokens
    try:
        model.generation_config.suppress_tokens = [number]
        for temperature in (0.0, 1.0):
            settings = GenerationSettings(max_new_tokens=40, temperature=temperature)
            texts = [g.text for g in HFGenerator(model, tokenizer, settings).generate(requests)]
            assert banned not in " ".join(texts).split()
    finally:
        model.generation_config.suppress_tokens = before


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_steers_a_choice_is_not_read_from_generation_config(model, tokenizer, temperature) -> None:
    """The values of Qwen's folders, and worse: the texts are those of the weights."""
    settings = GenerationSettings(max_new_tokens=30, temperature=temperature)
    expected = [g.text for g in HFGenerator(model, tokenizer, settings).generate(some_requests(6))]
    before = model.generation_config
    steered = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 2, "top_k": 1, "do_sample": True, "temperature": 0.1}
    model.generation_config = GenerationConfig(**steered, guidance_scale=3.0, num_return_sequences=2)
    try:
        assert [g.text for g in HFGenerator(model, tokenizer, settings).generate(some_requests(6))] == expected
        assert model.generation_config.repetition_penalty == 5.0  # what is saved with the model
    finally:
        model.generation_config = before


def test_training_mode_is_given_back(model, tokenizer) -> None:
    generator = HFGenerator(model, tokenizer, GenerationSettings(max_new_tokens=4))
    model.train()
    try:
        texts: Iterator = generator.generate(some_requests(2))
        assert len(list(texts)) == 2
        assert model.training
    finally:
        model.eval()


def test_prompts_given_as_tokens_are_asked_as_they_are(model, tokenizer) -> None:
    """[w1, pad, w5]: no text encodes to this, so encoding its text again would ask another thing."""
    settings = GenerationSettings(max_new_tokens=12, temperature=1.0, seed=2)
    prompts = {"a": [4, PAD, 8], "b": [5, 6]}
    results = {g.id: g for g in HFGenerator(model, tokenizer, settings).generate_from_tokens(prompts)}
    for id, prompt in prompts.items():
        expected = literal(model, prompt, settings, id)
        assert results[id].text == tokenizer.decode(expected, skip_special_tokens=True)
        assert results[id].prompt_tokens == len(prompt)


ANALYSIS, FINAL = (f"<|channel|>{name}<|message|>" for name in ("analysis", "final"))


@pytest.mark.parametrize(
    ("text", "prompt", "expected"),
    [
        ("plain <b> text", "", ("", "plain <b> text", True)),
        ("<think>a</think>\n\nb", "", ("<think>a</think>", "b", True)),
        ("a</think> b", "<think>\n", ("a</think>", "b", True)),
        ("x</think>y</think>z", "", ("x</think>y</think>", "z", True)),
        ("[THINK]a[/THINK]b", "", ("[THINK]a[/THINK]", "b", True)),
        ("<think>a", "", ("<think>a", "", False)),
        ("a", "Assistant: <think>\n", ("a", "", False)),
        (" leading space", "", ("", " leading space", True)),
        ("<THINK>a</Think>\nb", "", ("<THINK>a</Think>", "b", True)),
        ("a</THINK>b", "<THINK>\n", ("a</THINK>", "b", True)),
        ("<think>a<think>b</think>c</think>d", "", ("<think>a<think>b</think>c</think>", "d", True)),
        ("Sure.<think>a</think>b", "", ("Sure.<think>a</think>", "b", True)),
        ("<reasoning>a</reasoning>b", "", ("<reasoning>a</reasoning>", "b", True)),
        ("\u25c1think\u25b7a\u25c1/think\u25b7b", "", ("\u25c1think\u25b7a\u25c1/think\u25b7", "b", True)),
        ("<think>a</think><answer>\nb\n</answer>", "", ("<think>a</think>", "b", True)),
        ("<answer>b</answer>", "", ("", "<answer>b</answer>", True)),  # without a thought nobody knows what it is
        ("b\n<think>\na", "", ("b\n<think>\na", "", False)),
        ("the tag <think> opens", "", ("", "the tag <think> opens", True)),
        (
            f"{ANALYSIS}a<|end|><|start|>assistant{FINAL}b",
            "",
            (f"{ANALYSIS}a<|end|><|start|>assistant{FINAL}", "b", True),
        ),
        (f"{ANALYSIS}a", "", (f"{ANALYSIS}a", "", False)),
        ("analysisHm.assistantfinalb", "", ("analysisHm.assistantfinal", "b", True)),
        ("analysisHm.", "", ("analysisHm.", "", False)),
        ("analysis of assistantfinal", "", ("", "analysis of assistantfinal", True)),
        (
            "Here is my thought process: a\n\nHere is my response:\n\nb",
            "",
            ("Here is my thought process: a\n\nHere is my response:", "b", True),
        ),
        ("Here's my thought process: a", "", ("Here's my thought process: a", "", False)),
        ("Here is my response: b", "", ("", "Here is my response: b", True)),
    ],
)
def test_a_thought_is_parted_from_its_answer(text, prompt, expected) -> None:
    assert split_thought(text, THOUGHT_TAGS, prompt=prompt) == expected
    assert split_thought(text, [], prompt=prompt) == ("", text, True)


def test_a_local_model_s_thought_is_beside_its_text(model, tokenizer) -> None:
    """Of itself the model writes an ordinary word as the closing one, then the same word as a special one."""
    requests = some_requests(6)
    plain = {g.id: g for g in HFGenerator(model, tokenizer, GenerationSettings(max_new_tokens=20)).generate(requests)}
    words = " ".join(g.text for g in plain.values()).split()
    closing = max(set(words), key=words.count)
    settings = GenerationSettings(max_new_tokens=20, thought_tags=[f"w999 {closing}"])
    special = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=[closing],
    )  # fmt: skip
    for one in (tokenizer, special):
        parted = {g.id: g for g in HFGenerator(model, one, settings).generate(requests)}
        assert any(g.thought for g in parted.values())
        for id, whole in plain.items():
            answer = whole.text.rpartition(closing)[2].split()
            assert parted[id].text.split() == answer
            assert (closing in parted[id].thought) == (closing in whole.text)


def test_nothing_is_deprecated(model, tokenizer) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(HFGenerator(model, tokenizer, GenerationSettings(max_new_tokens=40)).generate(some_requests(3)))
    assert not [one for one in caught if "past_key_values" in str(one.message)]
