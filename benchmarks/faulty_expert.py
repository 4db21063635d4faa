"""How many requests and how much throughput are lost if a paid expert fails in every way? With the real client.

    python -m benchmarks.faulty_expert --rows 3000

Our server on loopback (tests/faulty_server.py, in its own process) answers each request after `--latency` seconds, or
fails: 20% 429 with Retry-After, 10% 500, 5% connection reset, 5% never, 5% broken JSON, 5% JSON of another form, 2%
empty. Target: every row ends with a verdict or a recorded abstention; requests <= 1.2 x rows / success share; rows per
second >= 60% of those without faults times the success share, including all waits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import torch

from config.settings import OpenAIExpertSettings
from safer_instruct.experts.expert import build_expert
from safer_instruct.text.examples import Example
from tests.faulty_server import FAULTS


def measure(options: argparse.Namespace, faults: dict[str, float]) -> dict:
    """Run the filter stage's calls once; return what the client saw and what the server counted."""
    flags = [flag for kind, share in faults.items() for flag in ("--fault", f"{kind}={share}")]
    latency = ["--latency", str(options.latency), "--retry-after", str(options.retry_after)]
    command = [sys.executable, "-m", "tests.faulty_server", *latency, *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        settings = OpenAIExpertSettings(
            model="m",
            base_url=f"{url}/v1",
            api_key_env="BENCHMARK_KEY",
            concurrency=options.concurrency,
            timeout_seconds=options.timeout,
        )
        expert = build_expert(settings, torch.device("cpu"))
        rows = [Example(str(i), instruction=f"Take item {i} now", rejected=f"text {i}") for i in range(options.rows)]
        started, cpu = time.monotonic(), time.process_time()
        verdicts = dict(expert.screen(rows))
        seconds, cpu = time.monotonic() - started, time.process_time() - cpu
        with urllib.request.urlopen(f"{url}/stats") as reply:
            stats = json.load(reply)
    finally:
        server.kill()
        server.wait()
    assert len(verdicts) == options.rows, "every row must end"
    return {
        "seconds": round(seconds, 1),
        "rows_per_second": round(options.rows / seconds, 1),
        "client_cpu_seconds": round(cpu, 1),
        "requests": sum(stats["counts"].values()),
        "asked_again_after_a_good_answer": sum(count - 1 for count in stats["good"].values()),
        "reasons": dict(Counter(verdict.reason for verdict in verdicts.values())),
        "server": stats["counts"],
    }


def main() -> None:
    """Print the table; write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--latency", type=float, default=0.5, help="seconds of an answer")
    parser.add_argument("--retry-after", type=float, default=1.0, help="seconds that a 429 asks to wait")
    parser.add_argument("--timeout", type=float, default=3.0, help="expert.timeout_seconds")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/faulty_expert.json"))
    options = parser.parse_args()
    os.environ.setdefault("BENCHMARK_KEY", "none")
    os.environ["NO_PROXY"] = "127.0.0.1"
    good, faulty = measure(options, {}), measure(options, FAULTS)
    success = 1 - sum(FAULTS.values())
    wasted = faulty["requests"] / (options.rows / success)
    throughput = faulty["rows_per_second"] / (good["rows_per_second"] * success)
    for name, result in (("no faults", good), ("all faults", faulty)):
        print(f"{name}: {result['rows_per_second']} rows/s, {result['requests']} requests, {result['reasons']}")
    print(f"requests / (rows / success share {success:.2f}): {wasted:.3f} (wanted: at most 1.2)")
    print(f"throughput / (without faults x success share): {throughput:.3f} (wanted: at least 0.6)")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    results = {"no_faults": good, "faults": faulty, "requests_ratio": wasted, "throughput_ratio": throughput}
    options.json.write_text(json.dumps({"options": vars(options), **results}, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
