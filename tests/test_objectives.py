"""Objectives against a literal implementation of the published formulas, written from the papers for this test."""

import math
from functools import partial

import pytest
import torch
from tensordict import TensorDict

from config.errors import UserError
from config.settings import LOSSES as SETTINGS
from config.settings import DPOSettings, IPOSettings, LikelihoodLossSettings
from tests.tiny_models import VOCABULARY, tiny_model
from trainers.kernels.logps import sequence_logps
from trainers.losses import PAIR_LOSSES
from trainers.objectives import LikelihoodObjective, PreferenceObjective

PROMPT, CHOSEN, REJECTED = [4, 2, 6], [5, 3, 1], [2, 7, 4]
PAIRS = len(PROMPT)


def pair_batch(seed: int = 0) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    width = max(p + max(c, r) for p, c, r in zip(PROMPT, CHOSEN, REJECTED, strict=True))
    ids = torch.zeros(PAIRS, 2, width, dtype=torch.int64)
    mask = torch.zeros(PAIRS, 2, width, dtype=torch.bool)
    response = torch.zeros_like(mask)
    for i in range(PAIRS):
        prompt = torch.randint(0, VOCABULARY, (PROMPT[i],), generator=generator)
        for side, length in enumerate((CHOSEN[i], REJECTED[i])):
            end = PROMPT[i] + length
            ids[i, side, : PROMPT[i]] = prompt
            ids[i, side, PROMPT[i] : end] = torch.randint(0, VOCABULARY, (length,), generator=generator)
            mask[i, side, :end] = True
            response[i, side, PROMPT[i] : end] = True
    return TensorDict(
        {
            "input_ids": ids,
            "attention_mask": mask,
            "response_mask": response,
            "row": torch.arange(PAIRS),
            "reference_logps": -20 * torch.rand(PAIRS, 2, dtype=torch.float64, generator=generator),
        },
        batch_size=[PAIRS],
    )


def log_pi(model, ids: list[int], prompt_length: int) -> torch.Tensor:
    """log pi(y|x) = sum_t log pi(y_t | x, y_<t), from the probabilities of one sequence."""
    probabilities = torch.softmax(model(torch.tensor([ids]), use_cache=False).logits[0].double(), dim=-1)
    return sum(torch.log(probabilities[t - 1, ids[t]]) for t in range(prompt_length, len(ids)))


def literal_preference_loss(model, batch, settings) -> tuple[torch.Tensor, list[float], list[float]]:
    """The mean loss and the two lists of rewards, pair by pair, as the papers write them."""
    losses, chosen_rewards, rejected_rewards = [], [], []
    for i in range(PAIRS):
        log_ratio = []
        for side, length in enumerate((CHOSEN[i], REJECTED[i])):
            ids = batch["input_ids"][i, side, : PROMPT[i] + length].tolist()
            policy, reference = log_pi(model, ids, PROMPT[i]), batch["reference_logps"][i, side]
            if side == 0:
                chosen_nll = -policy / length
            if settings.average_logps:
                policy, reference = policy / length, reference / length
            log_ratio.append(policy if settings.reference_free else policy - reference)
        h = log_ratio[0] - log_ratio[1]
        if settings.name == "ipo":
            loss = (h - 1 / (2 * settings.beta)) ** 2
        else:
            p = 1 / (1 + torch.exp(-settings.beta * h))  # Bradley-Terry probability that chosen wins
            loss = -(1 - settings.label_smoothing) * torch.log(p) - settings.label_smoothing * torch.log(1 - p)
        losses.append(loss + settings.nll_weight * chosen_nll)
        chosen_rewards.append(settings.beta * log_ratio[0].item())
        rejected_rewards.append(settings.beta * log_ratio[1].item())
    return torch.stack(losses).mean(), chosen_rewards, rejected_rewards


CASES = [
    DPOSettings(name="dpo"),
    DPOSettings(name="dpo", beta=0.5, label_smoothing=0.2),
    DPOSettings(name="dpo", reference_free=True),
    DPOSettings(name="dpo", average_logps=True, nll_weight=0.7),
    IPOSettings(name="ipo"),
    IPOSettings(name="ipo", average_logps=True, reference_free=True),
]


@pytest.mark.parametrize("settings", CASES, ids=lambda s: f"{s.name}-{s.beta}-{s.average_logps}-{s.reference_free}")
def test_preference_loss_rewards_and_gradients_are_the_papers(settings):
    model, batch = tiny_model(dtype=torch.float64), pair_batch()
    objective = PreferenceObjective(settings)
    output = objective(partial(sequence_logps, model), batch)
    expected, chosen, rejected = literal_preference_loss(model, batch, settings)
    torch.testing.assert_close(output.loss_sum / objective.num_units(batch), expected, rtol=1e-6, atol=1e-9)
    assert output.metrics["rewards_{split}/chosen"].tolist() == pytest.approx(chosen, rel=1e-6)
    assert output.metrics["rewards_{split}/rejected"].tolist() == pytest.approx(rejected, rel=1e-6)
    wins = [1.0 if c > r else 0.0 for c, r in zip(chosen, rejected, strict=True)]
    assert output.metrics["rewards_{split}/accuracies"].tolist() == wins

    parameters = list(model.parameters())
    gradients = torch.autograd.grad(output.loss_sum / PAIRS, parameters)
    for gradient, truth in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
        # Llama normalises in float32, so small entries carry float32 noise: relative to the largest one.
        torch.testing.assert_close(gradient, truth, rtol=1e-6, atol=1e-6 * truth.abs().max().item())


def test_metrics_are_detached_and_one_value_an_example():
    objective = PreferenceObjective(DPOSettings(name="dpo"))
    output = objective(partial(sequence_logps, tiny_model()), pair_batch())
    for name, values in output.metrics.items():
        assert values.shape == (PAIRS,), name
        assert not values.requires_grad, name


@pytest.mark.parametrize("reduction", ["sequence_sum", "token_mean"])
def test_likelihood_reductions(reduction):
    model, pairs = tiny_model(dtype=torch.float64), pair_batch()
    keys = ("input_ids", "attention_mask", "response_mask")
    batch = TensorDict({"row": pairs["row"], **{key: pairs[key][:, 0] for key in keys}}, batch_size=[PAIRS])
    objective = LikelihoodObjective(LikelihoodLossSettings(name="sft", reduction=reduction))
    output = objective(partial(sequence_logps, model), batch)
    sums = [
        log_pi(model, batch["input_ids"][i, : PROMPT[i] + CHOSEN[i]].tolist(), PROMPT[i]).item() for i in range(PAIRS)
    ]
    units = PAIRS if reduction == "sequence_sum" else sum(CHOSEN)
    assert objective.num_units(batch) == units
    assert (output.loss_sum / objective.num_units(batch)).item() == pytest.approx(-sum(sums) / units, rel=1e-6)
    assert output.metrics["logps_{split}/chosen"].tolist() == pytest.approx(sums)
    nll = [-total / length for total, length in zip(sums, CHOSEN, strict=True)]
    assert output.metrics["nll_{split}"].tolist() == pytest.approx(nll)


def first_batch(objective, *, shift: float = 0.0, dtype: torch.dtype = torch.float32):
    """The objective at step 0, where the reference columns are the policy's own log-probabilities (+ shift)."""
    model, batch = tiny_model(dtype=dtype), pair_batch()
    output = objective(partial(sequence_logps, model), batch)
    sides = [output.metrics["logps_{split}/chosen"] + shift, output.metrics["logps_{split}/rejected"]]
    batch["reference_logps"] = torch.stack(sides, dim=-1)
    return objective(partial(sequence_logps, model), batch), batch["input_ids"].shape[-1]


FIRST_LOSSES = {  # where policy and reference are one: typed from the formulas with a = b = 0
    "dpo": math.log(2), "cdpo": math.log(2), "rpo": math.log(2), "robust": math.log(2), "ipo": 25.0, "hinge": 1.0,
    "exo_pair": -0.5 * math.log(4 * 1e-3 * (1 - 1e-3)), "discopop": math.log(2) / 2 + 1 / 2,
    "nca_pair": 2 * math.log(2), "sppo_hard": 50.0, "apo_zero": 1.0, "apo_down": 1.0, "dpop": math.log(2),
    "dpo_norm": math.log(2), "bco_pair": 2 * math.log(2), "aot": math.log(2),
}  # fmt: skip


@pytest.mark.parametrize("name", FIRST_LOSSES)
def test_the_first_loss_is_known(name):
    objective = PreferenceObjective(SETTINGS[name](**({"nll_weight": 0.0} if name == "rpo" else {})))
    output, num_tokens = first_batch(objective)
    expected = FIRST_LOSSES[name]
    assert (output.loss_sum / PAIRS).item() == pytest.approx(expected, abs=1e-5)
    assert output.metrics["rewards_{split}/margins"].abs().max() < 1e-5
    assert output.metrics["rewards_{split}/accuracies"].tolist() == [0.5] * PAIRS
    objective.check_first_batch(output, num_tokens, torch.float32)


@pytest.mark.parametrize("shift", [1e-2, -3.0, math.nan])
@pytest.mark.parametrize("name", FIRST_LOSSES)
def test_a_reference_that_is_not_the_policy_is_refused(name, shift):
    objective = PreferenceObjective(SETTINGS[name]())
    output, num_tokens = first_batch(objective, shift=shift)
    with pytest.raises(UserError, match="before the first step the policy is the reference"):
        objective.check_first_batch(output, num_tokens, torch.float32)


def test_bfloat16_has_a_wider_tolerance_but_finds_a_wrong_model():
    objective = PreferenceObjective(DPOSettings(name="dpo"))
    output, num_tokens = first_batch(objective, shift=0.05, dtype=torch.bfloat16)
    objective.check_first_batch(output, num_tokens, torch.bfloat16)
    output, num_tokens = first_batch(objective, shift=3.0, dtype=torch.bfloat16)
    with pytest.raises(UserError, match="reward"):
        objective.check_first_batch(output, num_tokens, torch.bfloat16)


def test_without_a_reference_there_is_nothing_to_check():
    objective = PreferenceObjective(DPOSettings(name="dpo", reference_free=True))
    assert not objective.needs_reference
    output = objective(partial(sequence_logps, tiny_model()), pair_batch())
    objective.check_first_batch(output, 10, torch.float32)


@pytest.mark.parametrize("name", [name for name in PAIR_LOSSES if "reference_free" in vars(SETTINGS[name]())])
def test_reference_free_ignores_the_reference_in_rewards_too(name):
    """Equal to the last bit with the columns of a reference that says something else, and without any."""
    objective = PreferenceObjective(SETTINGS[name](reference_free=True))
    model, batch = tiny_model(), pair_batch()
    outputs = [objective(partial(sequence_logps, model), batch)]
    batch["reference_logps"] = batch["reference_logps"] * 3 - 7
    outputs.append(objective(partial(sequence_logps, model), batch))
    outputs.append(objective(partial(sequence_logps, model), batch.exclude("reference_logps")))
    for other in outputs[1:]:
        assert torch.equal(other.loss_sum, outputs[0].loss_sum)
        assert all(torch.equal(values, outputs[0].metrics[key]) for key, values in other.metrics.items())
