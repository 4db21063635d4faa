"""Losses against the newest TRL's own methods, called on the same log-probabilities.

TRL's trainers compute a loss inside of the method that runs the model, so the model here is a stand-in that says given
log-probabilities, and the trainer an object that only has the attributes that the method reads.
"""

import ast
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from config.settings import LOSSES
from trainers.losses import PAIR_LOSSES
from trainers.losses.responses import Pairs
from trainers.objectives import build_objective

pytest.importorskip("trl", reason="TRL is not installed: pip install -r requirements-dev.txt")

B, TOKENS, BETA, SMOOTHING = 6, 9, 0.3, 0.2
LENGTHS = torch.tensor([[3, 5], [8, 2], [4, 4], [1, 8], [6, 7], [7, 1]])


class Everything:
    """An accelerator of one process."""

    device = torch.device("cpu")

    def gather(self, values):
        return values

    gather_for_metrics = gather


def token_logps(seed: int) -> torch.Tensor:
    """(2B, TOKENS): chosen, then rejected, 0 behind the end of each."""
    generator = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(2 * B, TOKENS, generator=generator)
    return logps * (torch.arange(TOKENS) < LENGTHS.T.flatten()[:, None])


def says(logps):
    """A model whose output has these log-probabilities, half of them as agreements, and zeros where metrics look."""
    zeros = torch.zeros_like(logps)
    output = SimpleNamespace(
        log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=logps / 2
    )
    return lambda **_: output


def trainer_of(kind, **attributes):
    trainer = object.__new__(kind)
    plain = {
        "model": SimpleNamespace(training=True), "accelerator": Everything(), "aux_loss_enabled": False,
        "beta": BETA, "label_smoothing": SMOOTHING, "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0, "_tp_size": 1, "precompute_ref_logps": True,
    }  # fmt: skip
    trainer.__dict__.update(plain | attributes)
    return trainer


def theirs(policy, reference, **changes):
    """The loss of TRL's DPOTrainer."""
    from trl import DPOTrainer

    attributes = {
        "ld_alpha": None, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "use_weighting": False,
        "args": SimpleNamespace(discopop_tau=0.05), "loss_weights": [1.0],
    }  # fmt: skip
    trainer = trainer_of(DPOTrainer, **attributes | changes)
    mask = torch.cat([torch.zeros(2 * B, 1), (policy != 0).float()], dim=1).long()
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": mask, "completion_mask": mask}
    if reference is not None:
        own = reference
        if trainer.ld_alpha is not None:
            shorter = LENGTHS.amin(1).repeat(2)[:, None]
            own = torch.where(torch.arange(TOKENS) < shorter, own, trainer.ld_alpha * own)
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = own.sum(1).chunk(2)
    return trainer._compute_loss(says(policy), inputs, False).item()


def ours(settings, policy, reference):
    """The mean over pairs of our objective on the same numbers; a padded batch that says which tokens count."""

    def logps_of(batch, agreements=False):
        counted = batch["response_mask"][..., 1:]
        sums = (torch.stack(policy.chunk(2), 1) * counted).sum(-1).double()
        return (sums, counted.sum(-1), sums / 2) if agreements else (sums, counted.sum(-1))

    sums = reference
    ld_alpha = vars(settings).get("ld_alpha")
    if ld_alpha is not None:
        sums = torch.where(torch.arange(TOKENS) < LENGTHS.amin(1).repeat(2)[:, None], sums, ld_alpha * sums)
    mask = torch.stack((policy != 0).chunk(2), 1)
    batch = Batch(
        row=torch.arange(B), reference_logps=torch.stack(sums.sum(1).chunk(2), 1).double(),
        response_mask=torch.cat([torch.zeros(B, 2, 1, dtype=torch.bool), mask], dim=-1),
    )  # fmt: skip
    return build_objective(settings)(logps_of, batch).loss_sum.item() / B


class Batch(dict):
    """What of a TensorDict the objective uses."""

    def copy(self):
        return Batch(self)

    def set(self, key, value):
        self[key] = value
        return self


SMOOTH = {"label_smoothing": SMOOTHING}
# Ours -> keys of ours, TRL's name, attributes of TRL's
DPO_TRAINER = {
    "dpo": ({}, "sigmoid", {}),
    "robust": (SMOOTH, "robust", {}),
    "ipo": ({"average_logps": True}, "ipo", {}),  # TRL's only form; ours by default are sums, as in the DPO repo
    "hinge": ({}, "hinge", {}),
    "exo_pair": (SMOOTH, "exo_pair", {}),
    "nca_pair": ({}, "nca_pair", {}),
    "sppo_hard": ({}, "sppo_hard", {}),
    "apo_zero": ({}, "apo_zero", {}),
    "apo_down": ({}, "apo_down", {}),
    "discopop": ({}, "discopop", {}),
    "dpo_norm": ({}, "sigmoid_norm", {}),
    "aot": (SMOOTH, "aot", {}),
    "aot unpaired": (SMOOTH | {"form": "unpaired"}, "aot_unpaired", {}),
    "dpo forward_kl": ({"f_divergence": "forward_kl"}, "sigmoid", {"f_divergence_type": "forward_kl"}),
    "dpo js": ({"f_divergence": "js"}, "sigmoid", {"f_divergence_type": "js_divergence"}),
    # Their coefficient is 1 - alpha of the paper.
    "dpo alpha": (
        {"f_divergence": "alpha", "f_alpha": 0.3}, "sigmoid",
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    ),
    "dpo ld": ({"ld_alpha": 0.4}, "sigmoid", {"ld_alpha": 0.4}),
    "dpo wpo": ({"wpo": "sampled"}, "sigmoid", {"use_weighting": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", DPO_TRAINER)
def test_dpo_trainer(case):
    keys, name, attributes = DPO_TRAINER[case]
    policy, reference = token_logps(0), token_logps(1)
    settings = LOSSES[case.split()[0]](beta=BETA, **keys)
    expected = theirs(policy, reference, loss_types=[name], **attributes)
    assert ours(settings, policy, reference) == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_bco_pair_is_theirs_where_the_mean_of_the_rewards_is_0():
    """TRL 1.16 leaves delta out: theirs(r_w, r_l) = ours(r_w, r_l; delta = 0)."""
    policy, reference = token_logps(0), token_logps(1)
    expected = theirs(policy, reference, loss_types=["bco_pair"])
    pairs = Pairs(*(torch.stack(one.sum(1).chunk(2), 1).double() for one in (policy, reference)), baseline=0.0)
    found = PAIR_LOSSES["bco_pair"](pairs, LOSSES["bco_pair"](beta=BETA)).mean().item()
    assert found == pytest.approx(expected, abs=1e-5)


def test_no_loss_of_theirs_is_left_out():
    """TRL names its losses in the message about one that it does not have."""
    with pytest.raises(ValueError, match="Should be one of") as refused:
        theirs(token_logps(0), token_logps(1), loss_types=["?"])
    names = ast.literal_eval(str(refused.value).partition("one of ")[2])
    assert set(names) == {name for _, name, _ in DPO_TRAINER.values()} | {"bco_pair", "sft"}


def test_the_likelihood_of_chosen_is_theirs_but_for_the_mean():
    """ours = theirs - (sum of nll) / (sum of n) + mean over pairs of nll / n."""
    policy, reference = token_logps(0), token_logps(1)
    nll, num_tokens = -policy[:B].sum(1), LENGTHS[:, 0]
    expected = theirs(policy, reference, loss_types=["sigmoid", "sft"], loss_weights=[1.0, 1.0])
    expected += ((nll / num_tokens).mean() - nll.sum() / num_tokens.sum()).item()
    assert ours(LOSSES["rpo"](beta=BETA), policy, reference) == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_a_mixture_is_theirs():
    policy, reference = token_logps(2), token_logps(3)
    parts = {"dpo": {"weight": 0.8, "beta": BETA}, "sppo_hard": {"weight": 0.2, "beta": BETA}}
    expected = theirs(policy, reference, loss_types=["sigmoid", "sppo_hard"], loss_weights=[0.8, 0.2])
    assert ours(LOSSES["mixture"](parts=parts), policy, reference) == pytest.approx(expected, rel=1e-5)


# Their cpo_loss is given means per token for simpo and alphapo, as ours is; smoothing off.
@pytest.mark.parametrize(
    ("name", "keys", "attributes"),
    [
        ("cpo", {}, {"loss_type": "sigmoid", "alpha": 0.0}),
        ("hinge", {}, {"loss_type": "hinge", "alpha": 0.0}),  # against a uniform reference
        ("ipo", {}, {"loss_type": "ipo", "alpha": 0.0}),
        ("simpo", {"gamma": 0.6}, {"loss_type": "simpo", "alpha": 0.0, "simpo_gamma": 0.6}),
        ("alphapo", {"gamma": 0.6, "alpha": 0.25}, {"loss_type": "simpo", "alpha": 0.25, "simpo_gamma": 0.6}),
    ],
)
def test_cpo_trainer(name, keys, attributes):
    from trl.experimental.cpo import CPOTrainer

    policy = -2 * torch.rand(B, 2, generator=torch.Generator().manual_seed(4))
    trainer = trainer_of(CPOTrainer, **attributes | {"label_smoothing": 0.0})
    expected = trainer.cpo_loss(*policy.unbind(1))[0]
    found = PAIR_LOSSES[name](Pairs(policy, torch.zeros_like(policy)), LOSSES[name](beta=BETA, **keys))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_orpo_trainer():
    """Their odds_ratio_loss is beta log sigmoid(...), which they subtract: ours is its negative."""
    from trl.experimental.orpo import ORPOTrainer

    policy = -0.1 - 2 * torch.rand(B, 2, generator=torch.Generator().manual_seed(5))
    expected = -trainer_of(ORPOTrainer).odds_ratio_loss(*policy.unbind(1))[0]
    found = PAIR_LOSSES["orpo"](Pairs(policy, torch.zeros_like(policy)), LOSSES["orpo"](beta=BETA))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_kto_trainer(name):
    """Row i has an answer and another's: here columns 0 and 1 of the same made-up log-probabilities."""
    from trl import KTOTrainer

    policy, reference = token_logps(7), token_logps(6)
    is_good = torch.tensor([True, False, True, True, False, True])
    own, other = policy.chunk(2)
    own_reference, other_reference = (part.sum(1) for part in reference.chunk(2))
    if name == "kto":
        other = other * 0.5  # so that the policy has moved towards answers to other prompts
        assert (other.sum(1) - other_reference).mean() > 0
    mask = torch.cat([torch.zeros(B, 1), (own != 0).float()], dim=1).long()
    ids = torch.zeros_like(mask)
    trainer = trainer_of(
        KTOTrainer, loss_type=name, calculate_KL=name == "kto", desirable_weight=1.3, undesirable_weight=0.6
    )
    batch = {
        "label": is_good, "input_ids": ids, "attention_mask": mask, "completion_mask": mask, "KL_input_ids": ids,
        "KL_attention_mask": mask, "KL_completion_mask": mask, "ref_logps": own_reference,
        "ref_KL_logps": other_reference,
    }  # fmt: skip
    passes = iter([other, own] if name == "kto" else [own])
    expected = trainer._compute_loss(lambda **_: says(next(passes))(), batch, False).item()

    columns = [own.sum(1), other.sum(1)][: 2 if name == "kto" else 1]
    references = [own_reference, other_reference][: len(columns)]
    settings = LOSSES[name](beta=BETA, good_weight=1.3, bad_weight=0.6)
    rows = {"row": torch.arange(B), "is_good": is_good, "reference_logps": torch.stack(references, 1).double()}
    output = build_objective(settings)(lambda _: (torch.stack(columns, 1).double(), LENGTHS[:, : len(columns)]), rows)
    assert output.loss_sum.item() / B == pytest.approx(expected, abs=1e-5)
