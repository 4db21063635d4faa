"""Runs of the trainer on random token rows of unequal length, small enough for a test."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from config.settings import AnswerLossSettings, DPOSettings, LossSettings, TrainConfig, WandbSettings
from tests.tiny_models import VOCABULARY, tiny_model
from trainers.data.batching import BatchLoader
from trainers.data.cutters import Cutter, build_cutter
from trainers.data.token_store import TokenStore, TokenStoreWriter
from trainers.distributed.layout import Layout
from trainers.distributed.parallelize import parallelize, place_model
from trainers.kernels.attention import use_packed_attention
from trainers.kernels.head_check import check_head
from trainers.lora import add_adapter
from trainers.losses.lengths import ld_alpha_of
from trainers.objectives import build_objective
from trainers.reference import attach_reference, weights_key
from trainers.run.run_dir import RunDir
from trainers.trainer import Trainer


def segments_of(loss: LossSettings) -> int:
    """Prompt and response, or two responses."""
    return 3 if loss.rows == "pairs" or (isinstance(loss, AnswerLossSettings) and loss.mismatched) else 2


def random_store(folder: Path, *, num_rows: int, segments: int, seed: int = 0, judged: bool = False) -> TokenStore:
    """Rows of a prompt of 1 to 6 tokens and responses of 1 to 8, written where there is no such store yet."""
    path = folder / f"store-{num_rows}-{segments}-{seed}-{judged}"
    if not (path / "meta.json").exists():
        generator = torch.Generator().manual_seed(seed)
        with TokenStoreWriter(path, key=path.name, num_segments=segments) as writer:
            for i in range(num_rows):
                lengths = [int(torch.randint(1, 7 if s == 0 else 9, (), generator=generator)) for s in range(segments)]
                rows = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
                writer.append(f"row-{i}", rows, is_good=i % 3 > 0 if judged else None)
            writer.finish({})
    return TokenStore(path)


def tiny_settings(**changes: Any) -> TrainConfig:
    """DPO with batches of 4, no wandb, no pause between log rows."""
    settings = TrainConfig(
        exp_name="tiny",
        loss=DPOSettings(name="dpo"),
        wandb=WandbSettings(enabled=False),
        lr=1e-3,
        warmup_steps=2,
        batch_size=4,
        eval_batch_size=4,
        eval_every=8,
        minimum_log_interval_secs=0.0,
        device="cpu",
    )
    return replace(settings, **changes)


def cutter(settings: TrainConfig, num_microbatches: int) -> Cutter:
    """As train.py makes it."""
    return build_cutter(
        packing=settings.packing, device=torch.device("cpu"), pad_token_id=0,
        max_tokens=settings.max_tokens_per_microbatch, num_microbatches=num_microbatches,
    )  # fmt: skip


def train_loader(store: TokenStore, settings: TrainConfig, layout: Layout | None = None) -> BatchLoader:
    """As train.py makes it."""
    return BatchLoader(
        store,
        cutter(settings, settings.gradient_accumulation_steps),
        batch_size=settings.batch_size,
        seed=settings.seed,
        num_epochs=settings.n_epochs,
        num_examples=settings.n_examples,
        rank=layout.rank if layout else 0,
        world_size=layout.world_size if layout else 1,
    )


def eval_loader(store: TokenStore, settings: TrainConfig, layout: Layout | None = None) -> BatchLoader:
    """As train.py makes it."""
    return BatchLoader(
        store,
        cutter(settings, 1),
        batch_size=settings.eval_batch_size,
        rank=layout.rank if layout else 0,
        world_size=layout.world_size if layout else 1,
    )


def tiny_trainer(
    folder: Path, layout: Layout, run: RunDir, settings: TrainConfig, *, model: Any = None, num_rows: int = 22,
    identity: dict[str, str] | None = None, **arguments: Any,
) -> Trainer:  # fmt: skip
    """A trainer on random rows, laid out as the settings say, with a reference cache where the objective wants one.

    `model`: made anew for the meta device where it is sharded, so a name of `tests/tiny_models.py` there.
    """
    rows: dict[str, Any] = {"segments": segments_of(settings.loss), "judged": settings.loss.rows == "answers"}

    def stored(num_rows: int, seed: int = 0) -> TokenStore:
        return layout.main_first(lambda: random_store(folder, num_rows=num_rows, seed=seed, **rows))

    loaders = (
        train_loader(stored(num_rows), settings, layout),
        eval_loader(stored(7, seed=1), settings, layout),
    )
    full = tiny_model(model or "llama") if model is None or isinstance(model, str) else model
    check_head(full)
    if settings.packing:
        use_packed_attention(full)
    weights = weights_key(full)
    kind, shape = type(full), copy.deepcopy(full.config)
    add_adapter(full, settings.model.lora, base="", seed=settings.seed)

    def skeleton() -> torch.nn.Module:
        with torch.device("meta"):
            meta = kind(shape)
        add_adapter(meta, settings.model.lora, base="", seed=settings.seed)
        return meta

    prepare = partial(
        parallelize, layout=layout, trainer=settings.trainer, packing=settings.packing,
        block_name=settings.model.block_name, compute_dtype=settings.model.fsdp_policy_mp,
        activation_checkpointing=settings.activation_checkpointing,
    )  # fmt: skip
    model = place_model(full if layout.is_main else None, skeleton, prepare, layout)
    objective = build_objective(settings.loss)
    if objective.needs_reference:
        attach_reference(
            model, loaders, layout=layout, cache_dir=folder / "cache", weights=weights,
            ld_alpha=ld_alpha_of(settings.loss),
        )  # fmt: skip
        identity = {"initial weights": weights, **(identity or {})}
    return Trainer(
        policy=model, objective=objective, train_loader=loaders[0], eval_loader=loaders[1], settings=settings,
        layout=layout, run=run, identity=identity, **arguments,
    )  # fmt: skip
