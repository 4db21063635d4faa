"""The real pretrained model, where its packages are (requirements-real.txt): log-probabilities, and a miniature."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.real_logps import measure, write_pairs

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "si.jsonl"
    write_pairs(path, 64)
    return path


def test_packed_log_probabilities_are_those_of_plain_transformers(smollm2):
    """Nats a sequence: 1e-9 in float64, 1e-4 in float32; `benchmarks/real_logps.py` does the same on more pairs."""
    differences = measure(str(smollm2), 8)
    assert differences["float64"] < 1e-9
    assert differences["float32"] < 1e-4


def test_a_miniature_runs_to_the_end_and_is_not_done_twice(smollm2, pairs, tmp_path):
    command = [
        sys.executable,
        "quickstart/real/run.py",
        "--size",
        "tiny",
        "--model",
        str(smollm2),
        "--pairs",
        str(pairs),
    ]
    command += ["--expert", "rules", "--output", str(tmp_path / "real")]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "this machine (" in first.stdout
    found = json.loads((tmp_path / "real" / "results.json").read_text())
    assert list(found["models"]) == ["base", "sft", "dpo", "sft_more", "si_sft", "si_dpo"]
    for model in found["models"].values():
        for key in ("safety", "usefulness", "safe_and_useful"):
            assert 0 <= model[key]["low"] <= model[key]["value"] <= model[key]["high"] <= 1
    assert found["reversed"]["nats_per_token"]["untrained"][0] > 0
    assert (tmp_path / "real" / "report" / "report.html").is_file()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("finished before, skipped") == len(found["seconds"])
