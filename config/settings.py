"""Every setting of the three entrypoints, as plain dataclasses: no Hydra here, so that any module may import them.

A key of the command line is a field here: `python train.py lr=1e-6 model.policy_dtype=bfloat16` sets
`TrainConfig.lr` and `TrainConfig.model.policy_dtype`. Ranges and cross-checks are in `config/checks.py`, defaults of
the groups (`model=`, `loss=`, `datasets=`, `expert=`, ...) in the YAML files beside it. Keys of the DPO repo keep
their names and meanings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MISSING: Any = "???"  # OmegaConf's marker of a mandatory value


@dataclass
class ModelSettings:
    """A causal language model and the dtypes that it runs in."""

    name_or_path: str = MISSING  # HF folder, or hub id where the network allows
    tokenizer_name_or_path: str | None = None  # null: the model's own
    archive: str | None = None  # start from these weights: a run, a checkpoint, an HF folder, or a policy.pt
    block_name: str | None = None  # transformer block that FSDP wraps; null: found by itself
    policy_dtype: str = "float32"  # dtype of the trained weights
    fsdp_policy_mp: str | None = None  # compute dtype under FSDP; null: policy_dtype
    reference_dtype: str | None = None  # null: as the policy, which is what makes the first rewards 0
    autocast: str | None = None  # bfloat16: matrix products in it, weights as they are; docs/performance.md has errors
    attn_implementation: str = "sdpa"  # packing=true attends by itself, and asks for sdpa
    trust_remote_code: bool = False
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # of template=chat: {enable_thinking: false}


@dataclass
class LikelihoodLossSettings:
    """`loss=sft` and `loss=reverse`: maximum likelihood of the target given the prompt."""

    name: str = MISSING  # sft | reverse
    reduction: str = "sequence_sum"  # sequence_sum (DPO repo) | token_mean (Alpaca)


@dataclass
class PreferenceLossSettings:
    """`loss=dpo` and `loss=ipo`: a loss on the log-ratios of chosen and rejected."""

    name: str = MISSING  # dpo | ipo
    beta: float = 0.1  # temperature of the implicit reward; tau of IPO
    label_smoothing: float = 0.0  # conservative DPO: probability that a preference is flipped
    reference_free: bool = False  # a uniform reference: its log-ratio is 0, in loss and rewards alike
    average_logps: bool = False  # divide log-probabilities by the response length (the IPO authors' form)
    nll_weight: float = 0.0  # adds nll_weight x (nats per token of chosen), Pang et al. 2024


@dataclass
class TrainerSettings:
    """How the model is laid out over processes. All but `name` and `compile` are FSDPTrainer's."""

    name: str = "BasicTrainer"  # BasicTrainer: one process | FSDPTrainer: sharded over all processes of the job
    num_processes: int | None = None  # started on this machine; null: one for each GPU, or two on a CPU
    num_replicas: int = 1  # HSDP: so many copies of the model, each sharded over world size / num_replicas processes
    reshard_after_forward: bool = True  # free a block's parameters between its forward and backward pass
    cpu_offload: bool = False  # parameters, gradients and optimizer state live in host memory (needs a GPU)
    compile: bool = False  # torch.compile each transformer block
    reduce_every_microbatch: bool = False  # less memory, more traffic than one reduction a step: docs/distributed.md


@dataclass
class WandbSettings:
    """Weights & Biases. Metrics go to `metrics.jsonl` in any case."""

    enabled: bool = True
    mode: str = "auto"  # auto: online where a key is present, offline otherwise | online | offline | disabled
    entity: str | None = None
    project: str = "safer-instruct"
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class CheckpointSettings:
    """What a run writes besides its last checkpoint."""

    every_examples: int | None = None  # null: at every evaluation, as the DPO repo does
    keep_last: int | None = None  # null: keep all
    keep_best: str | None = None  # also keep the one whose evaluation was best by this metric, such as loss/eval
    asynchronous: bool = True  # training goes on while a checkpoint is written
    policy_pt: bool = False  # also write the DPO repo's policy.pt


@dataclass
class DatasetSettings:
    """One dataset: where it lies and how its rows read."""

    path: str = MISSING  # a file, a folder with several, or a folder made by induce.py
    schema: str = MISSING  # si | alpaca | hh
    template: str = "alpaca"  # how an instruction becomes a prompt: alpaca | hh | plain | chat
    columns: dict[str, str] = field(default_factory=dict)  # our name of a column -> the file's: {instruction: prompt}
    labels: list[str] | None = None  # keep only these labels
    exclude: str | None = None  # file whose instructions must not be trained on (the published test_set.csv)
    eval_path: str | None = None  # own evaluation file; null: rows are held out by hash of the instruction
    eval_fraction: float = 0.05  # share of instructions held out where eval_path is null
    max_rows: int | None = None  # first so many usable rows
    on_bad_row: str = "drop"  # drop (and count) | error


@dataclass
class TrainConfig:
    """`train.py`: reversed instruction tuning, SFT and preference training."""

    exp_name: str = MISSING
    model: ModelSettings = field(default_factory=ModelSettings)
    loss: Any = MISSING  # LikelihoodLossSettings or PreferenceLossSettings, by `loss=`
    datasets: dict[str, DatasetSettings] = field(default_factory=dict)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    wandb: WandbSettings = field(default_factory=WandbSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)

    seed: int = 0  # order of the batches, dropout, sampling
    batch_size: int = 4  # examples (pairs) of one optimizer step, over all processes
    eval_batch_size: int = 16
    gradient_accumulation_steps: int = 1  # micro-batches of one step, at least
    packing: bool = True  # no padding, the prompt of a pair computed once; false: padded rows, the same numbers, slower
    max_tokens_per_microbatch: int | None = None  # token positions; null: 1024 on a CPU, 8192 on a GPU, padded no limit
    max_length: int = 512  # tokens of prompt + response
    max_prompt_length: int = 256
    n_epochs: int | None = 1
    n_examples: int | None = None  # stop after so many; whichever of the two comes first
    n_eval_examples: int | None = 256
    optimizer: str = "RMSprop"  # any class of torch.optim with (params, lr)
    optimizer_args: dict[str, Any] = field(default_factory=dict)  # betas, eps, weight_decay, ...
    lr: float = 5e-7
    lr_scheduler: str = "constant"  # after the warm-up: constant | linear | cosine
    warmup_steps: int = 150
    warmup_ratio: float | None = None  # share of all steps; takes the place of warmup_steps
    max_grad_norm: float = 10.0
    activation_checkpointing: bool | str = False  # none (false) | selective: matrix products are kept | full (true)
    on_non_finite: str = "stop"  # stop | skip a step whose loss or gradient is not finite

    do_first_eval: bool = True
    eval_every: int = 20_000  # examples
    sample_during_eval: bool = False
    n_eval_model_samples: int = 16
    max_new_tokens: int | None = None  # of a sample; null: max_length - prompt
    minimum_log_interval_secs: float = 1.0

    device: str = "auto"  # auto | cpu | cuda | cuda:1
    tf32: bool = False  # float32 matrix products of a GPU in TF32: many times as fast, inputs rounded to 10 bits
    run_dir: str | None = None  # null: runs/<exp_name>
    local_run_dir: str | None = None  # DPO repo's name of run_dir
    local_dirs: list[str] = field(default_factory=lambda: [".cache"])  # token store and reference cache: first usable
    fsdp_port: int | None = None  # where the processes of one machine meet; null: a port that is free
    debug: bool = False  # no wandb, no checkpoints
    log_text: bool = False  # let samples reach wandb and the console
    dry_run: bool | str = False  # true: estimates from the data and three real steps | data: from the data alone


# "OPENING CLOSING" of what families of reasoning models think aloud: DeepSeek R1 and Qwen 3, Mistral, Cohere, Seed.
THOUGHT_TAGS = (
    "<think> </think>",
    "<thinking> </thinking>",
    "[THINK] [/THINK]",
    "<|START_THINKING|> <|END_THINKING|>",
    "<seed:think> </seed:think>",
)


@dataclass
class GenerationSettings:
    """Decoding."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    seed: int = 0
    max_batch_tokens: int = 16_384  # padded positions (prompt + new tokens) of one batch
    # An answer begins behind the last closing tag; []: what a model thinks aloud is part of its answer
    thought_tags: list[str] = field(default_factory=lambda: list(THOUGHT_TAGS))


@dataclass
class ShardSettings:
    """Which part of the corpus this process works on; null: Slurm's array variables, or all of it."""

    index: int | None = None
    count: int | None = None


@dataclass
class CorpusSettings:
    """The unsafe responses."""

    path: str = MISSING  # CSV, JSON, JSONL, Parquet, or a `datasets` folder
    response_column: str = "response"
    label_column: str | None = None  # null: `label` where there is one
    id_column: str | None = None  # null: a hash of the response
    columns: dict[str, str] = field(default_factory=dict)  # our name of a column -> the file's: {response: text}
    max_rows: int | None = None
    on_bad_row: str = "drop"


@dataclass
class RulesExpertSettings:
    """`expert=rules`: patterns and templates from a YAML file."""

    name: str = "rules"
    path: str = MISSING


@dataclass
class ServerSettings:
    """An OpenAI-compatible server. The key is read from the environment variable `api_key_env`, never from here."""

    model: str = MISSING  # the name under which the server knows the model
    base_url: str | None = None  # null: OpenAI's; others usually end in /v1
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8  # requests at a time, at most: fewer while the server answers many of them with 429
    timeout_seconds: float = 60.0  # of one attempt; a little more than the slowest honest answer takes
    max_retries: int = 8  # attempts after a failed one (5xx, lost connection, time-out); a 429 is waited out instead
    patience_seconds: float = 600.0  # give up (and keep everything) when nothing has been answered for so long


@dataclass
class OpenAIExpertSettings(ServerSettings):
    """`expert=openai`: any OpenAI-compatible server, with a budget."""

    name: str = "openai"
    temperature: float = 0.0
    max_new_tokens: int = 512
    thought_tags: list[str] = field(default_factory=lambda: list(THOUGHT_TAGS))  # as of GenerationSettings
    structured_output: str = "auto"  # auto: a JSON schema is sent where the server takes one | always | never
    price_prompt: float = 0.0  # of a million prompt tokens
    price_completion: float = 0.0  # of a million completion tokens
    max_cost: float | None = None  # of the whole dataset, in the currency of the prices; each shard has its part of it
    max_tokens: int | None = None  # of the whole dataset, prompt and completion; each shard has its part of it


@dataclass
class VLLMSettings:
    """`generation=vllm`: what its engine is started with."""

    tensor_parallel: int = 1  # GPUs that one model is spread over
    memory_fraction: float = 0.9  # of each GPU
    max_length: int | None = None  # context in tokens; null: the model's


@dataclass
class BackendSettings(GenerationSettings):
    """How a model is run, by `generation=hf`, `vllm` or `openai`."""

    backend: str = "hf"  # hf: transformers in this process | vllm: its offline engine | openai: a server that has it
    vllm: VLLMSettings = field(default_factory=VLLMSettings)
    server: ServerSettings = field(default_factory=ServerSettings)  # of backend=openai


@dataclass
class LocalExpertSettings:
    """`expert=local`: a causal language model of your own, on this machine or behind a server of yours."""

    name: str = "local"
    model: ModelSettings = field(default_factory=ModelSettings)
    template: str = "chat"
    generation: BackendSettings = field(default_factory=BackendSettings)


@dataclass
class InductionSettings(BackendSettings):
    """How the reversed model is run."""

    num_candidates: int = 1  # instructions of each response, of which the round-trip score keeps the best


@dataclass
class RoundTripSettings:
    """A forward model that scores how much an instruction explains its response (nats per token); off without one."""

    model: ModelSettings = field(default_factory=ModelSettings)  # follows instructions; roundtrip.model.name_or_path=
    template: str = "alpaca"  # how it is asked: alpaca | hh | plain | chat
    threshold: float | None = None  # least score of a pair that the expert is asked about
    top_fraction: float | None = None  # instead: the best part of all pairs of all shards, in (0, 1]
    max_length: int = 1024  # tokens of prompt + response; a longer pair has no score
    max_batch_tokens: int = 8192  # padded positions of one batch


@dataclass
class DuplicatesSettings:
    """Pairs that nearly repeat an earlier one, in the order of the corpus; exact repetitions always go."""

    threshold: float | None = 0.8  # Jaccard index of the word pairs of instruction + response; null: off
    index: str = "memory"  # memory (about 0.3 kB a pair) | disk: in the output folder while the merge runs


@dataclass
class InduceConfig:
    """`induce.py`: from a corpus of unsafe responses to a preference dataset."""

    output: str = MISSING  # the dataset folder; stage=audit writes its report there, if it is given
    stage: str = "all"  # all | induce | score | filter | respond | merge | status | audit
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    model: ModelSettings = field(default_factory=ModelSettings)  # the reversed model
    expert: Any = MISSING  # RulesExpertSettings, LocalExpertSettings or OpenAIExpertSettings, by `expert=`
    generation: InductionSettings = field(default_factory=InductionSettings)
    roundtrip: RoundTripSettings = field(default_factory=RoundTripSettings)
    shard: ShardSettings = field(default_factory=ShardSettings)
    format: str = "all"  # all (JSONL, Parquet, and a folder for datasets.load_from_disk) | jsonl | parquet
    exclude: str | None = None  # a file of prompts whose instructions are kept out of the dataset
    exclude_similarity: float | None = 0.6  # and what is so similar to one of them; null: exact matches only
    duplicates: DuplicatesSettings = field(default_factory=DuplicatesSettings)
    push_to_hub: str | None = None  # USER/NAME: upload the merged dataset, privately; needs a login of huggingface_hub
    path: str | None = None  # stage=audit: any file or folder in the schema of `si`
    max_same_chosen: int | None = None  # stage=audit: of equal safe responses, so many stay in the dataset it writes
    device: str = "auto"
    log_text: bool = False


@dataclass
class PromptSetSettings:
    """One set of evaluation prompts."""

    path: str = MISSING
    source: str | None = None  # null: the column of the file, or else the name of the set
    source_column: str | None = None  # the file's column that names the source; null: `source`
    kind: str | None = None  # unsafe | benign | near; null: the column `kind` of the file
    columns: dict[str, str] = field(default_factory=dict)  # our name of a column -> the file's: {instruction: prompt}
    max_rows: int | None = None


@dataclass
class EvaluatedModelSettings:
    """One model of a comparison: a folder, or anything `model.archive` takes."""

    path: str = MISSING
    base: str | None = None  # where path is a policy.pt: the folder with its architecture and tokenizer
    template: str | None = None  # alpaca | hh | plain | chat; null: the one of its run, alpaca for a model without
    dtype: str = "float32"
    served_as: str | None = None  # generation=openai: its name at the server; null: generation.server.model
    base_url: str | None = None  # generation=openai: a server of its own; null: generation.server.base_url


@dataclass
class HelpfulnessSettings:
    """Pairwise comparison by the judge, each pair in both orders."""

    baseline: str | None = None  # the model that all others are compared with; null: no comparison
    kinds: list[str] = field(default_factory=lambda: ["benign"])  # prompts that are compared on: benign | near | unsafe


@dataclass
class DownstreamSettings:
    """Tasks of lm_eval, in a process of its own."""

    tasks: list[str] = field(default_factory=list)  # names of lm_eval, or knowledge | common_sense | reading; []: none
    include_path: str | None = None  # folder with tasks of one's own (YAML)
    num_fewshot: int | None = None  # null: as the task says
    limit: int | None = None  # first so many documents of each task
    batch_size: int = 8


@dataclass
class RewardSettings:
    """The implicit rewards of models trained by preferences, on held-out pairs; nothing is generated."""

    path: str | None = None  # pairs (instruction, chosen, rejected, label) that were not trained on; null: no check
    reference: str | None = None  # the model of models.NAME that the others were trained from
    beta: float | None = None  # of their loss; null: as each model's run says, and needed for a model without a run
    average_logps: bool | None = None  # of their loss; null: as each model's run says, or false
    max_length: int = 512  # tokens of prompt + response
    max_prompt_length: int = 256
    batch_size: int = 16  # pairs


@dataclass
class EvaluateConfig:
    """`evaluate.py`: generate, judge, report."""

    output: str = MISSING
    models: dict[str, EvaluatedModelSettings] = field(default_factory=dict)  # models.NAME.path=...
    prompts: dict[str, PromptSetSettings] = field(default_factory=dict)  # prompts.NAME.path=...; prompts=published
    path: str | None = None  # file of the prompt sets that have no path of their own
    responses: str = "generate"  # generate | csv: the answers are in the prompt files, whose columns are the models
    columns: list[str] = field(default_factory=list)  # responses=csv: columns to judge; []: all but the prompt's own
    expert: Any = None  # the judge, by `expert=`; needed where there are prompts
    second_expert: Any = None  # another judge (expert@second_expert=...): their agreement is reported
    generation: BackendSettings = field(default_factory=BackendSettings)
    stop: list[str] = field(default_factory=list)  # an answer ends before the first of these strings
    shard: ShardSettings = field(default_factory=ShardSettings)  # part of the prompts: answered and judged, no report
    helpfulness: HelpfulnessSettings = field(default_factory=HelpfulnessSettings)
    downstream: DownstreamSettings = field(default_factory=DownstreamSettings)
    rewards: RewardSettings = field(default_factory=RewardSettings)
    compare: list[str] = field(default_factory=list)  # finished runs, or outputs of this program: one table of them
    sort_by: str | None = None  # compare: metric that sorts the table, "-" before it for the largest first
    training_data: list[str] = field(default_factory=list)  # files that no prompt may stem from; overlap is reported
    induction_report: str | None = None  # report.json of the dataset that was trained on; null: of a model's own run
    curves: dict[str, str] = field(default_factory=dict)  # NAME: run whose curves are drawn; {}: models that are runs
    stages_file: str | None = None  # JSONL of {"name", "command", "seconds"}: what was run before, shown in the report
    samples_per_set: int = 6  # prompts of each set that the page shows with all answers; samples.jsonl holds all
    wandb: WandbSettings = field(default_factory=WandbSettings)  # tables, without any text
    local_dirs: list[str] = field(default_factory=lambda: [".cache"])  # token store of the pairs of `rewards`
    device: str = "auto"
