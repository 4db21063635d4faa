"""Packing rows of unequal length without padding: which rows share a micro-batch, and its flat tensors.

The sequences of a pair, [prompt, chosen] and [prompt, rejected], share their prompt, so a packed row contains it once:
[prompt | chosen | rejected]. The positions of the rejected response continue from the prompt, and
`trainers.kernels.attention` hides the two responses from each other. Rows whose prompts begin alike share that prefix
(`trainers.data.prefixes`) in the same way: it is stored once, before the first of them, and each row holds the rest.
The last token of a response predicts nothing and no token sees it, so it is a target but not an input.

Letters: B = rows of a micro-batch, S = segments of a row (2: prompt and response; 3: prompt, chosen and rejected),
T = token positions of the micro-batch, R = its target tokens.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from trainers.data.layout import PackedLayout
from trainers.data.prefixes import Prefixes, no_prefixes
from trainers.data.token_store import TokenStore, split_given


def default_max_tokens(device: torch.device) -> int:
    """Return the default limit of positions in a micro-batch.

    A CPU is fastest while the activations of a layer fit its cache; a GPU needs more rows to fill its matrix units.
    """
    return 8192 if device.type == "cuda" else 1024


def input_lengths(lengths: Tensor) -> Tensor:
    """Return the positions of each segment: (..., S) tokens -> (..., S). The last token of a response is no input."""
    return torch.cat([lengths[..., :1], (lengths[..., 1:] - 1).clamp(min=0)], dim=-1)


def balanced_shares(sizes: Sequence[int], num_shares: int) -> list[list[int]]:
    """Distribute indices over shares of similar size: the largest remaining one goes to the smallest share so far.

    Args:
        sizes: positions of each row.
        num_shares: number of shares; some are empty if there are fewer rows.

    Returns:
        `num_shares` lists of indices into `sizes`, each by descending size. Equal sizes keep their order, so that the
        result is deterministic.
    """
    heap = [(0, share) for share in range(num_shares)]
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        filled, share = heapq.heappop(heap)
        shares[share].append(i)
        heapq.heappush(heap, (filled + sizes[i], share))
    return shares


def best_fit(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Bin packing by best fit decreasing: each row, largest first, goes into the fullest bin that has room for it.

    Args:
        sizes: positions of each row.
        limit: positions per bin; only a single longer row exceeds it.
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


class RowSizes(NamedTuple):
    """The positions that rows add to a micro-batch."""

    own: list[int]  # positions of each row, without those of its prefix
    prefixes: list[int]  # positions of the prefix of its family
    families: list[int]

    @classmethod
    def of(cls, positions: Tensor, prefixes: Prefixes) -> RowSizes:
        """Take the positions of each row, prefix included, (B,)."""
        return cls((positions - prefixes.lengths).tolist(), prefixes.lengths.tolist(), prefixes.families.tolist())

    def select(self, rows: list[int]) -> RowSizes:
        """Return the sizes of some of the rows."""
        return RowSizes(*([values[i] for i in rows] for values in self))

    def positions(self, rows: list[int]) -> int:
        """Count the positions of a micro-batch of these rows."""
        prefixes = {self.families[i]: self.prefixes[i] for i in rows}
        return sum(self.own[i] for i in rows) + sum(prefixes.values())


def pack_rows(sizes: RowSizes, *, limit: int, at_least: int) -> list[list[int]]:
    """Distribute row indices over micro-batches: as few as best fit needs, and of similar size.

    First each family is packed by itself, so that few micro-batches repeat its prefix; then families that leave room
    are combined. Finally the rows are spread evenly over the same number of micro-batches, if that keeps the limit and
    repeats no more prefixes: equal sizes need less memory than full micro-batches and a small last one.

    Args:
        sizes: of B rows.
        limit: positions per micro-batch; only a single longer row exceeds it.
        at_least: minimum number of micro-batches; fewer if there are fewer rows.
    """
    fitted = _fit_families(sizes, limit)
    needed = sum(map(sizes.positions, fitted))
    num_bins = max(len(fitted), min(at_least, len(sizes.own)))
    while True:
        even = [part for part in balanced_shares(sizes.own, num_bins) if part]
        filled = [sizes.positions(part) for part in even]
        fits = all(size <= limit or len(part) == 1 for size, part in zip(filled, even, strict=True))
        if fits and (num_bins > len(fitted) or sum(filled) <= needed):
            return even
        if num_bins == len(fitted):
            return fitted
        num_bins += 1


def _fit_families(sizes: RowSizes, limit: int) -> list[list[int]]:
    """Pack each family by itself, then pack the resulting parts together."""
    families: dict[int, list[int]] = {}
    for i, family in enumerate(sizes.families):
        families.setdefault(family, []).append(i)
    parts = []
    for members in families.values():
        room = limit - sizes.prefixes[members[0]]
        parts += [[members[i] for i in part] for part in best_fit([sizes.own[i] for i in members], room)]
    together = best_fit([sizes.positions(part) for part in parts], limit)
    return [list(chain.from_iterable(parts[i] for i in numbers)) for numbers in together]


def collate_packed(
    store: TokenStore, rows: Tensor, columns: Mapping[str, Tensor], prefixes: Prefixes | None = None
) -> TensorDict:
    """Return the flat tensors of B concatenated rows.

    For a row of prompt [5, 6], chosen [7, 8, 2], rejected [9, 2]:

        input_ids       5  6  7  8  9
        position_ids    0  1  2  3  2
        sources         1  2  3  1  4      the last prompt token predicts the first token of each response
        needed          1  2  3  4         the distinct sources
        targets         7  8  2  9  2
        num_targets     3, 2
        num_given       0, 0               response tokens that are not targets

    Args:
        store: N rows of S segments.
        rows: (B,) row numbers.
        columns: per-row values (N, ...) by name.
        prefixes: shared by these rows (`Prefixes.select` from a larger batch); None: they share nothing.

    Returns:
        input_ids, position_ids (T,), sources, targets (R,), needed, num_targets, num_given (B, S - 1), all int64; (B,)
        `row` and the columns; `layout`, a `PackedLayout`, which stays on the host when the rest is moved to a device.
        The rows of a family are adjacent, with their prefix before the first; families are ordered by first row. The
        TensorDict has no batch dimension, because its tensors count different things.
    """
    families, shared = no_prefixes(len(rows)) if prefixes is None else prefixes
    order = families.argsort(stable=True)
    rows, families, shared = rows[order], families[order], shared[order]
    is_first = families.diff(prepend=torch.tensor([-1])) != 0
    flat, num_given = _flat_rows(store, rows, shared * ~is_first)
    lengths = store.lengths[rows].long()
    targets_of = (lengths[:, 1:] - (lengths[:, :1] == 0).long()).clamp(min=0) - num_given
    first_rows = is_first.nonzero().squeeze(1)[is_first.cumsum(0) - 1]
    own_lengths = torch.cat([lengths[:, :1] - shared[:, None], lengths[:, 1:]], dim=1)
    layout = PackedLayout(input_lengths(own_lengths), shared * is_first, first_rows)
    if torch.cuda.is_available():
        layout.seen_keys()  # computed and kept here, in the prefetch thread, not in the training step
    return TensorDict(
        {
            **flat,
            "needed": flat["sources"].unique(),
            "num_targets": targets_of,
            "num_given": num_given,
            "layout": layout,
            **{name: column[rows] for name, column in columns.items()},
            "row": rows,
        },
        batch_size=[],
    )


def _flat_rows(store: TokenStore, rows: Tensor, skipped_tokens: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Concatenate rows (B,), each prompt without its first `skipped_tokens` (B,); see `collate_packed`.

    Also return how many tokens of each response are given, (B, S - 1): these are inputs but not targets.
    """
    input_ids, position_ids, sources, targets = [], [], [], []
    num_given = torch.zeros(len(rows), store.num_segments - 1, dtype=torch.int64)
    offset = 0
    for b, (row, skipped) in enumerate(zip(rows.tolist(), skipped_tokens.tolist(), strict=True)):
        prompt, *responses = store.row(row)
        start, last = len(prompt), min(len(prompt), 1)
        input_ids.append(prompt[skipped:])
        position_ids.append(torch.arange(skipped, start))
        offset += start - skipped
        last_of_prompt = torch.arange(offset - last, offset)
        for s, stored in enumerate(responses):
            response, is_given = split_given(stored)
            num_inputs = max(len(response) - 1, 0)
            input_ids.append(response[:num_inputs])
            position_ids.append(torch.arange(start, start + num_inputs))
            # Without a prompt nothing predicts the first token, so it is not a target.
            places = torch.cat([last_of_prompt[: len(response)], torch.arange(offset, offset + num_inputs)])
            is_target = ~is_given[1 - last :]
            sources.append(places[is_target])
            targets.append(response[1 - last :][is_target])
            num_given[b, s] = is_given.sum()
            offset += num_inputs
    flat = {
        "input_ids": torch.cat(input_ids).long(),
        "position_ids": torch.cat(position_ids),
        "sources": torch.cat(sources),
        "targets": torch.cat(targets).long(),
    }
    return flat, num_given


def is_packed(batch: Mapping[str, Any]) -> bool:
    """Return whether a micro-batch is packed (flat) rather than padded."""
    return "sources" in batch.keys()  # noqa: SIM118  # a TensorDict iterates over rows, not names


def num_tokens(batch: TensorDict) -> Tensor:
    """Count the tokens of all sequences, a shared prompt in each of them: a scalar, equal for packed and padded."""
    if not is_packed(batch):
        return batch["attention_mask"].sum()
    # The tokens of a response are its targets and its given tokens (without a prompt, the first is neither).
    layout, num_responses = batch["layout"], batch["num_targets"].shape[1]
    prompts = layout.lengths[layout.prefix_rows, 0] + layout.lengths[:, 1]
    return num_responses * prompts.sum() + batch["num_targets"].sum() + batch["num_given"].sum()


def num_positions(batch: TensorDict) -> int:
    """Count the positions that the model is run on, padding included."""
    return batch["input_ids"].numel()


def num_target_tokens(batch: TensorDict) -> Tensor:
    """Count the target tokens, whose log-probabilities are summed: a scalar, int64."""
    return batch["num_targets"].sum() if is_packed(batch) else batch["response_mask"][..., 1:].sum()


def longest_sequence(batch: TensorDict) -> int:
    """Return the number of tokens of the longest sequence."""
    # + 1: the last token of a response is not an input.
    return batch["layout"].longest_sequence + 1 if is_packed(batch) else batch["input_ids"].shape[-1]
