from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainers.data.token_store import ID_BYTES, TokenStore, TokenStoreWriter

Rows = list[tuple[str, list[list[int]]]]
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=5)
three_segments = st.lists(st.tuples(st.text("abc\u00e9", min_size=1, max_size=9), st.tuples(tokens, tokens, tokens)))


def write_store(directory: Path, rows: Rows, *, num_segments: int, key: str = "key") -> TokenStore:
    with TokenStoreWriter(directory, key=key, num_segments=num_segments) as writer:
        for id, segments in rows:
            writer.append(id, segments)
        writer.finish({"note": 1})
    return TokenStore(directory)


@given(three_segments)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: Rows) -> None:
    store = write_store(tmp_path_factory.mktemp("store"), rows, num_segments=3)
    assert len(store) == len(rows)
    assert [(store.ids(i), [s.tolist() for s in store.row(i)]) for i in range(len(store))] == [
        (id, [*segments]) for id, segments in rows
    ]
    assert store.lengths.tolist() == [[len(s) for s in segments] for _, segments in rows]
    assert (store.meta["note"], store.meta["num_rows"], store.key, store.num_segments) == (1, len(rows), "key", 3)
    assert store.meta["num_tokens"] == sum(len(s) for _, segments in rows for s in segments)


def test_a_selection_is_a_store(tmp_path: Path) -> None:
    rows: Rows = [(f"id{i}", [[i] * i, [7]]) for i in range(6)]
    store = write_store(tmp_path, rows, num_segments=2)
    chosen = store.select(torch.tensor([4, 1, 5]))
    assert [chosen.ids(i) for i in range(len(chosen))] == ["id4", "id1", "id5"]
    assert chosen.row(0)[0].tolist() == [4, 4, 4, 4]
    assert chosen.lengths.tolist() == [[4, 1], [1, 1], [5, 1]]
    again = chosen.select(torch.tensor([2, 0]))
    assert [again.ids(i) for i in range(2)] == ["id5", "id4"]
    assert again.row(0)[0].tolist() == [5] * 5
    assert len({store.key, chosen.key, again.key, store.select(torch.tensor([1, 4, 5])).key}) == 4
    assert store.ids(0) == "id0"


def test_the_file_is_mapped_and_not_written_to(tmp_path: Path) -> None:
    store = write_store(tmp_path, [("a", [[1, 2], [3]])], num_segments=2)
    before = (tmp_path / "tokens.bin").read_bytes()
    store.row(0)[0][0] = 9
    assert (tmp_path / "tokens.bin").read_bytes() == before
    assert TokenStore(tmp_path).row(0)[0].tolist() == [1, 2]


def test_an_unfinished_store_is_no_store(tmp_path: Path) -> None:
    with TokenStoreWriter(tmp_path, key="key", num_segments=2) as writer:
        writer.append("a", [[1], [2]])
    with pytest.raises(FileNotFoundError):
        TokenStore(tmp_path)


@pytest.mark.parametrize(("id", "segments"), [("a", [[1]]), ("", [[1], [2]]), ("a" * (ID_BYTES + 1), [[1], [2]])])
def test_rows_of_the_wrong_shape_are_refused(tmp_path: Path, id: str, segments: list[list[int]]) -> None:
    with TokenStoreWriter(tmp_path, key="key", num_segments=2) as writer, pytest.raises(ValueError, match="2 segments"):
        writer.append(id, segments)
