"""`benchmarks/gpu.py`: a stage that fails, hangs or says nothing takes no other down, and all of it is written."""

import argparse
import json
import signal

import pytest

from benchmarks import gpu
from benchmarks.gpu import Expected, Run, Stage, at_least, at_most, chosen_stages, yes

FAILS_ONCE = (
    "import json, pathlib, sys; seen = pathlib.Path({path!r}); first = not seen.exists(); seen.touch(); "
    "sys.exit(3) if first else print('words'), print(json.dumps(dict(tflops=5.0)))"
)


def stage(code: str, *expected: Expected, limit: float = 60, alongside: str | None = None) -> Stage:
    """A program that ignores the options that every stage gets."""
    return Stage(("-c", code), ("-c", code), limit, expected, alongside)


def test_every_stage_ends_in_a_line_of_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(
        gpu,
        "STAGES",
        {
            "again": stage(FAILS_ONCE.format(path=str(tmp_path / "seen")), at_least("tflops", 4), at_most("tflops", 4)),
            "hangs": stage("import time; time.sleep(60)", limit=1.0),
            "mute": stage("print('no JSON')", alongside="fine"),
            "fine": stage("print('{\"equal\": true}')", yes("equal"), at_least("speed", 1)),
        },
    )
    run = Run(argparse.Namespace(output=tmp_path / "gpu", small=False, device="cpu", model=None))
    for name in ("again", "hangs", "mute"):
        run.stage(name)
    written = [json.loads(line) for line in (tmp_path / "gpu" / "gpu.json").read_text().splitlines()]
    assert {one["stage"]: (one["tries"], one["error"] is None) for one in written} == {
        "again": (2, True), "hangs": (2, False), "mute": (2, False), "fine": (1, True),
    }  # fmt: skip
    table = run.table().splitlines()
    assert [line.split()[-1] for line in table if line.startswith("again")] == ["ok", "MISSED"]
    assert any("killed after 1 s" in line for line in table)
    assert any("its last line is no JSON" in line for line in table)
    assert [line.split()[-1] for line in table if line.startswith("fine")] == ["ok", "measured"]


def test_stages_by_name():
    assert chosen_stages(["first"], has_model=False) == ["card", "correctness", "dpo_1b_first"]
    assert "real_model" not in chosen_stages(["all"], has_model=False)
    assert "real_model" in chosen_stages(["all"], has_model=True)
    with pytest.raises(SystemExit, match="no such stage"):
        chosen_stages(["crad"], has_model=False)


def test_the_end_of_the_program_is_the_end_of_its_stages(tmp_path, monkeypatch):
    """What goes on computing would hold the device, and spoil what is measured next."""
    monkeypatch.setattr(gpu, "STAGES", {"a": stage("import time; time.sleep(600)", alongside="b"), "b": stage("")})
    run = Run(argparse.Namespace(output=tmp_path / "gpu", small=False, device="cpu", model=None))
    started = []

    def stopped(name, process, began):
        started.append(process)
        raise SystemExit(143)

    monkeypatch.setattr(run, "_wait", stopped)
    with pytest.raises(SystemExit):
        run.stage("a")
    assert [process.returncode for process in started] == [-signal.SIGKILL]
