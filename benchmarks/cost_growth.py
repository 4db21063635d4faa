"""Do larger global batches cost more per token? Measure a step's time per position at 64, 512 and 4,096 rows.

    OMP_NUM_THREADS=2 python -m benchmarks.cost_growth

Data and step are those of `dpo_throughput.py`, with a smaller model, so that costs per row and per step show. The sizes
take turns. Target: within 10% of each other.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.dpo_throughput import build_steps, parser
from config.settings import TrainConfig
from trainers.data.packing import num_positions
from trainers.distributed.launch import launch
from trainers.distributed.layout import Layout


def measure(options: argparse.Namespace, layout: Layout, folder: Path) -> dict[int, list[float]]:
    """Return the microseconds per position of each step, by the rows of the global batch."""
    figures: dict[int, list[float]] = {rows: [] for rows in options.rows}
    with ExitStack() as stack:
        built = {}
        for rows in options.rows:
            flags = ["--contenders", "packed", "--width", "256", "--layers", "2", "--steps", str(options.rounds)]
            arguments = parser().parse_args([*flags, "--batch-size", str(rows)])
            built[rows] = build_steps(arguments, layout, folder / str(rows), stack)
            built[rows][2]["packed"](built[rows][1][-1])  # warm-up
        for number in range(options.rounds):
            for rows, (_, batches, steps) in built.items():
                started = time.perf_counter()
                steps["packed"](batches[number])
                positions = sum(map(num_positions, batches[number].microbatches))
                figures[rows].append(1e6 * (time.perf_counter() - started) / positions)
                print(f"{rows} rows: {figures[rows][-1]:.1f} us a position", flush=True)
    return figures


def main() -> None:
    """Print the medians."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--rows", type=int, nargs="+", default=[64, 512, 4096])
    own.add_argument("--rounds", type=int, default=3)
    options = own.parse_args()

    def worker(layout: Layout) -> None:
        with tempfile.TemporaryDirectory() as folder:
            medians = {rows: statistics.median(all) for rows, all in measure(options, layout, Path(folder)).items()}
        first = next(iter(medians.values()))
        for rows, median in medians.items():
            print(f"{rows:>6} rows: {median:7.1f} us a position, {median / first:.3f} x")

    launch(worker, TrainConfig(exp_name="benchmark", device="cpu"))


if __name__ == "__main__":
    main()
