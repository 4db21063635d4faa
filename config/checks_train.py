"""Checks of a training command."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module

from config.checks import check_device, check_hub, check_lengths
from config.checks_lora import check_lora
from config.checks_loss import check_loss, check_reference, check_rows
from config.names import INSTALL_TORCHAO, TORCHAO_OPTIMIZERS, WITHOUT_SHARDS
from config.paths import find_path
from config.rules import MISSING, Fault, check_values, misfit
from config.settings import TrainConfig, TrainerSettings


def check_train(config: TrainConfig) -> list[Fault]:
    """Return all faults of a training command; checks that import torch, which takes seconds, run last."""
    faults = [
        *check_values(config),
        *check_loss(config.loss),
        *check_rows(config),
        *check_reference(config),
        *_check_run(config),
        *_check_sources(config),
        *_check_weights(config),
        *_check_trainer(config),
        *_check_batches(config),
        *check_lora(config),
        *check_hub(config.push_to_hub),
    ]
    return faults or [*check_device(config.device), *_check_optimizer(config)]


def _check_run(config: TrainConfig) -> Iterator[Fault]:
    if not config.datasets:
        yield Fault("datasets", "no dataset: choose some with datasets=[si]")
    is_folder_name = re.fullmatch(r"[\w.,=+-][\w.,=+ -]*", config.exp_name) and config.exp_name.strip(".")
    if config.exp_name != MISSING and not is_folder_name:
        why = "it names a folder: letters, digits and . , = + - _ only; run_dir=FOLDER puts the run elsewhere"
        yield misfit("exp_name", repr(config.exp_name), why)
    if config.run_dir and config.local_run_dir and config.run_dir != config.local_run_dir:
        why = f"local_run_dir={config.local_run_dir} is another name for it; set only one of them"
        yield misfit("run_dir", config.run_dir, why, "local_run_dir")
    limit = config.early_stop.over_refusal
    if limit is not None and not (config.sample_during_eval and config.n_eval_model_samples):
        why = (
            "refusals are counted among the answers sampled at evaluations; write sample_during_eval=true, and "
            "n_eval_model_samples=64 for a meaningful share"
        )
        yield misfit("early_stop.over_refusal", limit, why, "sample_during_eval", "n_eval_model_samples")
    if config.push_to_hub is not None and config.debug:
        why = "debug=true writes no checkpoint to upload; leave one of them out"
        yield misfit("push_to_hub", config.push_to_hub, why, "debug")
    if not config.local_dirs:
        why = "name a folder for the token store and the reference cache: local_dirs=[.cache]"
        yield misfit("local_dirs", [], why)
    best = config.checkpoint.keep_best
    for key, metric in (("checkpoint.keep_best", best), ("sweep_metric", config.sweep_metric)):
        if metric is not None and "eval" not in metric:
            yield misfit(key, metric, "must be an evaluation metric, such as loss/eval or rewards_eval/accuracies")
    if best is not None and config.ema.decay is not None and not config.ema.save:
        why = "with ema.save=false the average is evaluated, but the policy's own weights are saved; leave one out"
        yield misfit("checkpoint.keep_best", best, why, "ema.save")
    if config.ema.decay is None and not config.ema.save:
        yield misfit("ema.save", False, "there is no average; write ema.decay=0.999, too", "ema.decay")


def _check_sources(config: TrainConfig) -> Iterator[Fault]:
    """Check that keys for hub datasets are only set for hub datasets."""
    for name, dataset in config.datasets.items():
        path = find_path(dataset.path)
        unread = ("config", "split", "revision", "streaming") if path.is_file() else ("revision",) * path.is_dir()
        what = "file" if path.is_file() else "folder"
        for key in unread:
            if vars(dataset)[key]:
                why = f"it is for datasets on the hub, but {dataset.path} is a {what} on this machine; leave it out"
                yield misfit(f"datasets.{name}.{key}", vars(dataset)[key], why, f"datasets.{name}.path")


def _check_weights(config: TrainConfig) -> Iterator[Fault]:
    """Check that the weights of the datasets sum to 1."""
    weights = {name: dataset.weight for name, dataset in config.datasets.items()}
    given = {f"datasets.{name}.weight": weight for name, weight in weights.items() if weight is not None}
    if not given:
        return
    total, listed = sum(given.values()), ", ".join(f"{key}={weight}" for key, weight in given.items())
    key, *others = given
    why = ""
    if len(given) == len(weights) and abs(total - 1) > 1e-6:
        why = f"shares of all datasets must sum to 1, and these sum to {total:g}; leave one out to give it the rest"
    elif len(given) < len(weights) and total >= 1 - 1e-6:
        rest = ", ".join(name for name, weight in weights.items() if weight is None)
        nothing = f"these shares sum to {total:g}, which leaves nothing for {rest}"
        why = f"{nothing}; make them smaller, or take it out of datasets=[...]"
    if why:
        yield Fault(key, f"{listed}: {why}", tuple(others))


def _check_trainer(config: TrainConfig) -> Iterator[Fault]:
    trainer, plain = vars(config.trainer), vars(TrainerSettings())
    if config.trainer.name == "BasicTrainer":
        for name in plain.keys() - {"name", "compile"}:
            if trainer[name] != plain[name]:
                why = "it has no effect on BasicTrainer, which is one process; write trainer=FSDPTrainer"
                yield misfit(f"trainer.{name}", trainer[name], why, "trainer.name")
        return
    if re.fullmatch(r"cuda:\d+", config.device):
        yield misfit("device", config.device, "each process of FSDPTrainer takes its own GPU; write device=cuda")
    if config.device == "cpu" and config.trainer.cpu_offload:
        yield misfit("trainer.cpu_offload", True, "on device=cpu all memory is host memory; leave it out", "device")
    if config.model.fsdp_policy_mp == "float16":
        why = "gradients would underflow without a loss scaler; write bfloat16, or float32 on a GPU without it"
        yield misfit("model.fsdp_policy_mp", "float16", why)


def _check_batches(config: TrainConfig) -> Iterator[Fault]:
    if config.packing and config.model.attn_implementation != "sdpa":
        why = "packing=true has its own attention and requires sdpa; write packing=false to use another kernel"
        yield misfit("model.attn_implementation", config.model.attn_implementation, why, "packing")
    yield from check_lengths(config.max_prompt_length, config.max_length)
    steps, rows = config.gradient_accumulation_steps, config.batch_size
    if 1 <= rows < steps:
        why = f"each micro-batch needs a row, and a batch has only batch_size={rows} rows; give {rows} or less"
        yield misfit("gradient_accumulation_steps", steps, why, "batch_size")
    if config.n_epochs is None and config.n_examples is None:
        yield Fault("n_epochs", "n_epochs=null and n_examples=null: training would never end; set one of them")


_OPTIMIZER_KEYS = {"optimizer": "optimizer_args", "fallback_optimizer": "fallback_args"}


def _check_optimizer(config: TrainConfig) -> Iterator[Fault]:
    """Check the optimizers, with a step of a dummy matrix, since only torch knows which arguments they take."""
    if config.optimizer == "Muon" and config.fallback_optimizer is None:
        message = (
            "optimizer=Muon steps only matrices, but a model also has vectors (norms, biases) and embeddings; write "
            "fallback_optimizer=AdamW for those"
        )
        yield Fault("fallback_optimizer", message, ("optimizer",))
    if config.optimizer != "Muon" and config.fallback_optimizer is not None:
        why = f"optimizer={config.optimizer} steps all parameters; leave it out, or write optimizer=Muon"
        yield misfit("fallback_optimizer", config.fallback_optimizer, why, "optimizer")
    if config.fallback_args and config.fallback_optimizer is None:
        why = "there is no fallback_optimizer to take them; leave them out"
        yield misfit("fallback_args", config.fallback_args, why, "fallback_optimizer")
    if config.decay_ratio != TrainConfig.decay_ratio and config.lr_scheduler != "wsd":
        why = f"lr_scheduler={config.lr_scheduler} does not read it; leave it out, or write lr_scheduler=wsd"
        yield misfit("decay_ratio", config.decay_ratio, why, "lr_scheduler")
    if config.trainer.name != "BasicTrainer":
        yield from _check_sharded_steps(config)
    if config.optimizer in TORCHAO_OPTIMIZERS:
        try:
            import_module("torchao.optim")
        except ImportError as error:
            why = f"it needs torchao, which cannot be imported ({error}): {INSTALL_TORCHAO}"
            yield misfit("optimizer", config.optimizer, why)
            return
    for key, args_key in _OPTIMIZER_KEYS.items():
        if vars(config)[key] is not None:
            yield from _refused(config, key, args_key)


def _check_sharded_steps(config: TrainConfig) -> Iterator[Fault]:
    for key, args_key in _OPTIMIZER_KEYS.items():
        name = vars(config)[key]
        if name in (*TORCHAO_OPTIMIZERS, *WITHOUT_SHARDS):
            is_torchs = name in WITHOUT_SHARDS
            what = "torch cannot take its step on sharded weights" if is_torchs else "its 8-bit state is not sharded"
            why = f"{what}; write trainer=BasicTrainer, or {key}=AdamW, whose state is spread over the processes"
            yield misfit(key, name, why, "trainer.name")
        elif name == "SGD" and vars(config)[args_key].get("fused"):
            why = (
                "torch cannot take a fused step of SGD on sharded weights; leave it out, or write trainer=BasicTrainer"
            )
            yield misfit(f"{args_key}.fused", True, why, "trainer.name")


def _refused(config: TrainConfig, key: str, args_key: str) -> Iterator[Fault]:
    """Yield a fault if a step of a dummy matrix fails; some wrong arguments, such as three betas, only fail there."""
    import torch

    name, arguments = vars(config)[key], dict(vars(config)[args_key])
    module = import_module("torchao.optim") if name in TORCHAO_OPTIMIZERS else torch.optim
    parameter = torch.nn.Parameter(torch.zeros(1, 1))
    parameter.grad = torch.ones(1, 1)
    if config.device != "cpu" and torch.cuda.is_available():
        arguments.pop("capturable", None)  # needs a GPU, but the dummy is on the CPU
    try:
        with torch.compiler.set_stance("force_eager"):
            vars(module)[name]([parameter], lr=1e-3, **arguments).step()
        why = "" if parameter.isfinite().all() else "its first step is not finite"
    except Exception as error:  # torch raises many kinds, such as KeyError and AssertionError
        why = str(error)
    if why:
        yield misfit(args_key, vars(config)[args_key], f"these do not fit {key}={name}: {why}", key)
