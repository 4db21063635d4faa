"""The throughput benchmark's contenders do the same work; a literal step, written apart, is the trainer's oracle."""

import json
import sys

import pytest

from tests import warm


@pytest.mark.parametrize("lengths", ["si", "long"])
def test_the_trainer_takes_the_steps_of_the_literal_one(tmp_path, lengths):
    """Losses along three steps, each from the weights of the one before: a wrong gradient would be seen in the next."""
    command = [
        sys.executable, "-m", "benchmarks.dpo_throughput", "--contenders", "literal", "packed", "padded",
        *("--lengths", lengths, "--steps", "3", "--batch-size", "8", "--literal-parts", "2"),
        *("--width", "64", "--layers", "2", "--vocabulary", "64", "--lr", "0.001"),
        *("--json", str(tmp_path / "figures.json")),
    ]  # fmt: skip
    warm.run(command, check=True)
    figures = json.loads((tmp_path / "figures.json").read_text())
    differences = figures["loss_difference_to_first"]
    # Of losses of 0.8: float32, summed in another order.
    assert max(differences["packed"], differences["padded"]) < 5e-6
    # 8 rows in two micro-batches: the 30 tokens that all prompts begin with stand in each.
    assert figures["positions_per_needed"] < 1.0 < figures["positions_per_shared"] < 1.1
