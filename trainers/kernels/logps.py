"""Log-probabilities of target tokens under a causal language model.

One path for policy, reference and evaluation: hidden states of all positions, the output embedding on the rows that
predict a target (about a third of them in preference data), float32 softmax, float64 sum over a sequence. A sum of
hundreds of token log-probabilities in float32 is off by 1e-3 nats, 25 times as much as all other rounding.

Letters: B = rows, S = segments of a row, T = positions, D = width, V = vocabulary, R = target tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from trainers.data.packing import is_packed
from trainers.kernels.attention import packed_states
from trainers.kernels.shortcuts import embed, gradient_so_far

# Held at once. On a CPU 256 MiB of float32. On a GPU 2 GiB of bfloat16, which hold all rows of a micro-batch of 8,192
# positions at a vocabulary of 131,072: their matrix product is then made once, not again in the backward pass, and the
# gradient of the weight is added up once, not by parts that each read and write all of it.
MAX_LOGITS = {"cpu": 1 << 26, "cuda": 1 << 30}
ROW_TILE = 128  # parts of more rows than this are multiples of it, which the matrix products of a GPU are cut into


def autocast_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype that `model.autocast` names."""
    return None if name is None else {"bfloat16": torch.bfloat16}[name]


def hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the states that the output embedding reads: (B, T) tokens, (B, T) right-padded mask -> (B, T, D).

    Positions count the real tokens from 0. Padding repeats the last one, because a model with a table of positions may
    have no more.
    """
    position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return model.base_model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state


def sequence_logps(
    model: Any, batch: Mapping[str, Any], autocast: torch.dtype | None = None, *, add_to_grad: bool = False,
    agreements: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Sum log p(token | all before it) over the target tokens of each sequence.

    Args:
        model: a causal LM of transformers that `check_head` accepts and, for packed batches, `use_packed_attention`.
        batch: a micro-batch of `BatchLoader`, packed (see `collate_packed`) or padded:
            input_ids: (..., T) int64, right-padded.
            attention_mask: (..., T) bool, True at real tokens.
            response_mask: (..., T) bool, True where the token is a target. A token at position 0 has nothing before
                it that could predict it, and is not a target whatever the mask says.
        autocast: dtype of the matrix products where it is not that of the weights. Entered here and left again, so
            that no weight that was cast before an optimizer step is used after it.
        add_to_grad: the backward pass, which must be `backward()`, adds the gradients of both embeddings to `.grad` by
            itself where the batch is packed; see `trainers.kernels.shortcuts`.
        agreements: also sum log(sum over the vocabulary of p^2): how probable two samples of a token are one.

    Returns:
        log-probabilities and numbers of target tokens: float64 in nats, and int64. Packed: (B,) for one response a
        row, (B, 2) for two. Padded: of the leading dimensions (...). If asked for, agreements like log-probabilities.
    """
    with torch.autocast(batch["input_ids"].device.type, dtype=autocast, enabled=autocast is not None):
        run = partial(_packed_logps, add_to_grad=add_to_grad) if is_packed(batch) else _padded_logps
        return run(model, batch, agreements)


def _packed_logps(model: Any, batch: Mapping[str, Any], agreements: bool, add_to_grad: bool) -> tuple[Tensor, ...]:
    embedded_TD = embed(model.get_input_embeddings(), batch["input_ids"]) if add_to_grad else None
    states_TD = packed_states(model, batch, embedded_TD)
    # index_select: its backward pass adds up rows without sorting their numbers, as that of states[sources] does.
    states_RD = states_TD.index_select(0, batch["sources"])
    head, cap = model.get_output_embeddings(), soft_cap(model)
    logps_R = token_logps(head, states_RD, batch["targets"], cap=cap, add_to_grad=add_to_grad)
    num_targets = batch["num_targets"]
    leading = num_targets.shape if num_targets.shape[1] > 1 else num_targets.shape[:1]

    def summed(values_R: Tensor) -> Tensor:
        # Summed segment by segment: the same result each time, unlike index_add on a GPU.
        sums = torch.segment_reduce(values_R.double(), "sum", lengths=num_targets.flatten(), unsafe=True, initial=0.0)
        return sums.view(leading)

    more = (summed(log_agreements(head, states_RD, cap)),) if agreements else ()
    return summed(logps_R), num_targets.view(leading), *more


def _padded_logps(model: Any, batch: Mapping[str, Any], agreements: bool) -> tuple[Tensor, ...]:
    names = ("input_ids", "attention_mask", "response_mask")
    leading = batch["input_ids"].shape[:-1]
    input_ids, attention_mask, targets = (batch[name].flatten(0, -2) for name in names)
    # The state at t predicts token t + 1: the last position predicts nothing and is not run.
    states_BTD = hidden_states(model, input_ids[:, :-1], attention_mask[:, :-1])
    targets = targets[:, 1:]
    head, cap = model.get_output_embeddings(), soft_cap(model)
    states_RD = states_BTD[targets]

    def summed(values_R: Tensor) -> Tensor:
        # Placed back into rows and summed along them: the same result each time, unlike index_add on a GPU.
        values_BT = values_R.new_zeros(targets.shape, dtype=torch.float64)
        return values_BT.masked_scatter(targets, values_R.double()).sum(-1).view(leading)

    more = (summed(log_agreements(head, states_RD, cap)),) if agreements else ()
    logps_R = token_logps(head, states_RD, input_ids[:, 1:][targets], cap=cap)
    return summed(logps_R), targets.sum(-1).view(leading), *more


def soft_cap(model: Any) -> float | None:
    """Return the c of logits that are c tanh(logits / c), as Gemma 2 has them; None of others."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def token_logps(
    head: Any, states_RD: Tensor, targets_R: Tensor, *, cap: float | None = None, add_to_grad: bool = False
) -> Tensor:
    """Return the log-softmax of head(states) at each row's target, (R,): float32, or float64 where the states are.

    `cap`: see `soft_cap`. `add_to_grad`: see `trainers.kernels.shortcuts`.
    """
    weight, bias = head.weight, head.bias
    device = states_RD.device.type
    if torch.is_autocast_enabled(device):
        states_RD, weight = (x.to(torch.get_autocast_dtype(device)) for x in (states_RD, weight))
    states_RD = states_RD.to(weight.dtype)  # some models keep their head in float32
    with torch.autocast(device, enabled=False):
        if cap is not None:
            # Autograd's copies of the logits are those of one part, which is computed again in the backward pass.
            parts = _parts(states_RD, targets_R, weight)
            return torch.cat(
                [checkpoint(_capped_logps, states, weight, bias, t, cap, use_reentrant=False) for states, t in parts]
            )
        return _TokenLogps.apply(states_RD, weight, bias, targets_R, torch.is_grad_enabled(), add_to_grad)


@torch.no_grad()
def log_agreements(head: Any, states_RD: Tensor, cap: float | None) -> Tensor:
    """Return log(sum over the vocabulary of p^2) of each row, (R,): another product with the head."""
    measure = _compiled(_log_agreement) if states_RD.is_cuda else _log_agreement
    parts = [states for states, _ in _parts(states_RD, states_RD, head.weight)]
    return torch.cat([measure(F.linear(states.to(head.weight.dtype), head.weight, head.bias), cap) for states in parts])


def _log_agreement(logits_RV: Tensor, cap: float | None) -> Tensor:
    logits = capped(_wide(logits_RV, None), cap)
    return (2 * logits).logsumexp(1) - 2 * logits.logsumexp(1)


def _capped_logps(states_RD: Tensor, weight: Tensor, bias_V: Tensor | None, targets_R: Tensor, cap: float) -> Tensor:
    logits_RV = _wide(states_RD @ weight.T, bias_V)
    return capped(logits_RV, cap).log_softmax(1).gather(1, targets_R[:, None]).squeeze(1)


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Bend logits to stay within the cap; as they are where it is None."""
    return logits if cap is None else (logits / cap).tanh() * cap


class Softmax(NamedTuple):
    """The softmax of some rows, as the backward pass needs it; which numbers these are depends on the device."""

    buffer_RV: Tensor
    normaliser_R1: Tensor
    logp_R: Tensor  # at the targets


class _TokenLogps(torch.autograd.Function):
    """The log-softmax of h W^T + b at the targets, without the copies of the logits that autograd would keep.

    At most MAX_LOGITS logits exist at once. Where those of all rows fit, they wait for the backward pass and are
    overwritten there by their gradient; more are made again, part by part. With p = softmax(logits):

        d logp / d logits = onehot(target) - p
    """

    @staticmethod
    def forward(
        ctx: Any, states_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_R: Tensor, needs_gradient: bool,
        add_to_grad: bool,
    ) -> Tensor:  # fmt: skip
        parts = _parts(states_RD, targets_R, weight_VD)
        kept, logps = [], []
        for states, targets in parts:
            softmax = _softmax(states, weight_VD, bias_V, targets)
            logps.append(softmax.logp_R)
            if needs_gradient and len(parts) == 1:
                kept.append(softmax)
        ctx.save_for_backward(states_RD, weight_VD, bias_V, targets_R)
        ctx.kept, ctx.add_to_grad = kept, add_to_grad
        return torch.cat(logps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor | None, ...]:
        states_RD, weight_VD, bias_V, targets_R = ctx.saved_tensors
        needs_states, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_states = torch.empty_like(states_RD) if needs_states else None
        so_far = gradient_so_far(weight_VD) if needs_weight and ctx.add_to_grad else None
        grad_weight = so_far
        grad_bias = torch.zeros_like(bias_V) if needs_bias else None
        kept, ctx.kept = ctx.kept, []  # overwritten below: a second backward pass makes them again
        start = 0
        for states, targets in _parts(states_RD, targets_R, weight_VD):
            part = slice(start, start + len(states))
            softmax = kept.pop() if kept else _softmax(states, weight_VD, bias_V, targets)
            grad_RV = _logits_gradient(softmax, bias_V, targets, grad_R[part, None])
            if grad_bias is not None:
                grad_bias += grad_RV.sum(0)
            grad_RV = grad_RV.to(states.dtype)
            if grad_states is not None:
                torch.mm(grad_RV, weight_VD, out=grad_states[part])
            if grad_weight is not None:
                grad_weight.addmm_(grad_RV.T, states)
            elif needs_weight:
                grad_weight = grad_RV.T @ states
            start += len(states)
        return grad_states, None if so_far is not None else grad_weight, grad_bias, None, None, None


def _parts(states_RD: Tensor, targets_R: Tensor, weight_VD: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Split (states, targets) into as many rows at a time as MAX_LOGITS allows."""
    rows = max(1, MAX_LOGITS[states_RD.device.type] // len(weight_VD))
    if rows > ROW_TILE:
        rows -= rows % ROW_TILE
    return list(zip(states_RD.split(rows), targets_R.split(rows), strict=True))


def _softmax(states_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_R: Tensor) -> Softmax:
    # Rows of the buffer start at multiples of 64 values: the matrix products of a GPU are slow where they do not.
    stride = -(-len(weight_VD) // 64) * 64
    logits_RV = states_RD.new_empty(len(states_RD), stride)[:, : len(weight_VD)]
    torch.mm(states_RD, weight_VD.T, out=logits_RV)
    if logits_RV.is_cuda:
        return Softmax(logits_RV, *_compiled(_normalise)(logits_RV, bias_V, targets_R))
    return _exponentials(logits_RV, bias_V, targets_R)


def _logits_gradient(softmax: Softmax, bias_V: Tensor | None, targets_R: Tensor, grad_R1: Tensor) -> Tensor:
    """Return the gradient of the logits, in place of the buffer."""
    buffer, normaliser, _ = softmax
    if buffer.is_cuda:
        _compiled(_overwrite_by_gradient)(buffer, bias_V, normaliser, targets_R, grad_R1)
        return buffer
    grad_R1 = grad_R1.to(buffer.dtype)
    return buffer.mul_(-grad_R1 / normaliser).scatter_add_(1, targets_R[:, None], grad_R1)


def _exponentials(logits_RV: Tensor, bias_V: Tensor | None, targets_R: Tensor) -> Softmax:
    """Keep exp(logits - largest) and its sums: a CPU computes exponentials slowly, and only once."""
    if logits_RV.dtype != torch.float64:
        logits_RV = logits_RV.float()
    if bias_V is not None:
        logits_RV += bias_V
    logits_RV -= logits_RV.amax(dim=1, keepdim=True)
    target_R1 = logits_RV.gather(1, targets_R[:, None])
    sum_R1 = logits_RV.exp_().sum(dim=1, keepdim=True)
    return Softmax(logits_RV, sum_R1, (target_R1 - sum_R1.log()).squeeze(1))


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile for all sizes, so that the passes over the logits become one, which reads them as they are.

    The same code, whatever size comes first. Inductor would split the sums of a few rows among programs, and keep that
    for the full micro-batches behind them; and a run that goes on after a stop begins with another size than it did.
    """
    options: dict[str, Any] = {"split_reductions": False, "deterministic": True}
    return torch.compile(function, dynamic=True, fullgraph=True, options=options)


def _normalise(logits_RV: Tensor, bias_V: Tensor | None, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(sum(exp(logits))), (R, 1), and the log-probabilities of the targets, (R,).

    A GPU keeps the logits: it waits for memory, and exponentials would be float32, with twice the bytes.
    """
    logits = _wide(logits_RV, bias_V)
    largest = logits.amax(dim=1, keepdim=True)
    log_sum = (logits - largest).exp().sum(dim=1, keepdim=True).log()
    target = logits.gather(1, targets_R[:, None]) - largest  # in this order: the largest may have few digits to spare
    return largest + log_sum, (target - log_sum).squeeze(1)


def _overwrite_by_gradient(
    logits_RV: Tensor, bias_V: Tensor | None, normaliser_R1: Tensor, targets_R: Tensor, grad_R1: Tensor
) -> None:
    probabilities = (_wide(logits_RV, bias_V) - normaliser_R1).exp()
    is_target = torch.arange(logits_RV.shape[1], device=logits_RV.device) == targets_R[:, None]
    logits_RV.copy_((is_target.to(probabilities.dtype) - probabilities) * grad_R1)


def _wide(logits_RV: Tensor, bias_V: Tensor | None) -> Tensor:
    logits = logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
    return logits if bias_V is None else logits + bias_V
