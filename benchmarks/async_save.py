"""What do two asynchronous checkpoints cost 50 training steps?

    python -m benchmarks.async_save --processes 1
    python -m benchmarks.async_save --processes 2

SFT of a Llama of 25M random parameters (float32, RMSprop) on random tokens runs the same 50 steps without checkpoints,
with two asynchronous ones (after 15 and 30 steps), and with two synchronous ones, in turn, several times. Seconds are
from the first step to the end of the last, including any write still in progress. Target: asynchronous / without
<= 1.25. `--processes 2` shards the model over two gloo processes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from config.settings import CheckpointSettings, LikelihoodLossSettings, TrainConfig, TrainerSettings, WandbSettings
from trainers.data.batching import BatchLoader
from trainers.data.cutters import PaddedCutter
from trainers.data.token_store import TokenStore, TokenStoreWriter
from trainers.distributed.launch import launch
from trainers.distributed.layout import Layout
from trainers.distributed.parallelize import parallelize, place_model
from trainers.objectives import LikelihoodObjective
from trainers.run.metrics_log import MetricsLog
from trainers.run.run_dir import RunDir
from trainers.trainer import Trainer

STEPS, BATCH, LENGTH, VOCABULARY = 50, 8, 64, 8192
VARIANTS = {
    "without": CheckpointSettings(every_examples=10**9),
    "asynchronous": CheckpointSettings(every_examples=15 * BATCH),
    "waited for": CheckpointSettings(every_examples=15 * BATCH, asynchronous=False),
}


def build_model() -> LlamaForCausalLM:
    """Return a Llama of 25M parameters."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=5,
            num_attention_heads=8,
            max_position_embeddings=LENGTH,
        )
    )


def seconds_of(layout: Layout, settings: TrainConfig, folder: Path, name: str) -> float:
    """Return the seconds of 50 steps, without the checkpoint at the end, which every variant would write."""
    with TokenStoreWriter(folder / f"store-{layout.rank}", key="random", num_segments=2) as writer:
        generator = torch.Generator().manual_seed(0)
        for row in range(STEPS * BATCH):
            tokens = torch.randint(3, VOCABULARY, (LENGTH,), generator=generator).tolist()
            writer.append(f"row-{row}", [tokens[: LENGTH // 2], tokens[LENGTH // 2 :]])
        writer.finish({})
    loader = BatchLoader(
        TokenStore(folder / f"store-{layout.rank}"), PaddedCutter(pad_token_id=0), batch_size=BATCH, seed=0,
        rank=layout.rank, world_size=layout.world_size,
    )  # fmt: skip

    def skeleton() -> LlamaForCausalLM:
        with torch.device("meta"):
            return build_model()

    opened = layout.main_only(lambda: RunDir.open(folder / name, config=asdict(settings), manifest={}))
    prepare = partial(parallelize, layout=layout, trainer=settings.trainer, packing=settings.packing)
    with opened or RunDir(folder / name, None) as run:
        trainer = Trainer(
            policy=place_model(layout.main_only(build_model), skeleton, prepare, layout),
            objective=LikelihoodObjective(LikelihoodLossSettings(name="sft")),
            train_loader=loader,
            eval_loader=None,
            settings=settings,
            layout=layout,
            run=run,
        )
        last = trainer.save

        def save(log: MetricsLog) -> None:
            if trainer.progress.updates < STEPS:
                last(log)

        trainer.save = save  # type: ignore[method-assign]  # skips the last save
        started = time.perf_counter()
        trainer.train()
        return time.perf_counter() - started


def measure(layout: Layout, *, settings: TrainConfig, repetitions: int, result: str) -> None:
    """Run all variants in turn; rank 0 writes the seconds to the file `result`."""
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for repetition in range(repetitions + 1):
        for name, checkpoint in VARIANTS.items():
            folder = Path(layout.on_main(tempfile.mkdtemp))
            taken = seconds_of(layout, replace(settings, checkpoint=checkpoint), folder, "run")
            if repetition:  # the first one warms up
                seconds[name].append(taken)
    if layout.is_main:
        Path(result).write_text(json.dumps(seconds))


def main() -> None:
    """Print a table; with --json also write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    name = "BasicTrainer" if arguments.processes == 1 else "FSDPTrainer"
    count = None if arguments.processes == 1 else arguments.processes
    settings = TrainConfig(
        exp_name="benchmark",
        trainer=TrainerSettings(name, count),
        wandb=WandbSettings(enabled=False),
        batch_size=BATCH,
        eval_every=10**9,
        minimum_log_interval_secs=5,
        device="cpu",
        do_first_eval=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        result = os.path.join(folder, "seconds.json")
        launch(partial(measure, settings=settings, repetitions=arguments.repetitions, result=result), settings)
        seconds = json.loads(Path(result).read_text())
    print(f"torch {torch.__version__}, {platform.machine()}, {arguments.processes} processes, {os.cpu_count()} cores")
    print("| checkpoints | seconds, median (range) | ratio to the run before without, median (range) |\n|---|---|---|")
    for variant, taken in seconds.items():
        ratios = [one / base for one, base in zip(taken, seconds["without"], strict=True)]
        print(
            f"| {variant} | {statistics.median(taken):.1f} ({min(taken):.1f} to {max(taken):.1f}) | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"seconds": seconds, "processes": arguments.processes}, indent=1))


if __name__ == "__main__":
    main()
