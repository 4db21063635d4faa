"""What can be wrong with the values of a training command."""

from __future__ import annotations

import re
from typing import Any

import torch

from config.checks import _check_model, check_device, missing_values
from config.ranges import above, at_least, existing_path, one_of, switch
from config.settings import (
    MISSING,
    DatasetSettings,
    PreferenceLossSettings,
    TrainConfig,
    TrainerSettings,
)

UNUSABLE_OPTIMIZERS = ("Optimizer", "LBFGS", "SparseAdam")  # the base class; wants a closure; wants sparse gradients


SCHEDULERS = ("constant", "linear", "cosine")


def check_train(config: TrainConfig) -> list[str]:
    """All errors of a training command."""
    return [
        *missing_values(config),
        *_check_model(config.model, "model"),
        *_check_loss(config.loss),
        *_check_datasets(config.datasets),
        *_check_run(config),
        *_check_batches(config),
        *_check_optimizer(config),
    ]


def _check_loss(loss: Any) -> list[str]:
    if loss == MISSING:
        return []
    if not isinstance(loss, PreferenceLossSettings):
        return one_of("loss.reduction", loss.reduction, ("sequence_sum", "token_mean"))
    errors = above("loss.beta", loss.beta, 0) + at_least("loss.nll_weight", loss.nll_weight, 0)
    if not 0 <= loss.label_smoothing < 0.5:
        errors.append(
            f"loss.label_smoothing={loss.label_smoothing}: must lie in [0, 0.5); at 0.5 both responses count the same"
        )
    return errors


def _check_datasets(datasets: dict[str, DatasetSettings]) -> list[str]:
    if not datasets:
        return ["no dataset: choose some with datasets=[si] (si, alpaca, hh)"]
    errors: list[str] = []
    for name, settings in datasets.items():
        key = f"datasets.{name}"
        errors += existing_path(f"{key}.path", settings.path)
        errors += existing_path(f"{key}.eval_path", settings.eval_path)
        errors += existing_path(f"{key}.exclude", settings.exclude)
        errors += one_of(f"{key}.schema", settings.schema, ("si", "alpaca", "hh"))
        errors += one_of(f"{key}.template", settings.template, ("alpaca", "hh", "plain", "chat"))
        errors += one_of(f"{key}.on_bad_row", settings.on_bad_row, ("drop", "error"))
        errors += at_least(f"{key}.max_rows", settings.max_rows, 1)
        if not 0 <= settings.eval_fraction < 1:
            errors.append(f"{key}.eval_fraction={settings.eval_fraction}: must lie in [0, 1); 0.05 holds out 5%")
    return errors


def _check_run(config: TrainConfig) -> list[str]:
    errors = check_device(config.device)
    errors += _check_trainer(config)
    errors += one_of("wandb.mode", config.wandb.mode, ("auto", "online", "offline", "disabled"))
    errors += one_of("on_non_finite", config.on_non_finite, ("stop", "skip"))
    errors += switch("activation_checkpointing", config.activation_checkpointing, ("none", "selective", "full"))
    errors += switch("dry_run", config.dry_run, ("data",))
    errors += at_least("checkpoint.every_examples", config.checkpoint.every_examples, 1)
    errors += at_least("checkpoint.keep_last", config.checkpoint.keep_last, 1)
    best = config.checkpoint.keep_best
    if best is not None and "eval" not in best:
        errors.append(
            f"checkpoint.keep_best={best}: must be what an evaluation measures, such as loss/eval or "
            "rewards_eval/accuracies"
        )
    errors += at_least("seed", config.seed, 0)
    is_folder_name = re.fullmatch(r"[\w.,=+-][\w.,=+ -]*", config.exp_name) and ".." not in config.exp_name
    if config.exp_name != MISSING and not is_folder_name:
        errors.append(
            f"exp_name={config.exp_name!r}: it names a folder: letters, digits and . , = + - _ only; "
            "run_dir=FOLDER puts the run elsewhere"
        )
    if config.run_dir and config.local_run_dir and config.run_dir != config.local_run_dir:
        errors.append(f"run_dir={config.run_dir}, local_run_dir={config.local_run_dir}: one thing, set one of them")
    if not config.local_dirs:
        errors.append("local_dirs=[]: name a folder for the token store and the reference cache: local_dirs=[.cache]")
    return errors


def _check_trainer(config: TrainConfig) -> list[str]:
    trainer = config.trainer
    errors = one_of("trainer.name", trainer.name, ("BasicTrainer", "FSDPTrainer"))
    errors += at_least("trainer.num_processes", trainer.num_processes, 1)
    errors += at_least("trainer.num_replicas", trainer.num_replicas, 1)
    if trainer.name == "BasicTrainer":
        plain = TrainerSettings(compile=trainer.compile)
        for name in vars(plain).keys() - {"name", "compile"}:
            if vars(trainer)[name] != vars(plain)[name]:
                errors.append(
                    f"trainer.{name}={vars(trainer)[name]}: BasicTrainer is one process, which it means nothing to; "
                    "write trainer=FSDPTrainer"
                )
        return errors
    if re.fullmatch(r"cuda:\d+", config.device):
        errors.append(f"device={config.device}: the processes of FSDPTrainer take a GPU each; write device=cuda")
    if config.device == "cpu" and trainer.cpu_offload:
        errors.append("trainer.cpu_offload=true: on device=cpu all memory is the host's; leave it out")
    if config.model.fsdp_policy_mp == "float16":
        errors.append(
            "model.fsdp_policy_mp=float16: gradients would underflow without a loss scaler; write bfloat16, or "
            "float32 on a GPU without it"
        )
    return errors


def _check_batches(config: TrainConfig) -> list[str]:
    errors: list[str] = []
    for name in ("batch_size", "eval_batch_size", "gradient_accumulation_steps", "max_prompt_length", "eval_every"):
        errors += at_least(name, config.__dict__[name], 1)
    for name in ("max_tokens_per_microbatch", "n_epochs", "n_examples", "n_eval_examples", "max_new_tokens"):
        errors += at_least(name, config.__dict__[name], 1)
    errors += at_least("n_eval_model_samples", config.n_eval_model_samples, 0)
    errors += at_least("minimum_log_interval_secs", config.minimum_log_interval_secs, 0)
    if config.packing and config.model.attn_implementation != "sdpa":
        errors.append(
            f"model.attn_implementation={config.model.attn_implementation}: packing=true attends by itself and "
            "asks for sdpa; write packing=false to have padded rows under another one"
        )
    if config.max_prompt_length >= config.max_length:
        errors.append(
            f"max_prompt_length={config.max_prompt_length} must be smaller than max_length={config.max_length}: "
            "max_length counts prompt and response together"
        )
    if config.batch_size >= 1 and config.gradient_accumulation_steps > config.batch_size:
        errors.append(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps} is more than the rows of a batch "
            f"(batch_size={config.batch_size}): each micro-batch needs one row; lower it to {config.batch_size} or less"
        )
    if config.n_epochs is None and config.n_examples is None:
        errors.append("n_epochs=null and n_examples=null: training would never end; set one of them")
    return errors


def _check_optimizer(config: TrainConfig) -> list[str]:
    errors = above("lr", config.lr, 0) + above("max_grad_norm", config.max_grad_norm, 0)
    errors += one_of("lr_scheduler", config.lr_scheduler, SCHEDULERS)
    errors += at_least("warmup_steps", config.warmup_steps, 0)
    if config.warmup_ratio is not None and not 0 <= config.warmup_ratio < 1:
        errors.append(f"warmup_ratio={config.warmup_ratio}: must lie in [0, 1); 0.03 warms up over 3% of the steps")
    known: dict[str, Any] = {
        name: kind
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in UNUSABLE_OPTIMIZERS
    }
    if config.optimizer not in known:
        return errors + one_of("optimizer", config.optimizer, sorted(known))
    try:
        known[config.optimizer]([torch.nn.Parameter(torch.zeros(1))], lr=1e-3, **config.optimizer_args)
    except (TypeError, ValueError) as error:
        errors.append(f"optimizer_args={config.optimizer_args} do not fit optimizer={config.optimizer}: {error}")
    return errors
