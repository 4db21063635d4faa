"""Every setting of the three entrypoints, as plain dataclasses: no Hydra here, so that any module may import them.

A key of the command line is a field here: `python train.py lr=1e-6 model.policy_dtype=bfloat16` sets
`TrainConfig.lr` and `TrainConfig.model.policy_dtype`. Annotations carry the rules of single values (`config/rules.py`);
what does not fit together is in `config/checks*.py`. Defaults of the groups (`model=`, `loss=`, `datasets=`, `expert=`)
are in the YAML files beside. Keys of the DPO repo keep their names and meanings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from config import rules
from config.benign import BenignSettings, ContrastSettings, ReplaySettings
from config.losses import (  # noqa: F401 - the settings of train.py are read from here, too
    LOSSES,
    AnswerLossSettings,
    DPOSettings,
    IPOSettings,
    KTOSettings,
    LikelihoodLossSettings,
    LossSettings,
    MixtureSettings,
    ReverseSettings,
    SFTSettings,
    part_settings,
    weighted_parts,
)
from config.names import BENIGN_STAGES, FORMATS, STAGES
from config.pair_losses import MarginLossSettings, PairLossSettings, PreferenceLossSettings  # noqa: F401 - as above
from config.review import CardSettings, ReviewSettings
from config.rules import MISSING, BadRow, Count, DataPath, Device, Dtype, ExistingPath, PromptKind, Share, Template
from config.scale import EngineSettings, ShardSettings
from config.training import (  # noqa: F401 - as above
    CheckpointSettings,
    DatasetSettings,
    EarlyStopSettings,
    EMASettings,
    LoraSettings,
    ModelSettings,
    ReferenceSettings,
    TrainConfig,
    TrainerSettings,
    WandbSettings,
)

# "OPENING CLOSING" of what families of models think aloud: DeepSeek R1 and Qwen 3, Mistral, Cohere, Seed, GPT-OSS.
THOUGHT_TAGS = (
    "<think> </think>", "<thinking> </thinking>", "[THINK] [/THINK]", "<|START_THINKING|> <|END_THINKING|>",
    "<seed:think> </seed:think>", "<|channel|> <|message|>",
)  # fmt: skip
ThoughtTag = Annotated[
    str,
    rules.matches(r"\S+ \S+", "must be an opening and a closing tag with a space between, such as '<think> </think>'"),
]


Rate = Annotated[float, rules.above(0)]


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
class CorpusSettings:
    """The unsafe responses."""

    path: DataPath = MISSING  # CSV, JSON, JSONL, Parquet, or a folder of `datasets`
    response_column: str = "response"  # column of the text, or of conversations whose last answer it is
    label_column: str | None = None  # column of the category; null: `label` where there is one
    id_column: str | None = None  # column that names a row; null: a hash of the response
    columns: dict[str, str] = field(default_factory=dict)  # our name of a column -> the file's: {response: text}
    max_rows: Count | None = None  # read this many rows from the start; null: all
    on_bad_row: BadRow = "drop"  # drop: skip the row and count it | error: stop


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
    template: Template = "chat"  # how it is asked
    generation: BackendSettings = field(default_factory=BackendSettings)


@dataclass
class InductionSettings(BackendSettings):
    """How the reversed model is run."""

    num_candidates: Count = 1  # instructions of each response, of which the round-trip score keeps the best


@dataclass
class RoundTripSettings:
    """A forward model that scores how much an instruction explains its response (nats per token); off without one."""

    model: ModelSettings = field(default_factory=ModelSettings)  # a model that follows instructions
    template: Template = "alpaca"  # how it is asked
    threshold: float | None = None  # least score of a pair that the expert is asked about; null: no such line
    top_fraction: Share | None = None  # instead: the best part of all pairs of all shards; null: no such line
    max_length: Annotated[int, rules.at_least(2)] = 1024  # tokens of prompt + response; a longer pair has no score
    max_batch_tokens: Count = 8192  # padded positions of one batch


@dataclass
class RespondSettings:
    """The safe responses."""

    # Largest share of the rows with one and the same response; those beyond it are asked again. null: no such line.
    max_same: Share | None = None


@dataclass
class DuplicatesSettings:
    """Pairs that nearly repeat an earlier one, in the order of the corpus; exact repetitions always go."""

    threshold: Share | None = 0.8  # Jaccard index of the word pairs of instruction + response; null: keep them
    # What DuckDB may hold before it spills to the output folder: memory: 1 GB | disk: 128 MB.
    index: Annotated[str, rules.choices("memory", "disk")] = "memory"


@dataclass
class InduceConfig:
    """`induce.py`: from a corpus of unsafe responses to a preference dataset."""

    output: Annotated[str, "the folder to write"] = MISSING  # the dataset folder, or that of stage=audit's report
    # all: those with ledgers, and merge where there is one shard. docs/scale.md tells of the others.
    stage: Annotated[str, rules.choices("all", *STAGES, "merge", "status", "audit", "review", *BENIGN_STAGES)] = "all"
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    model: ModelSettings = field(default_factory=ModelSettings)  # the reversed model; stage=replay: the starting model
    expert: Annotated[Any, "one of rules, local, openai"] = MISSING  # who filters, responds and contrasts, by `expert=`
    generation: InductionSettings = field(default_factory=InductionSettings)
    roundtrip: RoundTripSettings = field(default_factory=RoundTripSettings)
    respond: RespondSettings = field(default_factory=RespondSettings)
    shard: ShardSettings = field(default_factory=ShardSettings)
    # Files of the dataset: JSONL | Parquet | all: both, and a folder for datasets.load_from_disk.
    format: Annotated[str, rules.choices(*FORMATS)] = "all"
    exclude: ExistingPath | None = None  # file of prompts whose instructions are kept out of the dataset; null: none
    exclude_similarity: Share | None = 0.6  # so similar to one of them is left out, too; null: exact matches only
    duplicates: DuplicatesSettings = field(default_factory=DuplicatesSettings)
    push_to_hub: rules.HubName | None = None  # USER/NAME: upload the merged dataset, privately; null: nothing
    card: CardSettings = field(default_factory=CardSettings)
    # stage=audit, replay, contrast, review: any file or folder in the schema of `si`; null: review takes output.
    path: ExistingPath | None = None
    review: ReviewSettings = field(default_factory=ReviewSettings)
    # Files exported from pages of stage=review: stage=audit measures by them, stage=merge leaves out what they reject.
    reviews: list[ExistingPath] = field(default_factory=list)
    benign: BenignSettings = field(default_factory=BenignSettings)
    replay: ReplaySettings = field(default_factory=ReplaySettings)
    contrast: ContrastSettings = field(default_factory=ContrastSettings)
    max_same_chosen: Count | None = None  # stage=audit: rows that it keeps of one safe response; null: all
    engine: EngineSettings = field(default_factory=EngineSettings)  # which processes do the shards
    # Count rows, tokens, calls, cost and hours of what is left to do, and stop before any model is loaded or asked.
    dry_run: bool = False
    rate: dict[str, Rate] = field(default_factory=dict)  # dry_run: rows a second of a process: rate.induce=60
    device: Device = "auto"  # auto: a GPU if there is one | cpu | cuda | cuda:1
    log_text: bool = False  # print some pairs at the end


@dataclass
class PromptSetSettings:
    """One set of evaluation prompts."""

    path: DataPath = MISSING  # file of the prompts
    source: str | None = None  # where all of them stem from; null: a column of the file, or else the name of the set
    source_column: str | None = None  # column of the file that names the source; null: `source`
    kind: PromptKind | None = None  # unsafe | benign | near; null: the column `kind` of the file
    kinds: dict[str, PromptKind] = field(default_factory=dict)  # what the file's column `kind` says -> one of the three
    columns: dict[str, str] = field(default_factory=dict)  # our name of a column -> the file's: {instruction: prompt}
    max_rows: Count | None = None  # read this many prompts from the start; null: all
    hand_labels: dict[str, str] = field(default_factory=dict)  # responses=csv: model -> column of what people say of it


@dataclass
class EvaluatedModelSettings:
    """One model of a comparison."""

    # A model folder, or anything that `model.archive` takes.
    path: Annotated[str, rules.model_path, "the file or folder to read"] = MISSING
    base: str | None = None  # where path is a policy.pt: the folder with its architecture and tokenizer
    template: Template | None = None  # how it is asked; null: as in its run, and alpaca for a model without a run
    system: str | None = None  # what it is told before each prompt; null: as in its run, and nothing without a run
    dtype: Dtype = "float32"  # of its weights
    served_as: str | None = None  # generation=openai: its name at the server; null: generation.server.model
    base_url: str | None = None  # generation=openai: a server of its own; null: generation.server.base_url


@dataclass
class HelpfulnessSettings:
    """Pairwise comparison by the judge, each pair in both orders."""

    baseline: str | None = None  # the model that all others are compared with; null: no comparison
    kinds: list[PromptKind] = field(default_factory=lambda: ["benign"])  # prompts that are compared on


@dataclass
class DownstreamSettings:
    """Tasks of lm_eval, in a process of its own."""

    tasks: list[str] = field(default_factory=list)  # names of lm_eval, or knowledge | common_sense | reading; []: none
    include_path: ExistingPath | None = None  # folder with tasks of one's own (YAML)
    num_fewshot: Annotated[int, rules.at_least(0)] | None = None  # examples in the prompt; null: as the task says
    limit: Count | None = None  # documents of each task, from its start; null: all
    batch_size: Count = 8  # documents at a time


@dataclass
class RewardSettings:
    """The implicit rewards of models trained by preferences, on held-out pairs; nothing is generated."""

    path: ExistingPath | None = None  # pairs in the schema of `si` that were not trained on; null: no such check
    reference: str | None = None  # the model of models.NAME that the others were trained from
    # Of their loss; null: as each model's run says, and needed for a model without a run.
    beta: Annotated[float, rules.above(0)] | None = None
    average_logps: bool | None = None  # of their loss; null: as each model's run says, or false
    max_length: int = 512  # tokens of prompt + response
    max_prompt_length: Count = 256  # tokens of the prompt, smaller than max_length
    batch_size: Count = 16  # pairs at a time


@dataclass
class EvaluateConfig:
    """`evaluate.py`: generate, judge, report."""

    output: Annotated[str, "the folder to write"] = MISSING  # the folder of the report
    models: dict[str, EvaluatedModelSettings] = field(default_factory=dict)  # models.NAME.path=...
    prompts: dict[str, PromptSetSettings] = field(default_factory=dict)  # prompts.NAME.path=...; prompts=xstest
    path: str | None = None  # file of the prompt sets that have no path of their own
    # generate: ask the models | csv: the answers are in the prompt files, whose columns are the models.
    responses: Annotated[str, rules.choices("generate", "csv")] = "generate"
    columns: list[str] = field(default_factory=list)  # responses=csv: columns to judge; []: all but the prompt's own
    expert: Annotated[Any, "one of rules, local, openai"] = None  # the judge, by `expert=`; needed if there are prompts
    second_expert: Any = None  # another judge (expert@second_expert=...), whose agreement is reported; null: none
    generation: BackendSettings = field(default_factory=BackendSettings)
    stop: list[str] = field(default_factory=list)  # an answer ends before any of these strings
    shard: ShardSettings = field(default_factory=ShardSettings)  # part of the prompts: answered and judged, no report
    helpfulness: HelpfulnessSettings = field(default_factory=HelpfulnessSettings)
    downstream: DownstreamSettings = field(default_factory=DownstreamSettings)
    rewards: RewardSettings = field(default_factory=RewardSettings)
    compare: list[str] = field(default_factory=list)  # finished runs, or outputs of this program: one table of them
    sort_by: str | None = None  # compare: metric that sorts the table, "-" before it for the largest first
    training_data: list[ExistingPath] = field(default_factory=list)  # files of training rows; overlap is reported
    induction_report: str | None = None  # report.json of the dataset that was trained on; null: of a model's own run
    curves: dict[str, str] = field(default_factory=dict)  # NAME: run whose curves are drawn; {}: models that are runs
    stages_file: str | None = None  # JSONL of {"name", "command", "seconds"}: what was run before, shown in the report
    engine: EngineSettings = field(default_factory=EngineSettings)  # which processes answer and judge the shards
    dry_run: bool = False  # count prompts, tokens, calls, cost and hours of what is left to do, and stop before it
    rate: dict[str, Rate] = field(default_factory=dict)  # dry_run: rows a second of a process: rate.generate=5
    samples_per_set: Annotated[int, rules.at_least(0)] = 6  # prompts of each set whose answers the page shows
    wandb: WandbSettings = field(default_factory=WandbSettings)  # tables, without any text
    local_dirs: list[str] = field(default_factory=lambda: [".cache"])  # token store of `rewards`: first usable
    device: Device = "auto"  # auto: a GPU if there is one | cpu | cuda | cuda:1
