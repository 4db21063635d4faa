"""Rows of no dataset in particular: `prompt`, `chosen`, `rejected`, `completion`, `messages`, as texts or as messages.

The forms that trainers of preferences agree on: standard (texts), conversational (lists of messages), with the prompt
in a column of its own, inside of both answers, or only there.
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
JUDGEMENTS = {  # of an answer
    **dict.fromkeys(("true", "1", "1.0", "good", "yes", "safe", "desirable"), True),
    **dict.fromkeys(("false", "0", "0.0", "bad", "no", "unsafe", "undesirable"), False),
}


def judgement(cell: Any) -> bool | None:
    """Return whether a cell calls an answer good, as a CSV file has it, too; None if it says something else."""
    return JUDGEMENTS.get(str(cell).strip().casefold())


def parse_standard(row: Row) -> Fields:
    """Return what was asked and its answers; see the module.

    Raises:
        BadRow: The prompts of chosen and rejected differ, there is no prompt, or a column holds something else.
    """
    fields = {"input": row.get("input"), "label": row.get("label")}
    if row.get("system"):
        fields["system"] = row["system"]
    if row.get("chosen") is None and row.get("messages") is not None:
        asked, answer = read_to_answer(row["messages"], "messages")
        return fields | _asked(asked, "messages") | {"chosen": answer}
    if row.get("responses") is not None:
        return fields | _prompt_of(row["prompt"]) | {"answers": _scored(row)}
    name = "chosen" if row.get("chosen") is not None else "completion"
    chosen, rejected = row.get(name), row.get("rejected")
    if is_messages(chosen):
        fields |= _conversations(row, name)
    elif row.get("prompt") is None:
        fields |= _implicit_prompt(chosen, rejected)
    else:
        fields |= _prompt_of(row["prompt"]) | _without_prompt(row["prompt"], chosen, rejected)
    label = row.get("label")
    bad = label is False or (name == "completion" and judgement(label) is False)
    if bad and fields.get("rejected") is None:  # an unpaired answer that was judged bad
        fields["chosen"], fields["rejected"] = None, fields["chosen"]
    return fields


def _asked(messages: Messages, column: str) -> Fields:
    """Return what was asked, without a system message that is not there: a column of its own may hold it."""
    fields = prompt_fields(messages, column)
    return fields if fields["system"] else {name: fields[name] for name in ("history", "instruction")}


def _prompt_of(prompt: Any) -> Fields:
    if is_messages(prompt):
        return _asked(read_messages(prompt, "prompt"), "prompt")
    return {"instruction": prompt}


def _conversations(row: Row, name: str) -> Fields:
    """Split off the prompt that lies inside of conversations; one in a column of its own must be the same."""
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
    """Take the prompt off answers that all begin with it; where one does not, they only seem to."""
    answers = [text for text in (chosen, rejected) if text is not None]
    inside = isinstance(prompt, str) and all(isinstance(text, str) and text.startswith(prompt) for text in answers)
    if not inside or not prompt.strip() or len(answers) < 2:
        return {"chosen": chosen, "rejected": rejected}
    return {"chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}


def _implicit_prompt(chosen: Any, rejected: Any) -> Fields:
    """Find the prompt that two texts begin with: a dialogue up to its last answer, or all words that they share."""
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise BadRow("no_prompt", "prompt", "a prompt, or two texts that begin with it")
    if chosen.startswith(HUMAN):
        asked, answer, other = split_pair(read_transcript(chosen, "chosen"), read_transcript(rejected, "rejected"))
        return prompt_fields(asked, "chosen") | {"chosen": answer, "rejected": other}
    parted = next((i for i, pair in enumerate(zip(chosen, rejected, strict=False)) if pair[0] != pair[1]), 0)
    shared = chosen[: max(chosen.rfind(blank, 0, parted) for blank in " \n\t") + 1]  # not the half of a word
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
