"""Ranges of values and values that do not fit each other, for each entrypoint.

Every function returns all the errors that it finds, each a complete message (rule, value, what to type instead).
Nothing is loaded here: folders are looked at, not read.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from config.paths import find_path
from config.settings import (
    MISSING,
    DatasetSettings,
    EvaluateConfig,
    GenerationSettings,
    InduceConfig,
    LocalExpertSettings,
    ModelSettings,
    OpenAIExpertSettings,
    PreferenceLossSettings,
    RulesExpertSettings,
    TrainConfig,
)

DTYPES = ("float32", "bfloat16", "float16", "float64")
DEVICES = r"auto|cpu|cuda(:\d+)?"
UNUSABLE_OPTIMIZERS = ("Optimizer", "LBFGS", "SparseAdam")  # the base class; wants a closure; wants sparse gradients
SCHEDULERS = ("constant", "linear", "cosine")
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")

# What to write for the mandatory values, by the end of their names.
EXAMPLES = {
    "exp_name": "the name of the run, which lives in runs/<exp_name>",
    "model.name_or_path": "the folder of the weights (config.json, *.safetensors), or the model's id on the hub",
    "path": "the file or folder to read",
    "schema": "how its rows read: si | alpaca | hh",
    "output": "the folder to write",
    "expert": "one of rules, local, openai",
    "expert.model": "the name under which the server knows the model",
    "expert.model.name_or_path": "the folder of the expert's weights, or its id on the hub",
    "expert.path": "the YAML file of the rules",
}


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


def check_induce(config: InduceConfig) -> list[str]:
    """All errors of an induction command."""
    needs_model = config.stage in ("all", "induce")
    needs_expert = config.stage in ("all", "filter", "respond")
    unused = [key for key, needed in (("model.", needs_model), ("expert", needs_expert)) if not needed]
    errors = [
        *(line for line in missing_values(config) if not line.startswith(tuple(unused))),
        *_one_of("stage", config.stage, ("all", "induce", "filter", "respond", "merge")),
        *_one_of("format", config.format, ("jsonl", "parquet")),
        *_one_of("corpus.on_bad_row", config.corpus.on_bad_row, ("drop", "error")),
        *_existing_path("corpus.path", config.corpus.path),
        *_existing_path("exclude", config.exclude),
        *_at_least("corpus.max_rows", config.corpus.max_rows, 1),
        *_check_device(config.device),
        *_check_generation(config.generation, "generation"),
        *(_check_model(config.model, "model") if needs_model else []),
        *(_check_expert(config.expert) if needs_expert else []),
    ]
    index, count = config.shard.index, config.shard.count
    errors += _at_least("shard.count", count, 1)
    if index is not None and (index < 0 or (count is not None and index >= max(count, 1))):
        last = f"{count - 1}" if count else "shard.count - 1"
        errors.append(f"shard.index={index}: shards are numbered from 0 to {last}")
    return errors


def check_evaluate(config: EvaluateConfig) -> list[str]:
    """All errors of an evaluation command."""
    errors = [
        *missing_values(config),
        *_check_device(config.device),
        *_check_generation(config.generation, "generation"),
        *_check_expert(config.expert),
    ]
    if not config.prompts:
        errors.append("no prompts: give at least one set with prompts.NAME.path=FILE")
    for name, prompts in config.prompts.items():
        errors += _existing_path(f"prompts.{name}.path", prompts.path)
        errors += _at_least(f"prompts.{name}.max_rows", prompts.max_rows, 1)
        if prompts.kind is not None:
            errors += _one_of(f"prompts.{name}.kind", prompts.kind, ("unsafe", "benign", "near"))
    for name, model in config.models.items():
        errors += _one_of(f"models.{name}.template", model.template, ("alpaca", "hh", "plain", "chat"))
        errors += _check_model_path(f"models.{name}.path", model.path)
    for path in config.training_data:
        errors += _existing_path("training_data", path)
    return errors


def missing_values(config: Any, prefix: str = "") -> list[str]:
    """One message for each mandatory value of a settings dataclass that is not set, inner ones included."""
    errors: list[str] = []
    entries = (
        {field.name: config.__dict__[field.name] for field in fields(config)} if is_dataclass(config) else dict(config)
    )
    for name, value in entries.items():
        key = f"{prefix}{name}"
        if isinstance(value, str) and value == MISSING:
            words = EXAMPLES.get(key) or EXAMPLES.get(name) or "a value"
            errors.append(f"{key} is not set: write {key}=..., {words}")
        elif is_dataclass(value) or isinstance(value, dict):
            errors += missing_values(value, key + ".")
    return errors


def _check_loss(loss: Any) -> list[str]:
    if loss == MISSING:
        return []
    if not isinstance(loss, PreferenceLossSettings):
        return _one_of("loss.reduction", loss.reduction, ("sequence_sum", "token_mean"))
    errors = _above("loss.beta", loss.beta, 0) + _at_least("loss.nll_weight", loss.nll_weight, 0)
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
        errors += _existing_path(f"{key}.path", settings.path)
        errors += _existing_path(f"{key}.eval_path", settings.eval_path)
        errors += _existing_path(f"{key}.exclude", settings.exclude)
        errors += _one_of(f"{key}.schema", settings.schema, ("si", "alpaca", "hh"))
        errors += _one_of(f"{key}.template", settings.template, ("alpaca", "hh", "plain", "chat"))
        errors += _one_of(f"{key}.on_bad_row", settings.on_bad_row, ("drop", "error"))
        errors += _at_least(f"{key}.max_rows", settings.max_rows, 1)
        if not 0 <= settings.eval_fraction < 1:
            errors.append(f"{key}.eval_fraction={settings.eval_fraction}: must lie in [0, 1); 0.05 holds out 5%")
    return errors


def _check_run(config: TrainConfig) -> list[str]:
    errors = _check_device(config.device)
    errors += _one_of("trainer.name", config.trainer.name, ("BasicTrainer", "FSDPTrainer"))
    errors += _one_of("wandb.mode", config.wandb.mode, ("auto", "online", "offline", "disabled"))
    errors += _one_of("on_non_finite", config.on_non_finite, ("stop", "skip"))
    errors += _at_least("checkpoint.every_examples", config.checkpoint.every_examples, 1)
    errors += _at_least("checkpoint.keep_last", config.checkpoint.keep_last, 1)
    errors += _at_least("seed", config.seed, 0)
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


def _check_batches(config: TrainConfig) -> list[str]:
    errors: list[str] = []
    for name in ("batch_size", "eval_batch_size", "gradient_accumulation_steps", "max_prompt_length", "eval_every"):
        errors += _at_least(name, config.__dict__[name], 1)
    for name in ("max_tokens_per_microbatch", "n_epochs", "n_examples", "n_eval_examples", "max_new_tokens"):
        errors += _at_least(name, config.__dict__[name], 1)
    errors += _at_least("n_eval_model_samples", config.n_eval_model_samples, 0)
    errors += _at_least("minimum_log_interval_secs", config.minimum_log_interval_secs, 0)
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
    errors = _above("lr", config.lr, 0) + _above("max_grad_norm", config.max_grad_norm, 0)
    errors += _one_of("lr_scheduler", config.lr_scheduler, SCHEDULERS)
    errors += _at_least("warmup_steps", config.warmup_steps, 0)
    if config.warmup_ratio is not None and not 0 <= config.warmup_ratio < 1:
        errors.append(f"warmup_ratio={config.warmup_ratio}: must lie in [0, 1); 0.03 warms up over 3% of the steps")
    known: dict[str, Any] = {
        name: kind
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in UNUSABLE_OPTIMIZERS
    }
    if config.optimizer not in known:
        return errors + _one_of("optimizer", config.optimizer, sorted(known))
    try:
        known[config.optimizer]([torch.nn.Parameter(torch.zeros(1))], lr=1e-3, **config.optimizer_args)
    except (TypeError, ValueError) as error:
        errors.append(f"optimizer_args={config.optimizer_args} do not fit optimizer={config.optimizer}: {error}")
    return errors


def _check_model(model: ModelSettings, key: str) -> list[str]:
    errors = _one_of(f"{key}.policy_dtype", model.policy_dtype, DTYPES)
    for name in ("fsdp_policy_mp", "reference_dtype"):
        if model.__dict__[name] is not None:
            errors += _one_of(f"{key}.{name}", model.__dict__[name], DTYPES)
    errors += _one_of(f"{key}.attn_implementation", model.attn_implementation, ("sdpa", "eager", "flash_attention_2"))
    if model.autocast is not None:
        errors += _one_of(f"{key}.autocast", model.autocast, ("bfloat16",))
    errors += _check_model_path(f"{key}.name_or_path", model.name_or_path)
    if model.archive is not None and not find_path(model.archive).exists():
        errors.append(
            f"{key}.archive={model.archive}: there is no such file or folder{_neighbours(model.archive)}. Give a run, "
            "a checkpoint, a model folder, or a policy.pt"
        )
    return errors


def _check_model_path(key: str, value: str) -> list[str]:
    """A model folder that is not there, or holds no weights. What may be an id on the hub is left to the loader."""
    path = find_path(value)
    if value == MISSING or path.is_file():
        return []
    if not path.exists():
        is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value) and not value.startswith(".")
        if is_hub_id and not (path.parent != Path(".") and path.parent.is_dir()):
            return []
        return [f"{key}={value}: there is no such folder{_neighbours(value)}"]
    if (path / "LATEST").exists() or (path / "model").is_dir():
        return []  # a run or a checkpoint
    if not (path / "config.json").is_file():
        return [f"{key}={value}: the folder has no config.json, so it holds no model"]
    if not any(list(path.glob(pattern)) for pattern in WEIGHT_PATTERNS):
        return [f"{key}={value}: the folder has a config.json but no weights (*.safetensors)"]
    return []


def _check_expert(expert: Any) -> list[str]:
    if isinstance(expert, RulesExpertSettings):
        return _existing_path("expert.path", expert.path)
    if isinstance(expert, LocalExpertSettings):
        return [
            *_check_model(expert.model, "expert.model"),
            *_one_of("expert.template", expert.template, ("alpaca", "hh", "plain", "chat")),
            *_check_generation(expert.generation, "expert.generation"),
        ]
    if isinstance(expert, OpenAIExpertSettings):
        errors = _at_least("expert.concurrency", expert.concurrency, 1) + _at_least(
            "expert.max_retries", expert.max_retries, 0
        )
        errors += _above("expert.timeout_seconds", expert.timeout_seconds, 0)
        errors += _at_least("expert.max_new_tokens", expert.max_new_tokens, 1)
        if not os.environ.get(expert.api_key_env):
            errors.append(
                f"the environment variable {expert.api_key_env} (expert.api_key_env) is not set: export the key of the "
                "server there; a server without keys takes any text"
            )
        return errors
    return []


def _check_generation(generation: GenerationSettings, key: str) -> list[str]:
    errors = _at_least(f"{key}.max_new_tokens", generation.max_new_tokens, 1)
    errors += _at_least(f"{key}.temperature", generation.temperature, 0)
    errors += _at_least(f"{key}.max_batch_tokens", generation.max_batch_tokens, 1)
    if not 0 < generation.top_p <= 1:
        errors.append(f"{key}.top_p={generation.top_p}: must lie in (0, 1]")
    return errors


def _check_device(device: str) -> list[str]:
    if not re.fullmatch(DEVICES, device):
        return [f"device={device}: must be auto, cpu or cuda"]
    if device.startswith("cuda") and not torch.cuda.is_available():
        return [f"device={device}: no CUDA device is visible to this process; write device=cpu or device=auto"]
    return []


def _one_of(key: str, value: str, choices: Sequence[str]) -> list[str]:
    if value in choices or value == MISSING:
        return []
    guess = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    meant = f"; did you mean {guess[0]}?" if guess else ""
    return [f"{key}={value}: no such choice{meant} Choices: {', '.join(choices)}"]


def _at_least(key: str, value: float | None, least: float) -> list[str]:
    return [f"{key}={value}: must be {least} or more"] if value is not None and not value >= least else []


def _above(key: str, value: float, bound: float) -> list[str]:
    return [] if value > bound and value != float("inf") else [f"{key}={value}: must be above {bound}, and finite"]


def _existing_path(key: str, value: str | None) -> list[str]:
    if not value or value == MISSING or find_path(value).exists():
        return []
    return [f"{key}={value}: there is no such file or folder{_neighbours(value)}"]


def _neighbours(value: str) -> str:
    """`; did you mean ...?`, from the folder that the path points into."""
    path = Path(value).expanduser()
    if not path.parent.is_dir():
        return f" ({path.parent} does not exist either)"
    names = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1, cutoff=0.6)
    return f"; did you mean {path.parent / names[0]}?" if names else ""
