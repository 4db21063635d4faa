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
    """How the model is laid out over processes."""

    name: str = "BasicTrainer"


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
    policy_pt: bool = False  # also write the DPO repo's policy.pt


@dataclass
class DatasetSettings:
    """One dataset: where it lies and how its rows read."""

    path: str = MISSING  # a file, a folder with several, or a folder made by induce.py
    schema: str = MISSING  # si | alpaca | hh
    template: str = "alpaca"  # how an instruction becomes a prompt: alpaca | hh | plain | chat
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
    max_tokens_per_microbatch: int | None = None  # token positions; null: 2048 on a CPU, 8192 on a GPU, padded no limit
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
    activation_checkpointing: bool = False
    on_non_finite: str = "stop"  # stop | skip a step whose loss or gradient is not finite

    do_first_eval: bool = True
    eval_every: int = 20_000  # examples
    sample_during_eval: bool = False
    n_eval_model_samples: int = 16
    max_new_tokens: int | None = None  # of a sample; null: max_length - prompt
    minimum_log_interval_secs: float = 1.0

    device: str = "auto"  # auto | cpu | cuda | cuda:1
    run_dir: str | None = None  # null: runs/<exp_name>
    local_run_dir: str | None = None  # DPO repo's name of run_dir
    local_dirs: list[str] = field(default_factory=lambda: [".cache"])  # token store and reference cache: first usable
    fsdp_port: int | None = None  # accepted for old launch scripts; a free port is always found
    debug: bool = False  # no wandb, no checkpoints
    log_text: bool = False  # let samples reach wandb and the console
    dry_run: bool = False  # compose, check, tokenise, report; no training


@dataclass
class GenerationSettings:
    """Decoding."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    seed: int = 0
    max_batch_tokens: int = 16_384  # padded positions (prompt + new tokens) of one batch


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
    max_rows: int | None = None
    on_bad_row: str = "drop"


@dataclass
class RulesExpertSettings:
    """`expert=rules`: patterns and templates from a YAML file."""

    name: str = "rules"
    path: str = MISSING


@dataclass
class LocalExpertSettings:
    """`expert=local`: a causal language model on this machine."""

    name: str = "local"
    model: ModelSettings = field(default_factory=ModelSettings)
    template: str = "chat"
    generation: GenerationSettings = field(default_factory=GenerationSettings)


@dataclass
class OpenAIExpertSettings:
    """`expert=openai`: any OpenAI-compatible server. The key is read from the environment variable `api_key_env`."""

    name: str = "openai"
    model: str = MISSING
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout_seconds: float = 60.0
    max_retries: int = 5
    temperature: float = 0.0
    max_new_tokens: int = 512


@dataclass
class InduceConfig:
    """`induce.py`: from a corpus of unsafe responses to a preference dataset."""

    output: str = MISSING  # the dataset folder
    stage: str = "all"  # all | induce | filter | respond | merge
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    model: ModelSettings = field(default_factory=ModelSettings)  # the reversed model
    expert: Any = MISSING  # RulesExpertSettings, LocalExpertSettings or OpenAIExpertSettings, by `expert=`
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    shard: ShardSettings = field(default_factory=ShardSettings)
    format: str = "jsonl"  # jsonl | parquet
    exclude: str | None = None  # a file of prompts whose instructions are kept out of the dataset
    device: str = "auto"
    log_text: bool = False


@dataclass
class PromptSetSettings:
    """One set of evaluation prompts."""

    path: str = MISSING
    source: str | None = None  # null: the column `source` of the file, or else the name of the set
    kind: str | None = None  # unsafe | benign | near; null: the column `kind` of the file
    max_rows: int | None = None


@dataclass
class EvaluatedModelSettings:
    """One model of a comparison: a folder, or anything `model.archive` takes."""

    path: str = MISSING
    base: str | None = None  # where path is a policy.pt: the folder with its architecture and tokenizer
    template: str = "alpaca"
    dtype: str = "float32"


@dataclass
class EvaluateConfig:
    """`evaluate.py`: generate, judge, report."""

    output: str = MISSING
    models: dict[str, EvaluatedModelSettings] = field(default_factory=dict)  # models.NAME.path=...
    prompts: dict[str, PromptSetSettings] = field(default_factory=dict)  # prompts.NAME.path=...
    expert: Any = MISSING
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    training_data: list[str] = field(default_factory=list)  # files that no prompt may stem from; overlap is reported
    induction_report: str | None = None  # report.json of the dataset that was trained on: its funnel is shown
    curves: dict[str, str] = field(default_factory=dict)  # NAME: run whose metrics.jsonl is drawn
    stages_file: str | None = None  # JSONL of {"name", "command", "seconds"}: what was run before, shown in the report
    samples_per_set: int = 6  # prompts of each set that the page shows with all answers; samples.jsonl holds all
    device: str = "auto"
