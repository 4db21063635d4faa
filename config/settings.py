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
from config.experts import (  # noqa: F401 - all settings are read from here
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
    """The unsafe responses."""

    path: DataPath = MISSING  # CSV, JSON, JSONL, Parquet, or a folder of `datasets`
    response_column: str = "response"  # column of the text, or of conversations whose last answer it is
    label_column: str | None = None  # column of the category; null: `label` where there is one
    id_column: str | None = None  # column that names a row; null: a hash of the response
    columns: dict[str, str] = field(default_factory=dict)  # our name of a column -> the file's: {response: text}
    max_rows: Count | None = None  # read this many rows from the start; null: all
    on_bad_row: BadRow = "drop"  # drop: skip the row and count it | error: stop


@dataclass
class InductionSettings(BackendSettings):
    """How the reversed model is run."""

    num_candidates: Count = 1  # instructions of each response, of which the round-trip score keeps the best


@dataclass
class RoundTripSettings:
    """A forward model that scores how much an instruction explains its response (nats per token); off without one."""

    model: ModelSettings = field(default_factory=ModelSettings)  # a model that follows instructions
    template: Template | None = None  # how it is asked; null: as in its run, and alpaca for a model without a run
    system: str | None = None  # what it is told before each conversation; null: as in its run, or as the row says
    threshold: float | None = None  # least score of a pair that the expert is asked about; null: no limit
    top_fraction: Share | None = None  # instead: the best part of all pairs of all shards; null: no limit
    max_length: Annotated[int, rules.at_least(2)] = 1024  # tokens of prompt + response; a longer pair has no score
    max_batch_tokens: Count = 8192  # padded positions of one batch


@dataclass
class RespondSettings:
    """The safe responses."""

    # Largest share of the rows with one and the same response; those beyond it are asked again. null: no limit.
    max_same: Share | None = None


@dataclass
class DuplicatesSettings:
    """Pairs that nearly repeat an earlier one, in the order of the corpus; exact repetitions always go."""

    threshold: Share | None = 0.8  # Jaccard index of the word pairs of instruction + response; null: keep them
    # What DuckDB may hold before it spills to the output folder: memory: 1 GB | disk: 128 MB.
    index: Annotated[str, rules.choices("memory", "disk")] = "memory"


@dataclass
class ShardSettings:
    """Which part of the corpus this process works on; null: Slurm's array variables, or all of it."""

    index: int | None = None  # number of the part, from 0
    count: Count | None = None  # number of parts


@dataclass
class EngineSettings:
    """Who does the shards: this process its own, or the workers of a Ray cluster all of them."""

    name: Annotated[str, rules.choices("process", "ray")] = "process"
    address: str | None = None  # of a Ray cluster, such as auto; null: RAY_ADDRESS, or else a cluster of this machine
    gpus: Annotated[float, rules.at_least(0)] = 0.0  # of each worker, by which Ray places them
    cpus: Annotated[float, rules.at_least(0)] = 1.0  # likewise


@dataclass
class BenignSettings:
    """`stage=replay`: the harmless instructions."""

    path: DataPath = MISSING  # any file of instructions: column `instruction`, perhaps `input` and `output`
    columns: dict[str, str] = field(default_factory=dict)  # our name of a column -> the file's: {instruction: prompt}
    max_rows: Count | None = None  # use this many prompts from the start; null: all


@dataclass
class ReplaySettings:
    """`stage=replay`: what is chosen and rejected on harmless prompts."""

    # model: the starting model's own answer, so that nothing else of it moves | file: the column `output`.
    answers: Annotated[str, rules.choices("model", "file")] = "model"
    # refusal: one of the dataset's own, of the same topic where it can be | none: nothing (SFT alone).
    rejected: Annotated[str, rules.choices("refusal", "none")] = "refusal"
    template: Template | None = None  # how the model is asked; null: as in its run, and alpaca without a run
    system: str | None = None  # what it is told before each prompt; null: as in its run, and nothing without a run


@dataclass
class ContrastSettings:
    """`stage=contrast`: harmless neighbours of unsafe instructions."""

    num_rows: Count | None = 1000  # unsafe instructions that get one, drawn by a hash; null: all


@dataclass
class ReviewSettings:
    """`stage=review`: the sample of pairs that people look at."""

    rows: Count = 100  # pairs of the dataset, as many of each label as there can be
    # Pairs that the filter dropped, and as many that it kept, all without their safe response: what the agreement with
    # the expert is measured on. Needs corpus.path.
    dropped: Annotated[int, rules.at_least(0)] = 0
    seed: Seed = 0  # of the drawing


@dataclass
class CardSettings:
    """What the dataset card says of the rights and the language of its rows."""

    # Identifier of the Hugging Face Hub: cc-by-4.0, other, ...; most often that of the corpus.
    license: str = "unknown"
    language: list[str] = field(default_factory=lambda: ["en"])  # ISO 639 codes


@dataclass
class InduceConfig:
    """`induce.py`: from a corpus of unsafe responses to a preference dataset."""

    output: Output = MISSING  # the dataset folder, or that of stage=audit's report
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
    rate: dict[str, Rate] = field(default_factory=dict)  # dry_run: rows per second of one process: rate.induce=60
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

    output: Output = MISSING  # the folder of the report
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
    rate: dict[str, Rate] = field(default_factory=dict)  # dry_run: rows per second of one process: rate.generate=5
    samples_per_set: Annotated[int, rules.at_least(0)] = 6  # prompts of each set whose answers the page shows
    wandb: WandbSettings = field(default_factory=WandbSettings)  # tables, without any text
    local_dirs: list[str] = field(default_factory=lambda: [".cache"])  # token store of `rewards`: first usable
    device: Device = "auto"  # auto: a GPU if there is one | cpu | cuda | cuda:1
