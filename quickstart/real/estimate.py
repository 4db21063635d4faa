"""Estimate how long `make real` will take on this machine: its counts times the rates measured at the start."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from quickstart.real.inputs import Size

# Tokens per row of the default inputs: trained (prompt and response; a pair has two responses), then generated.
REVERSE, LIKELIHOOD, PAIR = 100, 85, 130
INSTRUCTION, REPLAY, ANSWER = 22, 45, 40
FORWARD = 1 / 3  # time of a token without the backward pass, as a share of a trained token's
START_SECONDS = 10  # per stage, for imports and loading the weights
NUM_MODELS, NUM_SETS = 6, 3  # in the evaluation


def estimate(speed: Mapping[str, float], size: Size) -> dict[str, float]:
    """Return the seconds of each stage, except those that only look things up.

    Args:
        speed: `train_seconds_per_token` and `generate_seconds_per_token` of measure.py.
        size: Rows of each stage.
    """
    train, generate = speed["train_seconds_per_token"], speed["generate_seconds_per_token"]
    # The reference of DPO is a forward pass over the same pairs.
    sft, dpo = size.sft * LIKELIHOOD * train, size.dpo * PAIR * train * (1 + FORWARD)
    held_out = size.held_out * INSTRUCTION * generate
    score = size.held_out * 2 * LIKELIHOOD * train * FORWARD
    seconds = {
        "reverse": size.reverse * REVERSE * train,
        "induce held-out, reversed": held_out,
        "score held-out, reversed": score,
        "induce held-out, untrained": held_out,
        "score held-out, untrained": score,
        "measure reversed": 2 * size.held_out * REVERSE * train * FORWARD,
        "induce": size.corpus * INSTRUCTION * generate,
        "replay": size.replay * REPLAY * generate,
        "sft": sft,
        "dpo": dpo,
        "sft_more": size.dpo * LIKELIHOOD * train,
        "si_sft": sft,
        "si_dpo": dpo,
        "evaluate": NUM_MODELS * NUM_SETS * size.prompts * ANSWER * generate,
    }
    return {name: START_SECONDS + value for name, value in seconds.items()}


def render_estimate(speed: Mapping[str, float], size: Size, done: Collection[str]) -> str:
    """Describe how many minutes the remaining stages will take, in total and each."""
    seconds = {name: value for name, value in estimate(speed, size).items() if name not in done}
    stages = ", ".join(f"{name} {value / 60:.1f}" for name, value in seconds.items())
    rates = (
        f"{1 / speed['train_seconds_per_token']:.0f} tokens trained or "
        f"{1 / speed['generate_seconds_per_token']:.0f} generated per second"
    )
    return f"this machine ({rates}) will take about {sum(seconds.values()) / 60:.0f} minutes: {stages}"
