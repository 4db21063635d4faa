"""Log-probabilities of target tokens under a causal language model.

Policy, reference and evaluation share one path: hidden states of all positions, the output embedding only at positions
that predict a target (about a third in preference data), float32 softmax, float64 sum over the sequence. Summing
hundreds of token log-probabilities in float32 has an error of 1e-3 nats, 25 times that of all other rounding.

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

# Logits held at a time. CPU: 256 MiB of float32. GPU: 2 GiB of bfloat16, which fits a micro-batch of 8,192 positions
# at a vocabulary of 131,072. Then the backward pass does not recompute the matrix product, and the weight's gradient is
# accumulated once, not part by part with a read and write of all of it.
MAX_LOGITS = {"cpu": 1 << 26, "cuda": 1 << 30}
ROW_TILE = 128  # larger parts are multiples of it, because a GPU tiles matrix products


def autocast_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype that `model.autocast` names."""
    return None if name is None else {"bfloat16": torch.bfloat16}[name]


def hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the last hidden states, before the output embedding: (B, T) tokens and right-padded mask -> (B, T, D).

    Positions count real tokens from 0. Padding repeats the last position, because a learned position table may have no
    further entries.
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
        model: a transformers causal LM that passes `check_head` and, for packed batches, `use_packed_attention`.
        batch: a micro-batch of `BatchLoader`, packed (see `collate_packed`) or padded:
            input_ids: (..., T) int64, right-padded.
            attention_mask: (..., T) bool, True at real tokens.
            response_mask: (..., T) bool, True where the token is a target. Position 0 is never a target, whatever the
                mask says, because nothing before it predicts it.
        autocast: dtype of the matrix products if it differs from the weights. The autocast context ends with this call,
            because it caches cast weights, which must not outlive an optimizer step.
        add_to_grad: for a packed batch, the backward pass (it must be `backward()`) adds the gradients of both
            embeddings to `.grad` in place; see `trainers.kernels.shortcuts`.
        agreements: also sum log(sum over the vocabulary of p^2), the log-probability that two samples agree.

    Returns:
        log-probabilities (float64, nats) and numbers of target tokens (int64); on request agreements, shaped like
        log-probabilities. Packed: (B,) for one response per row, (B, 2) for two. Padded: the leading dimensions (...).
    """
    with torch.autocast(batch["input_ids"].device.type, dtype=autocast, enabled=autocast is not None):
        run = partial(_packed_logps, add_to_grad=add_to_grad) if is_packed(batch) else _padded_logps
        return run(model, batch, agreements)


def _packed_logps(model: Any, batch: Mapping[str, Any], agreements: bool, add_to_grad: bool) -> tuple[Tensor, ...]:
    embedded_TD = embed(model.get_input_embeddings(), batch["input_ids"]) if add_to_grad else None
    states_TD = packed_states(model, batch, embedded_TD)
    # Why not states[sources]? Its backward pass sorts the indices; that of index_select just adds up rows.
    states_RD = states_TD.index_select(0, batch["sources"])
    head, cap = model.get_output_embeddings(), soft_cap(model)
    logps_R = token_logps(head, states_RD, batch["targets"], cap=cap, add_to_grad=add_to_grad)
    num_targets = batch["num_targets"]
    leading = num_targets.shape if num_targets.shape[1] > 1 else num_targets.shape[:1]

    def summed(values_R: Tensor) -> Tensor:
        # A sum per segment is deterministic, unlike index_add on a GPU.
        sums = torch.segment_reduce(values_R.double(), "sum", lengths=num_targets.flatten(), unsafe=True, initial=0.0)
        return sums.view(leading)

    more = (summed(log_agreements(head, states_RD, cap)),) if agreements else ()
    return summed(logps_R), num_targets.view(leading), *more


def _padded_logps(model: Any, batch: Mapping[str, Any], agreements: bool) -> tuple[Tensor, ...]:
    names = ("input_ids", "attention_mask", "response_mask")
    leading = batch["input_ids"].shape[:-1]
    input_ids, attention_mask, targets = (batch[name].flatten(0, -2) for name in names)
    # The state at t predicts token t + 1, so the last position predicts nothing and is not run.
    states_BTD = hidden_states(model, input_ids[:, :-1], attention_mask[:, :-1])
    targets = targets[:, 1:]
    head, cap = model.get_output_embeddings(), soft_cap(model)
    states_RD = states_BTD[targets]

    def summed(values_R: Tensor) -> Tensor:
        # Scattering into rows and summing along them is deterministic, unlike index_add on a GPU.
        values_BT = values_R.new_zeros(targets.shape, dtype=torch.float64)
        return values_BT.masked_scatter(targets, values_R.double()).sum(-1).view(leading)

    more = (summed(log_agreements(head, states_RD, cap)),) if agreements else ()
    logps_R = token_logps(head, states_RD, input_ids[:, 1:][targets], cap=cap)
    return summed(logps_R), targets.sum(-1).view(leading), *more


def soft_cap(model: Any) -> float | None:
    """Return the soft cap c of a model whose logits are c tanh(logits / c), such as Gemma 2; None for others."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def token_logps(
    head: Any, states_RD: Tensor, targets_R: Tensor, *, cap: float | None = None, add_to_grad: bool = False
) -> Tensor:
    """Return the log-softmax of head(states) at each row's target, (R,): float32, or float64 if the states are.

    `cap`: see `soft_cap`. `add_to_grad`: see `trainers.kernels.shortcuts`.
    """
    weight, bias = head.weight, head.bias
    device = states_RD.device.type
    if torch.is_autocast_enabled(device):
        states_RD, weight = (x.to(torch.get_autocast_dtype(device)) for x in (states_RD, weight))
    states_RD = states_RD.to(weight.dtype)  # some models keep their head in float32
    with torch.autocast(device, enabled=False):
        if cap is not None:
            # Checkpointed in parts: autograd keeps copies of the logits for one part at a time, recomputed in backward.
            parts = _parts(states_RD, targets_R, weight)
            return torch.cat(
                [checkpoint(_capped_logps, states, weight, bias, t, cap, use_reentrant=False) for states, t in parts]
            )
        return _TokenLogps.apply(states_RD, weight, bias, targets_R, torch.is_grad_enabled(), add_to_grad)


@torch.no_grad()
def log_agreements(head: Any, states_RD: Tensor, cap: float | None) -> Tensor:
    """Return log(sum over the vocabulary of p^2) of each row, (R,); it costs another product with the head."""
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
    """Apply a soft cap to logits; None leaves them unchanged."""
    return logits if cap is None else (logits / cap).tanh() * cap


class Softmax(NamedTuple):
    """The softmax of some rows, in the form that the backward pass needs, which depends on the device."""

    buffer_RV: Tensor
    normaliser_R1: Tensor
    logp_R: Tensor  # at the targets


class _TokenLogps(torch.autograd.Function):
    """The log-softmax of h W^T + b at the targets, without the copies of the logits that autograd would keep.

    At most MAX_LOGITS logits exist at a time. If all rows fit, their logits are kept for the backward pass, which
    overwrites them with their gradient; otherwise it recomputes them part by part. With p = softmax(logits):

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
        kept, ctx.kept = ctx.kept, []  # overwritten below, so a second backward pass must recompute them
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
    """Split (states, targets) into parts of as many rows as MAX_LOGITS allows."""
    rows = max(1, MAX_LOGITS[states_RD.device.type] // len(weight_VD))
    if rows > ROW_TILE:
        rows -= rows % ROW_TILE
    return list(zip(states_RD.split(rows), targets_R.split(rows), strict=True))


def _softmax(states_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_R: Tensor) -> Softmax:
    # Align the rows of the buffer to 64 values: a GPU's matrix products are slow on unaligned rows.
    stride = -(-len(weight_VD) // 64) * 64
    logits_RV = states_RD.new_empty(len(states_RD), stride)[:, : len(weight_VD)]
    torch.mm(states_RD, weight_VD.T, out=logits_RV)
    if logits_RV.is_cuda:
        return Softmax(logits_RV, *_compiled(_normalise)(logits_RV, bias_V, targets_R))
    return _exponentials(logits_RV, bias_V, targets_R)


def _logits_gradient(softmax: Softmax, bias_V: Tensor | None, targets_R: Tensor, grad_R1: Tensor) -> Tensor:
    """Return the gradient of the logits, computed in place in the buffer."""
    buffer, normaliser, _ = softmax
    if buffer.is_cuda:
        _compiled(_overwrite_by_gradient)(buffer, bias_V, normaliser, targets_R, grad_R1)
        return buffer
    grad_R1 = grad_R1.to(buffer.dtype)
    return buffer.mul_(-grad_R1 / normaliser).scatter_add_(1, targets_R[:, None], grad_R1)


def _exponentials(logits_RV: Tensor, bias_V: Tensor | None, targets_R: Tensor) -> Softmax:
    """Keep exp(logits - largest) and its sums: exponentials are slow on a CPU, so compute them only once."""
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
    """Compile for dynamic sizes, which fuses the passes over the logits into one that reads them in their dtype.

    The generated code must not depend on the first size, because a resumed run starts with another size. By default,
    Inductor splits the reductions of a first batch of few rows, and keeps that for the full micro-batches after it.
    """
    options: dict[str, Any] = {"split_reductions": False, "deterministic": True}
    return torch.compile(function, dynamic=True, fullgraph=True, options=options)


def _normalise(logits_RV: Tensor, bias_V: Tensor | None, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(sum(exp(logits))), (R, 1), and the log-probabilities of the targets, (R,).

    On a GPU the logits are kept, not exponentials: the pass is memory-bound, and float32 would be twice the bytes.
    """
    logits = _wide(logits_RV, bias_V)
    largest = logits.amax(dim=1, keepdim=True)
    log_sum = (logits - largest).exp().sum(dim=1, keepdim=True).log()
    target = logits.gather(1, targets_R[:, None]) - largest  # in this order: log_sum would lose digits to a big logit
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
