"""Check that a model's logits are what `logps.py` computes: the output embedding applied to the last hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config.errors import UserError
from trainers.kernels.logps import capped, hidden_states, soft_cap
from trainers.kernels.self_check import PROBE_ERRORS


@torch.no_grad()
def check_head(model: Any) -> None:
    """Refuse a model whose logits are not its output embedding applied to its last hidden states.

    Scaled or shifted logits (Cohere, Granite, ...) would silently make all log-probabilities wrong. A soft cap in the
    config is supported. Why not a list of architectures? It would become outdated. Instead, two tokens are run with a
    hook on the output embedding that reads its input and replaces its output.

    Raises:
        UserError: with the class of the model, and what it does differently.
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
        seen["difference"] = output - F.linear(args[0], module.weight, module.bias)  # type: ignore[arg-type]  # a head
        # The range of real logits, in which a soft cap shows.
        seen["output"] = torch.linspace(-100, 100, output.numel(), device=device).view(output.shape).to(output.dtype)
        return seen["output"]

    handle = head.register_forward_hook(spy)
    try:
        with _in_evaluation(model):
            expected = hidden_states(model, input_ids, mask)
            with_another = hidden_states(model, input_ids + input_ids, mask)  # tokens 0 and 2
            logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    except PROBE_ERRORS as error:
        raise UserError(
            f"{type(model).__name__} cannot be run on tokens, mask and positions only ({type(error).__name__}: "
            f"{error}); train a causal language model."
        ) from error
    finally:
        handle.remove()
    problem, cap = None, soft_cap(model)
    if _differ(with_another[:, 0], expected[:, 0]):
        problem = "lets a token see the one behind it, as an encoder does"
    elif "input" in seen and seen["difference"].abs().max() > 1e-2 * expected.abs().max():
        problem = "has an output embedding that is more than a matrix and a bias"
    elif "input" not in seen or not _equal(seen["input"], expected):
        problem = "changes its hidden states before the output embedding"
    elif not torch.equal(logits.to(seen["output"].dtype), capped(seen["output"], cap)):
        problem = "changes its logits after the output embedding (a scale, a shift, or a soft cap not in its config)"
    if problem is not None:
        raise UserError(
            f"{type(model).__name__} {problem}. Log-probabilities are computed here from the last hidden states and "
            "that embedding only, and would be wrong; use another model (Llama, Mistral, Qwen, GPT-NeoX, GPT-2 and "
            "GPT-J are tested)."
        )


@torch.no_grad()
def check_training(model: Any) -> None:
    """Refuse a model that computes otherwise in training than in evaluation: a router with noise, batch norms.

    A reference is computed in evaluation, and a loss would compare it with something else.

    Raises:
        UserError: with the class of the model.
    """
    input_ids = torch.arange(16, device=next(model.parameters()).device)[None]
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    with _in_evaluation(model):
        expected = hidden_states(model, input_ids, mask)
        found = hidden_states(model.train(), input_ids, mask)
    if _differ(found, expected):
        raise UserError(
            f"{type(model).__name__} computes other states in training than in evaluation, where the reference is "
            "computed: by a router that adds noise, say. Use a model without that."
        )


@contextmanager
def _in_evaluation(model: Any) -> Iterator[None]:
    """Evaluate with an attention that runs on any device: the model is on the CPU still, whatever its kernel."""
    was_training, attention = model.training, model.config._attn_implementation
    model.eval()
    if attention not in ("sdpa", "eager"):
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.train(was_training)
        if attention not in ("sdpa", "eager"):
            model.set_attn_implementation(attention)


def _differ(found: Tensor, expected: Tensor) -> bool:
    """Tell whether states differ by more than rounding: experts share matrix products."""
    moved = (found - expected).norm() / expected.norm()
    return bool(moved > (1e-3 if expected.dtype.itemsize > 2 else 0.1))


def _equal(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found.to(expected.dtype), expected, equal_nan=True)
