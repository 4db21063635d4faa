"""`kill -9` of a paid stage at random moments, with a counting server: nothing lost, nothing finished asked again.

The long version, with induce.py itself, 50 kills and up to 16 shards: benchmarks/kill_induction.py.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from safer_instruct.induction.ledger import scan_records
from tests.faulty_server import faulty_server

ROWS, CONCURRENCY = 120, 4
WORKER = """
import sys
from pathlib import Path
from config.settings import OpenAIExpertSettings
from safer_instruct.text.examples import Example
from safer_instruct.experts.expert import build_expert
from safer_instruct.induction.ledger import Ledger, run_stage
from safer_instruct.induction.stages import stage_filter

settings = OpenAIExpertSettings(model="m", base_url=sys.argv[2], api_key_env="TEST_KEY", concurrency=4)
expert = build_expert(settings, None)
pairs = [
    Example(str(i), instruction=f"Take item {i} now", rejected=f"text {i}", provenance={"truncated": False})
    for i in range(int(sys.argv[3]))
]
with Ledger(Path(sys.argv[1]), {"seed": 0}, num_rows=len(pairs)) as ledger:
    run_stage(pairs, ledger, stage_filter(expert), batch_size=50)
assert "torch" not in sys.modules, "a stage without a model starts without torch"
"""


def finished(path: Path) -> Counter[str]:
    return Counter(record["id"] for record, _ in scan_records(path)) if path.is_file() else Counter()


def test_what_is_in_the_ledger_is_never_asked_again(tmp_path) -> None:
    path, draw = tmp_path / "filter.jsonl", random.Random(4)
    environment = {**os.environ, "TEST_KEY": "none", "NO_PROXY": "127.0.0.1"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    with faulty_server({"500": 0.05}, latency=0.02) as (url, server):
        command = [sys.executable, "-c", WORKER, str(path), url, str(ROWS)]
        kills, asked_before = 0, {}
        for _ in range(4):
            wanted = len(finished(path)) + draw.randint(5, 25)
            process = subprocess.Popen(command, env=environment)
            while process.poll() is None and len(finished(path)) < wanted:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
            time.sleep(0.1)  # what was under way at the server ends
            for id in finished(path):
                asked_before.setdefault(id, server.good[id])
        subprocess.run(command, env=environment, check=True)
    assert kills == 4
    assert finished(path) == Counter(str(i) for i in range(ROWS)), "no row lost, none twice"
    assert len(asked_before) >= 20
    assert {id: server.good[id] for id in asked_before} == asked_before, "finished, and asked again"
    assert server.good.total() <= ROWS + kills * CONCURRENCY, "only calls under way at a kill are made again"
