"""Every setting of the three entrypoints, as plain dataclasses without Hydra, so that any module may import them.

A key of the command line is a field here: `python train.py lr=1e-6 model.policy_dtype=bfloat16` sets
`TrainConfig.lr` and `TrainConfig.model.policy_dtype`. Annotations hold the rules for single values (`config/rules.py`);
`config/checks*.py` check combinations of values. The defaults of the groups (`model=`, `loss=`, `datasets=`, `expert=`)
are in the YAML files of this folder. Keys of the DPO repo keep their names and meanings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from config import rules
from config.experts import (  # noqa: F401 - other modules import all settings from here
    JUDGES,
    THOUGHT_TAGS,
    BackendSettings,
    GenerationSettings,
    GuardExpertSettings,
    LocalExpertSettings,
    OpenAIExpertSettings,
    RefusalsExpertSettings,
    RulesExpertSettings,
    ServerSettings,
    StrongRejectSettings,
)
from config.losses import (  # noqa: F401 - as above
    LOSSES,
    AnswerLossSettings,
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
from config.pair_losses import (  # noqa: F401 - as above
    DPOSettings,
    IPOSettings,
    MarginLossSettings,
    PairLossSettings,
    PreferenceLossSettings,
)
from config.rules import (
    MISSING,
    BadRow,
    Count,
    DataPath,
    Device,
    Dtype,
    ExistingPath,
    Output,
    PromptKind,
    Seed,
    Share,
    Template,
)
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

Rate = Annotated[float, rules.above(0)]


@dataclass
class CorpusSettings:
    """The unsafe responses to induce instructions for."""

    path: DataPath = MISSING  # CSV, JSON, JSONL, Parquet, or a folder of `datasets`
    response_column: str = "response"  # column of the text, or of conversations that end with it
    label_column: str | None = None  # column of the category; null: `label`, if there is one
    id_column: str | None = None  # column with a row's id; null: a hash of the response
    columns: dict[str, str] = field(default_factory=dict)  # our column name -> the file's: `{response: text}`
    max_rows: Count | None = None  # read this many rows from the start; null: all
    on_bad_row: BadRow = "drop"  # drop: skip the row and count it | error: stop


@dataclass
class InductionSettings(BackendSettings):
    """How the reversed model is run."""

    num_candidates: Count = 1  # instructions per response; the round-trip score keeps the best


@dataclass
class RoundTripSettings:
    """A forward model that scores how well an instruction explains its response (nats per token); off by default."""

    model: ModelSettings = field(default_factory=ModelSettings)  # a model that follows instructions
    template: Template | None = None  # its prompt template; null: that of its run, or alpaca without a run
    system: str | None = None  # system prompt; null: that of its run, or of the row
    threshold: float | None = None  # drop pairs with a lower score before the expert is asked; null: no limit
    top_fraction: Share | None = None  # instead: keep the best share of all pairs of all shards; null: no limit
    max_length: Annotated[int, rules.at_least(2)] = 1024  # tokens of prompt + response; a longer pair has no score
    max_batch_tokens: Count = 8192  # padded positions of one batch


@dataclass
class RespondSettings:
    """The safe responses."""

    # Largest share of the rows that may have the same response; the rest are asked again. null: no limit.
    max_same: Share | None = None


@dataclass
class DuplicatesSettings:
    """Pairs that nearly repeat an earlier one, in the order of the corpus; exact repetitions are always dropped."""

    threshold: Share | None = 0.8  # Jaccard index of the word pairs of instruction + response; null: keep them
    # Memory of DuckDB before it spills to the output folder: memory: 1 GB | disk: 128 MB.
    index: Annotated[str, rules.choices("memory", "disk")] = "memory"


@dataclass
class ShardSettings:
    """Which part of the corpus this process works on; null: Slurm's array variables, or all of it."""

    index: int | None = None  # number of the part, from 0
    count: Count | None = None  # number of parts


@dataclass
class EngineSettings:
    """Who processes the shards: this process its own, or the workers of a Ray cluster all of them."""

    name: Annotated[str, rules.choices("process", "ray")] = "process"
    address: str | None = None  # of a Ray cluster, such as auto; null: RAY_ADDRESS, or a new cluster on this machine
    gpus: Annotated[float, rules.at_least(0)] = 0.0  # GPUs of each worker
    cpus: Annotated[float, rules.at_least(0)] = 1.0  # CPU cores of each worker


@dataclass
class BenignSettings:
    """`stage=replay`: the harmless instructions."""

    path: DataPath = MISSING  # file of instructions: column `instruction`, optionally `input` and `output`
    columns: dict[str, str] = field(default_factory=dict)  # our column name -> the file's: `{instruction: prompt}`
    max_rows: Count | None = None  # use this many prompts from the start; null: all


@dataclass
class ReplaySettings:
    """`stage=replay`: the chosen and rejected answers to harmless prompts."""

    # model: the starting model's own answer, so that nothing else about it changes | file: the column `output`.
    answers: Annotated[str, rules.choices("model", "file")] = "model"
    # refusal: one from the unsafe dataset, on the same topic if possible | none: empty (for SFT alone).
    rejected: Annotated[str, rules.choices("refusal", "none")] = "refusal"
    template: Template | None = None  # prompt template; null: that of the model's run, or alpaca without a run
    system: str | None = None  # system prompt; null: that of the model's run, or none without a run


@dataclass
class ContrastSettings:
    """`stage=contrast`: harmless neighbours of unsafe instructions."""

    num_rows: Count | None = 1000  # unsafe instructions that get a neighbour, drawn by hash; null: all


@dataclass
class ReviewSettings:
    """`stage=review`: the sample of pairs that people look at."""

    rows: Count = 100  # pairs of the dataset, spread evenly over the labels
    # Pairs that the filter dropped, plus as many that it kept, all without their safe response, to measure agreement
    # with the expert. Needs corpus.path.
    dropped: Annotated[int, rules.at_least(0)] = 0
    seed: Seed = 0  # of the random draw


@dataclass
class CardSettings:
    """What the dataset card says about the license and the language of its rows."""

    # Identifier on the Hugging Face Hub: cc-by-4.0, other, ...; usually that of the corpus.
    license: str = "unknown"
    language: list[str] = field(default_factory=lambda: ["en"])  # ISO 639 codes


@dataclass
class InduceConfig:
    """`induce.py`: from a corpus of unsafe responses to a preference dataset."""

    output: Output = MISSING  # the dataset folder, or the folder of the audit's report
    # all: the stages with ledgers, then merge if there is only one shard. For the others see docs/scale.md.
    stage: Annotated[str, rules.choices("all", *STAGES, "merge", "status", "audit", "review", *BENIGN_STAGES)] = "all"
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    model: ModelSettings = field(default_factory=ModelSettings)  # reversed model; stage=replay: starting model
    expert: Annotated[Any, "one of rules, local, openai"] = MISSING  # filters, responds and contrasts; set by `expert=`
    generation: InductionSettings = field(default_factory=InductionSettings)
    roundtrip: RoundTripSettings = field(default_factory=RoundTripSettings)
    respond: RespondSettings = field(default_factory=RespondSettings)
    shard: ShardSettings = field(default_factory=ShardSettings)
    # Files of the dataset: JSONL | Parquet | all: both, and a folder for datasets.load_from_disk.
    format: Annotated[str, rules.choices(*FORMATS)] = "all"
    exclude: ExistingPath | None = None  # file of prompts to keep out of the dataset; null: none
    exclude_similarity: Share | None = 0.6  # also drop instructions this similar to an excluded one; null: none
    duplicates: DuplicatesSettings = field(default_factory=DuplicatesSettings)
    push_to_hub: rules.HubName | None = None  # USER/NAME: upload the merged dataset, privately; null: no upload
    card: CardSettings = field(default_factory=CardSettings)
    # stage=audit, replay, contrast, review: file or folder in the schema of `si`; null: stage=review reads output.
    path: ExistingPath | None = None
    review: ReviewSettings = field(default_factory=ReviewSettings)
    # Files exported from review pages: stage=audit computes precision from them, stage=merge drops what they reject.
    reviews: list[ExistingPath] = field(default_factory=list)
    benign: BenignSettings = field(default_factory=BenignSettings)
    replay: ReplaySettings = field(default_factory=ReplaySettings)
    contrast: ContrastSettings = field(default_factory=ContrastSettings)
    max_same_chosen: Count | None = None  # stage=audit: rows to keep with the same safe response; null: all
    engine: EngineSettings = field(default_factory=EngineSettings)  # which processes run the shards
    # Estimate rows, tokens, calls, cost and hours of the remaining work, and stop before loading or asking any model.
    dry_run: bool = False
    rate: dict[str, Rate] = field(default_factory=dict)  # dry_run: rows per second of one process: rate.induce=60
    device: Device = "auto"  # auto: a GPU if there is one | cpu | cuda | cuda:1
    log_text: bool = False  # print some pairs at the end


@dataclass
class PromptSetSettings:
    """One set of evaluation prompts."""

    path: DataPath = MISSING  # file of the prompts
    source: str | None = None  # source of all prompts; null: a column of the file, or the set's name
    source_column: str | None = None  # column with the source; null: `source`
    kind: PromptKind | None = None  # unsafe | benign | near; null: the column `kind` of the file
    kinds: dict[str, PromptKind] = field(default_factory=dict)  # value of the column `kind` -> one of the three
    columns: dict[str, str] = field(default_factory=dict)  # our column name -> the file's: `{instruction: prompt}`
    max_rows: Count | None = None  # read this many prompts from the start; null: all
    hand_labels: dict[str, str] = field(default_factory=dict)  # responses=csv: model -> column of hand labels


@dataclass
class EvaluatedModelSettings:
    """One model of a comparison."""

    # A model folder, or anything that `model.archive` takes.
    path: Annotated[str, rules.model_path, "the file or folder to read"] = MISSING
    base: str | None = None  # if path is a policy.pt: the folder with its architecture and tokenizer
    template: Template | None = None  # its prompt template; null: that of its run, or alpaca without a run
    system: str | None = None  # system prompt; null: that of its run, or none without a run
    dtype: Dtype = "float32"  # of its weights
    served_as: str | None = None  # generation=openai: its name on the server; null: generation.server.model
    base_url: str | None = None  # generation=openai: its own server; null: generation.server.base_url


@dataclass
class HelpfulnessSettings:
    """Pairwise comparison by the judge, each pair in both orders."""

    baseline: str | None = None  # the model to compare all others with; null: no comparison
    kinds: list[PromptKind] = field(default_factory=lambda: ["benign"])  # kinds of prompts to compare on


@dataclass
class DownstreamSettings:
    """Tasks of lm_eval, run in a separate process."""

    tasks: list[str] = field(default_factory=list)  # lm_eval names, or knowledge | common_sense | reading; []: none
    include_path: ExistingPath | None = None  # folder with your own tasks (YAML)
    num_fewshot: Annotated[int, rules.at_least(0)] | None = None  # examples in the prompt; null: the task's default
    limit: Count | None = None  # documents of each task, from its start; null: all
    batch_size: Count = 8  # documents at a time


@dataclass
class RewardSettings:
    """The implicit rewards of models trained on preferences, on held-out pairs; nothing is generated."""

    path: ExistingPath | None = None  # held-out pairs in the schema of `si`; null: skip this check
    reference: str | None = None  # NAME of the model in models.NAME that the others were trained from
    # beta of their loss; null: that of each model's run. Needed for a model without a run.
    beta: Annotated[float, rules.above(0)] | None = None
    average_logps: bool | None = None  # of their loss; null: that of each model's run, or false
    max_length: int = 512  # tokens of prompt + response
    max_prompt_length: Count = 256  # tokens of the prompt, smaller than max_length
    batch_size: Count = 16  # pairs at a time


@dataclass
class EvaluateConfig:
    """`evaluate.py`: generate, judge, report."""

    output: Output = MISSING  # the folder of the report
    models: dict[str, EvaluatedModelSettings] = field(default_factory=dict)  # models.NAME.path=...
    prompts: dict[str, PromptSetSettings] = field(default_factory=dict)  # prompts.NAME.path=...; prompts=xstest
    path: str | None = None  # file of the prompt sets without their own path
    # generate: ask the models | csv: read the answers from the prompt files, one column per model.
    responses: Annotated[str, rules.choices("generate", "csv")] = "generate"
    columns: list[str] = field(default_factory=list)  # responses=csv: columns to judge; []: all but the prompt's
    expert: Annotated[Any, "one of rules, local, openai"] = None  # the judge, set by `expert=`; needed with prompts
    second_expert: Any = None  # another judge (expert@second_expert=...) to report agreement with; null: none
    generation: BackendSettings = field(default_factory=BackendSettings)
    stop: list[str] = field(default_factory=list)  # an answer ends before any of these strings
    shard: ShardSettings = field(default_factory=ShardSettings)  # part of the prompts; it writes no report
    helpfulness: HelpfulnessSettings = field(default_factory=HelpfulnessSettings)
    downstream: DownstreamSettings = field(default_factory=DownstreamSettings)
    rewards: RewardSettings = field(default_factory=RewardSettings)
    compare: list[str] = field(default_factory=list)  # finished runs, or outputs of this program, to compare
    sort_by: str | None = None  # compare: metric to sort the table by; a leading "-": largest first
    training_data: list[ExistingPath] = field(default_factory=list)  # training files to check the prompts against
    induction_report: str | None = None  # report.json of the training dataset; null: that of a model's run
    curves: dict[str, str] = field(default_factory=dict)  # NAME: run whose curves to draw; `{}`: models that are runs
    stages_file: str | None = None  # JSONL of `{"name", "command", "seconds"}`: earlier stages to show in the report
    engine: EngineSettings = field(default_factory=EngineSettings)  # which processes run the shards
    dry_run: bool = False  # estimate prompts, tokens, calls, cost and hours of the remaining work, and stop
    rate: dict[str, Rate] = field(default_factory=dict)  # dry_run: rows per second of one process: rate.generate=5
    samples_per_set: Annotated[int, rules.at_least(0)] = 6  # prompts per set whose answers the page shows
    wandb: WandbSettings = field(default_factory=WandbSettings)  # receives tables, no text
    local_dirs: list[str] = field(default_factory=lambda: [".cache"])  # token store of `rewards`: first usable folder
    device: Device = "auto"  # auto: a GPU if there is one | cpu | cuda | cuda:1
