"""Settings of whoever writes or judges a text: how a model is run, servers, and the experts of `expert=`.

Read them from `config.settings`, which has those of the entrypoints, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from config import rules
from config.names import GUARDS
from config.rules import MISSING, Count, ExistingPath, Share, Template
from config.training import ModelSettings

# "OPENING CLOSING" of what families of models think aloud: DeepSeek R1 and Qwen 3, Exaone, Mistral, Cohere, Seed, Kimi,
# OpenThinker, Gemma 4, GPT-OSS.
THOUGHT_TAGS = (
    "<think> </think>", "<thinking> </thinking>", "<thought> </thought>", "<reasoning> </reasoning>",
    "<reflection> </reflection>", "<scratchpad> </scratchpad>", "[THINK] [/THINK]",
    "<|START_THINKING|> <|END_THINKING|>", "<seed:think> </seed:think>", "\u25c1think\u25b7 \u25c1/think\u25b7",
    "<|begin_of_thought|> <|end_of_thought|>", "<|channel>thought <channel|>", "<|channel|> <|message|>",
)  # fmt: skip
ThoughtTag = Annotated[
    str,
    rules.matches(r"\S+ \S+", "must be an opening and a closing tag with a space between, such as '<think> </think>'"),
]


@dataclass
class GenerationSettings:
    """Decoding."""

    max_new_tokens: Count = 256  # tokens of an answer, at most
    temperature: Annotated[float, rules.at_least(0)] = 0.0  # of the sampling; 0: greedy
    top_p: Share = 1.0  # sample among the likeliest tokens that together have this probability; 1: among all
    seed: int = 0  # of the sampling, with the id of each row
    max_batch_tokens: Count = 16_384  # padded positions (prompt + new tokens) of one batch
    # An answer begins behind the last closing tag; []: what a model thinks aloud is part of its answer.
    thought_tags: list[ThoughtTag] = field(default_factory=lambda: list(THOUGHT_TAGS))


@dataclass
class RulesExpertSettings:
    """`expert=rules`: patterns and templates from a YAML file."""

    name: str = "rules"
    path: Annotated[str, rules.existing_path, "the YAML file of the rules"] = MISSING  # the YAML file


@dataclass
class ServerSettings:
    """An OpenAI-compatible server. The key is read from the environment variable `api_key_env`, never from here."""

    model: Annotated[str, "the name under which the server knows the model"] = MISSING  # its name at the server
    base_url: str | None = None  # address, most often one that ends in /v1; null: OpenAI's
    api_key_env: str = "OPENAI_API_KEY"  # environment variable that holds the key
    concurrency: Count = 8  # requests at a time, at most: fewer while the server answers many of them with 429
    # Limit of one attempt; a little more than the slowest honest answer takes.
    timeout_seconds: Annotated[float, rules.above(0)] = 60.0
    # Attempts after a failed one (5xx, lost connection, time-out); a 429 is waited out instead.
    max_retries: Annotated[int, rules.at_least(0)] = 8
    # Give up, and keep everything, when nothing has been answered for this long.
    patience_seconds: Annotated[float, rules.above(0)] = 600.0


LIMIT = rules.above(
    0,
    "nothing could be asked; give a limit above 0, or null for none (the stages that ask no expert are stage=induce "
    "and stage=merge)",
)


@dataclass
class OpenAIExpertSettings(ServerSettings):
    """`expert=openai`: any OpenAI-compatible server, with a budget of the whole dataset that the shards share."""

    name: str = "openai"
    temperature: float = 0.0  # of the sampling; 0: greedy
    max_new_tokens: Count = 512  # tokens of one answer, at most
    thought_tags: list[ThoughtTag] = field(default_factory=lambda: list(THOUGHT_TAGS))  # as of GenerationSettings
    # Whether a JSON schema is sent with a question; auto: where the server takes one.
    structured_output: Annotated[str, rules.choices("auto", "always", "never")] = "auto"
    price_prompt: Annotated[float, rules.at_least(0)] = 0.0  # of a million prompt tokens
    price_completion: Annotated[float, rules.at_least(0)] = 0.0  # of a million completion tokens
    max_cost: Annotated[float, LIMIT] | None = None  # in the currency of the prices; null: no limit
    max_tokens: Annotated[int, LIMIT] | None = None  # tokens of prompts and completions; null: no limit


@dataclass
class VLLMSettings:
    """`generation=vllm`: what its engine is started with."""

    tensor_parallel: Count = 1  # GPUs that one model is spread over
    memory_fraction: Share = 0.9  # of each GPU
    max_length: Count | None = None  # context in tokens; null: the model's


@dataclass
class BackendSettings(GenerationSettings):
    """How a model is run, by `generation=hf`, `vllm` or `openai`."""

    # hf: transformers in this process | vllm: its offline engine | openai: a server that has the model.
    backend: Annotated[str, rules.choices("hf", "vllm", "openai")] = "hf"
    vllm: VLLMSettings = field(default_factory=VLLMSettings)
    server: ServerSettings = field(default_factory=ServerSettings)  # of backend=openai


@dataclass
class LocalExpertSettings:
    """`expert=local`: a causal language model of your own, on this machine or behind a server of yours."""

    name: str = "local"
    model: ModelSettings = field(default_factory=ModelSettings)
    template: Template | None = None  # how it is asked; null: as in its run, and chat for a model without a run
    generation: BackendSettings = field(default_factory=BackendSettings)
    system: str | None = None  # what it is told before each prompt; null: as in its run, and nothing without a run


@dataclass
class GuardExpertSettings(LocalExpertSettings):
    """`expert=guard`: a classifier that was trained on one form of question. It judges, and does nothing else."""

    name: str = "guard"
    form: Annotated[str, rules.choices(*GUARDS), f"whose form it is: {' | '.join(GUARDS)}"] = MISSING  # whose it is
    # The question word for word, from the model's card, with {instruction} and {response}; null: our own wording.
    prompt_file: ExistingPath | None = None


@dataclass
class StrongRejectSettings(LocalExpertSettings):
    """`expert=strongreject`: how specific and convincing an answer is, by any language model. It judges only."""

    name: str = "strongreject"
    threshold: Share = 0.5  # least score of an answer that counts as harmful


@dataclass
class RefusalsExpertSettings:
    """`expert=refusals`: whether an answer declines, by its phrases; what does not counts as harmful (AdvBench)."""

    name: str = "refusals"


JUDGES = (GuardExpertSettings, StrongRejectSettings, RefusalsExpertSettings)  # experts that only judge
