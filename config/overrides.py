"""Compose the words of a command line to settings, and collect everything that is wrong with the words.

Hydra stops at its first error. So Hydra composes only the groups, and every other word is merged separately:
`lr=abc los.beta=1 model=tinny` gives three faults, each with the nearest existing name.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import yaml
from hydra import compose
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from config.rules import MISSING, Fault, is_below, nearest, suggest, typed
from config.searches import PLUGINS, check_search, is_installed
from config.spelling import OTHER_NAMES, expected, free_key, listed_datasets, quoted, spell

CONFIG_DIR = Path(__file__).resolve().parent
PROGRAMS = {"config": "train.py", "induce": "induce.py", "evaluate": "evaluate.py"}
MANDATORY_GROUPS = {"config": ("loss", "model"), "induce": (), "evaluate": ()}
# Exceptions that a user's YAML file (--config-dir) can raise and that Hydra does not catch.
UNREADABLE = (
    yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError,
)  # fmt: skip


class Word(NamedTuple):
    """An override with one value; a sweep is several of them."""

    key: str  # the setting or group: `loss.beta`, `model`, `expert@second_expert`
    said: str  # as typed
    spelled: str  # as Hydra needs it
    is_group: bool


class Point(NamedTuple):
    """The composed settings of one run: the whole command, or one point of a sweep."""

    swept: str  # the words that distinguish it from the other points
    config: DictConfig
    refused: set[str]  # keys whose word was wrong, so that the config holds their default


@cache
def own_groups(config_name: str) -> list[str]:
    """Return the config groups of an entrypoint: the entries of its defaults."""
    entries: Any = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / f"{config_name}.yaml").defaults)
    groups = [group for entry in entries if isinstance(entry, dict) for group in entry]
    return [group for group in groups if not group.startswith("override ")]


def group_options(group: str, search: Sequence[str] = ()) -> list[str]:
    """Return the choices of a group, which are the YAML files of its folders; [] if there is no such group."""
    loader: Any = GlobalHydra.instance().config_loader()
    # The loader copies every schema on each call, so it is used only if `search` adds other folders.
    options = partial(loader.get_group_options, overrides=search) if search else loader.repository.get_group_options
    found = options(group.split("@")[0], ObjectType.CONFIG)
    return [option for option in found if not option.startswith("_")]


class Reader:
    """Read the overrides of one command, with Hydra initialised."""

    def __init__(
        self, config_name: str, kind: type, texts: Iterable[str], *, multirun: bool = False, search: Iterable[str] = ()
    ) -> None:
        """Read `texts` for `config/<config_name>.yaml`, whose schema is the dataclass `kind`.

        With `multirun` a word may hold several values. `search` holds overrides that add config folders to Hydra.
        """
        self._config_name, self._kind, self._search = config_name, kind, list(search)
        self.faults: dict[str, Fault] = {}  # what is wrong with the words, by message
        self.arguments: list[str] = []  # the words, spelled for Hydra
        self.swept: list[str] = []  # keys with several values, in Hydra's spelling
        self._ranges: list[str] = []  # words with a range: lr=interval(1e-6,1e-4)
        sweeps = [words for text in texts if (words := self._parse(text, multirun))]
        self._sweeping = {words[0].key for words in sweeps if len(words) > 1}
        usable = {word.key for words in sweeps for word in words}
        self._refused = {fault.key for fault in self.faults.values()} - usable
        self._bases: dict[tuple[str, ...], DictConfig] = {}
        # The composed settings of each point, without the wrong words.
        self.points = [self._compose(words) for words in itertools.product(*sweeps)]

    def _fault(self, key: str, message: str) -> None:
        self.faults.setdefault(message, Fault(key, message))

    def _parse(self, text: str, multirun: bool) -> list[Word]:
        """Return the valid values of an override as words; report the others."""
        if text.startswith("-"):
            plain = text.lstrip("-").replace(" ", "=")
            self._fault(plain.split("=")[0], f"{text}: unknown flag; overrides have no dashes: {plain}")
            return []
        try:
            override = _parsed(text)
        except (HydraException, ValueError, RecursionError):  # 5,000 digits, 500 brackets
            override = None
        if override is None or not override.key_or_group:  # `lr = 1` is three words; Hydra reads `=` as an empty key
            key, _, value = text.partition("=")
            hint = "quote a value that holds spaces, commas, brackets or quotes, such as \"key='a, b'\""
            if re.fullmatch(r"[+~]*[\w./@-]+", key) and key.isascii() and value and value[0] not in "[{'\"=, ":
                hint = f"as text: {shlex.quote(f'{key}={quoted(value)}')}"
            self._fault(key.strip(), f"{text}: not a valid override: write key=value; {hint}")
            return []
        key, name = override.key_or_group, override.get_key_element()
        if isinstance(override.value(), Glob) and not group_options(key, self._search):
            self._fault(key, f"{text}: glob chooses among the files of a group, and {key} is none")
            return []
        if isinstance(override.value(), Glob | IntervalSweep):  # the sweeper alone knows the values
            self.arguments.append(text)
            self.swept.append(key)
            self._ranges += [text] if isinstance(override.value(), IntervalSweep) else []
            return []
        if override.is_sweep_override() and not multirun:
            values = override.get_value_string()
            self._fault(key, f"{text}: several values need -m (one run each); a list is written {key}=[{values}]")
            return []
        texts = [text]
        if override.is_sweep_override():
            texts = [f"{name}={value}" for value in override.sweep_string_iterator()]
        words = [word for text in texts if (word := self._word(text)) is not None]
        if words:
            others = [word.spelled.split("=", 1)[1] for word in words[1:]]
            self.arguments.append(",".join([words[0].spelled, *others]))
        if len(words) > 1:
            self.swept.append(_parsed(words[0].spelled).key_or_group)
        return words

    def _word(self, text: str) -> Word | None:
        """Return an override with one value as a word, or report that its key or choice does not exist."""
        override = _parsed(text)
        key = override.get_key_element().lstrip("+~")
        options, free = group_options(key, self._search), free_key(self._kind, key)
        if options and not override.is_delete():
            return Word(key, text, text, True) if self._is_choice(key, text, override.value(), options) else None
        is_entry = free is not None and (len(free.names) == 1 or free.is_inner or not is_dataclass(free.entry))
        if key.startswith("hydra.") or (override.is_delete() and is_entry):
            return Word(key, text, text, False)
        if override.is_delete():
            self._fault(key, f"{text}: {key} cannot be removed; set it to null or to another value")
            return None
        spelled = None
        if free is not None:
            # A new name that resembles a choice of the group is probably a typo, so only a leading `+` adds it.
            similar = nearest(free.names[0], group_options(free.root, self._search)) if free.names else None
            if similar is None or text[0] == "+":
                spelled = spell(override, free)
            elif similar == free.names[0] and (free.is_inner or free.is_dictionary):
                spelled = f"++{text}"  # columns of a chosen dataset, which Hydra adds by `++`
            elif similar == key.partition(".")[2] and not isinstance(override.value(), dict):
                spelled = text.replace("=", ".path=", 1)
        return Word(key, text, spelled or text.lstrip("+"), False)

    def _is_choice(self, group: str, text: str, value: Any, options: list[str]) -> bool:
        """Tell whether a choice of a group is valid; report an unknown group of this entrypoint and unknown choices."""
        own, key = own_groups(self._config_name), group.split("@")[-1]
        if group not in own and text[0] != "+" and not group.startswith("hydra/"):
            owners = " and ".join(program for name, program in PROGRAMS.items() if group in own_groups(name))
            here = f"{PROGRAMS[self._config_name]} has no group {group}" + (f" (a group of {owners})" if owners else "")
            meant = suggest(group, [field.name for field in fields(self._kind)])
            self._fault(key, f"{text}: {here}{meant} Its groups: {', '.join(own)}")
            return False
        names = [typed(one) for one in (value if isinstance(value, list) else [value])]
        plugins = {one: package for one, package in PLUGINS.items() if group.startswith("hydra/")}
        options = [one for one in options if one not in plugins or is_installed(plugins[one])]
        wrong = [name for name in names if name not in options]
        for name in wrong:
            meant = suggest(name, options, 0.5)
            if name in plugins:
                meant = f" without a plug-in that is not installed: pip install {plugins[name]}."
            if group == "model" and "/" in name:
                meant = f"; a folder is written model=blank_model model.name_or_path={name}."
            self._fault(key, f"{text}: {group} has no choice {name!r}{meant} Choices: {', '.join(options)}")
        return not wrong

    def _compose(self, words: tuple[Word, ...]) -> Point:
        chosen = tuple(word.spelled for word in words if word.is_group)
        if chosen not in self._bases:
            composed = self._compose_groups([word for word in words if word.is_group])
            self._bases[chosen] = listed_datasets(composed, composed.hydra.overrides.task)
        config = self._bases[chosen].copy()
        refused = set(self._refused)
        for word in words:
            refused |= set() if word.is_group else self._merge(word, config)
        for group in MANDATORY_GROUPS[self._config_name]:
            if config.hydra.runtime.choices[group] is None and group not in refused:
                refused.add(group)
                options = ", ".join(group_options(group, self._search))
                self._fault(group, f"{group} is not set: write {group}=CHOICE. Choices: {options}")
        for fault in check_search(config, self._ranges):
            self._fault(fault.key, fault.message)
        swept = ", ".join(word.said for word in words if word.key in self._sweeping)
        return Point(swept, config, refused)

    def _compose_groups(self, words: list[Word]) -> DictConfig:
        """Compose the groups without the other words; report the groups that cannot be composed."""

        def composed(texts: Iterable[str]) -> DictConfig:
            try:
                return compose(self._config_name, overrides=[*self._search, *texts], return_hydra_config=True)
            except UNREADABLE as error:
                raise HydraException(f"its file cannot be read ({type(error).__name__}): {error}") from error

        try:
            config = composed(word.spelled for word in words)
        except HydraException as whole:
            good = []
            for word in words:
                try:
                    composed([word.spelled])
                    good.append(word)
                except HydraException as error:
                    is_free = free_key(self._kind, word.key) is not None
                    hint = f" (a file of config/{word.key} holds its own name, and below it the settings)"
                    self._fault(word.key, f"{word.said}: {one_line(error)}{hint if is_free else ''}")
                    self._refused.add(word.key)
            if good == words:  # each one composes, but not all of them together
                self._fault("", one_line(whole))
                good = []
            config = composed(word.spelled for word in good)
        return config

    def _merge(self, word: Word, config: DictConfig) -> set[str]:
        """Merge a value into the config, or report an unknown key or a value of the wrong type.

        Returns the keys that the word was probably meant for, if it was wrong.
        """
        override = _parsed(word.spelled)
        parent, _, name = override.key_or_group.rpartition(".")
        if override.is_delete():
            OmegaConf.set_struct(config, False)
            OmegaConf.select(config, parent).pop(name, None)
            return set()
        settings: Any = override.value()
        for part in reversed(override.key_or_group.split(".")):
            settings = {part: settings}
        OmegaConf.set_struct(config, not override.is_force_add())
        group = word.key.split(".")[0]
        is_unset = group in config and not OmegaConf.is_missing(config, group) and config[group] is None
        if is_unset and group != word.key:
            return {word.key, self._unknown(word, word.key, None, config)}
        try:
            if override.value() == MISSING:  # merged, it would change nothing
                OmegaConf.update(config, override.key_or_group, MISSING)
            else:
                config.merge_with(settings)
            return set()
        except (ConfigAttributeError, ConfigKeyError, ValidationError) as error:
            key = max(word.key, error.full_key or "", key=len)  # the longer one points into a given dictionary
            # OmegaConf reports a scalar in place of a group without its key.
            has_type = isinstance(error, ValidationError) and (error.key is None or key == error.full_key)
            if has_type:
                owner = OmegaConf.get_type(config, parent or None) if error.key is None else error.object_type
                self._fault(word.key, f"{word.said}: {expected(key, owner, settings)}")
            elif not is_below(word.key, self._refused):  # a wrong choice of the group has been told
                owner = error.object_type if key == error.full_key else None
                return {word.key, self._unknown(word, key, owner, config)}
        except OmegaConfBaseException as error:
            self._fault(word.key, f"{word.said}: {one_line(error)}")
        return {word.key}

    def _unknown(self, word: Word, key: str, owner: Any, config: DictConfig) -> str:
        """Report an unknown key (of the dataclass `owner`, if known), and return the key that was probably meant."""
        group, *names = key.split(".")
        if names and get_type_hints(self._kind).get(group) is Any:  # a group whose keys depend on the choice
            choice = config.hydra.runtime.choices.get(group)
            schemas = ConfigStore.instance().repo["schema"].get(group, {})  # composing all choices would take seconds
            options = [one for one in group_options(group, self._search) if f"{one}.yaml" in schemas]
            owners = [f"{group}={one}" for one in options if key in _keys(schemas[f"{one}.yaml"].node, f"{group}.")]
            if owners:
                lacks = f"{group}={choice} has no key {key}" if choice else f"{group} is not set"
                self._fault(word.key, f"{word.said}: {lacks}; it belongs to {', '.join(owners)}")
                return key
        if names and names[0] in group_options(group, self._search) and names[0] not in (config.get(group) or {}):
            self._fault(word.key, f"{word.said}: {group} {names[0]} is not selected: write {group}=[...,{names[0]}]")
            return key
        parent = key.rpartition(".")[0]
        siblings = [field.name for field in fields(owner)] if parent and is_dataclass(owner) else []
        known = [name for name in _keys(config) if group == "hydra" or not name.startswith("hydra")]
        plural = ".".join([f"{group}s", *names]) if names and f"{group}s" in config else ""  # model.base.path=
        beside = [f"{parent}.{sibling}" for sibling in siblings]
        guess = OTHER_NAMES.get(key) or plural or nearest(key, [*known, *beside])
        listed = f" Keys of {parent}: {', '.join(siblings)}" if siblings else ""
        meant = f"; did you mean {guess}?" if guess else "."
        self._fault(word.key, f"{word.said}: there is no key {key}{meant}{listed}")
        return guess or key


def _keys(settings: DictConfig | dict[Any, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all keys of a composed config, including nested ones."""
    entries: Any = OmegaConf.to_container(settings) if isinstance(settings, DictConfig) else settings
    for key, value in entries.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


def _parsed(text: str) -> Override:
    return OverridesParser.create().parse_override(text)


def one_line(error: Exception) -> str:
    """Return the message of Hydra or OmegaConf without its line breaks."""
    return " ".join(str(error).split())
