"""The console: what others wrote is cleaned, and a write that fails ends nothing."""

from __future__ import annotations

import errno
import os
import runpy
import sys

import pytest

from config.console import unfailing
from config.errors import UserError, machine_faults
from config.schema import SPIN_COUNT, USER_ERROR_STATUS, read_command
from config.settings import EvaluateConfig
from tests.commands import run_entrypoint
from tests.warm import ROOT, fork_server

KEPT = []  # a file object that goes closes its descriptor


def stream_on(descriptor: int, encoding: str = "utf-8"):
    KEPT.append(os.fdopen(descriptor, "w", encoding=encoding, closefd=False))
    return unfailing(KEPT[-1])


def test_a_reader_that_has_gone_is_no_error():
    read, write = os.pipe()
    stream = stream_on(write)
    print("first", file=stream, flush=True)
    assert os.read(read, 99) == b"first\n"
    os.close(read)
    for _ in range(3):
        print("x" * 100_000, file=stream, flush=True)


PROGRAMS = sorted(
    str(path.relative_to(ROOT))
    for folder in (".", "scripts", "quickstart", "quickstart/real", "safer_instruct")
    for path in (ROOT / folder).glob("*.py")
    if "print(" in path.read_text() + "argparse" and '__name__ == "__main__"' in path.read_text()
)


def closed_pipe() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


def help_for_nobody(program: str) -> None:
    """`python PROGRAM --help | true`, in a fork: its exit status is that of the program."""
    os.dup2(closed_pipe(), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.argv = [program, "--help"]
    try:
        runpy.run_path(program, run_name="__main__")
    finally:
        sys.stdout.flush()  # as the interpreter does when it ends


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_may_write_into_a_pipe_that_nobody_reads(program):
    process = fork_server().Process(target=help_for_nobody, args=(str(ROOT / program),))
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_no_error():
    stream = stream_on(os.open("/dev/full", os.O_WRONLY))
    for _ in range(2):  # each raises on a plain stream
        print("lost", file=stream, flush=True)
    assert not stream.closed


def test_an_ascii_terminal_gets_escapes():
    read, write = os.pipe()
    print("caf\u00e9 \ud800", file=stream_on(write, "ascii"), flush=True)
    assert os.read(read, 99) == b"caf\\xe9 \\ud800\n"


def failing(error: BaseException):
    def main(config: object) -> None:
        raise error

    return main


def run(error: BaseException, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "output=out"])
    run_entrypoint("evaluate", EvaluateConfig, lambda config: [], failing(error))


def test_escape_sequences_of_a_message_are_written_out(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(UserError("column \x1b[2J\u202e"), tmp_path, monkeypatch)
    assert ended.value.code == USER_ERROR_STATUS
    assert capsys.readouterr().err == "evaluate.py: column \\u001b[2J\\u202e\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
def test_a_fault_of_the_machine_is_one_line(number, tmp_path, monkeypatch, capsys):
    """Of every entrypoint, wherever it writes."""
    with pytest.raises(SystemExit) as ended:
        run(OSError(number, os.strerror(number), "runs/a/b"), tmp_path, monkeypatch)
    assert ended.value.code == USER_ERROR_STATUS
    told = capsys.readouterr().err
    assert told.startswith(f"evaluate.py: runs/a/b: {os.strerror(number)}; free some space")
    assert told.count("\n") == 1


def test_another_error_of_the_system_is_a_defect_and_keeps_its_traceback():
    for error in (FileNotFoundError(errno.ENOENT, "gone", "a"), ConnectionResetError(errno.ECONNRESET, "reset")):
        with pytest.raises(type(error)), machine_faults():
            raise error


@pytest.mark.parametrize(
    ("given", "spin_count"),
    [({}, SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["nothing", "a number", "a policy"],
)
def test_waiting_threads_are_told_to_sleep_unless_the_user_says_otherwise(given, spin_count, monkeypatch, capsys):
    """Before torch is imported, by each entrypoint: `--help` is the shortest command."""
    environment = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", *given)}
    monkeypatch.setattr(os, "environ", environment | given)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--help"])
    with pytest.raises(SystemExit):
        read_command("evaluate", EvaluateConfig, lambda config: [])
    assert os.environ.get("GOMP_SPINCOUNT") == spin_count
    capsys.readouterr()
