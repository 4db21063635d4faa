"""Is everything right and fast on a GPU? One command, at most eight minutes, every figure next to its expected value.

    python -m benchmarks.gpu --output gpu                     # all stages
    python -m benchmarks.gpu --output gpu --stages first      # card, correctness, resume, one 1B DPO figure: 4 minutes
    python -m benchmarks.gpu --output gpu --stages dpo_1b sft_1b
    python -m benchmarks.gpu --output gpu --model FOLDER      # also a real model: SFT, then DPO
    python -m benchmarks.gpu --output gpu --device cpu --small    # the same code at toy size: a smoke test

Each stage is a separate process with a time limit and a second try, so that no failure stops the others. Its result is
appended to `gpu.json` in the output folder as soon as it is known, and its output is saved next to it. Models are built
on the device from random weights, nothing is downloaded, and wandb is off. For a machine without a network,
`scripts/card_wheels.sh` fetches missing packages elsewhere: `PYTHONPATH=wheels/site`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TRIES = 2
Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Expected:
    """The expected value of a figure: `at_least` or `at_most` a number, or true."""

    figure: str
    words: str
    holds: Callable[[Any], bool]


def at_least(figure: str, bound: float, unit: str = "") -> Expected:
    """Expect a figure of `bound` or more."""
    return Expected(figure, f">= {bound:g}{unit}", lambda value: value >= bound)


def at_most(figure: str, bound: float, unit: str = "") -> Expected:
    """Expect a figure of `bound` or less."""
    return Expected(figure, f"<= {bound:g}{unit}", lambda value: value <= bound)


def yes(figure: str) -> Expected:
    """Expect a figure that is true."""
    return Expected(figure, "yes", bool)


@dataclass(frozen=True)
class Stage:
    """A process, its time limit, and the expected figures.

    Attributes:
        command: Arguments of python; its last line of output is a JSON object of figures.
        small: Arguments that replace `command` with `--small`.
        limit_seconds: Time after which it is killed; the second try gets as much.
        expected: The expected figures.
        alongside: A stage that runs at the same time; neither of the two is timed.
    """

    command: tuple[str, ...]
    small: tuple[str, ...]
    limit_seconds: float
    expected: tuple[Expected, ...] = ()
    alongside: str | None = field(default=None)


def _check(name: str, *options: str) -> tuple[str, ...]:
    return ("-m", "benchmarks.gpu_checks", name, *options)


def _throughput(*options: str) -> tuple[str, ...]:
    return ("-m", "benchmarks.dpo_throughput", "--print-json", *options)


SMALL = ("--width", "64", "--layers", "2", "--vocabulary", "512", "--batch-size", "4", "--steps", "2")
DPO_1B = ("--size", "1b", "--batch-size", "256", "--steps", "3", "--max-tokens", "16384")  # as experiment=one_gpu
STAGES: dict[str, Stage] = {
    "card": Stage(
        _check("card"), _check("card", "--size", "256"), 40,
        (at_least("bf16_tflops", 700), at_least("copy_tb_per_s", 2.7)),
    ),
    "correctness": Stage(
        _check("correctness"), _check("correctness", "--lengths", "40"), 200,
        (
            yes("all_within"), at_most("worst_float32", 1e-4), at_most("worst_bfloat16_ratio", 2),
            at_least("control", 1e-2),
        ),
        alongside="resume",
    ),
    "resume": Stage(
        _check("resume"), _check("resume"), 200, (yes("stopped_with_75"), yes("same_losses"), yes("bit_equal")),
    ),
    "dpo_1b_first": Stage(
        _throughput(*DPO_1B, "--contenders", "packed_bf16_compiled"),
        _throughput(*SMALL, "--contenders", "packed_bf16"), 120, (at_least("mfu_with_head", 0.45),),
    ),
    "waits": Stage(
        _check("waits"), _check("waits", "--size", "tiny"), 60, (at_most("waits_per_step", 1),),
    ),
    "dpo_1b": Stage(
        _throughput(
            *DPO_1B, "--contenders", "literal_bf16", "packed_bf16", "packed_bf16_compiled", "trl_bf16",
            "--literal-parts", "16", "--trl-rows", "16",
        ),
        _throughput(*SMALL, "--contenders", "literal_bf16", "packed_bf16"), 260,
        (at_least("times_literal", 4), at_least("times_trl", 2), at_least("mfu_with_head", 0.45)),
    ),
    "profile_1b": Stage(  # if the kernels take less time than the step, the GPU waits for the host
        _throughput(*DPO_1B, "--contenders", "packed_bf16_compiled", "--profile"),
        _throughput(*SMALL, "--contenders", "packed_bf16", "--profile"), 100,
    ),
    "sft_1b": Stage(
        _throughput(
            "--task", "sft", *DPO_1B, "--contenders", "trl_packed_bf16", "packed_bf16", "packed_bf16_compiled",
            "--trl-rows", "32",
        ),
        _throughput("--task", "sft", *SMALL, "--contenders", "packed_bf16"), 90, (at_least("times_trl", 1.2),),
    ),
    "dpo_7b": Stage(
        _throughput(
            "--size", "7b", "--batch-size", "64", "--steps", "3", "--max-tokens", "10240",
            "--contenders", "packed_bf16_compiled", "--fit-layers",
        ),
        _throughput(*SMALL, "--contenders", "packed_bf16"), 120,
        (at_least("mfu_with_head", 0.5), at_most("peak_reserved_gib", 139)),
    ),
    "dpo_7b_full": Stage(
        _throughput(
            "--size", "7b", "--batch-size", "64", "--steps", "2", "--contenders", "packed_bf16_full", "--fit-layers",
        ),
        _throughput(*SMALL, "--contenders", "packed_full"), 90,
    ),
    "isolated": Stage(_check("isolated"), _check("isolated", "--size", "tiny"), 60),
    "save": Stage(_check("save"), _check("save", "--size", "tiny"), 60, (at_most("stall_seconds", 1.0),)),
    "generation": Stage(_check("generation"), _check("generation", "--size", "tiny"), 60),
    "real_model": Stage(_check("real_model"), _check("real_model"), 300, (at_least("reward_accuracy", 0.8),)),
}  # fmt: skip
FIRST = ("card", "correctness", "dpo_1b_first")
NOT_IN_ALL = ("resume", "dpo_1b_first")  # the first runs alongside, the second is part of dpo_1b


def chosen_stages(names: list[str], *, has_model: bool) -> list[str]:
    """Expand `first` and `all`; the real model is only included if its folder is given."""
    if names == ["first"]:
        return list(FIRST)
    if names == ["all"]:
        return [name for name in STAGES if name not in NOT_IN_ALL and (has_model or name != "real_model")]
    unknown = set(names) - STAGES.keys()
    if unknown:
        raise SystemExit(f"--stages {' '.join(sorted(unknown))}: no such stage; there are {', '.join(STAGES)}")
    return names


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a stage and all processes that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Run:
    """The stages of one command, and their output folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Make the output folder."""
        self.arguments = arguments
        self.folder: Path = arguments.output
        self.folder.mkdir(parents=True, exist_ok=True)
        self.results: list[dict[str, Any]] = []

    def stage(self, name: str) -> None:
        """Run a stage and the one alongside, then append and print their figures."""
        names = [name, *filter(None, [STAGES[name].alongside])]
        for result in self._results(names):
            self.results.append(result)
            with (self.folder / "gpu.json").open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(json.dumps({key: result[key] for key in ("stage", "seconds", "error", "figures")}), flush=True)

    def _results(self, names: list[str]) -> Iterator[dict[str, Any]]:
        waiting = {name: 1 for name in names}  # name -> number of the current try
        while waiting:
            started = {name: (time.monotonic(), self._start(name, attempt)) for name, attempt in waiting.items()}
            again = {}
            for name, (began, process) in started.items():
                try:
                    figures, error = self._wait(name, process, began)
                except BaseException:  # kill the stages if this program ends, or they would keep the device busy
                    for _, one in started.values():
                        end(one)
                    raise
                if error and waiting[name] < TRIES:
                    again[name] = waiting[name] + 1
                    continue
                yield {
                    "stage": name, "seconds": round(time.monotonic() - began, 1), "tries": waiting[name],
                    "error": error, "figures": figures,
                }  # fmt: skip
            waiting = again

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _start(self, name: str, attempt: int) -> subprocess.Popen[bytes]:
        stage, arguments = STAGES[name], self.arguments
        options = [*(stage.small if arguments.small else stage.command), "--device", arguments.device]
        if name == "real_model":
            options += ["--model", str(arguments.model)]
        # Programs that a stage starts in another folder must find the packages, too.
        paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "HF_HUB_OFFLINE": "1",
            # Contenders that take turns fragment the GPU memory, and the last one would wait for memory.
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            "WANDB_MODE": "disabled",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with self._log(name).open("ab") as log:
            log.write(f"--- try {attempt}: python {' '.join(options)}\n".encode())
            log.flush()
            return subprocess.Popen(
                [sys.executable, *options], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def _wait(self, name: str, process: subprocess.Popen[bytes], began: float) -> tuple[dict[str, Any], str | None]:
        """Wait for a stage, and return its figures and any error."""
        limit = STAGES[name].limit_seconds
        try:
            status = process.wait(max(0.1, began + limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            end(process)
            return {}, f"killed after {limit:.0f} s; {self._log(name)} has what it printed"
        lines = self._log(name).read_text(encoding="utf-8", errors="replace").splitlines()
        try:
            figures = json.loads(lines[-1])
        except (json.JSONDecodeError, IndexError):
            last = lines[-1] if status and lines else f"its last line is no JSON; see {self._log(name)}"
            return {}, f"status {status}: {last}"
        # If a process dies after all was measured (seen once on a card), keep its figures and note the error.
        return figures | ({"status_at_exit": status} if status else {}), None

    def table(self) -> str:
        """Return the table of measured against expected, one line per figure with an expectation."""
        lines = [f"{'stage':16}{'figure':24}{'measured':>14}{'expected':>14}  {'':6}"]
        for result in self.results:
            if result["error"]:
                lines.append(f"{result['stage']:16}{result['error']}")
                continue
            for one in STAGES[result["stage"]].expected:
                value = result["figures"].get(one.figure)
                if value is None:
                    shown, verdict = "-", "not measured"
                else:
                    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
                    verdict = "ok" if one.holds(value) else "MISSED"
                lines.append(f"{result['stage']:16}{one.figure:24}{shown:>14}{one.words:>14}  {verdict}")
        return "\n".join(lines)


def main() -> None:
    """Run the stages, and print a table of measured against expected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of gpu.json and of what the stages print")
    parser.add_argument("--stages", nargs="+", default=["all"], help=f"first, all, or some of {', '.join(STAGES)}")
    parser.add_argument("--model", type=Path, default=None, help="folder of a real model for the stage real_model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes: a smoke test of this program")
    arguments = parser.parse_args()
    if "real_model" in arguments.stages and arguments.model is None:
        raise SystemExit("--stages real_model needs --model FOLDER")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    run, began = Run(arguments), time.monotonic()
    for name in chosen_stages(arguments.stages, has_model=arguments.model is not None):
        run.stage(name)
    print(run.table())
    print(f"{time.monotonic() - began:.0f} s in all; {run.folder / 'gpu.json'}")


if __name__ == "__main__":
    main()
