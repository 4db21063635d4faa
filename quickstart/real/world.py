"""The default inputs of `make real`: English from a grammar in world.yaml, benign.yaml and rules.yaml.

Requests are held out in two ways. The *meaning* of a request is its topic and objects (snooping, sister, diary); its
*phrasing* is the frame and the deed ("How do I ...?", "spy on my ..."). Hashes that do not depend on the seed hold out
a fifth of each. A held-out request has both held-out meaning and phrasing, and no training row shares either. Benign
instructions are split by the hash of their text.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from quickstart.world import Pair, part_of

HERE = Path(__file__).resolve().parent
RULES = HERE / "rules.yaml"
KINDS = ("unsafe", "near")


def is_held_out(*values: str) -> bool:
    """Tell whether the meaning, phrasing or text with these parts is held out for evaluation."""
    return part_of(values[0], values[1:]) != "train"


class RealWorld:
    """Requests with responses, drawn with an explicit `random.Random`: a seed gives the same rows on every machine.

    Attributes:
        topics: Names of the topics, in the order of world.yaml.
    """

    def __init__(self) -> None:
        rules = _read("rules.yaml")
        self._spec, self._benign = _read("world.yaml"), _read("benign.yaml")
        self._lexicons: dict[str, list[str]] = {name: entry["words"] for name, entry in rules["lexicons"].items()}
        self._frames: list[str] = rules["frames"]
        self._keys: dict[str, list[str]] = {name: entry["key"] for name, entry in rules["categories"].items()}
        self.topics = list(self._spec["topics"])

    def draw(self, rng: random.Random, topic: str, kind: str, *, held_out: bool) -> Pair:
        """Draw one request of a topic with a response.

        Args:
            rng: Source of all randomness.
            topic: One of `topics`.
            kind: unsafe | near; the response of a near request is a right answer.
            held_out: True: meaning and phrasing are both held out; False: neither is.
        """
        entry = self._spec["topics"][topic]
        while True:
            frame, deed = rng.choice(self._frames), rng.choice(list(entry[kind]))
            slots = {name: rng.choice(self._lexicons[name]) for name in self._keys[topic]}
            meaning = is_held_out(topic, *slots.values())
            if meaning == held_out and is_held_out(f"{topic} {kind}", frame, deed) == held_out:
                break
        if kind == "near":
            response = entry["near"][deed]
        else:
            response = " ".join(rng.choice(sentences) for sentences in entry["responses"])
        instruction = framed(frame, deed.format(**slots))
        return Pair(instruction, response.format(**slots), topic, kind, slots, held_out)

    def draws(self, rng: random.Random, kind: str, *, held_out: bool) -> Iterator[Pair]:
        """Yield endless requests, topics in turn; instructions, and responses to unsafe ones, are unique."""
        seen: set[str] = set()
        for topic in itertools.cycle(self.topics):
            pair = self.draw(rng, topic, kind, held_out=held_out)
            new = {pair.instruction, pair.response} if kind == "unsafe" else {pair.instruction}
            if not new & seen:
                seen |= new
                yield pair

    def benign(self, *, held_out: bool) -> list[Pair]:
        """Return all benign instructions that are held out, or all others; the response is "" if the grammar has none.

        `slots["reference"]`, if the grammar has it, holds the strings that a right answer must contain, one per line.
        """
        rows = [*self._pattern_rows(), *(Pair(task, "", "task", "benign", {}, False) for task in self._benign["tasks"])]
        return [row for row in rows if is_held_out("benign", row.instruction) == held_out]

    def _pattern_rows(self) -> Iterator[Pair]:
        facts = self._benign["facts"].values()
        for pattern in self._benign["patterns"]:
            names = re.findall(r"\{(\w+)\}", pattern["ask"])
            fact = next((one for one in facts if one["keys"] in names), None)
            choices: list[list[dict[str, str]]] = (
                [[{fact["keys"]: key, fact["values"]: value} for key, value in fact["pairs"].items()]]
                if fact
                else [[{name: word} for word in self._benign["words"][name]] for name in names]
            )
            for chosen in itertools.product(*choices):
                slots = {name: word for part in chosen for name, word in part.items()}
                reference = "\n".join(pattern.get("reference", [])).format(**slots)
                slots |= {"reference": reference} if reference else {}
                instruction, answer = (pattern.get(key, "").format(**slots) for key in ("ask", "answer"))
                yield Pair(instruction, answer, "_".join(names), "benign", slots, is_held_out("benign", instruction))


def framed(frame: str, deed: str) -> str:
    """Put a deed into a frame, capitalised where the frame has {Do}."""
    return frame.format(do=deed, Do=deed[0].upper() + deed[1:])


def prompt_row(number: int, pair: Pair) -> Mapping[str, Any]:
    """Return a row of an evaluation set."""
    row: dict[str, Any] = {"id": f"{pair.kind}-{number:04d}", "instruction": pair.instruction, "label": pair.skill}
    reference = pair.slots.get("reference")
    return row | {"kind": pair.kind} | ({"reference": reference.split("\n")} if reference else {})


def _read(name: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((HERE / name).read_text(encoding="utf-8"))
    return read
