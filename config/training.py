"""Settings of `train.py`: the model, the data and the run. The losses are in `losses.py` and `pair_losses.py`.

Import them from `config.settings`, which also has those of the other entrypoints. The comment of a field says what it
does, its unit, and what null means; a longer comment is on the lines above the field.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from config import rules
from config.names import OPTIMIZERS, PAIRINGS, SCHEDULERS, SCHEMAS, TORCHAO_OPTIMIZERS
from config.rules import (
    MISSING,
    BadRow,
    Count,
    Device,
    Dtype,
    ExistingPath,
    HubName,
    HubPath,
    PathOrNone,
    Seed,
    Share,
    Template,
)


@dataclass
class LoraSettings:
    """A low-rank adapter (peft) that is trained instead of the weights (docs/lora.md)."""

    r: Count | None = None  # its rank; null: no adapter, train all weights
    alpha: Count | None = None  # the adapter is scaled by alpha / r; null: 2 r
    dropout: Annotated[float, rules.interval("[0, 1)")] = 0.0  # on the adapter's input
    # Linear layers with an adapter, by the ends of their names: [q_proj, v_proj]; null: all but the output embedding.
    target_modules: list[str] | None = None
    use_rslora: bool = False  # scale by alpha / sqrt(r)
    use_dora: bool = False  # also train the length of each row of the weights
    # Keep the base in 4 bits with bitsandbytes (QLoRA); null: in policy_dtype.
    quantize: Annotated[str, rules.choices("nf4", "fp4")] | None = None

    @property
    def full_alpha(self) -> int:
        """Return alpha, with its default of 2 r filled in."""
        assert self.r is not None
        return 2 * self.r if self.alpha is None else self.alpha


@dataclass
class ModelSettings:
    """A causal language model and its dtypes."""

    # The folder of the weights, or the model's id on the Hugging Face hub if the network allows.
    name_or_path: Annotated[
        str, rules.model_path, "the folder of the weights (config.json, *.safetensors), or the model's id on the hub"
    ] = MISSING
    tokenizer_name_or_path: str | None = None  # folder or id of the tokenizer; null: the model's own
    # Weights to start from: a run, a checkpoint, a model folder, a peft adapter, or a policy.pt; null: name_or_path.
    archive: Annotated[str, rules.weights_path] | None = None
    block_name: str | None = None  # class of the transformer blocks that FSDP shards; null: detected
    policy_dtype: Dtype = "float32"  # dtype of the trained weights
    fsdp_policy_mp: Dtype | None = None  # dtype that FSDP computes in; null: policy_dtype
    reference_dtype: Dtype | None = None  # dtype of the reference; null: the policy's, so the first rewards are 0
    # dtype of matrix products; the weights keep theirs. null: no autocast. Accuracy: docs/performance.md.
    autocast: Annotated[str, rules.choices("bfloat16")] | None = None
    # Attention kernel; packing=true has its own kernel and requires sdpa.
    attn_implementation: Annotated[str, rules.choices("sdpa", "eager", "flash_attention_2")] = "sdpa"
    lora: LoraSettings = field(default_factory=LoraSettings)  # an adapter that is trained instead of the weights
    trust_remote_code: bool = False  # run code that comes with the weights
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # for template=chat: `{enable_thinking: false}`


@dataclass
class TrainerSettings:
    """How the model is laid out over processes. All keys except `name` and `compile` are for FSDPTrainer."""

    name: Annotated[str, rules.choices("BasicTrainer", "FSDPTrainer")] = "BasicTrainer"  # one process | all in the job
    num_processes: Count | None = None  # processes to start on this machine; null: one per GPU, or two on a CPU
    num_replicas: Count = 1  # HSDP: copies of the model, each sharded over world size / num_replicas processes
    reshard_after_forward: bool = True  # free a block's gathered parameters between its forward and backward pass
    cpu_offload: bool = False  # keep parameters, gradients and optimizer state in host memory (needs a GPU)
    compile: bool = False  # torch.compile each transformer block
    # Reduce gradients after each micro-batch, not once a step: less memory, more traffic (docs/distributed.md).
    reduce_every_microbatch: bool = False


@dataclass
class WandbSettings:
    """Weights & Biases. Metrics always go to `metrics.jsonl`, too."""

    enabled: bool = True  # false: wandb is not imported
    # auto: online if a key is present, offline otherwise.
    mode: Annotated[str, rules.choices("auto", "online", "offline", "disabled")] = "auto"
    entity: str | None = None  # user or team; null: the login's default
    project: str = "safer-instruct"  # project of the run
    group: str | None = None  # runs of a group are shown together; null: none
    tags: list[str] = field(default_factory=list)  # tags of the run


@dataclass
class CheckpointSettings:
    """What a run writes besides its last checkpoint."""

    every_examples: Count | None = None  # examples between two checkpoints; null: one at every evaluation
    keep_last: Count | None = None  # how many of the newest to keep; null: all
    keep_best: str | None = None  # also keep the best by this evaluation metric, such as loss/eval
    asynchronous: bool = True  # keep training while a checkpoint is written
    merge: bool = False  # model.lora: also write the merged model
    policy_pt: bool = False  # also write the DPO repo's policy.pt


@dataclass
class EMASettings:
    """An exponential moving average of the trained weights."""

    # Share of the average that each step keeps: 0.999 averages over about 1,000 steps; null: no average.
    decay: Annotated[float, rules.interval("(0, 1)", "; 0.999 averages over some 1,000 steps")] | None = None
    save: bool = True  # save the average as `model/`; false: `model/` has the policy's own weights


@dataclass
class ReferenceSettings:
    """A reference that follows the policy (TR-DPO, Gorbatovski et al. 2024); needs a loss that reads one."""

    refresh_examples: Count | None = None  # examples between two renewals; null: never renew
    # Share of the policy's weights in the new reference; the rest comes from the old one. 1: the policy itself.
    refresh_alpha: Share = 1.0


@dataclass
class EarlyStopSettings:
    """When a run stops early."""

    # Stop above this share of refusals among sampled held-out prompts that should be answered; null: never.
    over_refusal: Annotated[float, rules.interval("[0, 1)", "; 0.1 allows one refusal in ten")] | None = None


@dataclass
class DatasetSettings:
    """One dataset: where it is and how to read its rows."""

    path: HubPath = MISSING  # a file, a folder of several, a folder made by induce.py, or ORG/NAME on the hub
    # Format of the rows.
    schema: Annotated[str, rules.choices(*SCHEMAS), f"how its rows read: {' | '.join(SCHEMAS)}"] = MISSING
    config: str | None = None  # on the hub: the part of the dataset to read; null: the only one
    split: str | None = None  # on the hub: split to read; null: train, or else all but test, validation, ...
    revision: str | None = None  # on the hub: commit, branch or tag; null: main
    streaming: bool = False  # on the hub: stream rows from the network, with no copy except the token store
    template: Template = "alpaca"  # how an instruction becomes a prompt
    system: str | None = None  # system prompt of each conversation; null: that of the row
    columns: dict[str, str] = field(default_factory=dict)  # our column name -> the file's: `{instruction: prompt}`
    split_pairs: bool = False  # for losses on single answers: make chosen a good answer, rejected a bad one
    labels: list[str] | None = None  # keep only rows with one of these labels; null: keep all
    exclude: PathOrNone | None = None  # file of instructions to keep out of training (the published test_set.csv)
    eval_path: ExistingPath | None = None  # evaluation file; null: hold out rows by the hash of their instruction
    # Share of the instructions to hold out if eval_path is null.
    eval_fraction: Annotated[float, rules.interval("[0, 1)", "; 0.05 holds out 5%")] = 0.05
    max_rows: Count | None = None  # read this many usable rows from the start; null: all
    # This dataset's share of the training rows; datasets with null split the rest by size.
    weight: Annotated[float, rules.interval("(0, 1]", "; leave the dataset out to have none of it")] | None = None
    on_bad_row: BadRow = "drop"  # drop: skip the row and count it | error: stop
    # Pairs from several scored answers: the best and the worst | every two that differ.
    pairing: Annotated[str, rules.choices(*PAIRINGS)] = "best_worst"
    # Smallest difference between the scores of a pair; shp: smallest ratio of the votes.
    min_margin: Annotated[float, rules.at_least(0)] = 0.0


@dataclass
class TrainConfig:
    """`train.py`: reversed instruction tuning, SFT and preference training."""

    exp_name: Annotated[str, "the name of the run, which lives in runs/<exp_name>"] = MISSING  # name of the run
    model: ModelSettings = field(default_factory=ModelSettings)  # the policy
    loss: Any = MISSING  # set by `loss=NAME`
    datasets: dict[str, DatasetSettings] = field(default_factory=dict)  # by name; a run trains on all of them
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    wandb: WandbSettings = field(default_factory=WandbSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    ema: EMASettings = field(default_factory=EMASettings)
    reference: ReferenceSettings = field(default_factory=ReferenceSettings)

    seed: Seed = 0  # order of the batches, dropout, sampling
    batch_size: Count = 4  # examples (pairs) per optimizer step, over all processes
    eval_batch_size: Count = 16  # examples (pairs) per evaluation batch, over all processes
    gradient_accumulation_steps: Count = 1  # minimum number of micro-batches per step
    packing: bool = True  # no padding, and each pair's prompt computed once; false: padded rows, same numbers, slower
    # Maximum token positions of a micro-batch; null: 1024 on a CPU, 8192 on a GPU, no limit for padded rows.
    max_tokens_per_microbatch: Count | None = None
    max_length: int = 512  # maximum tokens of prompt + response
    max_prompt_length: Count = 256  # maximum tokens of the prompt, smaller than max_length
    n_epochs: Count | None = 1  # passes over the data; null: n_examples decides
    n_examples: Count | None = None  # stop after this many examples, if n_epochs does not end first; null: no limit
    n_eval_examples: Count | None = 256  # held-out examples per evaluation; null: all
    # Class of torch.optim; AdamW8bit: torchao's, with 8-bit state instead of 32-bit.
    optimizer: Annotated[str, rules.choices(*OPTIMIZERS, *TORCHAO_OPTIMIZERS)] = "RMSprop"
    optimizer_args: dict[str, Any] = field(default_factory=dict)  # its other arguments: betas, eps, weight_decay, ...
    # Optimizer for what `optimizer` cannot step (for Muon: vectors, embeddings and head); null: none needed.
    fallback_optimizer: Annotated[str, rules.choices("AdamW", "Adam", "RMSprop", "SGD")] | None = None
    fallback_args: dict[str, Any] = field(default_factory=dict)  # its other arguments; its learning rate is also lr
    # Parameters that weight_decay applies to: all | all except vectors (norms and biases).
    weight_decay_on: Annotated[str, rules.choices("all", "matrices")] = "all"
    lr: Annotated[float, rules.above(0)] = 5e-7  # learning rate after the warm-up
    # Learning rate after the warm-up; all but constant end at 0, wsd with a linear decay at the end.
    lr_scheduler: Annotated[str, rules.choices(*SCHEDULERS)] = "constant"
    warmup_steps: Annotated[int, rules.at_least(0)] = 150  # optimizer steps of the warm-up
    # Share of all steps to warm up over, instead of warmup_steps; null: use warmup_steps.
    warmup_ratio: Annotated[float, rules.interval("[0, 1)", "; 0.03 warms up over 3% of the steps")] | None = None
    # lr_scheduler=wsd: share of all steps over which the learning rate decays.
    decay_ratio: Annotated[float, rules.interval("(0, 1]")] = 0.1
    max_grad_norm: Annotated[float, rules.above(0)] = 10.0  # clip the gradient to this norm
    # What the backward pass recomputes: nothing (false) | all but matrix products (selective) | whole blocks (true).
    activation_checkpointing: Annotated[bool | str, rules.choices("none", "selective", "full", True, False)] = False
    # If a loss or gradient is not finite: stop the run | skip the step.
    on_non_finite: Annotated[str, rules.choices("stop", "skip")] = "stop"

    do_first_eval: bool = True  # evaluate before the first step
    eval_every: Count = 20_000  # examples between two evaluations
    # Answer prompts at each evaluation: answers go to samples.jsonl, the share that declines to refusals_eval/KIND.
    sample_during_eval: bool = False
    n_eval_model_samples: Annotated[int, rules.at_least(0)] = 16  # prompts to answer with sample_during_eval
    early_stop: EarlyStopSettings = field(default_factory=EarlyStopSettings)
    # hydra/sweeper=optuna: the metric of a run's last evaluation to search by, such as rewards_eval/accuracies.
    sweep_metric: str | None = None
    max_new_tokens: Count | None = None  # maximum tokens of such an answer; null: the rest of max_length
    minimum_log_interval_secs: Annotated[float, rules.at_least(0)] = 1.0  # seconds between two logged steps

    device: Device = "auto"  # auto: a GPU if there is one | cpu | cuda | cuda:1
    tf32: bool = False  # run float32 matrix products on a GPU in TF32: many times faster, inputs rounded to 10 bits
    run_dir: str | None = None  # folder of the run; null: runs/<exp_name>
    local_run_dir: str | None = None  # the DPO repo's name for run_dir
    local_dirs: list[str] = field(default_factory=lambda: [".cache"])  # token store and reference cache: first usable
    fsdp_port: int | None = None  # port where the processes of one machine meet; null: a free one
    debug: bool = False  # write no checkpoints, and nothing to wandb
    log_text: bool = False  # allow samples in wandb and on the console
    # License for the model card, as named on the Hugging Face hub (apache-2.0).
    license: str = "unknown"
    push_to_hub: HubName | None = None  # USER/NAME: upload the last checkpoint's model/, privately; null: no upload
    # true: estimate the run from its data and three real steps, then stop | data: from the data alone.
    dry_run: Annotated[bool | str, rules.choices("data", True, False)] = False
