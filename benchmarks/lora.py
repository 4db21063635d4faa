"""How much time and memory does a LoRA step with r=16 take, compared with a step of all weights?

    python -m benchmarks.lora    # about a minute and a half on two cores

SFT of a Llama of 25M random parameters (float32, AdamW, packed rows of 256 random tokens, 2,048 positions per step)
takes steps of both kinds in turn in one process, and counts the bytes that each holds from the tensors. Time ratios are
between neighbouring steps. Activations are counted as autograd saves them, each storage once and without parameters;
the logits, which the head keeps itself, are the same for both and left out.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from config.settings import LikelihoodLossSettings, LoraSettings, ModelSettings, TrainConfig, WandbSettings
from trainers.data.batching import BatchLoader
from trainers.data.cutters import build_cutter
from trainers.data.token_store import TokenStore, TokenStoreWriter
from trainers.distributed.launch import launch
from trainers.distributed.layout import Layout
from trainers.distributed.parallelize import parallelize
from trainers.kernels.attention import use_packed_attention
from trainers.lora import add_adapter
from trainers.objectives import LikelihoodObjective
from trainers.run.run_dir import RunDir
from trainers.trainer import Trainer

BATCH, LENGTH, VOCABULARY = 8, 256, 8192
KINDS = {"all weights": LoraSettings(), "LoRA, r=16": LoraSettings(r=16)}
MIB = 2**20


def build_trainer(layout: Layout, settings: TrainConfig, store: TokenStore, folder: Path) -> Trainer:
    """Return a trainer over the rows of a store, with the adapter of its settings."""
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 5, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **shape))
    use_packed_attention(model)
    add_adapter(model, settings.model.lora, base="", seed=0)
    parallelize(model, layout, trainer=settings.trainer, packing=True)
    cutter = build_cutter(packing=True, device=layout.device, pad_token_id=0, max_tokens=None, num_microbatches=1)
    return Trainer(
        policy=model, objective=LikelihoodObjective(LikelihoodLossSettings(name="sft")), eval_loader=None,
        train_loader=BatchLoader(store, cutter, batch_size=BATCH, seed=0), settings=settings, layout=layout,
        run=RunDir(folder, None),
    )  # fmt: skip


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages of some tensors, each counted once."""
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def held(trainer: Trainer) -> dict[str, float]:
    """Return the MiB that a step holds, by kind, from a step that is not timed."""
    parameters = list(trainer.policy.parameters())
    own, saved = {one.untyped_storage().data_ptr() for one in parameters}, []
    batch = next(iter(trainer.train_loader.batches()))

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        trainer.accumulate_gradients(batch, 1.0)
    parts = {
        "weights": parameters,
        "gradients": [one.grad for one in parameters if one.grad is not None],
        "optimizer": [value for state in trainer.optimizer.state.values() for value in state.values()],
        "kept for the backward pass": [one for one in saved if one.untyped_storage().data_ptr() not in own],
    }
    sizes = {name: num_bytes(tensors) / MIB for name, tensors in parts.items()}
    trainer.optimizer.zero_grad(set_to_none=True)
    return {**sizes, "in all": sum(sizes.values())}


def seconds_of(step: Callable[[], object]) -> float:
    """Return the wall time of a call."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def measure(layout: Layout, *, settings: TrainConfig, steps: int) -> None:
    """Take steps of both kinds in turn, and print the table."""
    folder = Path(tempfile.mkdtemp())
    with TokenStoreWriter(folder / "store", key="random", num_segments=2) as writer:
        for row in range(BATCH * (steps + 1)):
            tokens = torch.randint(3, VOCABULARY, (LENGTH,)).tolist()
            writer.append(f"row-{row}", [tokens[: LENGTH // 4], tokens[LENGTH // 4 :]])
        writer.finish({})
    store = TokenStore(folder / "store")
    trainers = {}
    for name, lora in KINDS.items():
        model = ModelSettings(lora=lora)
        kind = TrainConfig(**{**vars(settings), "model": model})
        trainers[name] = build_trainer(layout, kind, store, folder / name)
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    batches = {name: trainer.train_loader.batches() for name, trainer in trainers.items()}
    for number in range(steps + 1):
        for name, trainer in trainers.items():
            taken = seconds_of(partial(trainer.train_step, next(batches[name])))
            if number:  # the first one warms up
                seconds[name].append(taken)
    sizes = {name: held(trainer) for name, trainer in trainers.items()}
    full, lora = trainers
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"| MiB | {full} | {lora} | ratio |\n|---|---:|---:|---:|")
    for part, size in sizes[full].items():
        print(f"| {part} | {size:.1f} | {sizes[lora][part]:.1f} | {sizes[lora][part] / size:.2f} |")
    ratios = sorted(one / other for one, other in zip(seconds[lora], seconds[full], strict=True))
    quarter = len(ratios) // 4
    print(
        f"seconds of a step, LoRA / all weights: {statistics.median(ratios):.2f} (the middle half of {len(ratios)}: "
        f"{ratios[quarter]:.2f} to {ratios[-1 - quarter]:.2f})"
    )


def main() -> None:
    """Read the number of steps, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    settings = TrainConfig(
        exp_name="benchmark", loss=LikelihoodLossSettings(name="sft"), wandb=WandbSettings(enabled=False),
        optimizer="AdamW", batch_size=BATCH, device="cpu", do_first_eval=False, minimum_log_interval_secs=1e9,
    )  # fmt: skip
    launch(partial(measure, settings=settings, steps=steps), settings)


if __name__ == "__main__":
    main()
