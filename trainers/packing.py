"""Rows of unequal length without padding: which rows share a micro-batch, and the flat tensors that they become.

The sequences of a pair, [prompt, chosen] and [prompt, rejected], have their prompt in common, so a packed row holds it
once: [prompt | chosen | rejected]. Positions of the rejected response go on from the prompt's, and `trainers.attention`
keeps the two responses apart. The last token of a response predicts nothing and is seen by nothing: it is a target,
but not an input.

Letters: B = rows of a micro-batch, S = segments of a row (2: prompt and response; 3: prompt, chosen and rejected),
T = token positions of the micro-batch, R = its target tokens.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDict
from torch import Tensor

from trainers.token_store import TokenStore


def default_max_tokens(device: torch.device) -> int:
    """Positions of a micro-batch where none are set.

    A CPU is fastest while the activations of a layer fit its cache; a GPU needs more rows to fill its matrix units.
    """
    return 8192 if device.type == "cuda" else 1024


def input_lengths(lengths: Tensor) -> Tensor:
    """Positions that each segment of a row takes: (..., S) tokens -> (..., S); responses without their last token."""
    return torch.cat([lengths[..., :1], (lengths[..., 1:] - 1).clamp(min=0)], dim=-1)


def balanced_shares(sizes: Sequence[int], num_shares: int) -> list[list[int]]:
    """Indices of each share, so that the sums of `sizes` differ little: the largest goes where the least is so far.

    Args:
        sizes: positions of each row.
        num_shares: shares to make; some are empty where there are fewer rows.

    Returns:
        `num_shares` lists of indices into `sizes`, each by descending size. Equal sizes keep their order, so that the
        result depends on nothing but the arguments.
    """
    heap = [(0, share) for share in range(num_shares)]
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        filled, share = heapq.heappop(heap)
        shares[share].append(i)
        heapq.heappush(heap, (filled + sizes[i], share))
    return shares


def best_fit(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Indices of each bin: every row, largest first, goes into the fullest bin that has room for it.

    Args:
        sizes: positions of each row.
        limit: positions that no bin exceeds, unless a single row does.
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, bin), ascending
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = bisect.bisect_left(free, (sizes[i], -1))
        room, chosen = free.pop(place) if place < len(free) else (limit, len(bins))
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(i)
        bisect.insort(free, (room - sizes[i], chosen))
    return bins


def pack_rows(sizes: Sequence[int], *, limit: int, at_least: int) -> list[list[int]]:
    """Indices of each micro-batch: best fit, or `at_least` balanced ones (fewer where there are fewer rows)."""
    bins = best_fit(sizes, limit)
    wanted = min(at_least, len(sizes))
    return bins if len(bins) >= wanted else balanced_shares(sizes, wanted)


def collate_packed(store: TokenStore, rows: Tensor, columns: Mapping[str, Tensor]) -> TensorDict:
    """The flat tensors of B rows, one behind the other.

    For a row of prompt [5, 6], chosen [7, 8, 2], rejected [9, 2]:

        input_ids       5  6  7  8  9
        position_ids    0  1  2  3  2
        lengths         2, 2, 1            of prompt, chosen and rejected, as inputs
        sources         1  2  3  1  4      each response's first token is predicted from the prompt's last
        targets         7  8  2  9  2
        num_targets     3, 2

    Args:
        store: N rows of S segments.
        rows: (B,) row numbers.
        columns: per-row values (N, ...) by name.

    Returns:
        input_ids, position_ids (T,), lengths (B, S), sources, targets (R,), num_targets (B, S - 1), all int64, and
        (B,) `row` and the columns. It has no batch dimension: its tensors count different things.
    """
    prompt_lengths, *response_lengths = store.lengths[rows].long().unbind(1)
    input_ids, position_ids, sources, targets = [], [], [], []
    offset = 0
    for row in rows.tolist():
        prompt, *responses = store.row(row)
        start, first = len(prompt), min(len(prompt), 1)
        input_ids.append(prompt)
        position_ids.append(torch.arange(start))
        last_of_prompt = torch.arange(offset + start - first, offset + start)
        offset += start
        for response in responses:
            num_inputs = max(len(response) - 1, 0)
            input_ids.append(response[:num_inputs])
            position_ids.append(torch.arange(start, start + num_inputs))
            # Without a prompt nothing predicts the first token, and it is no target.
            sources += [last_of_prompt[: len(response)], torch.arange(offset, offset + num_inputs)]
            targets.append(response[1 - first :])
            offset += num_inputs
    has_prompt = (prompt_lengths > 0).long()
    num_targets = torch.stack([(n - 1 + has_prompt).clamp(min=0) for n in response_lengths], dim=1)
    return TensorDict(
        {
            "input_ids": torch.cat(input_ids).long(),
            "position_ids": torch.cat(position_ids),
            "lengths": input_lengths(store.lengths[rows].long()),
            "sources": torch.cat(sources),
            "targets": torch.cat(targets).long(),
            "num_targets": num_targets,
            **{name: column[rows] for name, column in columns.items()},
            "row": rows,
        },
        batch_size=[],
    )


def is_packed(batch: Mapping[str, Tensor]) -> bool:
    """Whether a micro-batch is packed (flat), rather than padded."""
    return "sources" in batch.keys()  # noqa: SIM118  # a TensorDict iterates over rows, not names


def num_tokens(batch: TensorDict) -> Tensor:
    """Tokens of all sequences, a shared prompt counted in each: a scalar, the same packed and padded."""
    if not is_packed(batch):
        return batch["attention_mask"].sum()
    # A response's tokens are its targets (all but the first one of a row without prompt).
    num_responses = batch["num_targets"].shape[1]
    return num_responses * batch["lengths"][:, 0].sum() + batch["num_targets"].sum()


def num_positions(batch: TensorDict) -> int:
    """Positions that the model is run on."""
    return batch["input_ids"].numel()


def num_target_tokens(batch: TensorDict) -> Tensor:
    """Tokens whose log-probabilities are summed: a scalar, int64."""
    return batch["num_targets"].sum() if is_packed(batch) else batch["response_mask"][..., 1:].sum()


def longest_sequence(batch: TensorDict) -> int:
    """Tokens of the longest sequence; waits for the device where the batch is packed."""
    if not is_packed(batch):
        return batch["input_ids"].shape[-1]
    lengths = batch["lengths"]
    return int((lengths[:, 0] + lengths[:, 1:].amax(1)).max()) + 1
