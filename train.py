"""Train a model: reversed instruction tuning, supervised fine-tuning or preference training, one command each.

    python train.py loss=reverse model=llama7b datasets=[alpaca] datasets.alpaca.path=FILE exp_name=reverse
    python train.py loss=sft model=tiny datasets.si.path=FOLDER exp_name=si_sft
    python train.py loss=dpo model=tiny model.archive=runs/si_sft datasets.si.path=FOLDER exp_name=si_dpo
    python train.py --help

Rerunning the same command resumes the run where it stopped. Every key: config/settings.py (TrainConfig).
"""

from __future__ import annotations

from trainers.distributed.preemption import exit_on_signals  # isort: skip

if __name__ == "__main__":
    exit_on_signals()  # before the slow imports: a signal may arrive during them

from config.checks_train import check_train
from config.schema import read_command, run_command
from config.settings import TrainConfig

if __name__ == "__main__":
    command = read_command("config", TrainConfig, check_train)  # before torch is imported, to report mistakes at once

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from config.errors import UserError
from config.settings import AnswerLossSettings, ReverseSettings, SFTSettings
from preference_datasets import ENCODED_FOR, TrainEval, build_stores, describe
from safer_instruct.evaluation.samples import MAX_ROWS, build_sampler
from safer_instruct.generation.adapters import base_hash, base_name, check_base, split_archive
from safer_instruct.generation.decoding import context_of, stop_where_answers_end
from safer_instruct.generation.models import load_causal_lm, load_tokenizer, meta_causal_lm
from safer_instruct.provenance import git_state, package_versions
from safer_instruct.text.row_log import count_cut
from trainers.data.batching import BatchLoader
from trainers.data.cache import usable_dir
from trainers.data.cutters import build_cutter
from trainers.data.mismatched import with_mismatched
from trainers.data.token_store import TokenStore, sequence_lengths
from trainers.distributed.launch import launch
from trainers.distributed.layout import Layout
from trainers.distributed.parallelize import parallelize, place_model
from trainers.distributed.sharding import forward_function, reshard
from trainers.dry_run import print_estimate
from trainers.kernels.attention import PACKED, use_packed_attention
from trainers.kernels.head_check import check_head, check_training
from trainers.kernels.logps import autocast_dtype
from trainers.kernels.self_check import check_packed_attention, packed_and_alone
from trainers.lora import add_adapter, start_adapter
from trainers.losses.lengths import ld_alpha_of
from trainers.objectives import build_objective
from trainers.optimizers import warmup_note
from trainers.reference import attach_reference, weights_key
from trainers.run.early_stop import is_over
from trainers.run.next_command import end_run, starting_line
from trainers.run.resume import is_finished
from trainers.run.run_dir import RunDir
from trainers.run.saved import read_progress, repair_links, require_measured
from trainers.run.speed import speed_notes
from trainers.trainer import Trainer


def main(config: TrainConfig) -> float | None:
    """Train, or with `dry_run` estimate the cost; return the last value of `sweep_metric` if it is set."""
    manifest = {
        "command": sys.orig_argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git": git_state(),
        "packages": package_versions(),
    }
    launch(partial(work, config=config, manifest=manifest), config)
    if config.sweep_metric is None or config.dry_run or config.debug:
        return None
    evaluation = read_progress(Path(config.run_dir or "") / "LATEST").evaluation
    require_measured(config, evaluation)  # also if the run had already finished
    return evaluation[config.sweep_metric]


def work(layout: Layout, *, config: TrainConfig, manifest: dict[str, Any]) -> None:
    """Run one process of the job: load the data, model and reference, then train."""
    torch.manual_seed(config.seed)
    for note in speed_notes(config, layout.device):
        say_note(note, layout)
    cache_dir = layout.main_first(lambda: usable_dir(config.local_dirs))
    tokenizer = layout.main_first(lambda: load_tokenizer(config.model))
    if config.dry_run:
        estimate(config, load_data(config, tokenizer, cache_dir, layout), tokenizer, layout)
        return
    with open_run(config, manifest, layout) as run:
        stores = load_data(config, tokenizer, cache_dir, layout)
        by_split = {"train": stores.train, "eval": stores.eval}
        data = {split: {"key": store.content, "rows": len(store)} for split, store in by_split.items()}
        manifest = {**manifest, "data": data, "processes": layout.world_size}
        layout.on_main(lambda: run.write_manifest(manifest))
        train_loader, eval_loader = build_loaders(config, stores, tokenizer, layout)
        say_note(warmup_note(train_loader.steps, config), layout)
        if layout.on_main(lambda: is_finished(run, train_loader.total_examples, data=stores.train.content)):
            finished = f"{run.path} is finished: {train_loader.total_examples} examples"
            layout.on_main(lambda: print(finished, end_run(config, run), sep="\n"))
            return
        if layout.is_main:
            print(f"run directory: {run.path}", flush=True)
        trainer = build_trainer(config, stores, train_loader, eval_loader, tokenizer, cache_dir, run, layout)
        if layout.is_main:
            print(starting_line(trainer.policy, train_loader, layout, trainer.progress.examples), flush=True)
        trainer.train()
        if layout.is_main and is_over(trainer.progress, config.early_stop):
            examples = trainer.progress.examples
            print(f"stopped by early_stop.over_refusal={config.early_stop.over_refusal} after {examples} examples")
        layout.on_main(lambda: print(end_run(config, run), flush=True))


def build_trainer(
    config: TrainConfig, stores: TrainEval, train_loader: BatchLoader, eval_loader: BatchLoader | None,
    tokenizer: PreTrainedTokenizerBase, cache_dir: Path, run: RunDir, layout: Layout,
) -> Trainer:  # fmt: skip
    """Return a trainer, ready to train, with the policy and the reference log-probabilities."""
    policy, weights = load_policy(config, stores, layout)
    stop_where_answers_end(policy, tokenizer)
    objective = build_objective(config.loss)
    identity = {"data": stores.train.content}  # must be the same when the run is resumed
    if config.model.lora.r is not None:
        identity["base"] = layout.on_main(lambda: base_hash(base_name(config.model)))
    if objective.needs_reference:
        loaders = [loader for loader in (train_loader, eval_loader) if loader is not None]
        identity["reference"] = attach_references(config, policy, weights, loaders, cache_dir, layout)
    return Trainer(
        policy=policy, objective=objective, train_loader=train_loader, eval_loader=eval_loader, settings=config,
        layout=layout, run=run, sampler=sampler_of(config, stores.eval, tokenizer), tokenizer=tokenizer,
        identity=identity,
    )  # fmt: skip


@contextmanager
def open_run(config: TrainConfig, manifest: Mapping[str, Any], layout: Layout) -> Iterator[RunDir]:
    """Open the run directory; rank 0 holds the lock for all processes."""
    path = Path(config.run_dir or "")
    opened = layout.main_only(lambda: RunDir.open(path, config=asdict(config), manifest=manifest))
    with opened or RunDir(path, None) as run:
        layout.on_main(lambda: repair_links(run, config.checkpoint))
        yield run


def load_policy(config: TrainConfig, stores: TrainEval, layout: Layout) -> tuple[PreTrainedModel, str]:
    """Return the policy with its initial weights, placed on its devices, and the key of these weights."""

    def check(policy: PreTrainedModel) -> None:
        require_context(config, stores, policy)
        check_head(policy)
        check_training(policy)

    policy, weights = load_model(config, layout, check=check, compute_dtype=config.model.fsdp_policy_mp)
    if config.packing:  # only now: the check must run on the training device, with the kernel that training uses
        autocast = autocast_dtype(config.model.autocast)
        packed, alone = forward_function(policy, packed_and_alone, device=layout.device, autocast=autocast)()
        check_packed_attention(packed, alone, name=type(policy).__name__.removeprefix("FSDP"), autocast=autocast)
        reshard(policy)
    return policy, weights


def load_model(
    config: TrainConfig, layout: Layout, *, dtype: str | None = None,
    check: Callable[[PreTrainedModel], None] = lambda model: None, compute_dtype: str | None = None,
    is_trained: bool = True,
) -> tuple[PreTrainedModel, str]:  # fmt: skip
    """Return the model of the config, laid out, and the key of its weights (empty where no reference asks for it).

    The weights have `dtype`; None means the policy's. `check` runs in rank 0, before the model is placed, and raises a
    UserError for an unsuitable model. Activation checkpointing applies only if the model `is_trained`.
    """
    lora, (base, trained) = config.model.lora, split_archive(config.model)

    def load() -> PreTrainedModel:
        model = load_causal_lm(base, dtype=dtype)
        if trained is not None:
            check_base(trained, model.config, base.name_or_path)
        check(model)
        if config.packing:
            use_packed_attention(model)
        return model

    loaded = layout.main_only(load)
    needs_key = build_objective(config.loss).needs_reference
    weights = layout.on_main(lambda: weights_key(loaded) if needs_key else "")
    begin = partial(start_adapter, loaded, lora, trained, base=base_name(config.model), seed=config.seed)
    weights += layout.on_main(begin)
    prepare = partial(
        parallelize, layout=layout, trainer=config.trainer, packing=config.packing,
        block_name=config.model.block_name, compute_dtype=compute_dtype,
        activation_checkpointing=is_trained and config.activation_checkpointing,
    )  # fmt: skip
    offload = config.trainer.cpu_offload
    return place_model(loaded, lambda: skeleton(config, dtype), prepare, layout, cpu_offload=offload), weights


def skeleton(config: TrainConfig, dtype: str | None = None) -> PreTrainedModel:
    """Return the policy on the meta device, with the same attention implementation as the loaded one."""
    model = meta_causal_lm(config.model, dtype=dtype)
    if config.packing:
        model.set_attn_implementation(PACKED)
    add_adapter(model, config.model.lora, base=base_name(config.model), seed=config.seed)
    return model


def load_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, cache_dir: Path, layout: Layout) -> TrainEval:
    """Return the token stores of all datasets, encoded for the kind of rows that the loss reads."""
    build = partial(
        build_stores, config.datasets, loss=ENCODED_FOR[config.loss.rows], tokenizer=tokenizer,
        max_length=config.max_length, max_prompt_length=config.max_prompt_length, cache_dir=cache_dir,
        n_eval_examples=config.n_eval_examples, batch_size=config.batch_size,
        all_answers=isinstance(config.loss, SFTSettings | ReverseSettings) and config.loss.on == "all",
    )  # fmt: skip
    stores = layout.main_first(build)
    if layout.is_main:
        print(describe(stores.report), file=sys.stderr, flush=True)
    if isinstance(config.loss, AnswerLossSettings) and config.loss.mismatched:
        return replace(stores, train=with_mismatched(stores.train), eval=with_mismatched(stores.eval))
    return stores


def build_loaders(
    config: TrainConfig, stores: TrainEval, tokenizer: PreTrainedTokenizerBase, layout: Layout
) -> tuple[BatchLoader, BatchLoader | None]:
    """Return the loaders for training and for evaluation (None if nothing is held out)."""
    cutter = partial(
        build_cutter, packing=config.packing, device=layout.device, pad_token_id=tokenizer.pad_token_id,
        max_tokens=config.max_tokens_per_microbatch,
    )  # fmt: skip
    place: dict[str, Any] = {"rank": layout.rank, "world_size": layout.world_size, "device": layout.device}
    train = BatchLoader(
        stores.train, cutter(num_microbatches=config.gradient_accumulation_steps), batch_size=config.batch_size,
        seed=config.seed, num_epochs=config.n_epochs, num_examples=config.n_examples, **place,
    )  # fmt: skip
    if not len(stores.eval):
        return train, None
    return train, BatchLoader(stores.eval, cutter(), batch_size=config.eval_batch_size, **place)


def require_context(config: TrainConfig, stores: TrainEval, policy: PreTrainedModel) -> None:
    """Raise a UserError if a row is longer than the model's context: a table of positions would end in a crash.

    Or longer than where longrope (Phi-3) changes the frequencies of all rows of a micro-batch: the log-probabilities of
    a row would depend on those beside it.
    """
    context = context_of(policy)
    ropes = getattr(policy.config.get_text_config(), "rope_parameters", None) or {}
    for rope in (ropes, *(one for one in ropes.values() if isinstance(one, dict))):
        if rope.get("rope_type") == "longrope":
            context = min(context, rope["original_max_position_embeddings"])
    longest = max(int(sequence_lengths(store.lengths).max()) for store in (stores.train, stores.eval) if len(store))
    if longest > context:
        raise UserError(
            f"max_length={config.max_length}: the longest row has {longest} tokens, and the context of "
            f"{config.model.name_or_path} is {context}; write max_length={context} (max_prompt_length below it) or less"
        )


def attach_references(
    config: TrainConfig, policy: PreTrainedModel, weights: str, loaders: list[BatchLoader], cache_dir: Path,
    layout: Layout,
) -> str:  # fmt: skip
    """Attach reference log-probabilities for every row that training visits, and return the key of the weights.

    The policy itself computes them, unless `model.reference_dtype` differs from its dtype.
    """
    dtype = config.model.reference_dtype or config.model.policy_dtype
    compute_dtype = config.model.fsdp_policy_mp if layout.mesh is not None else None
    reference = policy
    if dtype != config.model.policy_dtype:
        compute_dtype = None
        reference, weights = load_model(config, layout, dtype=dtype, is_trained=False)
    attach_reference(
        reference, loaders, layout=layout, cache_dir=cache_dir, weights=weights, compute_dtype=compute_dtype,
        autocast=autocast_dtype(config.model.autocast), ld_alpha=ld_alpha_of(config.loss),
    )  # fmt: skip
    return weights


def sampler_of(
    config: TrainConfig, store: TokenStore, tokenizer: PreTrainedTokenizerBase
) -> Callable[[PreTrainedModel], list[dict[str, Any]]] | None:
    """Return a function that samples answers to evaluation prompts from a model; None if no samples are wanted."""
    if not config.sample_during_eval or not config.n_eval_model_samples or not len(store):
        return None
    segments = [(store.ids(row), store.row(row)) for row in range(min(len(store), MAX_ROWS))]
    return build_sampler(
        # If all answers of a conversation are trained on, take only the first.
        [(id, prompt.tolist(), chosen[(chosen < 0).cumsum(0) == 0].tolist()) for id, (prompt, chosen, *_) in segments],
        tokenizer,
        number=config.n_eval_model_samples, max_length=config.max_length, max_new_tokens=config.max_new_tokens,
        seed=config.seed, tells_refusals=config.loss.name != "reverse",
    )  # fmt: skip


def say_note(note: str | None, layout: Layout) -> None:
    """Print a note, if there is one, from rank 0."""
    if note and layout.is_main:
        print(f"note: {note}", file=sys.stderr, flush=True)


def estimate(config: TrainConfig, stores: TrainEval, tokenizer: PreTrainedTokenizerBase, layout: Layout) -> None:
    """Print the size and the estimated cost of the run (`dry_run`)."""

    def make_trainer(settings: TrainConfig, first: BatchLoader, largest: BatchLoader, run: RunDir) -> Trainer:
        return build_trainer(settings, stores, first, largest, tokenizer, run.path.parent, run, layout)

    loaders = [loader for loader in build_loaders(config, stores, tokenizer, layout) if loader is not None]
    say_note(warmup_note(loaders[0].steps, config), layout)
    print_estimate(
        config, layout, loaders, cut=count_cut(stores.report), make_trainer=make_trainer,
        count_parameters=lambda: skeleton(config).num_parameters(),
    )  # fmt: skip


if __name__ == "__main__":
    run_command(command, main)
