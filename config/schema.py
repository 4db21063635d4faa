"""Turn a command line into a settings dataclass. Only this module and `overrides.py` use Hydra's composition.

An entrypoint reads its command before it imports torch, and runs it afterwards:

    if __name__ == "__main__":
        command = read_command("config", TrainConfig, check_train)
    import torch
    ...
    if __name__ == "__main__":
        run_command(command, main)
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
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
from config.console import open_console, visible
from config.errors import SaidElsewhere, UserError, machine_faults
from config.help import short_help
from config.overrides import CONFIG_DIR, PROGRAMS, Reader, group_options, one_line, own_groups
from config.rules import MISSING, Fault, is_below
from config.settings import LOSSES, EvaluateConfig, InduceConfig, TrainConfig
from config.spelling import listed_datasets

USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130  # 128 + SIGINT, as in shells
SPIN_COUNT = "10000"  # libgomp's default is 300,000
MAX_NAME_CHARS = 180  # well below the limit of 255 bytes of a file name
ConfigT = TypeVar("ConfigT")
CONFIGS: dict[str, type] = {"config": TrainConfig, "induce": InduceConfig, "evaluate": EvaluateConfig}


class Command(NamedTuple):
    """A command line without mistakes."""

    config_name: str
    arguments: list[str]  # the command line, spelled for Hydra
    swept: list[str]  # keys with several values
    configs: list[Any]  # the settings of each run: one, or one per point of a sweep


@cache
def register_schemas() -> None:
    """Register the dataclasses with Hydra; YAML files name them as `/schema/train@_here_`, `/schema/loss/dpo@_here_`.

    They are under `schema/`, because Hydra would offer a schema inside a real group as one of its choices.
    """
    nodes: dict[str, type] = {
        "train": TrainConfig,
        "induce": InduceConfig,
        "evaluate": EvaluateConfig,
        "expert/rules": settings.RulesExpertSettings,
        "expert/local": settings.LocalExpertSettings,
        "expert/openai": settings.OpenAIExpertSettings,
        "expert/guard": settings.GuardExpertSettings,
        "expert/strongreject": settings.StrongRejectSettings,
        "expert/refusals": settings.RefusalsExpertSettings,
        **{f"loss/{name}": kind for name, kind in LOSSES.items()},
    }
    for name, node in nodes.items():
        group, _, leaf = f"schema/{name}".rpartition("/")
        ConfigStore.instance().store(group=group, name=leaf, node=node)


def to_dataclass(config: DictConfig) -> Any:
    """Convert a composed config to the dataclass that its schema names, with interpolations resolved.

    Mandatory values that are not set stay `"???"`, so that a later check can list all of them.

    Raises:
        OmegaConfBaseException: An interpolation cannot be resolved.
    """
    kind = OmegaConf.get_type(config)
    values: dict[str, Any] = {}
    for key in [field.name for field in fields(kind)] if is_dataclass(kind) else config:  # leaves out Hydra's own keys
        value = MISSING if OmegaConf.is_missing(config, key) else config[key]
        if isinstance(value, DictConfig):
            value = to_dataclass(value)
        elif isinstance(value, ListConfig):
            value = OmegaConf.to_container(value, resolve=True)
        values[str(key)] = value
    return kind(**values) if is_dataclass(kind) else values


def compose_config(config_name: str, overrides: list[str]) -> Any:
    """Compose overrides to a settings dataclass without checking its values, for tests and notebooks.

    Raises:
        UserError: Lists everything that is wrong with the overrides.
    """
    return compose_configs(config_name, overrides)[0]


def compose_configs(config_name: str, overrides: list[str], *, multirun: bool = False) -> list[Any]:
    """Compose the settings of every point of a sweep, as `compose_config` does for one command."""
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        read = Reader(config_name, CONFIGS[config_name], overrides, multirun=multirun)
    if read.faults:
        raise UserError("\n".join(read.faults))
    return [to_dataclass(point.config) for point in read.points]


def read_command(config_name: str, config_class: type[ConfigT], check: Callable[[ConfigT], list[Fault]]) -> Command:
    """Read the command line in `sys.argv`; exit with status 2 and one message if anything is wrong with it.

    Flags that need no run (`--help`, `--cfg job`, Hydra's other flags) are handled here, and the process exits.
    """
    open_console()
    register_schemas()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # otherwise Hydra shortens tracebacks
    if "OMP_WAIT_POLICY" not in os.environ:
        # OpenMP threads busy-wait for each other. If another process occupies a core, they keep the others from the
        # very thread that they wait for. With this setting, read when torch is imported later, they sleep after a
        # fraction of a millisecond.
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    if "--help=all" in sys.argv:
        print(_all_keys(config_name))
        sys.exit()
    arguments, unknown = get_args_parser().parse_known_args()
    # The first two would run another config than the checked one; the last one loads a pickle.
    if not_ours := [name for name in ("config_name", "config_path", "experimental_rerun") if vars(arguments)[name]]:
        flag = not_ours[0].replace("_", "-")
        _print_error(
            f"--{flag} is not for this program: its settings are config/{config_name}.yaml; --config-dir adds some"
        )
        sys.exit(USER_ERROR_STATUS)
    if arguments.help:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            groups = {group: group_options(group) for group in own_groups(config_name)}
        print(short_help(PROGRAMS[config_name], config_class, groups))
        sys.exit()
    if arguments.hydra_help or arguments.shell_completion:
        run_command(Command(config_name, sys.argv[1:], [], []), lambda config: None)
        sys.exit()
    shows = arguments.cfg or arguments.info
    search = [f"hydra.searchpath=[file://{Path(arguments.config_dir).resolve()}]"] if arguments.config_dir else []
    try:
        with machine_faults(), initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            words = [*arguments.overrides, *unknown]
            read = Reader(config_name, config_class, words, multirun=arguments.multirun, search=search)
            configs = _checked_configs(read, None if shows else check)
    except UserError as error:  # a path of 5,000 letters
        _print_error(str(error))
        sys.exit(USER_ERROR_STATUS)
    flags = [text for text in sys.argv[1:] if text not in arguments.overrides]
    command = Command(config_name, flags + read.arguments, read.swept, configs)
    if shows:
        run_command(command, lambda config: None)
        sys.exit()
    return command


def _checked_configs(read: Reader, check: Callable[[Any], list[Fault]] | None) -> list[Any]:
    """Return the settings of each point; if any word or value is wrong, print all errors and exit."""
    errors = dict.fromkeys(read.faults, "")
    configs = []
    for point in read.points:
        at = f" (at {point.swept})" if point.swept else ""
        try:
            configs.append(to_dataclass(point.config))
        except OmegaConfBaseException as error:
            errors.setdefault(one_line(error), at)
            continue
        for fault in check(configs[-1]) if check else ():
            # A refused word left its default in place; a fault of that default would only confuse the user.
            if not any(is_below(key, point.refused) for key in (fault.key, *fault.others)):
                errors.setdefault(fault.message, at)
    if errors:
        heading = "one error" if len(errors) == 1 else f"{len(errors)} errors"
        lines = [f"  - {message}{at}" for message, at in errors.items()]
        _print_error("\n".join([f"{heading} in this command, nothing was started:", *lines]))
        sys.exit(USER_ERROR_STATUS)
    return configs


def run_command(command: Command, main: Callable[[Any], Any]) -> None:
    """Run `main(config)` for a command, or for each point of a sweep (`-m`), and return its result to the sweeper.

    A `UserError` from `main` is printed without a traceback (status 2; the other points of a sweep still run). Ctrl-C
    prints one line (status 130). Any other exception is a bug and keeps its traceback (status 1).
    """
    # Show only the warnings of libraries, which log every request, font and table; Hydra logs the points of a sweep.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for told in ("safer_instruct", "hydra", "hydra_plugins"):
        logging.getLogger(told).setLevel(logging.INFO)
    sys.argv[1:] = command.arguments  # sys.orig_argv keeps the command as typed
    failed, started_by = False, os.getpid()

    def run(composed: DictConfig) -> Any:
        nonlocal failed
        try:
            with machine_faults():
                composed = listed_datasets(composed, HydraConfig.get().overrides.task)
                return main(_place(to_dataclass(composed), _sweep_point(command.swept)))
        except UserError as error:
            if not isinstance(error, SaidElsewhere):
                _print_error(str(error))
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                sys.exit(USER_ERROR_STATUS)
            failed = True
            searches = HydraConfig.get().runtime.choices.get("hydra/sweeper") == "optuna"
            if searches or os.getpid() != started_by:  # searches and launchers see a failure only as an exception
                raise
        except KeyboardInterrupt:
            _print_error("interrupted; rerun the same command to resume from what was saved")
            sys.exit(INTERRUPTED_STATUS)

    try:
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=command.config_name)(run)()
    except (UserError, HydraException) as error:  # of the first point that failed in a launcher's process; of a flag
        _print_error(str(error))
        failed = True
    except ValueError:
        if not failed:
            raise
        _print_error("no point of the search finished")  # so Optuna has no best point, and raises ValueError
    if failed:
        sys.exit(USER_ERROR_STATUS)


def _sweep_point(swept: list[str]) -> str:
    """Return this point's swept overrides as a folder name, such as `loss.beta=0.05,seed=1`; "" for a single run."""
    job = HydraConfig.get()
    if job.mode != RunMode.MULTIRUN:
        return ""
    parsed = [OverridesParser.create().parse_override(text) for text in job.overrides.task]
    point = [f"{one.key_or_group}={one.get_value_element_as_str()}" for one in parsed if one.key_or_group in swept]
    name = quote(",".join(point) or f"point={job.job.num}", safe="=,.+-_[]:~")
    if len(name) > MAX_NAME_CHARS:  # the hash keeps one folder per point
        name = name[: MAX_NAME_CHARS - 13] + "-" + hashlib.blake2b(name.encode(), digest_size=6).hexdigest()
    return name


def _place(config: Any, sweep_point: str) -> Any:
    """Fill in the run dir of `train.py`; each point of a sweep gets its own folder inside the given one."""
    if isinstance(config, TrainConfig):
        run_dir = config.run_dir or config.local_run_dir or str(Path("runs") / config.exp_name)
        return replace(config, run_dir=str(Path(run_dir) / sweep_point))
    return replace(config, output=str(Path(config.output) / sweep_point))


def _print_error(message: str) -> None:
    print(f"{Path(sys.argv[0]).name}: {visible(message)}", file=sys.stderr, flush=True)


def _all_keys(config_name: str) -> str:
    """Return every key of a program with its default, as YAML."""
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = compose(config_name)
    return f"# ??? must be set; what each key means: docs/configuration.md\n{OmegaConf.to_yaml(config).rstrip()}"
