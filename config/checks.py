"""Ranges of values and values that do not fit each other, for each entrypoint.

Every function returns all the errors that it finds, each a complete message (rule, value, what to type instead).
Nothing is loaded here: folders are looked at, not read.
"""

from __future__ import annotations

import os
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from config.paths import find_path
from config.ranges import above, at_least, existing_path, neighbours, one_of, share, switch
from config.settings import (
    MISSING,
    BackendSettings,
    DatasetSettings,
    GenerationSettings,
    InduceConfig,
    LocalExpertSettings,
    ModelSettings,
    OpenAIExpertSettings,
    PreferenceLossSettings,
    RoundTripSettings,
    RulesExpertSettings,
    ServerSettings,
    TrainConfig,
    TrainerSettings,
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
    "generation.server.model": "the name under which the server knows the reversed model",
    "roundtrip.model.name_or_path": "the folder of a model that follows instructions",
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


INDUCE_STAGES = ("all", "induce", "score", "filter", "respond", "merge", "status", "audit")


def check_induce(config: InduceConfig) -> list[str]:
    """All errors of an induction command."""
    stage = config.stage
    local = config.generation.backend != "openai"
    needs_model = stage in ("all", "induce") and local
    needs_server = stage in ("all", "induce") and not local
    needs_expert = stage in ("all", "filter", "respond")
    has_roundtrip = config.roundtrip.model.name_or_path != MISSING
    needed = {
        "output": stage != "audit",
        "corpus.": stage not in ("status", "audit"),
        "model.": needs_model,
        "expert": needs_expert,
        "generation.server.": needs_server,
        "roundtrip.": has_roundtrip or stage == "score",
    }
    unused = tuple(key for key, is_needed in needed.items() if not is_needed)
    errors = [
        *(line for line in missing_values(config) if not line.startswith(unused)),
        *one_of("stage", stage, INDUCE_STAGES),
        *one_of("format", config.format, ("all", "jsonl", "parquet")),
        *one_of("corpus.on_bad_row", config.corpus.on_bad_row, ("drop", "error")),
        *existing_path("corpus.path", config.corpus.path),
        *existing_path("exclude", config.exclude),
        *existing_path("path", config.path),
        *at_least("corpus.max_rows", config.corpus.max_rows, 1),
        *at_least("max_same_chosen", config.max_same_chosen, 1),
        *share("exclude_similarity", config.exclude_similarity),
        *share("duplicates.threshold", config.duplicates.threshold),
        *one_of("duplicates.index", config.duplicates.index, ("memory", "disk")),
        *check_device(config.device),
        *_check_induction(config),
        *(_check_model(config.model, "model") if needs_model else []),
        *(check_server(config.generation.server, "generation.server") if needs_server else []),
        *_check_roundtrip(config.roundtrip, has_roundtrip),
        *(check_expert(config.expert) if needs_expert else []),
    ]
    if stage == "audit" and config.path is None:
        errors.append("stage=audit reads a dataset: write path=..., a file or folder with the columns of `si`")
    index, count = config.shard.index, config.shard.count
    errors += at_least("shard.count", count, 1)
    if index is not None and (index < 0 or (count is not None and index >= max(count, 1))):
        last = f"{count - 1}" if count else "shard.count - 1"
        errors.append(f"shard.index={index}: shards are numbered from 0 to {last}")
    return errors


def _check_induction(config: InduceConfig) -> list[str]:
    generation = config.generation
    errors = check_backend(generation) + at_least("generation.num_candidates", generation.num_candidates, 1)
    several = generation.num_candidates > 1
    if several and config.roundtrip.model.name_or_path == MISSING and config.stage in ("all", "induce", "filter"):
        errors.append(
            f"generation.num_candidates={generation.num_candidates}: the round-trip score chooses among them, so a "
            "forward model is needed: roundtrip.model.name_or_path=FOLDER"
        )
    if several and generation.temperature == 0:
        errors.append(
            f"generation.num_candidates={generation.num_candidates} with generation.temperature=0: all candidates "
            "would be the same; give a temperature, for example generation.temperature=0.7"
        )
    return errors


def check_backend(generation: BackendSettings) -> list[str]:
    """How a model is run, its server apart."""
    errors = check_generation(generation, "generation")
    errors += one_of("generation.backend", generation.backend, ("hf", "vllm", "openai"))
    errors += at_least("generation.vllm.tensor_parallel", generation.vllm.tensor_parallel, 1)
    errors += at_least("generation.vllm.max_length", generation.vllm.max_length, 1)
    return errors + share("generation.vllm.memory_fraction", generation.vllm.memory_fraction)


def _check_roundtrip(roundtrip: RoundTripSettings, has_model: bool) -> list[str]:
    errors = _check_model(roundtrip.model, "roundtrip.model") if has_model else []
    if roundtrip.threshold is not None and not has_model:
        errors.append(
            f"roundtrip.threshold={roundtrip.threshold} needs scores: give roundtrip.model.name_or_path=FOLDER"
        )
    errors += one_of("roundtrip.template", roundtrip.template, ("alpaca", "hh", "plain", "chat"))
    errors += share("roundtrip.top_fraction", roundtrip.top_fraction)
    errors += at_least("roundtrip.max_length", roundtrip.max_length, 2)
    errors += at_least("roundtrip.max_batch_tokens", roundtrip.max_batch_tokens, 1)
    if roundtrip.threshold is not None and roundtrip.top_fraction is not None:
        errors.append(
            f"roundtrip.threshold={roundtrip.threshold}, roundtrip.top_fraction={roundtrip.top_fraction}: two ways to "
            "draw one line, set one of them"
        )
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
        for name in ("num_processes", "num_replicas", "reshard_after_forward", "cpu_offload"):
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


def _check_model(model: ModelSettings, key: str) -> list[str]:
    errors = one_of(f"{key}.policy_dtype", model.policy_dtype, DTYPES)
    for name in ("fsdp_policy_mp", "reference_dtype"):
        if model.__dict__[name] is not None:
            errors += one_of(f"{key}.{name}", model.__dict__[name], DTYPES)
    errors += one_of(f"{key}.attn_implementation", model.attn_implementation, ("sdpa", "eager", "flash_attention_2"))
    if model.autocast is not None:
        errors += one_of(f"{key}.autocast", model.autocast, ("bfloat16",))
    errors += check_model_path(f"{key}.name_or_path", model.name_or_path)
    if model.archive is not None and not find_path(model.archive).exists():
        errors.append(
            f"{key}.archive={model.archive}: there is no such file or folder{neighbours(model.archive)}. Give a run, "
            "a checkpoint, a model folder, or a policy.pt"
        )
    return errors


def check_model_path(key: str, value: str) -> list[str]:
    """A model folder that is not there, or holds no weights. What may be an id on the hub is left to the loader."""
    path = find_path(value)
    if value == MISSING or path.is_file():
        return []
    if not path.exists():
        is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value) and not value.startswith(".")
        if is_hub_id and not (path.parent != Path(".") and path.parent.is_dir()):
            return []
        return [f"{key}={value}: there is no such folder{neighbours(value)}"]
    if (path / "LATEST").exists() or (path / "model").is_dir():
        return []  # a run or a checkpoint
    if not (path / "config.json").is_file():
        return [f"{key}={value}: the folder has no config.json, so it holds no model"]
    if not any(list(path.glob(pattern)) for pattern in WEIGHT_PATTERNS):
        return [f"{key}={value}: the folder has a config.json but no weights (*.safetensors)"]
    return []


def check_expert(expert: Any) -> list[str]:
    """The settings of an expert, whichever it is."""
    if isinstance(expert, RulesExpertSettings):
        return existing_path("expert.path", expert.path)
    if isinstance(expert, LocalExpertSettings):
        return [
            *_check_model(expert.model, "expert.model"),
            *one_of("expert.template", expert.template, ("alpaca", "hh", "plain", "chat")),
            *check_generation(expert.generation, "expert.generation"),
        ]
    if isinstance(expert, OpenAIExpertSettings):
        return [*check_server(expert, "expert"), *_check_budget(expert)]
    return []


def check_server(server: ServerSettings, key: str) -> list[str]:
    """The settings of a server, its name and address apart."""
    errors = at_least(f"{key}.concurrency", server.concurrency, 1)
    errors += at_least(f"{key}.max_retries", server.max_retries, 0)
    errors += above(f"{key}.timeout_seconds", server.timeout_seconds, 0)
    errors += above(f"{key}.patience_seconds", server.patience_seconds, 0)
    if not os.environ.get(server.api_key_env):
        errors.append(
            f"the environment variable {server.api_key_env} ({key}.api_key_env) is not set: export the key of the "
            "server there; a server without keys takes any text"
        )
    return errors


def _check_budget(expert: OpenAIExpertSettings) -> list[str]:
    errors = at_least("expert.max_new_tokens", expert.max_new_tokens, 1)
    errors += one_of("expert.structured_output", expert.structured_output, ("auto", "always", "never"))
    errors += at_least("expert.price_prompt", expert.price_prompt, 0)
    errors += at_least("expert.price_completion", expert.price_completion, 0)
    for name in ("max_cost", "max_tokens"):
        limit = expert.__dict__[name]
        if limit is not None and not limit > 0:
            errors.append(
                f"expert.{name}={limit}: nothing could be asked; give a limit above 0, or null for none (the stages "
                "that ask no expert are stage=induce and stage=merge)"
            )
    if expert.max_cost is not None and not (expert.price_prompt or expert.price_completion):
        errors.append(
            f"expert.max_cost={expert.max_cost} needs prices to count with: expert.price_prompt=... and "
            "expert.price_completion=..., each of a million tokens"
        )
    return errors


def check_generation(generation: GenerationSettings, key: str) -> list[str]:
    """Decoding parameters out of range."""
    errors = at_least(f"{key}.max_new_tokens", generation.max_new_tokens, 1)
    errors += at_least(f"{key}.temperature", generation.temperature, 0)
    errors += at_least(f"{key}.max_batch_tokens", generation.max_batch_tokens, 1)
    if not 0 < generation.top_p <= 1:
        errors.append(f"{key}.top_p={generation.top_p}: must lie in (0, 1]")
    return errors


def check_device(device: str) -> list[str]:
    """A device that this machine has not."""
    if not re.fullmatch(DEVICES, device):
        return [f"device={device}: must be auto, cpu or cuda"]
    if device.startswith("cuda") and not torch.cuda.is_available():
        return [f"device={device}: no CUDA device is visible to this process; write device=cpu or device=auto"]
    return []
