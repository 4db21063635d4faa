from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from config.checksums import hash_files
from config.errors import UserError
from trainers.data.cache import build_once, usable_dir


def fill(directory: Path) -> None:
    (directory / "a").write_text("whole")
    (directory / "sub").mkdir()
    (directory / "sub" / "b").write_text("whole")


def test_builds_once(tmp_path: Path) -> None:
    calls: list[Path] = []

    def build(directory: Path) -> None:
        calls.append(directory)
        fill(directory)

    entries = {build_once(tmp_path / "cache", "key", build) for _ in range(3)}
    assert entries == {tmp_path / "cache" / "key"}
    assert len(calls) == 1
    assert (tmp_path / "cache" / "key" / "sub" / "b").read_text() == "whole"
    assert calls[0] != tmp_path / "cache" / "key"  # never under its name before it is complete


def test_a_failed_build_leaves_nothing_and_the_next_one_works(tmp_path: Path) -> None:
    def broken(directory: Path) -> None:
        (directory / "a").write_text("half")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        build_once(tmp_path, "key", broken)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert (build_once(tmp_path, "key", fill) / "a").read_text() == "whole"


def test_a_full_disk_is_the_users_matter(tmp_path: Path) -> None:
    def full(directory: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"the disk is full; .* local_dirs"):
        build_once(tmp_path, "key", full)
    assert not (tmp_path / "key").exists()


def _build_slowly(cache: Path, log: Path) -> None:
    def build(directory: Path) -> None:
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.2)
        fill(directory)

    assert (build_once(cache, "key", build) / "a").read_text() == "whole"


def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_build_slowly, args=(tmp_path / "c", tmp_path / "log")) for _ in range(5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 5
    assert (tmp_path / "log").read_text() == "built\n"


def _die_in_the_middle(cache: Path) -> None:
    def build(directory: Path) -> None:
        (directory / "a").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    build_once(cache, "key", build)


def test_a_killed_builder_leaves_no_entry_and_its_remains_are_cleared(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_die_in_the_middle, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "key").exists()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [f"key.tmp-{process.pid}"]
    assert (build_once(tmp_path, "key", fill) / "a").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["key"]


def test_usable_dir_takes_the_first_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    assert usable_dir([str(tmp_path / "file" / "x"), "$SCRATCH/a", str(tmp_path / "b")]) == tmp_path / "scratch" / "a"
    assert list((tmp_path / "scratch" / "a").iterdir()) == []
    assert not (tmp_path / "b").exists()
    with pytest.raises(UserError, match=r"none of the folders can be written to: .*file/x \("):
        usable_dir([str(tmp_path / "file" / "x")])


def test_hash_files_is_of_the_contents_and_their_borders(tmp_path: Path) -> None:
    texts = {"a": "xy", "b": "z", "c": "x", "d": "yz", "e": "xy"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    a, b, c, d, e = (tmp_path / name for name in texts)
    assert hash_files([a, b]) == hash_files([e, b])
    assert len({hash_files([a, b]), hash_files([c, d]), hash_files([b, a]), hash_files([a])}) == 4


def test_a_link_among_the_remains_of_a_killed_builder_is_removed_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept").touch()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "key.tmp-1").symlink_to(tmp_path / "mine")
    build_once(tmp_path / "cache", "key", fill)
    assert (tmp_path / "mine" / "kept").exists()
    assert not (tmp_path / "cache" / "key.tmp-1").is_symlink()
