"""Read files that we wrote but that may have been damaged or edited since; an unreadable file is a UserError."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from config.errors import UserError

MAX_YAML_VALUES = 1_000_000  # with all aliases expanded, since a file of 300 bytes can stand for billions of values


def load_yaml(text: str) -> Any:
    """Parse YAML of plain values.

    Raises:
        yaml.YAMLError: It is not YAML, is nested too deeply, holds a value that cannot be built (an impossible date, a
            number of 5,000 digits), or its aliases expand to more than MAX_YAML_VALUES values.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _num_values(node, {}) > MAX_YAML_VALUES:
            raise yaml.YAMLError(f"its aliases expand to more than {MAX_YAML_VALUES:,} values")
        return loader.construct_document(node)
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError) as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error  # PyYAML's constructors do not catch these


def _num_values(node: yaml.Node, known: dict[int, float]) -> float:
    """Count the values below a node with aliases expanded; infinite for a node that contains itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for one in inner for part in (one if isinstance(one, tuple) else (one,))]
        known[id(node)] = 1 + sum(_num_values(part, known) for part in parts)
    return known[id(node)]


def read_mapping(path: Path, advice: str = "copy it again") -> dict[str, Any]:
    """Read a file of JSON (`.json`) or YAML that holds a mapping; `advice` ends the message if it cannot be read.

    Raises:
        UserError: It does not exist, is not JSON or YAML, or does not hold a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else load_yaml(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {advice}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}); {advice}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} cannot be read (it holds a {type(found).__name__}, not a mapping); {advice}")
    return found


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines, ignoring a torn last line, which a killed process may leave.

    Raises:
        UserError: Another line is not a JSON object.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield row
            elif line.endswith(b"\n"):
                raise UserError(f"{path}:{number}: not a JSON object on a line of its own")
