"""Datasets of the hub: by name, by split and config, streamed or copied, and what is said where there is no network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from conftest import byte_level_tokenizer
from hub_server import hub_server

import preference_datasets
from config.errors import UserError
from config.rules import check_values
from config.settings import DatasetSettings
from preference_datasets import TrainEval, build_stores
from safer_instruct.text import hub
from tests.commands import run
from trainers.data.token_store import TokenStoreWriter

CARD = """---
configs:
- config_name: small
  data_files:
  - split: train
    path: data/train.jsonl
  - split: test
    path: data/test.jsonl
- config_name: other
  data_files: data/test.jsonl
---
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset as it lies on the hub: a card that names configs and splits, and files in a folder of their own."""
    hub._builder.cache_clear()
    (tmp_path / "hub" / "data").mkdir(parents=True)
    (tmp_path / "hub" / "README.md").write_text(CARD)
    for split, number in (("train", 5), ("test", 3)):
        rows = [{"instruction": f"What is {i} of {split}?", "chosen": f"It is {i}."} for i in range(number)]
        (tmp_path / "hub" / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "hub"


@pytest.fixture
def asked(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A hub that knows the folder as org/name; what it was asked for."""
    questions = []
    load = datasets.load_dataset_builder

    def load_dataset_builder(path: str, config: str | None, revision: str | None) -> Any:
        questions.append((path, config, revision))
        return load(str(folder), config, cache_dir=str(tmp_path / "copies"))

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    monkeypatch.chdir(tmp_path)
    return questions


def build(path: str, cache: Path, **keys: Any) -> TrainEval:
    settings = DatasetSettings(path=path, schema="si", template="plain", eval_fraction=0.0, **keys)
    return build_stores(
        {"si": settings}, loss="likelihood", tokenizer=byte_level_tokenizer(add_bos=True), max_length=64,
        max_prompt_length=48, cache_dir=cache,
    )  # fmt: skip


def test_a_name_of_the_hub_is_read_streamed_or_copied_to_the_same_tokens(asked: list[Any], tmp_path: Path) -> None:
    keys: dict[str, Any] = {"config": "small", "revision": "v1"}
    copied = build("org/name", tmp_path / "a", **keys)
    assert list((tmp_path / "copies").rglob("*.arrow"))
    hub._builder.cache_clear()
    streamed = build("org/name", tmp_path / "b", streaming=True, **keys)
    assert asked == [("org/name", "small", "v1")] * 2
    assert len(copied.train) == 5
    assert streamed.train.content == copied.train.content
    assert streamed.train.key == copied.train.key  # either way the same entry of the cache
    files = copied.report["files"]["si"]
    assert files["left_out"] == ["test"]
    (read,) = files["read"]
    assert read.endswith(" train")
    assert len(build("org/name", tmp_path / "c", split="test", **keys).train) == 3


def test_streaming_copies_nothing(asked: list[Any], tmp_path: Path) -> None:
    build("org/name", tmp_path / "cache", config="small", streaming=True)
    assert asked
    assert not (tmp_path / "copies").exists() or not list((tmp_path / "copies").rglob("*.arrow"))


def test_a_folder_of_that_form_is_read_by_split_and_config(folder: Path, tmp_path: Path) -> None:
    """Through the same function; a file that has changed is noticed, which the library's own cache does not do."""
    store = build(str(folder), tmp_path / "cache", config="small").train
    assert len(store) == 5
    assert len(build(str(folder), tmp_path / "cache", config="other").train) == 3
    assert len(build(str(folder), tmp_path / "cache", config="small", split="test").train) == 3
    with (folder / "data" / "train.jsonl").open("a") as rows:
        rows.write('{"instruction": "More?", "chosen": "Yes."}\n')
    assert len(build(str(folder), tmp_path / "cache", config="small").train) == 6


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"split": "train"}, r"load_dataset\('.*hub'\) failed: Config name is missing.*'small', 'other'"),
        ({"config": "small", "split": "dev"}, r"config=small\) failed after row 0 of split=dev: Bad split: dev"),
        ({"config": "larger"}, r"config=larger\) failed: BuilderConfig 'larger' not found"),
    ],
)
def test_a_config_or_split_that_is_not_there(keys: Any, message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as refused:
        build(str(folder), tmp_path / "cache", **keys)
    assert "no such file" not in str(refused.value)


def test_without_a_network_the_message_says_what_was_tried_and_what_to_do(tmp_path: Path) -> None:
    hub._builder.cache_clear()
    message = (
        r"datasets.si.path=org/name: load_dataset\('org/name', revision=v1\) failed: .*; there is no such local file "
        r"or folder either. Without a network: hf download org/name --repo-type dataset --local-dir FOLDER where "
        r"there is one, then datasets.si.path=FOLDER datasets.si.split=train"
    )
    with pytest.raises(UserError, match=message):
        build("org/name", tmp_path / "cache", revision="v1")


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_on_names_of_the_hub_is_the_run_on_its_files(
    streaming: bool, folder: Path, tmp_path: Path, tiny_model_folder: str
) -> None:
    """The libraries themselves ask a server on loopback; data and model are then those of the folders, to the byte."""
    for kind, source in (("datasets", folder), ("models", Path(tiny_model_folder))):
        shutil.copytree(source, tmp_path / "served" / kind / "org" / "name")
    common = ["loss=sft", "model=tiny", "datasets=[si]", "datasets.si.template=plain", "datasets.si.eval_fraction=0"]
    common += ["n_epochs=1", "optimizer=AdamW", "lr=1e-3", "warmup_steps=0"]
    local = [f"model.name_or_path={tiny_model_folder}", f"datasets.si.path={folder}/data/train.jsonl", "exp_name=local"]
    named = ["model.name_or_path=org/name", "datasets.si.path=org/name", "exp_name=named"]
    named += ["datasets.si.config=small", f"datasets.si.streaming={streaming}"]
    with hub_server(tmp_path / "served") as (address, fetched):
        online = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        run([*common, *local], tmp_path)
        run([*common, *named], tmp_path, fresh=True, **online)
    weights = [tmp_path / "runs" / name / "LATEST" / "model" / "model.safetensors" for name in ("local", "named")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert {"model.safetensors", "tokenizer.json", "train.jsonl"} <= set(fetched)


def stub(rows: Iterator[dict[str, str]]) -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(data_files={"train": []}), cache_dir="copies/org___name/default/0.0.0/4f2a",
        as_streaming_dataset=lambda split: rows,
    )  # fmt: skip


def test_a_stream_that_breaks_off_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield from ({"instruction": f"Q{i}?", "chosen": "A."} for i in range(2))
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(hub, "_builder", lambda *name: stub(rows()))
    with pytest.raises(UserError, match="failed after row 2 of split=train: reset by peer"):
        build("org/name", tmp_path / "cache", streaming=True)


def test_rows_go_from_the_stream_to_the_store_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than one batch of the tokenizer is read and not yet written."""
    drawn, written, most = 0, 0, 0
    append = TokenStoreWriter.append

    def rows() -> Iterator[dict[str, str]]:
        nonlocal drawn, most
        for drawn in range(1, 5001):
            most = max(most, drawn - written)
            yield {"instruction": f"What is {drawn}?", "chosen": "A number."}

    def counted(*arguments: Any, **keys: Any) -> None:
        nonlocal written
        written += 1
        append(*arguments, **keys)

    monkeypatch.setattr(TokenStoreWriter, "append", counted)
    monkeypatch.setattr(hub, "_builder", lambda *name: stub(rows()))
    store = build("org/name", tmp_path / "cache", streaming=True).train
    assert len(store) == drawn == 5000
    assert store.ids(4999)
    assert most <= preference_datasets.ROWS_AT_ONCE


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("HuggingFaceH4/ultrafeedback_binarized", ""),
        ("org/name-2.5", ""),
        ("nowhere", "there is no such file or folder"),
        ("data/si.jsonl", "there is no such file or folder"),
        ("/org/name", "there is no such file or folder"),
        ("hub/nam", "there is no such file or folder; did you mean hub/name?"),
    ],
)
def test_what_may_be_a_name_of_the_hub(path: str, complaint: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub" / "name").mkdir(parents=True)
    faults = [str(fault) for fault in check_values(DatasetSettings(path=path, schema="si"))]
    assert bool(faults) == bool(complaint)
    assert not faults or complaint in faults[0]
