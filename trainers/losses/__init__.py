"""The losses by their name in `loss=NAME`, each a pure function; docs/losses.md has formulas and papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from trainers.losses.answers import apo_zero_unpaired_loss, kto_loss
from trainers.losses.likelihoods import alphapo_loss, cpo_loss, orpo_loss, simpo_loss, slic_loss
from trainers.losses.ratios import (
    aot_loss,
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    discopop_loss,
    dpo_loss,
    dpo_norm_loss,
    dpop_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    nca_pair_loss,
    robust_loss,
    sppo_hard_loss,
)
from trainers.losses.responses import Answers, Pairs

# Name -> function that maps B pairs and the settings of the loss to B losses.
PAIR_LOSSES: dict[str, Callable[[Pairs, Any], Tensor]] = {
    "dpo": dpo_loss, "cdpo": dpo_loss, "rpo": dpo_loss, "robust": robust_loss, "ipo": ipo_loss, "hinge": hinge_loss,
    "exo_pair": exo_pair_loss, "discopop": discopop_loss, "nca_pair": nca_pair_loss, "sppo_hard": sppo_hard_loss,
    "apo_zero": apo_zero_loss, "apo_down": apo_down_loss, "dpop": dpop_loss, "dpo_norm": dpo_norm_loss,
    "bco_pair": bco_pair_loss, "aot": aot_loss, "slic": slic_loss, "cpo": cpo_loss, "orpo": orpo_loss,
    "simpo": simpo_loss, "alphapo": alphapo_loss,
}  # fmt: skip

# Name -> function that maps B single answers and the settings of the loss to B losses.
ANSWER_LOSSES: dict[str, Callable[[Answers, Any], Tensor]] = {
    "kto": kto_loss, "apo_zero_unpaired": apo_zero_unpaired_loss,
}  # fmt: skip
