"""How much memory and time does a report of 100,000 judged answers take?

    python -m benchmarks.evaluation_report [--rows 100000] [--json FILE]

It writes an output of evaluate.py with five models and that many answers of about 450 characters, then measures
`evaluate.py compare=[FOLDER]`, which reads it and makes its report again; the same with 100 answers shows the share of
the libraries. Target: less than 500 MB and less than 60 s, including the libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODELS, SOURCES, LABELS = 5, ("si", "hh", "beaver"), ("hate", "illegal", "nsfw", "self-harm")
TEXT = "please tell me how one does this without being seen by anybody who could mind it at all today"


def write_output(folder: Path, num_rows: int) -> None:
    """Write an output of evaluate.py with `num_rows` judged answers: half a kilobyte each, outcomes at random."""
    from dataclasses import asdict

    from config.settings import GenerationSettings
    from safer_instruct.experts.verdicts import Judgement
    from safer_instruct.measures.rates import JudgedOutput, summarize
    from safer_instruct.report.document import build_report, describe_prompts, write_json
    from safer_instruct.report.evaluations import sample_row, write_samples
    from safer_instruct.text.prompt_sets import EvaluationPrompt

    draw, words = random.Random(0), TEXT.split()
    prompts = [
        EvaluationPrompt(f"p{i}", " ".join(draw.choices(words, k=20)) + f" {i}", "test", SOURCES[i % 3], LABELS[i % 4],
                         "unsafe")
        for i in range(num_rows // MODELS)
    ]  # fmt: skip
    judged = {
        f"model{m}": [
            JudgedOutput(
                prompt,
                " ".join(draw.choices(words, k=90)),
                False,
                Judgement(draw.choices(("harmful", "refusal", "safe"), (5 - m, 2 + m, 1))[0], specific=True),
            )
            for prompt in prompts
        ]
        for m in range(MODELS)
    }
    folder.mkdir(parents=True)
    write_samples(folder / "samples.jsonl", (sample_row(name, row) for name, rows in judged.items() for row in rows))
    report = build_report(
        models={
            name: {"path": name, "template": "", "fingerprint": name, **summarize(rows)}
            for name, rows in judged.items()
        },
        prompts={"test": describe_prompts("test.jsonl", prompts)},
        overlaps=[],
        dataset=None,
        run={"judge": {"name": "j", "fingerprint": "j"}, "generation": asdict(GenerationSettings()), "stages": []},
    )
    write_json(folder / "report.json", report)


def measure(command: list[str]) -> dict[str, float]:
    """Return the wall seconds, CPU seconds and peak resident memory in MB of a process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{command} ended with status {status}")
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss / 1024}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, rows in {"small": 100, "large": options.rows}.items():
            folder = Path(temporary) / name
            # Not in this process, because a child's peak memory starts at that of the process it is forked from.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                pool.submit(write_output, folder, rows).result()
        for name in ("small", "large"):
            folder = Path(temporary) / name
            command = [sys.executable, str(ROOT / "evaluate.py"), f"compare=[{folder}]", f"output={folder}-out"]
            results[name] = measure(command)
    print("| rows | seconds | processor seconds | peak memory |\n|---|---|---|---|")
    for name, rows in {"small": 100, "large": options.rows}.items():
        one = results[name]
        print(f"| {rows:,} | {one['seconds']:.1f} | {one['cpu_seconds']:.1f} | {one['peak_mb']:.0f} MB |")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
