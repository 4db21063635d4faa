"""Kill induction (`kill -9`) at random moments: is no row lost or repeated, and is the dataset the same?

    python -m benchmarks.kill_induction --kills 50                  one run, killed 50 times
    python -m benchmarks.kill_induction --shards 1 3 16 --kills 5   the same corpus in several ways, 5 kills per shard

`induce.py` runs in a separate process, with the model of the quick start and an expert on loopback that counts its good
answers by row (tests/faulty_server.py). Each process is killed after a random number of further good answers or ledger
rows, and then restarted. Target: 0 rows lost, 0 repeated in a ledger, 0 finished calls of the expert repeated (except
those in flight at a kill), and the same bytes of `si.jsonl` for every number of shards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from safer_instruct.induction.ledger import scan_records
from tests.faulty_server import FaultyServer, faulty_server

CONCURRENCY = 4
ROOT = Path(__file__).resolve().parents[1]


def write_corpus(path: Path, num_rows: int) -> None:
    """Write responses whose row the counting server can read from the expert's prompt (the word after `item`)."""
    rows = [
        {"id": f"r{i}", "response": f"Take item r{i} from the shop at night, and hide it.", "label": "ab"[i % 2]}
        for i in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(folder: Path, corpus: Path, url: str, shard: tuple[int, int]) -> list[str]:
    """Return the command of one shard."""
    return [
        sys.executable, str(ROOT / "induce.py"), f"corpus.path={corpus}", "corpus.id_column=id", "model=tiny",
        "expert=openai", "expert.model=m", f"expert.base_url={url}", "expert.api_key_env=BENCHMARK_KEY",
        f"expert.concurrency={CONCURRENCY}", f"output={folder}", "generation.max_new_tokens=24", "device=cpu",
        "generation.temperature=0.7", "generation.max_batch_tokens=600", "duplicates.threshold=null",
        f"shard.index={shard[0]}", f"shard.count={shard[1]}",
    ]  # fmt: skip


def num_records(folder: Path) -> int:
    """Return the number of lines of all ledgers."""
    return sum(path.read_bytes().count(b"\n") for path in (folder / "ledger").glob("*.jsonl"))


def run_with_kills(arguments: list[str], folder: Path, kills: int, draw: random.Random, most: int) -> int:
    """Start and kill the command repeatedly, each time after a random number of rows, then let it end; return kills."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "BENCHMARK_KEY": "none", "NO_PROXY": "127.0.0.1"}
    done = 0
    for _ in range(kills):
        wanted = num_records(folder) + draw.randint(0, most)
        process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and num_records(folder) < wanted:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        done += process.wait() == -signal.SIGKILL
    subprocess.run(arguments, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return done


def check(folder: Path, server: FaultyServer, num_rows: int, kills: int) -> dict:
    """Count rows lost and repeated in the ledgers, and calls beyond one per row and paid stage."""
    ids: dict[str, Counter[str]] = {}
    kept = 0
    for path in sorted((folder / "ledger").glob("*.jsonl")):
        stage = ids.setdefault(path.name.split("-")[0], Counter())
        for record, _ in scan_records(path):
            stage[record["id"]] += 1
            kept += record.get("keep", False)
    asked = sum(
        verdict.get("tokens", 0) > 0
        for path in (folder / "ledger").glob("filter-*")
        for verdict, _ in scan_records(path)
    )
    return {
        "kills": kills,
        "rows_lost": num_rows - len(ids["induce"]) + num_rows - len(ids["filter"]) + kept - len(ids["respond"]),
        "rows_twice": sum(count - 1 for stage in ids.values() for count in stage.values()),
        "expert_answers_needed": asked + kept,
        "answers_made_again": sum(server.good.values()) - asked - kept,
        "in_flight_at_the_kills_at_most": kills * CONCURRENCY,
        "dataset": hashlib.sha256((folder / "si.jsonl").read_bytes()).hexdigest()[:16],
        "pairs": (folder / "si.jsonl").read_bytes().count(b"\n"),
    }


def measure(num_rows: int, count: int, kills: int, seed: int) -> dict:
    """Run one corpus in `count` shards, in random order, each killed `kills` times."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name, faulty_server({}, latency=0.02) as (url, server):
        folder, corpus = Path(name) / "out", Path(name) / "corpus.jsonl"
        write_corpus(corpus, num_rows)
        order = list(range(count))
        draw.shuffle(order)
        killed = 0
        most = max(2, 3 * num_rows // count // max(1, kills))
        for index in order:
            killed += run_with_kills(command(folder, corpus, url, (index, count)), folder, kills, draw, most)
        if count > 1:
            merge = [*command(folder, corpus, url, (0, count)), "stage=merge"]
            subprocess.run(merge, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "BENCHMARK_KEY": "none"})
        return {"shards": count, **check(folder, server, num_rows, killed)}


def main() -> None:
    """Print the table; write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--shards", type=int, nargs="+", default=[1])
    parser.add_argument("--kills", type=int, default=50, help="kills of each shard")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/kill_induction.json"))
    options = parser.parse_args()
    results = []
    for count in options.shards:
        results.append(measure(options.rows, count, options.kills, options.seed))
        print(json.dumps(results[-1]), flush=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
