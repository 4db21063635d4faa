"""Measure merge and audit of many rows: time, resident memory, recall of planted near-duplicates, false removals.

    python -m benchmarks.merge_scale                      10,000 and 1,000,000 rows, the index off, in memory, on disk

Corpus and ledgers are synthetic: each pair has 40 + 10 random words out of 20,000, in 16 shards. Two rows in a hundred
repeat an earlier one with one or two words changed, at a Jaccard index of at least 0.8, computed from their texts. Each
merge runs in its own process, whose peak resident memory is read from the kernel. Target: a million rows within 240 s
with the index; additional memory over 10,000 rows of less than 100 MB without and at most 2 GB with the index; recall
at least 0.95; at most 0.1% of the other rows removed.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.memory import resident_mib
from config.settings import CorpusSettings, DuplicatesSettings
from safer_instruct.dataset.audit import audit
from safer_instruct.dataset.merge import merge
from safer_instruct.dataset.similarity import LeakageGuard, shingles
from safer_instruct.induction.ledger import shard_path
from safer_instruct.induction.ledgers import find_ledgers
from safer_instruct.induction.stages import stage_digest
from safer_instruct.text.examples import in_shard, text_id

SHARDS = 16
PLANTED_SHARE = 0.02
EXPERT = {"expert": "e", "expert_fingerprint": "f", "expert_prompt": "p", "checks": 2}
CONFIGURATIONS = {
    "induce": {
        "model": "m", "model_fingerprint": "f", "prompt": "p", "generation.temperature": 0.7, "generation.top_p": 1.0,
        "generation.max_new_tokens": 64, "generation.seed": 0, "generation.num_candidates": 1,
    },
}  # fmt: skip
CONFIGURATIONS["filter"] = {**EXPERT, "stage_before": stage_digest(CONFIGURATIONS["induce"])}
CONFIGURATIONS["respond"] = {**EXPERT, "stage_before": stage_digest(CONFIGURATIONS["filter"])}


def write_run(folder: Path, num_rows: int) -> None:
    """Write a corpus, the ledgers of a finished run over it, and the ids of the planted rows."""
    draw = random.Random(num_rows)
    vocabulary = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 9))) for _ in range(20_000)]
    ledgers = {}
    for stage, configuration in CONFIGURATIONS.items():
        for shard in range(SHARDS):
            path = shard_path(folder / "ledger", stage, shard, SHARDS)
            path.parent.mkdir(exist_ok=True)
            ledgers[stage, shard] = path.open("w")
            ledgers[stage, shard].write(json.dumps({"format": 1, "configuration": configuration}) + "\n")
    recent: list[tuple[list[str], list[str]]] = []
    with (folder / "corpus.jsonl").open("w") as corpus, (folder / "planted.txt").open("w") as planted:
        for number in range(num_rows):
            response, instruction = draw.choices(vocabulary, k=40), draw.choices(vocabulary, k=10)
            is_planted = bool(recent) and draw.random() < PLANTED_SHARE
            if is_planted:
                response, instruction = (list(words) for words in recent[draw.randrange(len(recent))])
                before = shingles(" ".join(instruction + response))
                for _ in range(draw.randint(1, 2)):
                    response[draw.randrange(40)] = draw.choice(vocabulary)
                after = shingles(" ".join(instruction + response))
                is_planted = len(before & after) / len(before | after) >= 0.8
            elif draw.random() < 0.2:
                recent.append((response, instruction))
            text, asked = " ".join(response), " ".join(instruction)
            id = text_id(text)
            planted.write(f"{id}\n" if is_planted else "")
            corpus.write(json.dumps({"response": text, "label": f"label {number % 4}"}) + "\n")
            shard = next(shard for shard in range(SHARDS) if in_shard(id, shard, SHARDS))
            induced = {"response": id, "instruction": asked, "truncated": False, "prompt_cut": False, "tokens": 90}
            verdict = {"keep": True, "reason": "keep", "label": "x", "tokens": 230, "cost": 0.0001}
            answer = {"chosen": f"I will not {asked}.", "reason": "", "tokens": 200, "cost": 0.0001}
            for stage, record in (("induce", induced), ("filter", verdict), ("respond", answer)):
                ledgers[stage, shard].write(json.dumps({"id": id, **record, "at": 1.0}) + "\n")
    for file in ledgers.values():
        file.close()


def run_here(folder: Path, what: str, index: str) -> None:
    """Run one merge or audit in this process, and print its time and memory."""
    duplicates = DuplicatesSettings(
        threshold=None if index == "off" else 0.8, index="memory" if index == "off" else index
    )
    guard = LeakageGuard(["take the red pen from the desk of the clerk"], 0.6)
    started = time.monotonic()
    if what == "merge":
        corpus = CorpusSettings(path=str(folder / "corpus.jsonl"))
        merged = merge(
            corpus, find_ledgers(folder / "ledger"), folder, guard=guard, duplicates=duplicates, format="all"
        )
        num_rows = merged.num_rows
    else:
        report = audit(str(folder / "si.jsonl"), guard=guard, duplicates=duplicates, max_same_chosen=None, output=None)
        num_rows = report["rows"]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    took = {"seconds": round(time.monotonic() - started, 1), "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1)}
    print(json.dumps({**took, "peak_mb": round(resident_mib("VmHWM")), "rows": num_rows}))


def child(folder: Path, what: str, index: str) -> dict:
    """Do the same in a separate process, and return what it printed."""
    command = [sys.executable, "-m", "benchmarks.merge_scale", "--here", str(folder), what, index]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def quality(folder: Path) -> dict:
    """Return the recall of planted rows, and the share of other rows that were removed, of the last merge."""
    planted = set((folder / "planted.txt").read_text().split())
    kept, num_rows = set(), 0
    with (folder / "si.jsonl").open() as lines:
        kept = {json.loads(line)["id"] for line in lines}
    with (folder / "corpus.jsonl").open() as lines:
        num_rows = sum(1 for _ in lines)
    removed_others = (num_rows - len(planted)) - len(kept - planted)
    recall = 1 - len(kept & planted) / len(planted)
    return {"planted": len(planted), "recall": round(recall, 4), "false_removals": removed_others / num_rows}


def main() -> None:
    """Print the table; write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--index", nargs="+", default=["off", "memory", "disk"])
    parser.add_argument("--folder", type=Path, help="folder of the rows; default: a temporary one")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/merge_scale.json"))
    parser.add_argument("--here", nargs=3, metavar=("FOLDER", "WHAT", "INDEX"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        run_here(Path(options.here[0]), *options.here[1:])
        return
    results = []
    print(
        f"{'rows':>9} {'what':>6} {'index':>7} {'seconds':>8} {'cpu s':>7} {'peak MB':>8} {'recall':>7} {'false %':>8}"
    )
    for num_rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            write_run(Path(name), num_rows)
            for index in options.index:
                for what in ("merge", "audit"):
                    result = {"rows_in": num_rows, "what": what, "index": index, **child(Path(name), what, index)}
                    if what == "merge" and index != "off":
                        result |= quality(Path(name))
                    results.append(result)
                    found = f"{result.get('recall', '-'):>7} {100 * result.get('false_removals', 0):>8.4f}"
                    took = f"{result['seconds']:>8} {result['cpu_seconds']:>7} {result['peak_mb']:>8}"
                    print(f"{num_rows:>9} {what:>6} {index:>7} {took} {found}", flush=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
