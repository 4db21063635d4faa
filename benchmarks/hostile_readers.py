"""Does any damaged file cause a traceback or an endless read?

It checks the properties of `tests/hostile.py` with many more examples: each kind of file is drawn, damaged and read.

    python -m benchmarks.hostile_readers --examples 20000
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.hostile import SUBJECTS, Subject

HANG_SECONDS = 10.0  # CPU time


def attack(subject: Subject, examples: int, chosen_seed: int) -> tuple[dict[str, str], float]:
    """Return the exceptions, each with the first content that raised it, and the longest CPU time of a read."""
    found: dict[str, str] = {}
    longest = 0.0

    @seed(chosen_seed)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(subject.content)
    def check(content: bytes) -> None:
        nonlocal longest
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            try:
                subject.check(Path(folder), content)
            except Exception as error:  # of any kind, since a user would see its traceback
                found.setdefault(f"{type(error).__name__}: {str(error)[:80]}", repr(content[:200]))
        longest = max(longest, time.process_time() - start)

    check()
    return found, longest


def main() -> None:
    """Print the result for each kind of file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=20_000, help="files in all, over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tracebacks = hangs = 0
    for kind, subject in SUBJECTS.items():
        found, longest = attack(subject, options.examples // len(SUBJECTS), options.seed)
        tracebacks, hangs = tracebacks + len(found), hangs + (longest > HANG_SECONDS)
        print(f"{kind}: {len(found)} kinds of traceback, the longest read took {longest:.2f} s", flush=True)
        for error, content in found.items():
            print(f"  {error}\n    {content}")
    print(f"{options.examples} files: {tracebacks} kinds of traceback, {hangs} kinds with a hang")


if __name__ == "__main__":
    main()
