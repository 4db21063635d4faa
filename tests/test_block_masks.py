"""Which blocks of the scores are computed, from the segments of a layout, against masks written pair by pair."""

import random

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from trainers.data import layout as layout_module
from trainers.data.layout import PackedLayout
from trainers.kernels import attention
from trainers.kernels.attention import block_mask

EDGE = 8  # of a block here: small layouts then have many


def random_layout(draw: random.Random) -> tuple[PackedLayout, torch.Tensor, torch.Tensor]:
    """A layout with what the mask of all sequences is written from: (T, T) whether seen, and the distances."""
    segments = draw.choice([2, 3])
    shapes = [[draw.choice([0, draw.randint(1, 20)]) for _ in range(segments)] for _ in range(draw.randint(1, 6))]
    shapes[0][0] += 1  # never without a position
    before, holders, holder = [], [], 0
    for row in range(len(shapes)):
        new = draw.random() < 0.4
        holder = row if new or draw.random() < 0.3 else holder
        before.append(draw.randint(1, 30) if new else 0)
        holders.append(holder)
    layout = PackedLayout(torch.tensor(shapes), torch.tensor(before), torch.tensor(holders))
    total = sum(map(sum, shapes)) + sum(before)
    seen = torch.zeros(total, total, dtype=torch.bool)
    distance = torch.zeros(total, total, dtype=torch.int64)
    prefixes, start = {}, 0
    for row, (prompt, *responses) in enumerate(shapes):
        prefixes[row] = torch.arange(start, start + before[row])
        start += before[row]
        beginning = torch.cat([prefixes[holders[row]], torch.arange(start, start + prompt)])
        start += prompt
        for length in responses:
            places = torch.cat([beginning, torch.arange(start, start + length)])
            start += length
            steps = torch.arange(len(places))
            distance[places[:, None], places] = steps[:, None] - steps
            seen[places[:, None], places] |= steps[:, None] >= steps
    return layout, seen, distance


def blocks_of(layout: PackedLayout, window: int | None, part: int) -> torch.Tensor:
    """A table of blocks as a matrix of booleans."""
    numbers, columns = layout.blocks(window)[part].long().split([1, len(layout.blocks(window)[part])], dim=1)
    is_listed = torch.arange(len(columns)) < numbers
    return torch.zeros_like(is_listed).scatter_(1, columns, is_listed)


def test_a_thousand_layouts_have_the_blocks_of_the_dense_mask(monkeypatch):
    """With prefixes and windows: which blocks are seen in part, which in full, and both seen from the keys."""
    monkeypatch.setattr(layout_module, "BLOCK", EDGE)
    draw = random.Random(0)
    kinds = {"windows": 0, "full": 0, "one block": 0}
    for _ in range(1000):
        layout, seen, distance = random_layout(draw)
        window = draw.choice([None, draw.randint(1, 40)])
        seen &= distance < (window or 1000)
        total = len(seen)
        num_blocks = max(2, -(-total // EDGE))
        padded = torch.zeros(num_blocks * EDGE, num_blocks * EDGE, dtype=torch.int64)
        padded[:total, :total] = seen
        counts = padded.view(num_blocks, EDGE, num_blocks, EDGE).sum((1, 3))
        assert torch.equal(blocks_of(layout, window, 0), (counts > 0) & (counts < EDGE**2))
        assert torch.equal(blocks_of(layout, window, 1), counts == EDGE**2)
        assert torch.equal(blocks_of(layout, window, 2), blocks_of(layout, window, 0).T)
        assert torch.equal(blocks_of(layout, window, 3), blocks_of(layout, window, 1).T)
        kinds["windows"] += window is not None
        kinds["full"] += bool((counts == EDGE**2).any())
        kinds["one block"] += total <= EDGE
    assert min(kinds.values()) > 5, kinds


@pytest.mark.parametrize("window", [None, 13])
def test_flex_attention_gets_what_its_own_constructor_makes(monkeypatch, window):
    """`create_block_mask` evaluates the mask at every pair; the mask is also the same at every pair."""
    monkeypatch.setattr(layout_module, "BLOCK", EDGE)
    monkeypatch.setattr(attention, "BLOCK", EDGE)
    draw = random.Random(1)
    for _ in range(20):
        layout, seen, distance = random_layout(draw)
        total = len(seen)
        ours = block_mask(layout, window, torch.device("cpu"))
        theirs = create_block_mask(ours.mask_mod, None, None, total, total, device="cpu", BLOCK_SIZE=EDGE)
        place = torch.arange(total)
        assert torch.equal(ours.mask_mod(None, None, place[:, None], place), seen & (distance < (window or 1000)))
        edge = theirs.kv_num_blocks.shape[-1]  # ours has two blocks where there could be one
        for name in ("kv", "full_kv", "q", "full_q"):
            numbers = getattr(ours, f"{name}_num_blocks")[0, 0]
            assert numbers[:edge].tolist() == getattr(theirs, f"{name}_num_blocks")[0, 0].tolist()
            assert not numbers[edge:].any()
            for row, number in enumerate(numbers[:edge].tolist()):
                indices = [getattr(one, f"{name}_indices")[0, 0, row, :number].tolist() for one in (ours, theirs)]
                assert indices[0] == indices[1]


def test_a_window_no_sequence_is_longer_than_changes_no_block():
    layout = PackedLayout(torch.tensor([[60, 80, 90], [40, 50, 10]]), torch.tensor([100, 0]), torch.tensor([0, 0]))
    assert layout.longest_sequence == 100 + 60 + 90
    assert layout.blocks(250) is layout.blocks(None)
    assert layout.blocks(249) is not layout.blocks(None)
