"""How much longer does the quick start take when another program has one of its two cores?

    python -m benchmarks.busy_core               # two demos: about a quarter of an hour on two idle cores

It runs `quickstart/demo.py` from an empty folder on two cores: alone, then next to a process that keeps one of them
busy. With threads that busy-wait for others this was 20 times slower (see `SPIN_COUNT` in `config/schema.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def busy(core: int) -> Iterator[None]:
    """Keep a core busy."""
    code = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def demo_seconds(folder: Path, arguments: list[str]) -> float:
    """Run the quick start into an empty folder; return its seconds."""
    command = [sys.executable, "quickstart/demo.py", "--output", str(folder), *arguments]
    started = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo_arguments", nargs="*", help="of quickstart/demo.py, behind `--`")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cores)
    with tempfile.TemporaryDirectory() as temporary:
        alone = demo_seconds(Path(temporary) / "alone", options.demo_arguments)
        with busy(cores[0]):
            beside = demo_seconds(Path(temporary) / "beside", options.demo_arguments)
    print(json.dumps({"cores": len(cores), "alone_s": alone, "beside_s": beside, "ratio": beside / alone}))


if __name__ == "__main__":
    main()
