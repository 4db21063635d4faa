"""evaluate.py in this process, as its command line would run it."""

from __future__ import annotations

import evaluate
from config.checks_evaluate import check_evaluate
from config.errors import UserError
from config.schema import compose_config


def run_evaluate(*arguments: str) -> None:
    """Compose, check and run; all errors of the command as one UserError. Without wandb unless it is asked for."""
    wandb = [] if any(argument.startswith("wandb.") for argument in arguments) else ["wandb.mode=disabled"]
    config = compose_config("evaluate", [*arguments, *wandb])
    errors = check_evaluate(config)
    if errors:
        raise UserError("\n".join(map(str, errors)))
    evaluate.main(config)
