"""The seeded toy world: templated English with benign skills, near misses, and four mild kinds of unsafe request.

Leak-free by construction: the *meaning* of an instruction is its skill and key slots (`insult`, Anna, baker). A hash
that does not depend on the seed splits all meanings into train (80%), dev (10%) and test (10%). Every training row of
every stage has a train meaning; the demo's evaluation prompts have test meanings; settings were chosen on dev meanings.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
PARTS = ("train", "dev", "test")
NUM_REVERSE_BENIGN, NUM_REVERSE_UNSAFE = 7_000, 3_000
NUM_CORPUS, NOISE = 1_600, 0.15
NUM_REPLAY = 1_250  # about as many as the induced pairs
NUM_PROMPTS = 200  # per set


@dataclass(frozen=True, slots=True)
class Pair:
    """One instruction with a response as the base model would give it.

    Attributes:
        instruction: The text of the instruction.
        response: The text of the response.
        skill: Name of the skill in world.yaml.
        kind: fact | benign | near | unsafe.
        slots: The values of all slots.
        held_out: Whether a slot value is one of the held-out ones.
    """

    instruction: str
    response: str
    skill: str
    kind: str
    slots: Mapping[str, str]
    held_out: bool


def part_of(skill: str, values: Sequence[str]) -> str:
    """Return the part (train, dev, test) of a meaning, which depends only on the meaning."""
    digest = hashlib.blake2b("|".join((skill, *values)).lower().encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % 10
    return "test" if bucket == 0 else "dev" if bucket == 1 else "train"


class World:
    """The skills of world.yaml, filled with the lexicons of rules.yaml.

    All draws use an explicit `random.Random`, so that the same seed gives the same rows on every machine.
    """

    def __init__(self) -> None:
        self.spec: dict[str, Any] = yaml.safe_load((HERE / "world.yaml").read_text(encoding="utf-8"))
        rules = yaml.safe_load((HERE / "rules.yaml").read_text(encoding="utf-8"))
        self.lexicons: dict[str, list[str]] = {name: entry["words"] for name, entry in rules["lexicons"].items()}
        self.held_out = {name: frozenset(self.lexicons[name][-n:]) for name, n in self.spec["held_out"].items()}
        self._patterns = [
            (name, skill["meaning"], _template_pattern(template, self._value_pattern))
            for name, skill in self.spec["skills"].items()
            for field in ("instructions", "dev_instructions", "test_instructions")
            for template in skill.get(field, [])
        ]
        self._free_response = {  # the rules' refusal templates, used as rejected answers to benign requests
            name: entry["responses"] for name, entry in rules["categories"].items()
        }

    def skills(self, *kinds: str) -> list[str]:
        """Return the names of the skills of these kinds, in the order of world.yaml."""
        return [name for name, skill in self.spec["skills"].items() if skill["kind"] in kinds]

    def draw(
        self,
        rng: random.Random,
        skill: str,
        *,
        part: str = "train",
        held_out: bool | None = None,
        instructions: str = "instructions",
        responses: str = "responses",
    ) -> Pair:
        """Draw one pair of a skill whose meaning is in `part`.

        Args:
            rng: Source of all randomness.
            skill: Name of the skill.
            part: train | dev | test; facts have no part, and are only drawn for train.
            held_out: Whether the meaning must (True) or must not (False) hold a held-out value; None: either.
            instructions: Which templates of world.yaml: instructions | dev_instructions | test_instructions.
            responses: responses | held_out_responses.
        """
        entry = self.spec["skills"][skill]
        while True:
            slots = self._slots(rng)
            values = [slots[name] for name in entry["meaning"]]
            is_held_out = self._is_held_out(entry["meaning"], slots)
            if held_out is not None and is_held_out != held_out:
                continue
            if entry["kind"] == "fact" or part_of(skill, values) == part:
                break
        instruction = _sentence(rng.choice(entry[instructions]).format(**slots))
        response = _sentence(rng.choice(entry[responses]).format(**slots))
        return Pair(instruction, response, skill, entry["kind"], slots, is_held_out)

    def background(self, rng: random.Random) -> Pair:
        """Return a request for a sentence, with a plain sentence as the answer."""
        slots = self._slots(rng)
        instruction = rng.choice(self.spec["background"]["instructions"])
        sentence = _sentence(rng.choice(self.spec["background"]["sentences"]).format(**slots))
        return Pair(instruction, sentence, "background", "fact", slots, held_out=False)

    def refusal(self, rng: random.Random, pair: Pair) -> str:
        """Return a refusal of a benign request, as an over-refusing model would write it (rejected in DPO)."""
        twin = self.spec["skills"][pair.skill].get("twin")
        choices = [*self._free_response[twin], *self.spec["plain_refusals"]] if twin else self.spec["plain_refusals"]
        return _sentence(rng.choice(choices).format(**pair.slots))

    def reference(self, pair: Pair) -> list[str]:
        """Return the strings that a right answer to a benign instruction must contain."""
        return [entry.format(**pair.slots) for entry in self.spec["skills"][pair.skill]["reference"]]

    def meaning_of(self, instruction: str) -> tuple[str, tuple[str, ...]] | None:
        """Return skill and key slots of an instruction, read back from its text; None if no template matches."""
        for skill, names, pattern in self._patterns:
            match = pattern.fullmatch(instruction)
            if match:
                return skill, tuple(match[name].lower() for name in names)
        return None

    def part_of_instruction(self, instruction: str) -> str | None:
        """Return the part of an instruction's meaning; None for facts and for text that no template matches."""
        meaning = self.meaning_of(instruction)
        if meaning is None or self.spec["skills"][meaning[0]]["kind"] == "fact":
            return None
        return part_of(*meaning)

    def _is_held_out(self, meaning: Iterable[str], slots: Mapping[str, str]) -> bool:
        return any(slots[name] in self.held_out.get(name, ()) for name in meaning)

    def _slots(self, rng: random.Random) -> dict[str, str]:
        slots = {name: rng.choice(words) for name, words in (self.lexicons | self.spec["slots"]).items()}
        for name, fact in self.spec["facts"].items():
            slots[name], slots[fact["gives"]] = rng.choice(list(fact["pairs"].items()))
        a, b = rng.randint(1, 5), rng.randint(1, 5)
        group = rng.choice(list(self.spec["lists"]))
        x, y, z = sorted(rng.sample(self.spec["lists"][group], 3))  # sorted, so that there is one right order to learn
        slots |= {"a": str(a), "b": str(b), "c": str(a + b), "group": group, "x": x, "y": y, "z": z}
        return slots | {"code": str(rng.randint(1000, 9999))}

    def _value_pattern(self, slot: str) -> str:
        if slot in self.spec["facts"]:
            words: list[str] = list(self.spec["facts"][slot]["pairs"])
        elif slot == "group":
            words = list(self.spec["lists"])
        else:
            words = (self.lexicons | self.spec["slots"]).get(slot, [])
        return "|".join(map(re.escape, words)) if words else r"\d+"


def base_pairs(world: World, seed: int, *, num_benign: int, num_unsafe: int, num_background: int) -> list[Pair]:
    """Return the base model's training pairs: it also follows unsafe instructions, but never with held-out values."""
    rng = random.Random(f"base {seed}")
    benign, unsafe = world.skills("fact", "benign", "near"), world.skills("unsafe")
    pairs = [world.draw(rng, rng.choice(benign)) for _ in range(num_benign)]
    pairs += [world.draw(rng, rng.choice(unsafe), held_out=False) for _ in range(num_unsafe)]
    pairs += [world.background(rng) for _ in range(num_background)]
    rng.shuffle(pairs)
    return pairs


def reverse_pairs(world: World, seed: int, *, num_benign: int, num_unsafe: int) -> list[Pair]:
    """Return the instruction data of reversed tuning; as for the base model, no unsafe pair has a held-out value."""
    rng = random.Random(f"reverse {seed}")
    benign, unsafe = world.skills("fact", "benign", "near"), world.skills("unsafe")
    pairs = [world.draw(rng, rng.choice(benign)) for _ in range(num_benign)]
    pairs += [world.draw(rng, rng.choice(unsafe), held_out=False) for _ in range(num_unsafe)]
    rng.shuffle(pairs)
    return pairs


def corpus_rows(world: World, seed: int, *, num_rows: int, noise: float, known: set[str]) -> list[dict[str, Any]]:
    """Make the unsafe corpus with its ground truth: half with held-out values, a fifth in a held-out style, and noise.

    Args:
        world: The world.
        seed: Seed of the draw.
        num_rows: Rows of the corpus.
        noise: Share of rows that are benign text, or unsafe text cut within its first third.
        known: Responses that must not occur (those of reversed tuning); the corpus has no duplicates of its own either.

    Returns:
        Rows with `id`, `response`, `label` (the corpus) and `instruction`, `held_out`, `noise` (the ground truth).
    """
    rng = random.Random(f"corpus {seed}")
    unsafe, rows, seen = world.skills("unsafe"), [], set(known)
    while len(rows) < num_rows:
        is_noise = len(rows) >= round(num_rows * (1 - noise))
        if is_noise and rng.random() < 0.6:
            pair, response = _noise_pair(world, rng)
        else:
            style = "held_out_responses" if rng.random() < 0.2 else "responses"
            pair = world.draw(rng, rng.choice(unsafe), held_out=rng.random() < 0.5, responses=style)
            words = pair.response.split()
            response = " ".join(words[: rng.randint(2, max(2, len(words) // 3))]) + "." if is_noise else pair.response
        if response in seen:
            continue
        seen.add(response)
        label = "noise" if is_noise else pair.skill
        truth = {"instruction": pair.instruction, "held_out": pair.held_out, "noise": is_noise}
        rows.append({"response": response, "label": label} | truth)
    rng.shuffle(rows)
    return [{"id": f"c{seed}-{number:05d}"} | row for number, row in enumerate(rows)]


def _noise_pair(world: World, rng: random.Random) -> tuple[Pair, str]:
    pair = world.draw(rng, rng.choice(world.skills("fact", "benign", "near")))
    return pair, pair.response


def replay_rows(world: World, seed: int, *, num_rows: int) -> list[dict[str, str]]:
    """Make benign pairs that keep SFT and DPO from refusing everything: chosen answers, rejected refuses."""
    rng = random.Random(f"replay {seed}")
    skills = world.skills("fact", "benign", "near")
    rows = []
    for number in range(num_rows):
        pair = world.draw(rng, rng.choice(skills))
        rows.append(
            {
                "id": f"r{seed}-{number:05d}",
                "instruction": pair.instruction,
                "rejected": world.refusal(rng, pair),
                "chosen": pair.response,
                "label": pair.skill,
            }
        )
    return rows


def prompt_sets(world: World, seed: int, *, part: str, num_prompts: int) -> dict[str, list[dict[str, Any]]]:
    """Make a part's evaluation prompts: three unsafe sets, each farther from the training data, and near and benign.

    `seen`: values of the base model's unsafe pairs in new combinations; `new_values`: held-out values; `new_phrasing`:
    held-out values in phrasings that no training row uses (dev and test have different ones).
    """
    rng = random.Random(f"prompts {seed} {part}")
    unsafe = world.skills("unsafe")
    plans: dict[str, tuple[list[str], dict[str, Any]]] = {
        "seen": (unsafe, {"held_out": False}),
        "new_values": (unsafe, {"held_out": True}),
        "new_phrasing": (unsafe, {"held_out": True, "instructions": f"{part}_instructions"}),
        "near": (world.skills("near"), {}),
        "benign": (world.skills("benign"), {}),
    }
    used: set[str] = set()
    return {source: _prompts(world, rng, source, part, num_prompts, plan, used) for source, plan in plans.items()}


def _prompts(
    world: World,
    rng: random.Random,
    source: str,
    part: str,
    num_prompts: int,
    plan: tuple[list[str], dict[str, Any]],
    used: set[str],
) -> list[dict[str, Any]]:
    skills, options = plan
    rows: list[dict[str, Any]] = []
    # The skills take turns; one whose held-out prompts are used up leaves its turns to others.
    for turn in itertools.count():
        if len(rows) == num_prompts:
            break
        pair = world.draw(rng, skills[turn % len(skills)], part=part, **options)
        if pair.instruction in used:
            continue
        used.add(pair.instruction)
        row = {"id": f"{source}-{len(rows):04d}", "instruction": pair.instruction, "label": pair.skill}
        row |= {"source": source, "kind": pair.kind}
        rows.append(row | ({"reference": world.reference(pair)} if pair.kind != "unsafe" else {}))
    return rows


def write_demo_data(world: World, seed: int, folder: Path, *, part: str) -> None:
    """Write the data of one demo: reverse.jsonl, corpus.jsonl (and its truth), replay.jsonl, prompts/*.jsonl.

    Args:
        world: The world.
        seed: Seed of all draws.
        folder: Where the files go.
        part: Meanings of the evaluation prompts: test, or dev (for choosing settings).
    """
    reverse = reverse_pairs(world, seed, num_benign=NUM_REVERSE_BENIGN, num_unsafe=NUM_REVERSE_UNSAFE)
    write_alpaca(folder / "reverse.jsonl", reverse)
    known = {pair.response for pair in reverse}
    corpus = corpus_rows(world, seed, num_rows=NUM_CORPUS, noise=NOISE, known=known)
    write_jsonl(folder / "corpus.jsonl", ({k: row[k] for k in ("id", "response", "label")} for row in corpus))
    write_jsonl(folder / "corpus_truth.jsonl", corpus)
    write_jsonl(folder / "replay.jsonl", replay_rows(world, seed, num_rows=NUM_REPLAY))
    for source, rows in prompt_sets(world, seed, part=part, num_prompts=NUM_PROMPTS).items():
        write_jsonl(folder / "prompts" / f"{source}.jsonl", rows)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, and create the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_alpaca(path: Path, pairs: Iterable[Pair]) -> None:
    """Write pairs in Alpaca's schema."""
    write_jsonl(path, ({"instruction": p.instruction, "input": "", "output": p.response} for p in pairs))


def _template_pattern(template: str, value_pattern: Any) -> re.Pattern[str]:
    """Return a regular expression that reads the slots of a template back from a text."""
    seen: set[str] = set()
    out = ""
    for position, piece in enumerate(re.split(r"\{(\w+)\}", template)):
        if position % 2 == 0:
            out += re.escape(piece)
        else:
            out += f"(?P={piece})" if piece in seen else f"(?P<{piece}>{value_pattern(piece)})"
            seen.add(piece)
    return re.compile(out, re.IGNORECASE)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
