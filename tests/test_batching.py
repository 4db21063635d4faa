from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor

from trainers.data.batching import BatchLoader, GlobalBatch, permutation
from trainers.data.cutters import PaddedCutter, build_cutter
from trainers.data.token_store import TokenStore, TokenStoreWriter, sequence_lengths

PAD = 0


def make_store(directory: Path, num_rows: int, num_segments: int = 3) -> TokenStore:
    """Rows of many lengths; the tokens of row i are i + 1, prompt +1000, chosen +2000, rejected +3000."""
    generator = torch.Generator().manual_seed(5)
    with TokenStoreWriter(directory, key="key", num_segments=num_segments) as writer:
        for i in range(num_rows):
            lengths = torch.randint(1, 12, (num_segments,), generator=generator).tolist()
            writer.append(f"row{i}", [[1000 * (s + 1) + i] * n for s, n in enumerate(lengths)])
        writer.finish({})
    return TokenStore(directory)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return make_store(tmp_path_factory.mktemp("pairs"), 23)


def loader(store: TokenStore, **changes: Any) -> BatchLoader:
    """In batches of 5, two epochs; of the changes, the names of `build_cutter` are the cutter's."""
    options: dict[str, Any] = {"packing": False, "device": torch.device("cpu"), "pad_token_id": PAD}
    options |= {name: changes.pop(name) for name in ("packing", "max_tokens", "num_microbatches") if name in changes}
    arguments: dict[str, Any] = {"batch_size": 5, "seed": 0, "num_epochs": 2}
    return BatchLoader(store, build_cutter(**options), **(arguments | changes))


def own_rows(batch: GlobalBatch) -> list[int]:
    return [row for microbatch in batch.microbatches for row in microbatch["row"].tolist()]


def as_text(batches: list[GlobalBatch]) -> list[Any]:
    """All that a list of batches holds, comparable with ==."""
    return [
        (
            b.start_examples,
            b.num_examples,
            b.rows.tolist(),
            [[(k, v.tolist()) for k, v in m.items()] for m in b.microbatches],
        )
        for b in batches
    ]


def test_an_epoch_visits_every_row_once_and_keeps_its_partial_last_batch(store: TokenStore) -> None:
    batches = list(loader(store).batches())
    assert [b.num_examples for b in batches] == [5, 5, 5, 5, 3] * 2
    assert [b.start_examples for b in batches] == [0, 5, 10, 15, 20, 23, 28, 33, 38, 43]
    for epoch in (batches[:5], batches[5:]):
        assert sorted(row for b in epoch for row in b.rows.tolist()) == list(range(23))
        assert sorted(row for b in epoch for row in own_rows(b)) == list(range(23))
    assert loader(store).steps == len(batches)
    assert loader(store).total_examples == 46


def test_seed_and_epoch_change_the_order_and_nothing_else_does(store: TokenStore) -> None:
    def order(**changes: Any) -> list[int]:
        return [row for b in loader(store, **changes).batches() for row in b.rows.tolist()]

    first = order()
    assert first == order()
    assert first == order(num_microbatches=3, max_tokens=30)
    assert first == order(batch_size=7)
    assert first[:23] != first[23:]
    assert order(seed=1)[:23] != first[:23]
    assert order(seed=None) == list(range(23)) * 2
    assert permutation(23, seed=0, epoch=1).tolist() == first[23:]


def test_permutations_of_seed_and_epoch_do_not_coincide() -> None:
    orders = {tuple(permutation(20, seed=s, epoch=e).tolist()) for s in range(4) for e in range(4)}
    assert len(orders) == 16


@pytest.mark.parametrize("world_size", [2, 3, 16])
def test_ranks_share_the_batches_of_one_process(store: TokenStore, world_size: int) -> None:
    alone = list(loader(store).batches())
    shares = [list(loader(store, rank=r, world_size=world_size).batches()) for r in range(world_size)]
    for k, batch in enumerate(alone):
        parts = [own_rows(share[k]) for share in shares]
        assert all(share[k].rows.tolist() == batch.rows.tolist() for share in shares)
        assert all(share[k].num_examples == batch.num_examples for share in shares)
        assert Counter(row for part in parts for row in part) == Counter(own_rows(batch))
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("start", [0, 5, 20, 23, 43, 46])
def test_a_run_that_stopped_goes_on_as_if_it_had_not(store: TokenStore, start: int) -> None:
    whole = list(loader(store).batches())
    rest = list(loader(store).batches(start))
    assert as_text(rest) == as_text([b for b in whole if b.start_examples >= start])


@pytest.mark.parametrize("start", range(0, 46, 3))
def test_from_inside_a_batch_its_rest_comes_first(store: TokenStore, start: int) -> None:
    rows = [row for b in loader(store).batches() for row in b.rows.tolist()]
    assert [row for b in loader(store).batches(start) for row in b.rows.tolist()] == rows[start:]
    starts = [b.start_examples for b in loader(store).batches(start)]
    assert set(starts[1:]) <= {0, 5, 10, 15, 20, 23, 28, 33, 38, 43}


@pytest.mark.parametrize(
    ("num_epochs", "num_examples", "total", "steps"),
    [
        (1, None, 23, 5),
        (3, 50, 50, 11),
        (1, 50, 23, 5),
        (None, 50, 50, 11),
        (None, 12, 12, 3),
        (2, 23, 23, 5),
        (1, 0, 0, 0),
    ],
)
def test_whichever_limit_comes_first(
    store: TokenStore, num_epochs: int | None, num_examples: int | None, total: int, steps: int
) -> None:
    data = loader(store, num_epochs=num_epochs, num_examples=num_examples)
    batches = list(data.batches())
    assert (data.total_examples, data.steps) == (total, steps)
    assert (sum(b.num_examples for b in batches), len(batches)) == (total, steps)
    assert data.rows_visited().tolist() == sorted({row for b in batches for row in b.rows.tolist()})


def test_a_store_smaller_than_a_batch_and_an_empty_one(store: TokenStore, tmp_path: Path) -> None:
    assert [b.num_examples for b in loader(store, batch_size=100).batches()] == [23, 23]
    empty = loader(make_store(tmp_path, 0))
    assert (list(empty.batches()), empty.total_examples, empty.steps, len(empty.rows_visited())) == ([], 0, 0, 0)


def expected_sequences(store: TokenStore, row: int) -> list[tuple[list[int], int]]:
    """For each response of a row: prompt + response, and the prompt's length."""
    prompt, *responses = (segment.tolist() for segment in store.row(row))
    return [(prompt + response, len(prompt)) for response in responses]


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 30), st.none() | st.integers(1, 200), st.sampled_from([2, 3]))
def test_microbatches(
    tmp_path_factory: pytest.TempPathFactory,
    num_microbatches: int,
    batch_size: int,
    max_tokens: int | None,
    num_segments: int,
) -> None:
    store = make_store(tmp_path_factory.mktemp("any"), 11, num_segments)
    data = loader(
        store,
        num_microbatches=num_microbatches,
        batch_size=batch_size,
        max_tokens=max_tokens,
    )
    data.columns = {"score": torch.arange(11.0) * 3}
    for batch in data.batches():
        sizes = [len(m) for m in batch.microbatches]
        assert min(sizes) > 0
        assert max(sizes) <= -(-batch.num_examples // num_microbatches)
        assert len(sizes) >= min(num_microbatches, batch.num_examples)
        if max_tokens is None:
            assert len(sizes) == min(num_microbatches, batch.num_examples)
        lengths = []
        for microbatch in batch.microbatches:
            assert max_tokens is None or len(microbatch) == 1 or microbatch["input_ids"].numel() <= max_tokens
            assert microbatch["score"].tolist() == [row * 3 for row in microbatch["row"].tolist()]
            shape = (len(microbatch), -1) if num_segments == 2 else (len(microbatch), 2, -1)
            assert microbatch["input_ids"].shape[:-1] == torch.empty(shape[:-1]).shape
            for i, row in enumerate(microbatch["row"].tolist()):
                sequences = expected_sequences(store, row)
                lengths.append(max(len(ids) for ids, _ in sequences))
                for s, (ids, prompt_length) in enumerate(sequences):
                    place: Any = i if num_segments == 2 else (i, s)
                    padding = microbatch["input_ids"].shape[-1] - len(ids)
                    response = [False] * prompt_length + [True] * (len(ids) - prompt_length) + [False] * padding
                    assert microbatch["input_ids"][place].tolist() == ids + [PAD] * padding
                    assert microbatch["attention_mask"][place].tolist() == [True] * len(ids) + [False] * padding
                    assert microbatch["response_mask"][place].tolist() == response
            longest = microbatch["attention_mask"].sum(-1).max()
            assert microbatch["input_ids"].shape[-1] == longest  # padded to its own longest row, not the batch's
        assert lengths == sorted(lengths, reverse=True)


def test_dtypes(store: TokenStore) -> None:
    batch = next(loader(store).batches()).microbatches[0]
    kinds = {name: tensor.dtype for name, tensor in batch.items()}
    masks = dict.fromkeys(("attention_mask", "response_mask"), torch.bool)
    assert kinds == {"input_ids": torch.int64, "row": torch.int64, **masks}
    assert batch.batch_size == torch.Size([5])


def test_columns_may_be_set_later(store: TokenStore) -> None:
    data = loader(store)
    data.columns = {"reference_chosen_logps": torch.arange(23, dtype=torch.float64)}
    microbatch = next(data.batches()).microbatches[0]
    assert microbatch["reference_chosen_logps"].tolist() == microbatch["row"].tolist()
    assert microbatch["reference_chosen_logps"].dtype == torch.float64


class BrokenStore:
    """A store whose rows cannot be read."""

    num_segments = 3

    def __init__(self, store: TokenStore) -> None:
        self.lengths: Tensor = store.lengths
        self.columns: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, i: int) -> list[Tensor]:
        raise OSError(f"row {i} is gone")


def test_errors_of_the_thread_reach_the_caller_and_threads_end(store: TokenStore) -> None:
    with pytest.raises(OSError, match="is gone"):
        next(loader(BrokenStore(store)).batches())  # type: ignore[arg-type]  # stands in for a broken disk
    batches = loader(store).batches()
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_the_next_batch_is_made_while_this_one_is_in_use(store: TokenStore) -> None:
    made = threading.Event()
    data = loader(store)
    make = data._make

    def watched(start: int, rows: Tensor) -> GlobalBatch:
        if start == 5:
            made.set()
        return make(start, rows)

    data._make = watched  # type: ignore[method-assign]  # a spy
    batches = data.batches()
    next(batches)
    assert made.wait(timeout=600)
    batches.close()


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_only_a_gpu_run_pins_and_its_thread_chooses_the_gpu_first(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """On a machine that has GPUs, a CPU run must not touch them, nor one rank's thread the GPU of another."""
    calls: list[tuple[str, str]] = []

    def note(name: str) -> None:
        calls.append((name, threading.current_thread().name[:8]))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: note(str(chosen)))
    monkeypatch.setattr(TensorDict, "pin_memory", lambda batch: note("pin") or batch)
    batches = list(loader(store, num_epochs=1, device=torch.device(device)).batches())
    assert len(batches) == 5
    expected = [] if device == "cpu" else [("cuda:1", "prefetch"), *[("pin", "prefetch")] * 5]
    assert calls == expected


@pytest.mark.parametrize("packing", [False, True])
def test_fillers_are_of_the_shortest_row_and_count_for_the_missing_passes(store: TokenStore, packing: bool) -> None:
    """Three rows over two ranks, one micro-batch a row: rank 1 has one pass too few."""
    shares = [
        list(loader(store, batch_size=3, num_microbatches=3, rank=rank, world_size=2, packing=packing).batches())
        for rank in range(2)
    ]
    shortest = min(range(23), key=lambda row: max(len(ids) for ids, _ in expected_sequences(store, row)))
    for own in zip(*shares, strict=True):
        assert len({len(batch.passes) for batch in own}) == 1
        for batch in own:
            assert [counts for _, counts in batch.passes] == [True] * len(batch.microbatches) + [False] * len(
                batch.fillers
            )
            assert all(filler["row"].tolist() == [shortest] for filler in batch.fillers)
    assert any(batch.fillers for batch in shares[1])


def test_the_default_limit_is_of_the_device_and_of_packed_rows_alone() -> None:
    for device, limit in (("cpu", 1024), ("cuda:0", 8192)):
        kind = torch.device(device)
        packed = build_cutter(packing=True, device=kind, pad_token_id=PAD)
        assert packed.max_tokens == limit
        assert build_cutter(packing=True, device=kind, pad_token_id=PAD, max_tokens=7).max_tokens == 7
        assert build_cutter(packing=True, device=kind, pad_token_id=PAD, max_tokens=7).forward_only(kind) == packed
        padded = build_cutter(packing=False, device=kind, pad_token_id=PAD, num_microbatches=3)
        assert padded == PaddedCutter(PAD, None, 3)
        assert padded.forward_only(kind) == PaddedCutter(PAD, 16_384)


def test_the_shortest_row_is_looked_for_once(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for each batch that leaves a process without rows: with a million rows that would take longer than a step."""
    calls, visited = [], BatchLoader.rows_visited
    monkeypatch.setattr(BatchLoader, "rows_visited", lambda self: calls.append(self) or visited(self))
    idle = loader(store, batch_size=2, rank=2, world_size=3)
    fillers = [one for batch in idle.batches() for one in batch.fillers]
    assert len(fillers) > 2
    assert len(calls) == 1
    shortest = sequence_lengths(store.lengths).min()
    assert all(sequence_lengths(store.lengths[one["row"]]) == shortest for one in fillers)
    other = idle.excerpt(sequence_lengths(store.lengths).argsort(descending=True)[:2])
    assert other.filler()["row"].item() in (0, 1)  # of its own store


def test_a_loader_without_end_is_refused(store: TokenStore) -> None:
    with pytest.raises(ValueError, match="never end"):
        loader(store, num_epochs=None, num_examples=None)
    with pytest.raises(ValueError, match="num_microbatches=0"):
        loader(store, num_microbatches=0)
    with pytest.raises(ValueError, match="rank=2"):
        loader(store, rank=2, world_size=2)
