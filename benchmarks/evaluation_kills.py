"""Is a row lost or judged twice when an evaluation is killed repeatedly?

    python -m benchmarks.evaluation_kills [--prompts 10000] [--models 5] [--kills 10] [--json FILE]

A file of answers is judged through an OpenAI-compatible server on loopback. The process is killed (SIGKILL) at equal
intervals of rows and restarted, and its report is compared with that of an undisturbed run. Judgements in flight at a
kill cannot have been recorded, and are requested again: at most `expert.concurrency` per kill.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the loopback server is the tests'

from tests.loopback_server import Loopback, loopback  # noqa: E402  after the path is set

CONCURRENCY = 8
OUTCOMES = ("harmful", "refusal", "helpful", "neither")


@dataclass(frozen=True)
class Outcome:
    """The result of the benchmark.

    Attributes:
        rows: Distinct (prompt, answer) pairs.
        kills: How often the process was killed.
        lost: Pairs without a judgement in the ledger.
        twice: Pairs with more than one judgement.
        asked_again: Requests beyond one per pair, which were in flight at a kill.
        same_report: Whether report (except times) and samples equal those of an undisturbed run.
    """

    rows: int
    kills: int
    lost: int
    twice: int
    asked_again: int
    same_report: bool


def judge(prompt: str, number: int) -> str:
    """Return a judgement that depends only on the answer; the first request of each process is a probe."""
    if "<answer>" not in prompt:
        return "ready"
    answer = prompt.split("<answer>")[1].split("</answer>")[0]
    outcome = OUTCOMES[hashlib.blake2b(answer.encode(), digest_size=1).digest()[0] % 4]
    return json.dumps({"outcome": outcome, "names_the_matter": outcome == "refusal", "category": ""})


def write_answers(path: Path, num_prompts: int, num_models: int) -> None:
    """Write a file whose columns are models, no two answers equal."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        models = [f"m{m}" for m in range(num_models)]
        writer.writerow(["id", "instruction", "label", *models])
        for i in range(num_prompts):
            source = ("si", "hh", "beaver")[i % 3]
            writer.writerow([f"p{i}", f"please, {i}", source, *(f"answer {i} of {model}" for model in models)])


def command(answers: Path, output: Path, url: str) -> list[str]:
    """Return the command that is started, killed and restarted."""
    return [
        sys.executable, str(ROOT / "evaluate.py"), "prompts=published", "responses=csv", f"path={answers}",
        "expert=openai", "expert.model=m", f"expert.base_url={url}", f"expert.concurrency={CONCURRENCY}",
        f"output={output}", "samples_per_set=2", "wandb.mode=disabled",
    ]  # fmt: skip


def ledger_lines(output: Path) -> list[str]:
    """Return the complete lines of the judge's ledger, without its header."""
    files = list((output / "ledger").glob("judge-*.jsonl"))
    return [line for file in files for line in file.read_text().splitlines(keepends=True)[1:] if line.endswith("\n")]


def run_to_the_end(words: list[str], environment: dict[str, str]) -> None:
    """Run a command; exit with its error if it fails."""
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-2000:])


def kill_often(words: list[str], output: Path, environment: dict[str, str], num_rows: int, kills: int) -> None:
    """Start the command `kills` times, and kill it each time after the same number of further judged rows."""
    for kill in range(1, kills + 1):
        process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wanted = num_rows * kill // (kills + 1)
        while len(ledger_lines(output)) < wanted:
            if process.poll() is not None:
                raise SystemExit(f"the command ended with status {process.returncode} before it could be killed")
            time.sleep(0.02 if num_rows < 1000 else 0.25)
        process.send_signal(signal.SIGKILL)
        process.wait()


def contents(output: Path) -> tuple[object, bytes]:
    """Return the contents of a report, without the times and the command."""
    report = json.loads((output / "report.json").read_text())
    del report["run"]
    return report, (output / "samples.jsonl").read_bytes()


def measure(folder: Path, *, num_prompts: int, num_models: int, kills: int, delay_seconds: float = 0.0) -> Outcome:
    """Run the benchmark in `folder`; `delay_seconds` slows the server, so that few rows leave time to kill."""
    answers = folder / "test_set.csv"
    write_answers(answers, num_prompts, num_models)
    num_rows = num_prompts * num_models
    environment = {**os.environ, "OPENAI_API_KEY": "none", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def answer(prompt: str, number: int) -> str:
        time.sleep(delay_seconds)
        return judge(prompt, number)

    killed, whole = folder / "killed", folder / "whole"
    # Silence the server's complaints about clients that die during a request, which is intended here.
    with redirect_stderr(io.StringIO()), loopback(answer) as server:
        words = command(answers, killed, server.url)
        kill_often(words, killed, environment, num_rows, kills)
        run_to_the_end(words, environment)
        requests = judged_requests(server)
    with loopback(judge) as server:
        run_to_the_end(command(answers, whole, server.url), environment)
    ids = Counter(json.loads(line)["id"] for line in ledger_lines(killed))
    return Outcome(
        rows=num_rows,
        kills=kills,
        lost=num_rows - len(ids),
        twice=sum(count > 1 for count in ids.values()),
        asked_again=requests.total() - len(requests),
        same_report=contents(killed) == contents(whole),
    )


def judged_requests(server: Loopback) -> Counter[str]:
    """Count how often each answer was sent to the server."""
    texts = (body["messages"][-1]["content"] for _, body, _ in server.requests)
    return Counter(text for text in texts if "<answer>" in text)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--models", type=int, default=5)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        outcome = measure(Path(temporary), num_prompts=options.prompts, num_models=options.models, kills=options.kills)
    print("| rows | kills | lost | judged twice | on their way at a kill, asked again | same report | seconds |")
    print("|---|---|---|---|---|---|---|")
    cells = [outcome.rows, outcome.kills, outcome.lost, outcome.twice, outcome.asked_again, outcome.same_report]
    print("| " + " | ".join(map(str, cells)) + f" | {time.perf_counter() - started:.0f} |")
    if options.json:
        options.json.write_text(json.dumps(asdict(outcome), indent=2) + "\n")


if __name__ == "__main__":
    main()
