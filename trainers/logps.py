"""Log-probabilities of target tokens under a causal language model.

One path for policy, reference and evaluation: hidden states of all positions, the output embedding on the rows that
predict a target (about a third of them in preference data), float32 log-softmax, float64 sum over a sequence. Summing
hundreds of token log-probabilities in float32 loses 1e-3 nats, 25 times what all the rest does.

Letters: B = sequences, T = padded length, D = width, V = vocabulary, R = target tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config.errors import UserError

MAX_LOGITS = 1 << 28  # held at once: 1 GiB of float32, and as much again for their gradient


def hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The states that the output embedding reads: (B, T) tokens, (B, T) right-padded mask -> (B, T, D).

    Positions count the real tokens from 0; those of the padding repeat the last one, so that a model with a table of
    positions is never asked for one that it lacks.
    """
    position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return model.base_model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state


def sequence_logps(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sum over the target tokens of log p(token | all before it), for each sequence.

    Args:
        model: a causal LM of transformers that `check_head` accepts.
        batch: a micro-batch of `BatchLoader`:
            input_ids: (..., T) int64, right-padded.
            attention_mask: (..., T) bool, True at real tokens.
            response_mask: (..., T) bool, True where the token is a target. A token at position 0 has nothing before
                it that could predict it, and is not a target whatever the mask says.

    Returns:
        log-probabilities (...,) float64, in nats, and numbers of target tokens (...,) int64.
    """
    names = ("input_ids", "attention_mask", "response_mask")
    leading = batch["input_ids"].shape[:-1]
    input_ids, attention_mask, targets = (batch[name].flatten(0, -2) for name in names)
    # The state at t predicts token t + 1: the last position predicts nothing and is not run.
    states_BTD = hidden_states(model, input_ids[:, :-1], attention_mask[:, :-1])
    targets = targets[:, 1:]
    logps_R = _token_logps(model.get_output_embeddings(), states_BTD[targets], input_ids[:, 1:][targets])
    # Placed back into rows and summed along them: the same result each time, unlike index_add on a GPU.
    logps_BT = torch.zeros(targets.shape, dtype=torch.float64, device=logps_R.device)
    logps_BT = logps_BT.masked_scatter(targets, logps_R.double())
    return logps_BT.sum(-1).view(leading), targets.sum(-1).view(leading)


def _token_logps(head: Any, states_RD: Tensor, targets_R: Tensor) -> Tensor:
    """Log-probability of each target, (R,); a large vocabulary's logits are made, and made again, a part at a time."""
    rows = max(1, MAX_LOGITS // head.weight.shape[0])
    if len(states_RD) <= rows:
        return _logps_of_part(head, states_RD, targets_R)
    parts = zip(states_RD.split(rows), targets_R.split(rows), strict=True)
    return torch.cat([checkpoint(_logps_of_part, head, *part, use_reentrant=False) for part in parts])


def _logps_of_part(head: Any, states_RD: Tensor, targets_R: Tensor) -> Tensor:
    logits_RV = head(states_RD)
    if logits_RV.dtype != torch.float64:
        logits_RV = logits_RV.float()
    return -F.cross_entropy(logits_RV, targets_R, reduction="none")


@torch.no_grad()
def check_head(model: Any) -> None:
    """Refuses a model whose logits are more than its output embedding applied to its last hidden states.

    Soft-capped, scaled or shifted logits (Gemma 2, Cohere, Granite, ...) would make every log-probability here wrong
    without a sign of it. No list of architectures: two tokens are run with a spy on the output embedding, which reads
    what goes in and replaces what comes out.

    Raises:
        UserError: naming the class of the model, and what it does otherwise.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"{type(model).__name__} has no output embedding; train a causal language model.")
    device = next(model.parameters()).device
    input_ids = torch.tensor([[0, 1]], device=device)
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    seen: dict[str, Tensor] = {}

    def spy(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["input"] = args[0]
        # Values as large as logits get, where a soft cap bends them.
        seen["output"] = torch.linspace(-100, 100, output.numel(), device=device).view(output.shape).to(output.dtype)
        return seen["output"]

    was_training = model.training
    model.eval()
    handle = head.register_forward_hook(spy)
    try:
        expected = hidden_states(model, input_ids, mask)
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    finally:
        handle.remove()
        model.train(was_training)
    if (
        "input" not in seen
        or seen["input"].shape != expected.shape
        or not torch.allclose(seen["input"], expected, equal_nan=True)
    ):
        raise UserError(
            f"{type(model).__name__} changes its hidden states before the output embedding. Log-probabilities are "
            "computed from the hidden states here and would be wrong; use a model without that (Llama, Mistral, "
            "Qwen, GPT-NeoX, GPT-2 and GPT-J are tested)."
        )
    if not torch.equal(logits.to(seen["output"].dtype), seen["output"]):
        raise UserError(
            f"{type(model).__name__} changes its logits after the output embedding (a soft cap, a scale or a shift). "
            "Log-probabilities are computed from the embedding's output here and would be wrong; use a model without "
            "that (Llama, Mistral, Qwen, GPT-NeoX, GPT-2 and GPT-J are tested)."
        )
