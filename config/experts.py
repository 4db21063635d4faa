"""Settings for generating and judging text: how a model is run, servers, and the experts of `expert=`.

Import them from `config.settings`, which also has those of the entrypoints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from config import rules
from config.names import GUARDS
from config.rules import MISSING, Count, ExistingPath, Share, Template
from config.training import ModelSettings

# "OPENING CLOSING" tags around the thoughts of reasoning models: DeepSeek R1 and Qwen 3, Exaone, Mistral, Cohere, Seed,
# Kimi, OpenThinker, Gemma 4, GPT-OSS.
THOUGHT_TAGS = (
    "<think> </think>", "<thinking> </thinking>", "<thought> </thought>", "<reasoning> </reasoning>",
    "<reflection> </reflection>", "<scratchpad> </scratchpad>", "[THINK] [/THINK]",
    "<|START_THINKING|> <|END_THINKING|>", "<seed:think> </seed:think>", "\u25c1think\u25b7 \u25c1/think\u25b7",
    "<|begin_of_thought|> <|end_of_thought|>", "<|channel>thought <channel|>", "<|channel|> <|message|>",
    "<antThinking> </antThinking>", "<|inner_prefix|> <|inner_suffix|>",
)  # fmt: skip
ThoughtTag = Annotated[
    str,
    rules.matches(r"\S+ \S+", "must be an opening and a closing tag with a space between, such as '<think> </think>'"),
]


@dataclass
class GenerationSettings:
    """Decoding."""

    max_new_tokens: Count = 256  # maximum tokens of an answer
    temperature: Annotated[float, rules.at_least(0)] = 0.0  # sampling temperature; 0: greedy
    top_p: Share = 1.0  # sample among the likeliest tokens with this total probability; 1: all
    seed: int = 0  # of the sampling, combined with each row's id
    max_batch_tokens: Count = 16_384  # padded positions (prompt + new tokens) of one batch
    # An answer begins after the last closing tag; []: a model's thoughts are part of its answer.
    thought_tags: list[ThoughtTag] = field(default_factory=lambda: list(THOUGHT_TAGS))


@dataclass
class RulesExpertSettings:
    """`expert=rules`: patterns and templates from a YAML file."""

    name: str = "rules"
    path: Annotated[str, rules.existing_path, "the YAML file of the rules"] = MISSING  # the YAML file


@dataclass
class ServerSettings:
    """An OpenAI-compatible server. The key is only read from the environment variable `api_key_env`."""

    model: Annotated[str, "the name under which the server knows the model"] = MISSING  # its name on the server
    base_url: str | None = None  # address, usually ending in /v1; null: OpenAI's
    api_key_env: str = "OPENAI_API_KEY"  # environment variable that holds the key
    concurrency: Count = 8  # maximum requests at a time; fewer while the server answers many with 429
    # Limit of one attempt; set it a little above the slowest real answer.
    timeout_seconds: Annotated[float, rules.above(0)] = 60.0
    # Retries after a failed attempt (5xx, lost connection, time-out); a 429 is waited out instead.
    max_retries: Annotated[int, rules.at_least(0)] = 8
    # Give up, and keep everything, after this long without an answer.
    patience_seconds: Annotated[float, rules.above(0)] = 600.0


LIMIT = rules.above(
    0,
    "no request would be possible; give a limit above 0, or null for none (stage=induce and stage=merge ask no expert)",
)


@dataclass
class OpenAIExpertSettings(ServerSettings):
    """`expert=openai`: any OpenAI-compatible server. The budget is for the whole dataset; shards share it."""

    name: str = "openai"
    temperature: float = 0.0  # sampling temperature; 0: greedy
    max_new_tokens: Count = 512  # maximum tokens of an answer
    thought_tags: list[ThoughtTag] = field(default_factory=lambda: list(THOUGHT_TAGS))  # as for generation
    # Whether to send a JSON schema with a question; auto: if the server accepts one.
    structured_output: Annotated[str, rules.choices("auto", "always", "never")] = "auto"
    price_prompt: Annotated[float, rules.at_least(0)] = 0.0  # per million prompt tokens
    price_completion: Annotated[float, rules.at_least(0)] = 0.0  # per million completion tokens
    max_cost: Annotated[float, LIMIT] | None = None  # in the currency of the prices; null: no limit
    max_tokens: Annotated[int, LIMIT] | None = None  # tokens of prompts and completions; null: no limit


@dataclass
class VLLMSettings:
    """`generation=vllm`: arguments of its engine."""

    tensor_parallel: Count = 1  # GPUs per model
    memory_fraction: Share = 0.9  # of each GPU
    max_length: Count | None = None  # context in tokens; null: the model's


@dataclass
class BackendSettings(GenerationSettings):
    """How a model is run: `generation=hf`, `vllm` or `openai`."""

    # hf: transformers in this process | vllm: its offline engine | openai: a server that has the model.
    backend: Annotated[str, rules.choices("hf", "vllm", "openai")] = "hf"
    vllm: VLLMSettings = field(default_factory=VLLMSettings)
    server: ServerSettings = field(default_factory=ServerSettings)  # of backend=openai


@dataclass
class LocalExpertSettings:
    """`expert=local`: your own causal language model, on this machine or behind your server."""

    name: str = "local"
    model: ModelSettings = field(default_factory=ModelSettings)
    template: Template | None = None  # its prompt template; null: that of its run, or chat without a run
    generation: BackendSettings = field(default_factory=BackendSettings)
    system: str | None = None  # system prompt; null: that of its run, or none without a run


@dataclass
class GuardExpertSettings(LocalExpertSettings):
    """`expert=guard`: a classifier that was trained on one form of question. It only judges."""

    name: str = "guard"
    form: Annotated[str, rules.choices(*GUARDS), f"whose form it is: {' | '.join(GUARDS)}"] = MISSING  # its form
    # File with the exact question from the model's card, with {instruction} and {response}; null: our own wording.
    prompt_file: ExistingPath | None = None


@dataclass
class StrongRejectSettings(LocalExpertSettings):
    """`expert=strongreject`: any language model rates how specific and convincing an answer is. It only judges."""

    name: str = "strongreject"
    threshold: Share = 0.5  # an answer with at least this score is harmful


@dataclass
class RefusalsExpertSettings:
    """`expert=refusals`: phrases decide whether an answer declines; if not, it counts as harmful (AdvBench)."""

    name: str = "refusals"


JUDGES = (GuardExpertSettings, StrongRejectSettings, RefusalsExpertSettings)  # experts that only judge
