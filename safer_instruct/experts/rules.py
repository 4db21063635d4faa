"""The rule-based expert: filter, safe responses and judge from the patterns and lexicons of a YAML file.

It sees only text: no labels, and no ground truth of a generator. `quickstart/rules.yaml` is a worked example of the
format. In a conversation the last instruction carries the intent, and slots that it does not name are taken from the
most recent message that does. Terms: a *lexicon* is a list of words or phrases that a text can name; the *key slots* of
a category are the lexicons that tell what a request is about; a sentence *declines* if a refusal pattern matches it.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import regex

from config.errors import UserError
from safer_instruct.experts.rules_schema import CategorySpec, RulesSpec, read_rules
from safer_instruct.experts.verdicts import HARMLESS, Judgement, Verdict

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")

SEARCH_SECONDS = 10.0
CODE_VERSION = b"3"  # raise it with any change of this file that moves a verdict: ledgers then begin anew

T = TypeVar("T")
Named = Mapping[str, frozenset[str]]  # lexicon -> its words that occur in a text, in lower case


class Pattern:
    """A pattern of a rules file, searched with a time limit, which `regex` supports and `re` does not."""

    def __init__(self, pattern: str, *, ignore_case: bool = True) -> None:
        self._compiled = regex.compile(pattern, regex.IGNORECASE if ignore_case else 0)

    def search(self, text: str) -> bool:
        """Return whether the pattern is found in a text.

        Raises:
            UserError: The search takes more than SEARCH_SECONDS, because the pattern backtracks too much.
        """
        try:
            return self._compiled.search(text, timeout=SEARCH_SECONDS) is not None
        except TimeoutError:
            raise UserError(
                f"rules: the pattern {self._compiled.pattern[:120]!r} takes more than {SEARCH_SECONDS:g} s on a text "
                f"of {len(text):,} characters; write it without a repetition inside a repetition, such as (a+)+"
            ) from None


@dataclass(frozen=True, slots=True)
class Category:
    """One kind of harm, with its patterns compiled."""

    name: str  # its name in the dataset and the report
    spec: CategorySpec
    intent: Pattern  # matches instructions that ask for it ...
    intent_unless: Pattern  # ... unless this matches, too
    harm: Pattern  # matches harmful text outside of declining sentences
    harm_anywhere: Pattern  # matches harmful text anywhere: a refusal that leaks harmful content is not a refusal


class Rules:
    """Filter, respond and judge by deterministic rules."""

    def __init__(self, spec: RulesSpec, *, fingerprint: str) -> None:
        self.fingerprint = fingerprint  # hash of the rules, for ledger headers and cache keys
        self._form = spec.instruction
        self._form_pattern = Pattern(spec.instruction.pattern, ignore_case=False)
        self._lexicons = {name: _compile_words(lex.words, lex.case_sensitive) for name, lex in spec.lexicons.items()}
        self._spelling = {word.lower(): word for lexicon in spec.lexicons.values() for word in lexicon.words}
        self._refusal = _compile_any(spec.refusals)
        self._categories = {name: _compile_category(name, category) for name, category in spec.categories.items()}
        neighbours = [one for category in spec.categories.values() for one in category.neighbours]
        self._frames = [(frame, _compile_frame(frame)) for frame in spec.frames]
        self._answers = [(self._compile_neighbour(one.instruction), one.answer) for one in neighbours]

    @classmethod
    def from_yaml(cls, path: Path | str) -> Rules:
        """Read and check a rules file.

        Raises:
            UserError: The file is missing, is not YAML, or breaks the schema; every fault is listed.
        """
        path = Path(path)
        spec = read_rules(path)
        return cls(spec, fingerprint=hashlib.blake2b(CODE_VERSION + path.read_bytes(), digest_size=8).hexdigest())

    def slots(self, text: str, before: Sequence[str] = ()) -> Named:
        """Return the words of each lexicon that the text names, or else the latest earlier message that names any."""
        named: dict[str, frozenset[str]] = {}
        for said in (text, *reversed(before)):
            for name, pattern in self._lexicons.items():
                if not named.get(name):
                    named[name] = frozenset(match.group().lower() for match in pattern.finditer(said))
        return named

    def intent(self, instruction: str, before: Sequence[str] = ()) -> str | None:
        """Return the category of harm that an instruction, given the messages before it, asks for, or None."""
        slots = self.slots(instruction, before)
        for category in self._categories.values():
            if not category.intent.search(instruction) or not all(slots[key] for key in category.spec.key):
                continue
            if not category.intent_unless.search(instruction):
                return category.name
        return None

    def harm(self, text: str, *, context: str = "") -> str | None:
        """Return the category of harm that a text does, or None.

        Args:
            text: A response.
            context: The instruction, if it is known: the words it names count as named, so that harm is still found in
                a response that only says "it" or garbles a word.
        """
        declared = " ".join(s for s in SENTENCE_END.split(text) if not self._refusal.search(s))
        slots = self.slots(f"{context}\n{text}")
        for category in self._categories.values():
            if not all(slots[name] for name in category.spec.harm.requires):
                continue
            if category.harm.search(declared) or category.harm_anywhere.search(text):
                return category.name
        return None

    def meaning(self, instruction: str, before: Sequence[str] = ()) -> tuple[str, Named] | None:
        """Return the category and key slots that an instruction asks for; None if it asks for nothing unsafe."""
        name = self.intent(instruction, before)
        if name is None:
            return None
        slots = self.slots(instruction, before)
        return name, {key: slots[key] for key in self._categories[name].spec.key}

    def screen(self, instruction: str, response: str, before: Sequence[str] = ()) -> Verdict:
        """Decide whether this is a well-formed unsafe request that the response complies with.

        Reasons for a drop: `response_not_unsafe`, `ill_formed_instruction`, `instruction_not_unsafe`,
        `category_mismatch`, `slot_mismatch`.
        """
        harm = self.harm(response, context="\n".join(before))
        if harm is None:
            return Verdict(False, "response_not_unsafe")
        num_words = len(instruction.split())
        if not self._form.min_words <= num_words <= self._form.max_words or not self._form_pattern.search(instruction):
            return Verdict(False, "ill_formed_instruction", harm)
        asked = self.meaning(instruction, before)
        if asked is None:
            return Verdict(False, HARMLESS, harm)
        category, wanted = asked
        if category != harm:
            return Verdict(False, "category_mismatch", harm)
        named = self.slots(response, before)
        if any(named[key] != words for key, words in wanted.items()):
            return Verdict(False, "slot_mismatch", harm)
        return Verdict(True, "keep", harm)

    def respond(self, instruction: str, before: Sequence[str] = ()) -> str | None:
        """Return a safe response, or None if the rules find nothing unsafe in the instruction.

        A hash of the instruction selects the template, so that the same instruction always gets the same response.
        """
        asked = self.meaning(instruction, before)
        if asked is None:
            return None
        name, wanted = asked
        return self._fill(_pick(self._categories[name].spec.responses, instruction), wanted)

    def vary(self, instruction: str, before: Sequence[str] = ()) -> str | None:
        """Return a different safe response from that of `respond`; None if the rules have no other."""
        asked = self.meaning(instruction, before)
        if asked is None:
            return None
        responses = self._categories[asked[0]].spec.responses
        others = [one for one in responses if one != _pick(responses, instruction)]
        return self._fill(_pick(others, instruction), asked[1]) if others else None

    def neighbour(self, instruction: str) -> str | None:
        """Return a harmless instruction on the topic of an unsafe one; None if the rules have none."""
        asked = self.meaning(instruction)
        neighbours = self._categories[asked[0]].spec.neighbours if asked is not None else []
        if asked is None or not neighbours:
            return None
        chosen = _pick(neighbours, instruction)
        text = self._fill(chosen.instruction, asked[1])
        return self._framed(text, instruction) if chosen.framed else text

    def _framed(self, deed: str, instruction: str) -> str:
        """Put a deed into the frame of the instruction, or into some other frame if the instruction matches none."""
        found = self._deeds(instruction)
        # Several frames may match ("{Do}." matches most sentences): the most specific one leaves the shortest deed.
        frame = min(found, key=lambda one: len(one[1]))[0] if found else _pick(self._frames, instruction)[0]
        return frame.format(do=deed, Do=deed[0].upper() + deed[1:])

    def _deeds(self, instruction: str) -> list[tuple[str, str]]:
        """Return each frame that matches an instruction, with the deed that it asks for."""
        matches = ((frame, pattern.fullmatch(instruction)) for frame, pattern in self._frames)
        return [(frame, found["do"]) for frame, found in matches if found]

    def answer(self, instruction: str) -> str | None:
        """Return the answer to an instruction that matches the template of a harmless neighbour, or None."""
        for text in (instruction, *(deed for _, deed in self._deeds(instruction))):
            for pattern, template in self._answers:
                if found := pattern.fullmatch(text):
                    return template.format(**found.groupdict())
        return None

    @property
    def knows_neighbours(self) -> bool:
        """Whether any category has neighbours."""
        return bool(self._answers)

    def _fill(self, template: str, wanted: Named) -> str:
        # `re` takes some letters for others, whatever the case: "s" for a long one, "i" for one without a dot.
        return template.format(**{key: self._spelling.get(min(words), min(words)) for key, words in wanted.items()})

    def _compile_neighbour(self, template: str) -> re.Pattern[str]:
        """Return a pattern for the instructions that a template can produce, with a group for each slot."""
        seen: set[str] = set()

        def group(slot: str) -> str:
            again = slot in seen
            seen.add(slot)
            return f"(?P={slot})" if again else f"(?P<{slot}>{self._lexicons[slot].pattern})"

        parts = string.Formatter().parse(template)
        whole = "".join(re.escape(text) + (group(slot) if slot else "") for text, slot, _, _ in parts)
        return re.compile(whole, re.IGNORECASE)

    def judge(self, instruction: str, output: str) -> Judgement:
        """Judge a model's output as `harmful`, `refusal` (specific or not), or `safe`.

        A refusal is specific if it names at least one key slot of the request, and no wrong value for any of them.
        """
        harm = self.harm(output, context=instruction)
        if harm is not None:
            return Judgement("harmful", harm)
        if self._refusal.search(output):
            return Judgement("refusal", specific=self._names_the_matter(instruction, output))
        return Judgement("safe")

    def _names_the_matter(self, instruction: str, output: str) -> bool:
        asked = self.meaning(instruction)
        if asked is None:
            return False
        _, wanted = asked
        named = self.slots(output)
        return any(words & named[key] for key, words in wanted.items()) and all(
            named[key] <= words for key, words in wanted.items()
        )


def _pick(choices: Sequence[T], instruction: str) -> T:
    """Return the choice selected by a hash of the instruction."""
    digest = hashlib.blake2b(instruction.encode(), digest_size=8).digest()
    return choices[int.from_bytes(digest, "big") % len(choices)]


def _compile_words(words: Sequence[str], case_sensitive: bool) -> re.Pattern[str]:
    longest_first = sorted(map(re.escape, words), key=len, reverse=True)
    # Not \b: a word may end in what is no letter to `re`, "C++" or a vowel sign of Hindi.
    return re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)", 0 if case_sensitive else re.IGNORECASE)


def _compile_any(patterns: Sequence[str]) -> Pattern:
    never = r"(?!)"  # an empty alternation would match everything
    return Pattern("|".join(f"(?:{pattern})" for pattern in patterns) or never)


def _compile_frame(frame: str) -> re.Pattern[str]:
    """Return a pattern for the instructions that a frame can produce, with a group `do`."""
    before, _, after = frame.format(do="\0", Do="\0").partition("\0")
    return re.compile(f"{re.escape(before)}(?P<do>.+){re.escape(after)}", re.IGNORECASE | re.DOTALL)


def _compile_category(name: str, spec: CategorySpec) -> Category:
    patterns = (spec.intent.patterns, spec.intent.unless, spec.harm.patterns, spec.harm.anywhere)
    return Category(name, spec, *map(_compile_any, patterns))
