"""What changes any loss on pairs (LD-DPO, WPO, likelihood term, mixtures), against loops over tokens and pairs."""

import math
from dataclasses import fields
from functools import partial

import pytest
import torch

from config.settings import LOSSES, DPOSettings, IPOSettings, MixtureSettings
from tests.test_objectives import CHOSEN, PAIRS, PROMPT, REJECTED, pair_batch
from tests.tiny_models import tiny_model
from tests.tiny_runs import random_store, tiny_settings
from trainers.data.batching import BatchLoader
from trainers.data.cutters import build_cutter
from trainers.distributed.launch import launch
from trainers.kernels.attention import use_packed_attention
from trainers.kernels.logps import sequence_logps
from trainers.losses.lengths import response_logps
from trainers.objectives import build_objective
from trainers.objectives.pairs import PreferenceObjective


def log_agreements(model, ids: list[int], prompt_length: int) -> list[float]:
    """log sum_v p(v)^2 at each token of a response: how probable two samples of it are one."""
    with torch.no_grad():
        probabilities = torch.softmax(model(torch.tensor([ids]), use_cache=False).logits[0].double(), dim=-1)
    return [math.log(sum(p * p for p in probabilities[t - 1].tolist())) for t in range(prompt_length, len(ids))]


def token_logps(model, ids: list[int], prompt_length: int) -> list[float]:
    with torch.no_grad():
        logps = torch.log_softmax(model(torch.tensor([ids]), use_cache=False).logits[0].double(), dim=-1)
    return [logps[t - 1, ids[t]].item() for t in range(max(prompt_length, 1), len(ids))]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("ld_alpha", [None, 0.0, 0.3, 1.0])
def test_tokens_beyond_the_shorter_response_count_less(tmp_path, packing, ld_alpha):
    """Liu et al. 2024: log pi = sum over t <= l of log p_t + alpha (sum over t > l), l = the shorter length."""
    store = random_store(tmp_path, num_rows=9, segments=3, seed=4)
    model, plain_model = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64)
    if packing:
        use_packed_attention(model)
    cutter = build_cutter(packing=packing, device=torch.device("cpu"), pad_token_id=0, num_microbatches=2)
    (batch,) = BatchLoader(store, cutter, batch_size=9).batches()
    different = 0
    for microbatch in batch.microbatches:
        weighed, plain, num_tokens, agreements = response_logps(
            partial(sequence_logps, model), microbatch, ld_alpha, agreements=True
        )
        for b, row in enumerate(microbatch["row"].tolist()):
            prompt, *responses = (segment.tolist() for segment in store.row(row))
            shorter = min(map(len, responses))
            for side, response in enumerate(responses):
                tokens = token_logps(plain_model, prompt + response, len(prompt))
                alpha = 1.0 if ld_alpha is None else ld_alpha
                expected = sum(tokens[:shorter]) + alpha * sum(tokens[shorter:])
                different += len(response) > shorter
                assert weighed[b, side].item() == pytest.approx(expected, abs=1e-5)
                assert plain[b, side].item() == pytest.approx(sum(tokens), abs=1e-5)
                assert num_tokens[b, side].item() == len(response)
                assert agreements[b, side].item() == pytest.approx(
                    sum(log_agreements(plain_model, prompt + response, len(prompt))), abs=1e-5
                )
    assert different >= 4


def output_of(settings, batch=None):
    return PreferenceObjective(settings)(
        partial(sequence_logps, tiny_model(dtype=torch.float64)), pair_batch() if batch is None else batch
    )


def test_wpo_weighs_the_preference_and_not_the_likelihood():
    plain, weighted = output_of(DPOSettings(nll_weight=0.4)), output_of(DPOSettings(nll_weight=0.4, wpo="plain"))
    expected = 0.0
    for i in range(PAIRS):
        logps = [weighted.metrics[f"logps_{{split}}/{side}"][i].item() for side in ("chosen", "rejected")]
        weight = math.exp(logps[0] / CHOSEN[i]) * math.exp(logps[1] / REJECTED[i])
        expected += weight * plain.metrics["preference_loss_{split}"][i].item() + 0.4 * -logps[0] / CHOSEN[i]
    assert weighted.loss_sum.item() == pytest.approx(expected, rel=1e-10)


def test_wpo_by_samples_weighs_by_the_probability_over_that_of_a_sample():
    """Zhou et al. 2024, section 3.2: w = exp(1/|y| sum over t of log(pi(y_t) / sum_v pi(v)^2)), for both responses."""
    batch, model = pair_batch(), tiny_model(dtype=torch.float64)
    plain, weighted = output_of(DPOSettings()), output_of(DPOSettings(wpo="sampled"))
    expected = 0.0
    for i in range(PAIRS):
        weight = 1.0
        for side in (0, 1):
            mask = batch["attention_mask"][i, side]
            ids, prompt = batch["input_ids"][i, side][mask].tolist(), PROMPT[i]
            logps, agreements = token_logps(model, ids, prompt), log_agreements(model, ids, prompt)
            assert len(logps) == (CHOSEN, REJECTED)[side][i]
            weight *= math.exp(sum(p - a for p, a in zip(logps, agreements, strict=True)) / len(logps))
        expected += weight * plain.metrics["preference_loss_{split}"][i].item()
    assert weighted.loss_sum.item() == pytest.approx(expected, rel=1e-10)
    assert weighted.loss_sum.item() != pytest.approx(output_of(DPOSettings(wpo="plain")).loss_sum.item(), rel=1e-2)


def test_a_mixture_is_the_weighted_sum_of_its_parts():
    parts = {"dpo": {"weight": 0.8, "beta": 0.5}, "simpo": {"weight": 0.2, "gamma": 0.1}, "ipo": {"nll_weight": 0.3}}
    mixed = output_of(MixtureSettings(parts=parts))
    alone = [
        (0.8, output_of(DPOSettings(beta=0.5))),
        (0.2, output_of(LOSSES["simpo"](gamma=0.1))),
        (1.0, output_of(IPOSettings(nll_weight=0.3))),
    ]
    assert mixed.loss_sum.item() == pytest.approx(sum(w * one.loss_sum.item() for w, one in alone), rel=1e-12)
    rewards = "rewards_{split}/chosen"
    assert torch.equal(mixed.metrics[rewards], alone[0][1].metrics[rewards])  # of the first part with a reference


def test_a_mixture_without_a_reference_reads_none():
    loss = MixtureSettings(parts={"simpo": {}, "cpo": {}})
    assert not loss.needs_reference
    output_of(loss, pair_batch().exclude("reference_logps"))


@pytest.mark.parametrize("name", [name for name, kind in LOSSES.items() if not kind().needs_reference])
def test_a_loss_without_a_reference_reads_none(name):
    if LOSSES[name].rows == "pairs" and name != "mixture":
        assert "reference_free" not in {field.name for field in fields(LOSSES[name])}
        output_of(LOSSES[name](), pair_batch().exclude("reference_logps"))


def test_the_mean_of_bco_is_over_all_rewards_so_far():
    """Two batches: the second one's delta is the mean of the rewards of both, an evaluation in between adds none."""
    settings = LOSSES["bco_pair"](beta=0.5)
    model, batches = tiny_model(dtype=torch.float64), [pair_batch(seed=seed) for seed in (0, 1)]
    logps_of = partial(sequence_logps, model)
    seen, rewards = [], []

    def worker(layout):
        objective = build_objective(settings)
        for batch in batches:
            objective.begin_batch(logps_of, [(batch, True)], layout.device)
            output = objective(logps_of, batch)
            rewards.extend(output.metrics["rewards_{split}/chosen"].tolist())
            rewards.extend(output.metrics["rewards_{split}/rejected"].tolist())
            delta = sum(rewards) / len(rewards)
            for i in range(PAIRS):
                chosen, rejected = (output.metrics[f"rewards_{{split}}/{side}"][i] for side in ("chosen", "rejected"))
                loss = math.log1p(math.exp(-(chosen - delta))) + math.log1p(math.exp(rejected - delta))
                assert output.metrics["preference_loss_{split}"][i].item() == pytest.approx(loss, rel=1e-9)
            with torch.no_grad():
                objective.begin_batch(logps_of, [(batch, True)], layout.device)
            seen.append(objective.state["rewards"])

    launch(worker, tiny_settings())
    assert seen == [2 * PAIRS, 4 * PAIRS]
    assert len(PROMPT) == PAIRS
