"""`safer-instruct train|induce|evaluate ...`: run one of the three programs from any folder, once installed."""

from __future__ import annotations

import os
import sys

from config.console import open_console
from config.paths import REPOSITORY

PROGRAMS = {
    "train": "reversed instruction tuning, supervised fine-tuning, preference training",
    "induce": "from a corpus of unsafe responses to preference data",
    "evaluate": "models side by side, judged and reported",
}


def main() -> None:
    """Replace this process with the program that the first argument names, and pass it the other arguments."""
    open_console()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in PROGRAMS:
        # -P: when installed, the programs are in site-packages, which must not precede the standard library.
        command = [sys.executable, "-P", "-u", str(REPOSITORY / f"{name}.py"), *sys.argv[2:]]
        os.execv(sys.executable, command)
    programs = "\n".join(f"  {program:10}{text}" for program, text in PROGRAMS.items())
    usage = f"Usage: safer-instruct PROGRAM KEY=VALUE ...\n\n{programs}\n\nsafer-instruct PROGRAM --help lists its keys"
    if name in ("-h", "--help"):
        print(usage)
    else:
        print(f"safer-instruct: there is no program {name}\n{usage}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
