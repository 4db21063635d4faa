"""The generic schema: `prompt`, `chosen`, `rejected`, `completion`, `messages`, as texts or as messages.

It reads the formats that preference trainers share: standard (texts) or conversational (lists of messages), with the
prompt in its own column, inside both answers, or both.
"""

from __future__ import annotations

from typing import Any

from safer_instruct.text.formats import Row
from safer_instruct.text.messages import (
    Messages,
    is_messages,
    prompt_fields,
    read_messages,
    read_to_answer,
    read_transcript,
    split_pair,
)
from safer_instruct.text.pairs import Answer, read_score
from safer_instruct.text.prompts import HUMAN
from safer_instruct.text.row_log import BadRow

Fields = dict[str, Any]
# Values that mark an answer as good or bad, in JSON, in CSV, and as written by pandas.
_GOOD = ("true", "1", "1.0", "yes", "good", "desirable", "safe")
_BAD = ("false", "0", "0.0", "no", "bad", "undesirable", "unsafe")


def is_good(cell: Any, column: str) -> bool:
    """Return whether a cell marks an answer as good.

    Raises:
        BadRow: It holds anything else than a judgement.
    """
    word = str(cell).strip().casefold()
    if word not in _GOOD + _BAD:
        raise BadRow("not_judged", column, ", ".join(f"{good} or {bad}" for good, bad in zip(_GOOD, _BAD, strict=True)))
    return word in _GOOD


def parse_standard(row: Row, *, judged: bool = False) -> Fields:
    """Return the prompt and its answers; see the module docstring.

    With `judged`, a single answer must be judged: by its `label`, or by being in the column `chosen`.

    Raises:
        BadRow: The prompts of chosen and rejected differ, there is no prompt, or a column has the wrong type.
    """
    fields = {"input": row.get("input"), "label": row.get("label")}
    if row.get("system"):
        fields["system"] = row["system"]
    if row.get("chosen") is None and row.get("messages") is not None:
        asked, answer = read_to_answer(row["messages"], "messages")
        fields |= _asked(asked, "messages") | {"chosen": answer}
        return _put_where_judged(fields, "messages", judged=judged)
    if row.get("responses") is not None:
        if judged:
            raise BadRow("not_judged", "responses", "one answer with a label, or split_pairs=true")
        return fields | _prompt_of(row["prompt"]) | {"answers": _scored(row)}
    name = "chosen" if row.get("chosen") is not None else "completion"
    chosen, rejected = row.get(name), row.get("rejected")
    if is_messages(chosen):
        fields |= _conversations(row, name)
    elif row.get("prompt") is None:
        fields |= _implicit_prompt(chosen, rejected)
    else:
        fields |= _prompt_of(row["prompt"]) | _without_prompt(row["prompt"], chosen, rejected)
    return _put_where_judged(fields, name, judged=judged)


def _put_where_judged(fields: Fields, name: str, *, judged: bool) -> Fields:
    """Make a single answer, from the column `name`, the rejected one if its label marks it as bad."""
    label = fields["label"]
    if fields.get("rejected") is not None:
        return fields
    try:
        # Otherwise the label is the row's category, which may well be "bad" or "0".
        good = is_good(label, "label") if judged or name == "completion" or isinstance(label, bool) else True
    except BadRow:
        if judged and name != "chosen":
            raise
        good = True
    return fields if good else {**fields, "chosen": None, "rejected": fields["chosen"]}


def _asked(messages: Messages, column: str) -> Fields:
    """Return the prompt's fields, without an empty `system`, which would override the column `system`."""
    fields = prompt_fields(messages, column)
    return fields if fields["system"] else {name: fields[name] for name in ("history", "instruction")}


def _prompt_of(prompt: Any) -> Fields:
    if is_messages(prompt):
        return _asked(read_messages(prompt, "prompt"), "prompt")
    return {"instruction": prompt}


def _conversations(row: Row, name: str) -> Fields:
    """Split off the prompt contained in conversations; a prompt in its own column must agree with it."""
    rejected = row.get("rejected")
    asked, answer, other = split_pair(
        read_messages(row[name], name), None if rejected is None else read_messages(rejected, "rejected")
    )
    fields = {"chosen": answer, "rejected": other}
    prompt = row.get("prompt")
    if not asked:
        if prompt is None:
            raise BadRow("no_prompt", "prompt", "a prompt, here or inside of the conversations")
        return _prompt_of(prompt) | fields
    if prompt is not None:
        given = read_messages(prompt, "prompt") if is_messages(prompt) else None
        said = [message.content.strip() for message in asked if message.role == "user"]
        if given != asked and (given is not None or str(prompt).strip() not in said):
            raise BadRow("prompts_differ", "prompt", f"what the messages of {name} begin with")
    return _asked(asked, name) | fields


def _without_prompt(prompt: Any, chosen: Any, rejected: Any) -> Fields:
    """Remove the prompt from two answers if both begin with it; if only one does, it is a coincidence."""
    answers = [text for text in (chosen, rejected) if text is not None]
    inside = isinstance(prompt, str) and all(isinstance(text, str) and text.startswith(prompt) for text in answers)
    if not inside or not prompt.strip() or len(answers) < 2:
        return {"chosen": chosen, "rejected": rejected}
    return {"chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}


def _implicit_prompt(chosen: Any, rejected: Any) -> Fields:
    """Find the prompt that two texts begin with: a dialogue up to its last answer, or the words that they share."""
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise BadRow("no_prompt", "prompt", "a prompt, or two texts that begin with it")
    if chosen.startswith(HUMAN):
        asked, answer, other = split_pair(read_transcript(chosen, "chosen"), read_transcript(rejected, "rejected"))
        return prompt_fields(asked, "chosen") | {"chosen": answer, "rejected": other}
    parted = next((i for i, pair in enumerate(zip(chosen, rejected, strict=False)) if pair[0] != pair[1]), 0)
    shared = chosen[: max(chosen.rfind(blank, 0, parted) for blank in " \n\t") + 1]  # whole words only
    if not shared.strip():
        raise BadRow("no_prompt", "prompt", "a prompt, or two texts that begin with it")
    return {"instruction": shared, "chosen": chosen[len(shared) :], "rejected": rejected[len(shared) :]}


def _scored(row: Row) -> list[Answer]:
    responses, scores = row["responses"], row.get("scores")
    if not isinstance(responses, list) or not isinstance(scores, list) or len(responses) != len(scores):
        raise BadRow("no_score", "scores", "as many numbers as there are responses")
    for number, text in enumerate(responses):
        if not isinstance(text, str):
            raise BadRow("not_text", f"responses[{number}]", "a text")
    return [Answer(text, read_score(score, "scores")) for text, score in zip(responses, scores, strict=True)]
