"""evaluate.py in this process, as its command line would run it."""

from __future__ import annotations

import evaluate
from config.errors import UserError
from config.named import expand_named
from config.schema import compose_config


def run_evaluate(*arguments: str) -> None:
    """Compose, check and run; all errors of the command as one UserError. Without wandb unless it is asked for."""
    wandb = [] if any(argument.startswith("wandb.") for argument in arguments) else ["wandb.mode=disabled"]
    config = compose_config("evaluate", expand_named([*arguments, *wandb]))
    errors = evaluate.check(config)
    if errors:
        raise UserError("\n".join(errors))
    evaluate.main(config)
