"""`python held_run.py -u train.py ...` is `python -u train.py ...`, held before one step until it is asked to stop.

HOLD_AT=STEP:NAME holds the run NAME before its optimizer step STEP (from 1), once: started again it is not held.
`held-NAME` and `released-NAME` in the working directory tell where it is.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path

from config.paths import REPOSITORY
from trainers.distributed.preemption import exit_on_signals

exit_on_signals()  # as train.py does, before the imports that take seconds

from trainers.trainer import Trainer  # noqa: E402

train_step = Trainer.train_step


def held_step(trainer: Trainer, *arguments, **more):
    step, name = os.environ["HOLD_AT"].split(":")
    released = Path(f"released-{name}")
    if trainer.settings.exp_name == name and trainer.progress.updates + 1 == int(step) and not released.exists():
        Path(f"held-{name}").touch()
        while not (trainer.layout.stop or released.exists()):
            time.sleep(0.05)
        released.touch()
    return train_step(trainer, *arguments, **more)


if __name__ == "__main__":
    Trainer.train_step = held_step
    sys.argv = sys.argv[2:]
    runpy.run_path(str(REPOSITORY / sys.argv[0]), run_name="__main__")
