"""How much host memory does a process need to receive its shard of a model that rank 0 reads?

    python -m benchmarks.materialise

Two gloo processes save a Llama of 250M random float32 parameters, then lay it out with `place_model`. The figure is the
growth of rank 1's peak resident memory meanwhile, compared with its shard and the largest block (a parameter may be
whole for a moment while it is scattered). Target: at most 1.3 x shard + one block.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.memory import MIB, forget_peak, resident_mib
from config.settings import TrainConfig, TrainerSettings
from trainers.distributed.launch import local_store, work_in_group
from trainers.distributed.layout import Layout
from trainers.distributed.parallelize import find_blocks, parallelize, place_model
from trainers.distributed.preemption import StopRequest
from trainers.distributed.spawn import Place, start_processes


def measure(layout: Layout, *, folder: str, settings: TrainConfig) -> None:
    """Lay the model out, and write the figures of this rank to <folder>/rank<r>.json."""
    config = LlamaConfig.from_pretrained(folder)

    def load() -> PreTrainedModel:
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def skeleton() -> LlamaForCausalLM:
        with torch.device("meta"):
            return LlamaForCausalLM(config)

    layout.on_main(lambda: None)  # a barrier
    before = resident_mib("VmRSS")
    forget_peak()
    started = time.perf_counter()
    prepare = partial(parallelize, layout=layout, trainer=settings.trainer, packing=settings.packing)
    model = place_model(layout.main_only(load), skeleton, prepare, layout)
    seconds = time.perf_counter() - started
    peak = resident_mib("VmHWM") - before
    parameters = list(model.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters)
    shard = sum(parameter.to_local().numel() * 4 for parameter in parameters) / MIB
    block = max(sum(one.numel() * 4 for one in blk.parameters()) for blk in find_blocks(model, None)) / MIB
    row = {"rank": layout.rank, "seconds": seconds, "peak_mib": peak, "shard_mib": shard, "block_mib": block}
    Path(folder, f"rank{layout.rank}.json").write_text(json.dumps(row))


def start(place: Place, stop: StopRequest, *, folder: str, settings: TrainConfig, port: int) -> None:
    """Run one process."""
    worker = partial(measure, folder=folder, settings=settings)
    work_in_group(place, stop, worker=worker, settings=settings, address=port)


def main() -> None:
    """Print a table; with --json also write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=17, help="of 1024 x 2816, with 32,000 tokens: 250M parameters")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    settings = TrainConfig(exp_name="benchmark", trainer=TrainerSettings("FSDPTrainer", 2), device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            vocab_size=32_000,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=arguments.layers,
            num_attention_heads=16,
            tie_word_embeddings=True,
        )
        model = LlamaForCausalLM(config)
        size = sum(parameter.numel() for parameter in model.parameters())
        model.save_pretrained(folder)
        del model
        store = local_store(settings)
        start_processes(partial(start, folder=folder, settings=settings, port=store.port), 2)
        rows = [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in (0, 1)]
    print(f"{size / 1e6:.0f}M parameters, {size * 4 / MIB:,.0f} MiB; torch {torch.__version__}, {platform.machine()}")
    print("| rank | seconds | peak beyond the start, MiB | shard, MiB | block, MiB | 1.3 x shard + block, MiB |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        bound = 1.3 * row["shard_mib"] + row["block_mib"]
        print(
            f"| {row['rank']} | {row['seconds']:.1f} | {row['peak_mib']:,.0f} | {row['shard_mib']:,.0f} | "
            f"{row['block_mib']:,.0f} | {bound:,.0f} |"
        )
    if arguments.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        arguments.json.write_text(json.dumps({"parameters": size, "ranks": rows, **versions}, indent=1))


if __name__ == "__main__":
    main()
