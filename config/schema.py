"""From a command line to a settings dataclass: Hydra is used here and nowhere below the entrypoints.

`run_entrypoint` checks every override and every value first and prints all mistakes together (exit status 2), then
lets Hydra run the command, or each point of a sweep (`-m`), with the plain dataclass of `config/settings.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from config import settings
from config.errors import SaidElsewhere, UserError
from config.overrides import CheckedOverrides, all_groups, check_overrides, group_options
from config.settings import MISSING, EvaluateConfig, InduceConfig, TrainConfig

CONFIG_DIR = Path(__file__).resolve().parent
USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130  # 128 + SIGINT, as shells have it
MAX_NAME_CHARS = 180  # a file name holds 255 bytes

ConfigT = TypeVar("ConfigT", TrainConfig, InduceConfig, EvaluateConfig)


def register_schemas() -> None:
    """Gives Hydra the dataclasses: YAML files name them as `/schema/train@_here_`, `/schema/loss/preference@_here_`.

    They lie under `schema/`, because a schema inside a real group would be offered as one of its choices.
    """
    store = ConfigStore.instance()
    nodes: dict[str, type] = {
        "train": settings.TrainConfig,
        "induce": settings.InduceConfig,
        "evaluate": settings.EvaluateConfig,
        "loss/likelihood": settings.LikelihoodLossSettings,
        "loss/preference": settings.PreferenceLossSettings,
        "expert/rules": settings.RulesExpertSettings,
        "expert/local": settings.LocalExpertSettings,
        "expert/openai": settings.OpenAIExpertSettings,
    }
    for name, node in nodes.items():
        group, _, leaf = f"schema/{name}".rpartition("/")
        store.store(group=group, name=leaf, node=node)


def to_dataclass(config: DictConfig) -> Any:
    """The composed config as the dataclass that its schema names, interpolations resolved.

    Mandatory values that are not set stay `"???"`, so that `config/checks.py` can list all of them.

    Raises:
        OmegaConfBaseException: an interpolation that cannot be resolved.
    """
    values: dict[str, Any] = {}
    for key in config:
        value = MISSING if OmegaConf.is_missing(config, key) else config[key]
        if isinstance(value, DictConfig):
            value = to_dataclass(value)
        elif isinstance(value, ListConfig):
            value = OmegaConf.to_container(value, resolve=True)
        values[str(key)] = value
    kind = OmegaConf.get_type(config)
    return kind(**values) if is_dataclass(kind) else values


def compose_config(config_name: str, overrides: list[str]) -> Any:
    """The dataclass that a command line composes to, unchecked: for tests and notebooks.

    Raises:
        UserError: everything that is wrong with the overrides.
    """
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        checked = check_overrides(config_name, overrides, multirun=False)
        if checked.errors:
            raise UserError("\n".join(checked.errors))
        return to_dataclass(compose(config_name, overrides=checked.points[0]))


def run_entrypoint(
    config_name: str,
    config_class: type[ConfigT],
    check: Callable[[ConfigT], list[str]],
    main: Callable[[ConfigT], None],
) -> None:
    """Runs `main(config)` for the command line in `sys.argv`, and for each point of a sweep (`-m`).

    Before that, everything that is wrong with the overrides or found by `check` is printed as one message, and the
    process exits with status 2. A `UserError` of `main` is printed without a traceback (status 2; the other points of
    a sweep still run); Ctrl-C is answered by one line (status 130); any other exception is a defect and keeps its
    traceback (status 1).

    Args:
        config_name: `config/<config_name>.yaml`, whose schema is `config_class`.
        config_class: the settings dataclass of this entrypoint.
        check: finds values out of range and values that do not fit each other; one message each.
        main: the work. `run_dir` (train) or `output` differ between the points of a sweep.
    """
    register_schemas()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra shortens tracebacks otherwise
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    arguments, unknown = get_args_parser().parse_known_args()
    if arguments.help:
        print(_help(config_name, config_class))
        return
    inspects = arguments.cfg or arguments.info or arguments.hydra_help or arguments.shell_completion
    swept_keys: list[str] = []
    if not inspects:
        checked = _check_command(config_name, check, arguments, unknown)
        swept_keys = checked.swept_keys
        flags = [text for text in sys.argv[1:] if text not in arguments.overrides]
        sys.argv[1:] = flags + checked.overrides  # the whole command stays in sys.orig_argv
    failed = False

    def run(composed: DictConfig) -> None:
        nonlocal failed
        try:
            main(_place(to_dataclass(composed), _sweep_point(swept_keys)))
        except UserError as error:
            if not isinstance(error, SaidElsewhere):
                _print_error(str(error))
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                sys.exit(USER_ERROR_STATUS)
            failed = True
        except KeyboardInterrupt:
            _print_error("interrupted; the same command goes on from what was saved")
            sys.exit(INTERRUPTED_STATUS)

    hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(run)()
    if failed:
        sys.exit(USER_ERROR_STATUS)


def _check_command(
    config_name: str, check: Callable[[Any], list[str]], arguments: argparse.Namespace, unknown: list[str]
) -> CheckedOverrides:
    """Checks overrides and values of all points of the command; prints all errors and exits if there are any."""
    extra = f"hydra.searchpath=[file://{Path(arguments.config_dir).resolve()}]" if arguments.config_dir else None
    overrides = arguments.overrides + unknown + ([extra] if extra else [])
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        checked = check_overrides(config_name, overrides, multirun=arguments.multirun)
        errors = {error: "" for error in checked.errors}
        for point in checked.points:
            names = ", ".join(text for text in point if text.split("=")[0].lstrip("+") in checked.swept_keys)
            for error in _check_point(config_name, point, check, checked.bad_keys):
                errors.setdefault(error, f" (at {names})" if names else "")
    if errors:
        lines = [error + where for error, where in errors.items()]
        heading = "one error" if len(lines) == 1 else f"{len(lines)} errors"
        _print_error(f"{heading} in this command, nothing was started:\n" + "\n".join(f"  - {line}" for line in lines))
        sys.exit(USER_ERROR_STATUS)
    if extra:
        checked.overrides.remove(extra)
    return checked


def _check_point(
    config_name: str, point: list[str], check: Callable[[Any], list[str]], bad_keys: set[str]
) -> list[str]:
    try:
        config = to_dataclass(compose(config_name, overrides=point))
    except (HydraException, OmegaConfBaseException) as error:
        return [] if bad_keys else [" ".join(str(error).split())]
    # A refused override left its default behind: what `check` says about that key is no news to the user.
    keys = "|".join(re.escape(key) for key in bad_keys)
    named = re.compile(rf"(^|[ (])({keys})([.=]| is not set)") if bad_keys else None
    return [error for error in check(config) if named is None or not named.search(error)]


def _sweep_point(swept_keys: list[str]) -> str:
    """`loss.beta=0.05,seed=1`: the swept overrides of this point as a folder name; empty in a single run."""
    job = HydraConfig.get()
    if job.mode != RunMode.MULTIRUN:
        return ""
    parsed = [OverridesParser.create().parse_override(text) for text in job.overrides.task]
    point = [f"{one.key_or_group}={one.get_value_element_as_str()}" for one in parsed if one.key_or_group in swept_keys]
    name = quote(",".join(point) or f"point={job.job.num}", safe="=,.+-_[]:~")
    if len(name) > MAX_NAME_CHARS:  # still one folder a point
        name = name[: MAX_NAME_CHARS - 13] + "-" + hashlib.blake2b(name.encode(), digest_size=6).hexdigest()
    return name


def _place(config: Any, sweep_point: str) -> Any:
    """Fills in the run dir of `train.py`; points of a sweep get a folder each, below the one that was named."""
    if isinstance(config, TrainConfig):
        run_dir = config.run_dir or config.local_run_dir or str(Path("runs") / config.exp_name)
        return replace(config, run_dir=str(Path(run_dir) / sweep_point))
    return replace(config, output=str(Path(config.output) / sweep_point))


def _print_error(message: str) -> None:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)


def _help(config_name: str, config_class: type[Any]) -> str:
    """The doc line of the command, its groups with their choices, and every key with its default."""
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        checked = check_overrides(config_name, [], multirun=False)
        config = compose(config_name, overrides=checked.points[0])
        groups = [group for group in all_groups() if group in config or group == "experiment"]
        choices = [f"  {group}={'|'.join(group_options(group))}" for group in groups]
    program = Path(sys.argv[0]).name
    lines = [
        str(config_class.__doc__).strip(),
        f"\nUsage: python {program} KEY=VALUE ... [-m for sweeps: KEY=A,B,C]",
        "\nGroups:",
        *choices,
        "\nKeys and defaults (??? must be set; what each means is in config/settings.py):",
        re.sub(r"^", "  ", OmegaConf.to_yaml(config).rstrip(), flags=re.MULTILINE),
    ]
    return "\n".join(lines)
