"""Checks the overrides of a command before anything runs, and says all that is wrong with them at once.

Hydra stops at the first error with a message of its own. Here every override is parsed and composed on its own, so
that `lr=abc los.beta=1 model=tinny` is answered with three lines, each with the nearest name that exists.
Used by `config/schema.py` only.
"""

from __future__ import annotations

import difflib
import itertools
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, OverrideType, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

# What people write who come from other trainers; difflib would never find these.
OTHER_NAMES = {
    "learning_rate": "lr",
    "num_train_epochs": "n_epochs",
    "num_epochs": "n_epochs",
    "epochs": "n_epochs",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "scheduler": "lr_scheduler",
    "lr_scheduler_type": "lr_scheduler",
    "optim": "optimizer",
    "beta": "loss.beta",
    "output_dir": "run_dir",
    "model_name_or_path": "model.name_or_path",
    "max_seq_length": "max_length",
    "gradient_checkpointing": "activation_checkpointing",
}


@dataclass
class CheckedOverrides:
    """What became of the overrides of one command.

    `points` holds one list of overrides for each run: one, or all points of a sweep. `bad_keys` are the keys whose
    override was refused, `swept_keys` those with several values.
    """

    points: list[list[str]] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)  # as Hydra must be given them, sweeps unexpanded
    errors: list[str] = field(default_factory=list)
    bad_keys: set[str] = field(default_factory=set)
    swept_keys: list[str] = field(default_factory=list)


def check_overrides(config_name: str, arguments: list[str], *, multirun: bool) -> CheckedOverrides:
    """Parses and composes each of `arguments`; Hydra must be initialised with the config directory.

    The points that come back compose, whether or not there were errors: refused overrides are left out of them.
    """
    checked = CheckedOverrides()
    parsed = [override for text in arguments if (override := _parse(text, checked)) is not None]
    groups = [override for override in parsed if _is_group(override.key_or_group)]
    values = [override for override in parsed if not _is_group(override.key_or_group)]

    base, variants = [], []
    for override in groups:
        good = [text for text in _expand(override, checked, multirun) if _check_group(override, text, checked)]
        if good:
            base.append(good[0])
            variants.append(good)
            checked.overrides.append(override.input_line or "")
    config, unset = _fill_mandatory_groups(config_name, base, checked)
    variants += [[text] for text in unset.values()]

    values = [override for override in values if override.key_or_group.split(".")[0] not in unset]
    expanded = [(override, _expand(override, checked, multirun)) for override in values]
    spelled = [[_spell_addition(config, override, text) for text in texts] for override, texts in expanded]
    # The quick answer for a command without mistakes: one composition instead of one for each override.
    all_compose = _composes(config_name, base + [text for texts in spelled for text in texts[:1]])
    for (override, texts), there in zip(expanded, spelled, strict=True):
        surely_good = all_compose and len(texts) == 1 and override.type == OverrideType.CHANGE
        good = [
            text
            for said, text in zip(texts, there, strict=True)
            if surely_good or _check_value(config_name, base, config, override, said, text, checked)
        ]
        if good:
            checked.bad_keys.discard(override.key_or_group)  # other values of a sweep are to be checked further
            variants.append(good)
            checked.overrides.append(_joined(good) if there != texts else override.input_line or "")
            if len(texts) > 1:
                checked.swept_keys.append(good[0].lstrip("+").split("=")[0])
    checked.points = [list(point) for point in itertools.product(*variants)]
    return checked


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The entry of `names` that `name` was probably meant to be, or None."""
    choices = sorted(names)
    found = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if not found:  # `beta` for `loss.beta`, `path` for `datasets.si.path`
        leaves = {choice.split(".")[-1]: choice for choice in reversed(choices)}
        found = [leaves[leaf] for leaf in difflib.get_close_matches(name.split(".")[-1], leaves, n=1, cutoff=0.75)]
    return found[0] if found else None


def group_options(group: str) -> list[str]:
    """The choices of a config group: the YAML files of `config/<group>/`."""
    return [option for option in _loader().get_group_options(group, ObjectType.CONFIG) if not option.startswith("_")]


def all_groups() -> list[str]:
    """The config groups of this repository (Hydra's own and the schemas left out)."""
    return [group for group in _loader().list_groups("") if group not in ("hydra", "schema")]


def all_keys(config: Any, prefix: str = "") -> list[str]:
    """The dotted names of all keys of a composed config, inner ones included."""
    keys: list[str] = []
    if not isinstance(config, DictConfig):
        return keys
    for key in map(str, config):
        name = f"{prefix}{key}"
        keys.append(name)
        if not OmegaConf.is_missing(config, key) and not OmegaConf.is_interpolation(config, key):
            keys += all_keys(config[key], name + ".")
    return keys


def _loader() -> Any:
    return GlobalHydra.instance().config_loader()


def _parse(text: str, checked: CheckedOverrides) -> Override | None:
    if text.startswith("-"):
        checked.errors.append(f"{text}: unknown flag; overrides have no dashes: {text.lstrip('-').replace(' ', '=')}")
        return None
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        override = None
    if override is None or not override.key_or_group:  # `lr = 1` is three arguments; Hydra reads `=` as an empty key
        hint = "write key=value; quote a value that holds spaces, commas, brackets or quotes, such as \"key='a, b'\""
        checked.errors.append(f"{text}: not a valid override: {hint}")
        return None
    return override


def _composes(config_name: str, overrides: list[str]) -> bool:
    try:
        compose(config_name, overrides=overrides)
    except HydraException:
        return False
    return True


def _is_group(key: str) -> bool:
    return bool(_loader().get_group_options(key, ObjectType.CONFIG))


def _expand(override: Override, checked: CheckedOverrides, multirun: bool) -> list[str]:
    """The single-valued overrides that a sweep such as `lr=1e-5,1e-6` stands for; else the override itself."""
    value = override.value()
    if isinstance(value, (Glob, IntervalSweep)):
        checked.swept_keys.append(override.key_or_group)
        checked.overrides.append(override.input_line or "")
        return []  # only the sweeper knows the values
    if not override.is_sweep_override():
        return [override.input_line or ""]
    key = override.key_or_group
    points = [f"{override.get_key_element()}={text}" for text in override.sweep_string_iterator()]
    if not multirun:
        values = (override.input_line or "").split("=", 1)[1]
        checked.errors.append(
            f"{override.input_line}: several values need -m (one run each); a list is written {key}=[{values}]"
        )
        checked.bad_keys.add(key)
        return []
    checked.swept_keys.append(key)
    return points


def _check_group(override: Override, text: str, checked: CheckedOverrides) -> bool:
    """Says whether the choices named by `text` exist, and reports those that do not."""
    group = override.key_or_group
    single = OverridesParser.create().parse_override(text)
    value = single.value()
    if override.is_delete() or value is None:
        return True
    chosen = value if isinstance(value, list) else [value]
    names = [name.text if isinstance(name, QuotedString) else str(name) for name in chosen]
    options = group_options(group)
    bad = [name for name in names if name not in options]
    for name in bad:
        guess = nearest(name, options)
        meant = f"; did you mean {guess}?" if guess else ""
        checked.errors.append(f"{text}: {group} has no choice {name!r}{meant} Choices: {', '.join(options)}")
        checked.bad_keys.add(group)
    return not bad


def _fill_mandatory_groups(
    config_name: str, base: list[str], checked: CheckedOverrides
) -> tuple[DictConfig, dict[str, str]]:
    """Adds a choice to `base` for each mandatory group that has none, so that the rest can be checked.

    Returns what `base` then composes to, and group -> override that was added; reports the groups, unless a wrong
    choice of theirs was reported.
    """
    added: dict[str, str] = {}
    while True:
        try:
            return compose(config_name, overrides=base), added
        except HydraException as error:
            if "You must specify" not in str(error):
                raise
            group = str(error).split("'")[1]
        options = group_options(group)
        if group not in checked.bad_keys:
            checked.errors.append(f"{group} is not set: write {group}=CHOICE. Choices: {', '.join(options)}")
        checked.bad_keys.add(group)
        added[group] = f"{group}={options[0]}"
        base.append(added[group])


def _spell_addition(config: DictConfig, override: Override, text: str) -> str:
    """`models.base.path=x`, an entry of a dictionary with free names, as Hydra wants it: `++models={base:{path:x}}`.

    Which dictionaries are free is known from the schema (`optimizer_args`, `models`, `datasets`, ...). A name that
    resembles one that exists, or that is a choice of the group and not selected, is left for the error it is.
    """
    if override.is_add() or override.is_force_add() or override.is_delete():
        return text
    parts = override.key_or_group.split(".")
    value = text.split("=", 1)[1]
    node: Any = config
    for depth, part in enumerate(parts):
        if not isinstance(node, DictConfig):
            return text
        if part not in node:
            known = [str(key) for key in node] + group_options(".".join(parts[:depth]))
            if is_dataclass(OmegaConf.get_type(node)) or nearest(part, known) is not None:
                return text
            nested = "".join(f"{{{name}:" for name in parts[depth:]) + value + "}" * (len(parts) - depth)
            return f"++{'.'.join(parts[:depth])}={nested}"
        if OmegaConf.is_missing(node, part) or OmegaConf.is_interpolation(node, part):
            return text
        node = node[part]
    is_free = isinstance(node, DictConfig) and not is_dataclass(OmegaConf.get_type(node))
    return "++" + text if is_free else text  # `optimizer_args={betas:[0.9,0.95]}`


def _joined(texts: list[str]) -> str:
    """One override that sweeps over the values of several: `k=a`, `k=b` -> `k=a,b`."""
    return texts[0] + "".join("," + text.split("=", 1)[1] for text in texts[1:])


def _check_value(
    config_name: str,
    base: list[str],
    config: DictConfig,
    override: Override,
    text: str,
    spelled: str,
    checked: CheckedOverrides,
) -> bool:
    """Composes one override, `spelled` for Hydra, on top of the groups; reports what is wrong with `text`."""
    key = override.key_or_group
    try:
        composed = compose(config_name, overrides=[*base, spelled])
    except HydraException as error:
        cause = error.__cause__
        if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
            checked.errors.append(f"{text}: {_unknown_key(config_name, base, config, key)}")
        elif isinstance(cause, ValidationError):
            checked.errors.append(f"{text}: {_expected_type(config, key)}")
        else:
            checked.errors.append(f"{text}: {' '.join(str(error).split())}")
        checked.bad_keys.add(key)
        return False
    # Hydra's + and ~ open a typed config; no module would ever read the key, or the default would come back.
    if (override.is_add() or override.is_force_add()) and not key.startswith("hydra"):
        parent = OmegaConf.select(composed, key.rpartition(".")[0]) if "." in key else composed
        if key not in all_keys(config) and is_dataclass(OmegaConf.get_type(parent)):
            checked.errors.append(f"{text}: {_unknown_key(config_name, base, config, key)}")
            checked.bad_keys.add(key)
            return False
    if override.is_delete() and is_dataclass(OmegaConf.get_type(_parent(config, key))):
        checked.errors.append(f"{text}: {key} cannot be removed; set it to null or to another value")
        checked.bad_keys.add(key)
        return False
    return True


def _parent(config: DictConfig, key: str) -> Any:
    return OmegaConf.select(config, key.rpartition(".")[0]) if "." in key else config


def _unknown_key(config_name: str, base: list[str], config: DictConfig, key: str) -> str:
    group = key.split(".")[0]
    chosen = [text for text in base if text.startswith(f"{group}=")]
    with_key = [option for option in group_options(group) if _has_key(config_name, base, group, option, key)]
    if chosen and with_key:
        return f"{chosen[-1]} has no key {key}; it belongs to {', '.join(f'{group}={option}' for option in with_key)}"
    name = key.split(".")[1] if "." in key else ""
    if name in group_options(group) and OmegaConf.select(config, f"{group}.{name}") is None:
        return f"{group} {name} is not selected: write {group}=[...,{name}]"
    keys = all_keys(config)
    guess = OTHER_NAMES.get(key) or nearest(key, keys)
    parent = key.rpartition(".")[0]
    known = [other.rpartition(".")[2] for other in keys if other.rpartition(".")[0] == parent]
    listed = f" Keys of {parent}: {', '.join(known)}" if parent and known else ""
    return f"there is no key {key}" + (f"; did you mean {guess}?" if guess else ".") + listed


def _has_key(config_name: str, base: list[str], group: str, option: str, key: str) -> bool:
    rest = [text for text in base if not text.startswith(f"{group}=")]
    try:
        return key in all_keys(compose(config_name, overrides=[*rest, f"{group}={option}"]))
    except (HydraException, OmegaConfBaseException):
        return False


def _expected_type(config: DictConfig, key: str) -> str:
    """`must be a number`, from the annotation of the field that `key` names."""
    parent = _parent(config, key)
    kind = OmegaConf.get_type(parent)
    leaf = key.rpartition(".")[2]
    hint = typing.get_type_hints(kind).get(leaf) if is_dataclass(kind) else None
    if hint is None:  # a key of a dictionary with free names, of which nothing is known but that it did not fit
        return "does not fit; see config/settings.py for what it may be"
    kinds: list[Any] = [kind for kind in typing.get_args(hint) if isinstance(kind, type)] or [hint]
    words: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "null",
    }
    if is_dataclass(kinds[0]):
        return f"is a group of keys; set one of them: {', '.join(f'{key}.{name}' for name in parent[leaf])}"
    if isinstance(OmegaConf.select(config, key, throw_on_missing=False), ListConfig):
        return f"must be a list: {key}=[...]"
    if isinstance(OmegaConf.select(config, key, throw_on_missing=False), DictConfig):
        return f"must be a dictionary: {key}={{name: value}}"
    return f"must be {' or '.join(words.get(kind, str(kind)) for kind in kinds)}"
