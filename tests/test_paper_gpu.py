"""What a GPU would be given, compiled for one without one: `benchmarks/paper_gpu.py`, in a process of its own."""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is None, reason="this torch is not built for CUDA"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler for the stand-in of the CUDA runtime"),
]


def results_of(*arguments: str) -> list[dict]:
    command = [sys.executable, "-m", "benchmarks.paper_gpu", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]


def test_a_whole_run_compiles_attention_at_most_three_times():
    """Self check, reference, training and evaluation, in micro-batches from 90 to 8,000 positions."""
    alone, *in_blocks = results_of("--parts", "run")
    flex = {kind: number for kind, number in alone["graphs"].items() if kind.startswith("flex")}
    assert flex == {"flex inference": 1, "flex forward": 1, "flex backward": 1}
    assert not alone["graph_breaks"]
    assert not any(one["graph_breaks"] for one in in_blocks)


def test_every_architecture_takes_a_step_in_every_precision():
    """In float32 with flex_attention, in 16 bits with flash attention; and nothing waits for a value."""
    results = results_of("--parts", "architectures")
    assert {one["precision"] for one in results} == {"float32", "bfloat16", "autocast"}
    assert len({one["architecture"] for one in results}) >= 5
    for one in results:
        flex = {one["graphs"].get(f"flex {kind}", 0) for kind in ("forward", "backward")}
        assert flex <= {1, 2} if one["precision"] == "float32" else flex == {0}


def test_short_micro_batches_compile_for_grouped_heads():
    """Its kernel for decoding, which flex_attention would choose for 90 positions, has no configuration for them."""
    # The long one first, as a run's self check is: one compiled for a single block is for a single block alone.
    results = results_of("--parts", "heads", "--sizes", "2000", "90", "40")
    assert {one["ratio"] for one in results} == {1, 2, 4, 8}
    assert all(one["kernels"] and one["graphs"]["flex forward"] == 1 for one in results)


def test_code_does_not_depend_on_the_first_size():
    """A run that goes on after a stop begins with another micro-batch than it did, and is to compute the same."""
    few, many = results_of("--parts", "first_sizes")
    assert few["kernels"] == many["kernels"]
    assert len(many["kernels"]) == 1
