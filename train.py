"""Reversed instruction tuning, supervised fine-tuning and preference training, by one command each.

    python train.py loss=reverse model=llama7b datasets=[alpaca] datasets.alpaca.path=FILE exp_name=reverse
    python train.py loss=sft model=tiny datasets.si.path=FOLDER exp_name=si_sft
    python train.py loss=dpo model=tiny model.archive=runs/si_sft datasets.si.path=FOLDER exp_name=si_dpo
    python train.py --help

The same command typed again goes on where the run stopped. Every key: config/settings.py (TrainConfig).
"""

from __future__ import annotations

from trainers.distributed.preemption import exit_on_signals  # isort: skip

if __name__ == "__main__":
    exit_on_signals()  # before the imports that take seconds: a signal may come while they are made

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from config.checks_train import check_train
from config.errors import UserError
from config.schema import run_entrypoint
from config.settings import GenerationSettings, PreferenceLossSettings, TrainConfig
from preference_datasets import Loss, TrainEval, build_stores, describe
from safer_instruct.generation.hf import HFGenerator
from safer_instruct.generation.models import load_causal_lm, load_tokenizer, meta_causal_lm
from safer_instruct.provenance import git_state, package_versions
from trainers.data.batching import BatchLoader
from trainers.data.cache import usable_dir
from trainers.data.packing import default_max_tokens
from trainers.data.token_store import TokenStore
from trainers.distributed.launch import launch
from trainers.distributed.layout import Layout
from trainers.distributed.sharding import forward_function, place_model, reshard
from trainers.estimates import Work, count_work, describe_measured, describe_work, measure
from trainers.kernels.attention import PACKED, check_packed_attention, packed_and_alone, use_packed_attention
from trainers.kernels.flops import emulates_bfloat16
from trainers.kernels.logps import autocast_dtype, check_head
from trainers.objectives import LikelihoodObjective, Objective, PreferenceObjective
from trainers.reference import attach_reference, weights_key
from trainers.run.checkpoint import read_progress, saved_checkpoints
from trainers.run.run_dir import RunDir, write_durably
from trainers.trainer import Trainer

SLOW_BFLOAT16 = (
    "note: this CPU has no instructions for bfloat16 (AVX512-BF16, AMX); model.autocast=bfloat16 is slower here than "
    "float32, which is model.autocast=null"
)
LARGE_ON_A_CPU = 1.0  # billions of parameters: nobody trains so many without a GPU by intention


def main(config: TrainConfig) -> None:
    """Trains, or with `dry_run` says what that would take."""
    manifest = {
        "command": sys.orig_argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git": git_state(),
        "packages": package_versions(),
    }
    launch(partial(work, config=config, manifest=manifest), config)


def work(layout: Layout, *, config: TrainConfig, manifest: dict[str, Any]) -> None:
    """What each process of a run does: data, model, reference, training."""
    torch.manual_seed(config.seed)
    if config.trainer.name == "BasicTrainer" and config.model.fsdp_policy_mp is not None:
        print("note: model.fsdp_policy_mp is FSDPTrainer's; this run computes in policy_dtype", file=sys.stderr)
    if config.model.autocast and layout.is_main and emulates_bfloat16(layout.device):
        print(SLOW_BFLOAT16, file=sys.stderr)
    cache_dir = layout.main_first(lambda: usable_dir(config.local_dirs))
    tokenizer = layout.main_first(lambda: load_tokenizer(config.model))
    if config.dry_run:
        estimate(config, load_data(config, tokenizer, cache_dir, layout), tokenizer, layout)
        return
    with open_run(config, manifest, layout) as run:
        stores = load_data(config, tokenizer, cache_dir, layout)
        manifest = {**manifest, "data": data_keys(stores), "processes": layout.world_size}
        layout.on_main(lambda: write_durably(run.path / "manifest.json", json.dumps(manifest, indent=2) + "\n"))
        train_loader, eval_loader = build_loaders(config, stores, tokenizer, layout)
        if layout.on_main(lambda: is_finished(run, train_loader)):
            if layout.is_main:
                print(f"{run.path} is finished: {train_loader.total_examples} examples. {next_step(config, run)}")
            return
        if layout.is_main:
            print(f"run directory: {run.path}", flush=True)
        trainer = build_trainer(config, stores, train_loader, eval_loader, tokenizer, cache_dir, run, layout)
        trainer.train()
        if layout.is_main:
            print(next_step(config, run), flush=True)


def build_trainer(
    config: TrainConfig,
    stores: TrainEval,
    train_loader: BatchLoader,
    eval_loader: BatchLoader | None,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    run: RunDir,
    layout: Layout,
) -> Trainer:
    """The policy and the log-probabilities of its reference, ready to be trained."""
    policy, weights = load_policy(config, stores, layout)
    objective = build_objective(config)
    identity = {"data": stores.train.key}
    if objective.needs_reference:
        loaders = [loader for loader in (train_loader, eval_loader) if loader is not None]
        identity["reference"] = attach_references(config, policy, weights, loaders, cache_dir, layout)
    return Trainer(
        policy=policy,
        objective=objective,
        train_loader=train_loader,
        eval_loader=eval_loader,
        settings=config,
        layout=layout,
        run=run,
        sampler=build_sampler(config, stores.eval, tokenizer),
        tokenizer=tokenizer,
        identity=identity,
    )


@contextmanager
def open_run(config: TrainConfig, manifest: Mapping[str, Any], layout: Layout) -> Iterator[RunDir]:
    """The run directory, locked by rank 0 for all processes."""
    path = Path(config.run_dir or "")
    opened: list[RunDir] = []
    layout.on_main(lambda: opened.append(RunDir.open(path, config=asdict(config), manifest=manifest)))
    with opened[0] if layout.is_main else RunDir(path, None) as run:
        yield run


def load_policy(config: TrainConfig, stores: TrainEval, layout: Layout) -> tuple[PreTrainedModel, str]:
    """The policy with its initial weights, laid out, and the key of these weights (empty where nothing asks for it)."""
    keys: list[str] = []

    def load() -> PreTrainedModel:
        policy = load_causal_lm(config.model)
        require_context(config, stores, policy)
        check_head(policy)
        if config.packing:
            use_packed_attention(policy)
        keys.append(weights_key(policy) if build_objective(config).needs_reference else "")
        return policy

    policy = place_model(load, lambda: skeleton(config), config, layout)
    if config.packing:  # now: on its device, and with the kernel that will run there
        autocast = autocast_dtype(config.model.autocast)
        packed, alone = forward_function(policy, packed_and_alone, device=layout.device, autocast=autocast)()
        check_packed_attention(packed, alone, name=type(policy).__name__.removeprefix("FSDP"), autocast=autocast)
        reshard(policy)
    return policy, layout.on_main(lambda: keys[0])


def skeleton(config: TrainConfig, dtype: str | None = None) -> PreTrainedModel:
    """The policy on the meta device, attending as the loaded one does."""
    model = meta_causal_lm(config.model, dtype=dtype)
    if config.packing:
        model.set_attn_implementation(PACKED)
    return model


def load_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, cache_dir: Path, layout: Layout) -> TrainEval:
    """The token stores of all datasets, for the kind of rows that the loss reads."""
    kind: Loss = "reverse" if config.loss.name == "reverse" else "likelihood"
    if isinstance(config.loss, PreferenceLossSettings):
        kind = "preference"
    build = partial(
        build_stores,
        config.datasets,
        loss=kind,
        tokenizer=tokenizer,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        cache_dir=cache_dir,
        n_eval_examples=config.n_eval_examples,
        batch_size=config.batch_size,
    )
    stores = layout.main_first(build)
    if layout.is_main:
        print(describe(stores.report), file=sys.stderr, flush=True)
    return stores


def build_loaders(
    config: TrainConfig, stores: TrainEval, tokenizer: PreTrainedTokenizerBase, layout: Layout
) -> tuple[BatchLoader, BatchLoader | None]:
    """Batches for training, and for each evaluation (None: nothing is held out)."""
    max_tokens = config.max_tokens_per_microbatch
    if config.packing and max_tokens is None:
        max_tokens = default_max_tokens(layout.device)
    shared: dict[str, Any] = {
        "seed": config.seed,
        "max_tokens_per_microbatch": max_tokens,
        "pad_token_id": tokenizer.pad_token_id,
        "packing": config.packing,
        "rank": layout.rank,
        "world_size": layout.world_size,
    }
    train = BatchLoader(
        stores.train,
        batch_size=config.batch_size,
        shuffle=True,
        num_epochs=config.n_epochs,
        num_examples=config.n_examples,
        num_microbatches=config.gradient_accumulation_steps,
        **shared,
    )
    if not len(stores.eval):
        return train, None
    held_out = BatchLoader(
        stores.eval,
        batch_size=config.eval_batch_size,
        shuffle=False,
        num_epochs=1,
        num_examples=None,
        num_microbatches=1,
        **shared,
    )
    return train, held_out


def require_context(config: TrainConfig, stores: TrainEval, policy: PreTrainedModel) -> None:
    """Raises a UserError if a row is longer than the model's context: a table of positions would end in a crash."""
    context = policy.config.max_position_embeddings
    lengths = [store.lengths for store in (stores.train, stores.eval) if len(store)]
    longest = max(int((rows[:, 0] + rows[:, 1:].amax(1)).max()) for rows in lengths)
    if longest > context:
        raise UserError(
            f"max_length={config.max_length}: the longest row has {longest} tokens, and the context of "
            f"{config.model.name_or_path} is {context}; write max_length={context} (max_prompt_length below it) or less"
        )


def build_objective(config: TrainConfig) -> Objective:
    """What `loss=` names."""
    if isinstance(config.loss, PreferenceLossSettings):
        return PreferenceObjective(config.loss)
    return LikelihoodObjective(config.loss)


def attach_references(
    config: TrainConfig,
    policy: PreTrainedModel,
    weights: str,
    loaders: list[BatchLoader],
    cache_dir: Path,
    layout: Layout,
) -> str:
    """Reference log-probabilities for every row that is visited; by the policy itself unless another dtype is set.

    Returns the key of the reference weights: a run that goes on must have started from the same.
    """
    dtype = config.model.reference_dtype or config.model.policy_dtype
    compute_dtype = config.model.fsdp_policy_mp if layout.mesh is not None else None
    reference = policy
    if dtype != config.model.policy_dtype:
        compute_dtype = None
        keys: list[str] = []
        alone = replace(config, model=replace(config.model, fsdp_policy_mp=None), activation_checkpointing=False)

        def load() -> PreTrainedModel:
            model = load_causal_lm(config.model, dtype=dtype)
            if config.packing:
                use_packed_attention(model)
            keys.append(weights_key(model))
            return model

        reference = place_model(load, lambda: skeleton(config, dtype), alone, layout)
        weights = layout.on_main(lambda: keys[0])
    attach_reference(
        reference, loaders, layout=layout, cache_dir=cache_dir, weights=weights, compute_dtype=compute_dtype,
        autocast=autocast_dtype(config.model.autocast),
    )  # fmt: skip
    return weights


def build_sampler(
    config: TrainConfig, store: TokenStore, tokenizer: PreTrainedTokenizerBase
) -> Callable[[PreTrainedModel], list[dict[str, Any]]] | None:
    """A function from the model to sampled answers on the first evaluation prompts; None: not asked for."""
    rows = range(min(config.n_eval_model_samples, len(store)))
    if not config.sample_during_eval or not rows:
        return None
    prompts = {store.ids(row): store.row(row)[0].tolist() for row in rows}
    longest = max(map(len, prompts.values()))
    settings = GenerationSettings(
        max_new_tokens=config.max_new_tokens or config.max_length - longest, temperature=1.0, seed=config.seed
    )

    def sample(model: PreTrainedModel) -> list[dict[str, Any]]:
        generator = HFGenerator(model, tokenizer, settings, max_length=longest + settings.max_new_tokens)
        outputs = {one.id: one.text for one in generator.generate_from_tokens(prompts)}
        return [
            {"id": id, "prompt": tokenizer.decode(tokens, skip_special_tokens=True), "output": outputs[id]}
            for id, tokens in prompts.items()
        ]

    return sample


def data_keys(stores: TrainEval) -> dict[str, Any]:
    """The content hashes and sizes of the stores, for the manifest."""
    return {
        "train": {"key": stores.train.key, "rows": len(stores.train)},
        "eval": {"key": stores.eval.key, "rows": len(stores.eval)},
    }


def is_finished(run: RunDir, loader: BatchLoader) -> bool:
    """Whether the newest checkpoint is the last one of this very run: all examples of this data, evaluated."""
    newest = saved_checkpoints(run.path)[-1:]
    if not newest:
        return False
    progress = read_progress(newest[0])
    at_end = progress.examples >= loader.total_examples and progress.evaluated_at == progress.examples
    return at_end and progress.identity.get("data") == loader.store.key


def estimate(config: TrainConfig, stores: TrainEval, tokenizer: PreTrainedTokenizerBase, layout: Layout) -> None:
    """`dry_run`: says what the run would be and, unless it is `data`, what it would take; leaves nothing behind."""
    loaders = [loader for loader in build_loaders(config, stores, tokenizer, layout) if loader is not None]
    works = layout.on_main(lambda: [count_work(loader) for loader in loaders])  # the second, if any, is evaluation
    if layout.is_main:  # now: the steps may fail
        print(f"{config.exp_name}, from the lengths of its rows:", flush=True)
        print(describe_work(config, loaders, works, cut_texts(stores)), flush=True)
    lines = take_steps(config, stores, tokenizer, layout, loaders, works) if config.dry_run != "data" else []
    if layout.is_main:
        print(*lines, f"nothing was trained; the run would live in {config.run_dir}", sep="\n", flush=True)


def take_steps(
    config: TrainConfig,
    stores: TrainEval,
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout,
    loaders: list[BatchLoader],
    works: list[Work],
) -> list[str]:
    """Lines on three steps of the run, or why there are none; `works` are those of `loaders`."""
    reason = layout.on_main(lambda: why_no_steps(config, layout))
    if reason:
        return [f"no steps were taken: {reason}"]
    first, largest = loaders[0].excerpt(works[0].first), loaders[0].excerpt(works[0].largest)
    alone = replace(config, debug=True, sample_during_eval=False)  # no checkpoints, no wandb
    with TemporaryDirectory(prefix="dry-run-") as folder:
        run = RunDir(Path(folder) / "run", None)
        trainer = build_trainer(alone, stores, first, largest, tokenizer, Path(folder), run, layout)
        measured = measure(trainer)
    num_positions = 0
    if trainer.objective.needs_reference:  # each row once, where a run may visit it in several epochs
        for loader, work in zip(loaders, works, strict=True):
            num_positions += work.positions * len(loader.rows_visited()) // work.ends[-1]
    return [
        f"from three real steps ({layout.device.type}, processes: {layout.world_size}):",
        describe_measured(config, works, measured, num_positions),
    ]


def why_no_steps(config: TrainConfig, layout: Layout) -> str:
    """Why a dry run had better not load the model: what looks like a login node. Empty: it may."""
    if config.device != "auto" or layout.device.type != "cpu":
        return ""
    billions = skeleton(config).num_parameters() / 1e9
    if billions < LARGE_ON_A_CPU:
        return ""
    return (
        f"device=auto found no GPU, and the model has {billions:.1f} billion parameters; type the command where it "
        "will run, or insist with device=cpu"
    )


def cut_texts(stores: TrainEval) -> dict[str, int]:
    """How many prompts and responses of all rows were too long."""
    noted = Counter[str]()
    for counts in stores.report["datasets"].values():
        noted.update(counts["noted"])
    responses = noted["response_cut"] + noted["chosen_cut"] + noted["rejected_cut"]
    return {"prompts": noted["prompt_cut"], "responses": responses}


def next_step(config: TrainConfig, run: RunDir) -> str:
    """Where the weights are, and the command that the method goes on with."""
    commands = {
        "reverse": f"python induce.py model.name_or_path={run.path} corpus.path=FILE expert=rules output=FOLDER",
        "sft": f"python train.py loss=dpo model.name_or_path={config.model.name_or_path} model.archive={run.path} "
        "model=blank_model datasets=[si] datasets.si.path=FOLDER exp_name=NAME",
    }
    evaluate = (
        f"python evaluate.py models.base.path={config.model.name_or_path} models.{config.loss.name}.path={run.path} "
        "prompts.NAME.path=FILE expert=rules output=FOLDER"
    )
    where = f"weights: {run.latest / 'model'}" if run.latest.exists() else "no checkpoint was written (debug=true)"
    return f"{where}\nnext: {commands.get(config.loss.name, evaluate)}"


if __name__ == "__main__":
    run_entrypoint("config", TrainConfig, check_train, main)
