"""Schemas of known datasets: how a row of each becomes a prompt and its answers.

A parser returns fields of `Example`, and possibly `answers`, from which `text/pairs.py` makes pairs, or the `margin` by
which chosen was preferred. The columns are those of the published datasets.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from safer_instruct.text.examples import Message
from safer_instruct.text.formats import Row
from safer_instruct.text.html_text import html_text
from safer_instruct.text.messages import (
    Messages,
    prompt_fields,
    read_history,
    read_messages,
    read_to_answer,
    read_transcript,
    split_pair,
)
from safer_instruct.text.pairs import Answer, read_score
from safer_instruct.text.row_log import BadRow
from safer_instruct.text.standard import Fields, is_good, parse_standard

_HELPSTEER_TURN = re.compile(r"\n<extra_id_1>(Assistant|User)\n")


class Schema(NamedTuple):
    """How the columns of a row become an Example."""

    parse: Callable[[Row], Fields]  # row -> fields; raises BadRow, or KeyError for a missing field
    needed: tuple[str, ...] = ()  # required columns
    one_of: tuple[str, ...] = ()  # at least one is required: the dataset is published in several forms
    for_pairs: tuple[str, ...] | None = ()  # columns also required for pairs; None: the schema has no pairs
    # All columns that `parse` uses, so that others are reported; None: the unused ones are known, and not reported.
    read: tuple[str, ...] | None = None
    joined: bool = False  # consecutive rows with the same prompt are answers to it


def _parse_si(row: Row) -> Fields:
    texts = {name: row.get(name) for name in ("instruction", "input", "chosen", "rejected", "label")}
    return {**texts, **read_history(row.get("history"))}


def _parse_unpaired(row: Row) -> Fields:
    """Make a good answer the chosen response and a bad one the rejected response."""
    side = "chosen" if is_good(row["good"], "good") else "rejected"
    return {**{name: row.get(name) for name in ("instruction", "input", "label")}, side: row["response"]}


def _parse_alpaca(row: Row) -> Fields:
    return {"instruction": row["instruction"], "input": row.get("input"), "chosen": row["output"]}


def _parse_hh(row: Row) -> Fields:
    """Split two transcripts that differ in the last answer only; the rest is the prompt, which must be the same."""
    rejected = row.get("rejected")
    asked, answer, other = split_pair(
        read_transcript(row["chosen"], "chosen"), None if rejected is None else read_transcript(rejected, "rejected")
    )
    return {**prompt_fields(asked, "chosen"), "chosen": answer, "rejected": other, "label": row.get("label")}


def _parse_shp(row: Row) -> Fields:
    """Read Stanford Human Preferences: `labels` is 1 if A is preferred; the margin is the ratio of the votes."""
    first, second = row["human_ref_A"], row["human_ref_B"]
    chosen, rejected = (first, second) if _is_one(row, "labels") else (second, first)
    ratio = row.get("score_ratio")
    margin = None if ratio in (None, "") else read_score(ratio, "score_ratio")
    return {
        "instruction": row["history"], "chosen": chosen, "rejected": rejected, "margin": margin,
        "label": row.get("domain"),
    }  # fmt: skip


def _parse_se(row: Row) -> Fields:
    """Read Stack Exchange preferences: all answers as HTML with scores, or one pair of plain texts."""
    if "response_j" in row:
        return {"instruction": row["question"], "chosen": row["response_j"], "rejected": row["response_k"]}
    answers = [
        Answer(html_text(_text(answer, "text", f"answers[{number}]")), _score(answer, "pm_score", f"answers[{number}]"))
        for number, answer in enumerate(_list(row, "answers"))
    ]
    return {"instruction": html_text(_text(row, "question", "question")), "answers": answers}


def _parse_sharegpt(row: Row) -> Fields:
    """Read a conversation; messages after the last answer are left out."""
    column = "conversations" if "conversations" in row else "messages"
    asked, answer = read_to_answer(row[column], column)
    if asked and asked[0].role == "assistant":
        asked = asked[1:]  # a greeting, or the rest of a truncated conversation: no request precedes it
    return {**prompt_fields(asked, column), "chosen": answer}


def _parse_dolly(row: Row) -> Fields:
    fields = {"instruction": row["instruction"], "input": row.get("context"), "chosen": row["response"]}
    return {**fields, "label": row.get("category")}


def _parse_ultrafeedback(row: Row) -> Fields:
    """Read four answers with scores, or the binarised form: whole conversations as chosen and rejected."""
    if "completions" not in row:
        fields = parse_standard(row)
        scores = [row.get("score_chosen"), row.get("score_rejected")]
        if None not in scores:
            fields["margin"] = read_score(scores[0], "score_chosen") - read_score(scores[1], "score_rejected")
        return fields
    answers = []
    for number, one in enumerate(_list(row, "completions")):
        # The mean over the four aspects; `overall_score` was parsed from a text and is sometimes wrong.
        score = "fine-grained_score" if isinstance(one, dict) and one.get("fine-grained_score") else "overall_score"
        place = f"completions[{number}]"
        answers.append(Answer(_text(one, "response", place), _score(one, score, place)))
    return {"instruction": row["instruction"], "answers": answers, "label": row.get("source")}


def _parse_beavertails(row: Row) -> Fields:
    """Read BeaverTails (one answer, safe or not) or PKU-SafeRLHF (two answers, one marked as the safer)."""
    if "response_0" not in row:
        side = "chosen" if is_good(row["is_safe"], "is_safe") else "rejected"
        return {"instruction": row["prompt"], side: row["response"]}
    safer = int(_is_one(row, "safer_response_id"))
    name = f"is_response_{safer}_safe"
    return {
        "instruction": row["prompt"], "chosen": row[f"response_{safer}"], "rejected": row[f"response_{1 - safer}"],
        "is_safe": row.get(name) is None or is_good(row[name], name),
    }  # fmt: skip


def _is_one(row: Row, column: str) -> bool:
    try:
        return is_good(row[column], column)  # 1, 1.0 and true, also as text
    except BadRow:
        raise BadRow("no_preference", column, "1 or 0") from None


def _parse_helpsteer(row: Row) -> Fields:
    """Read HelpSteer 1 and 2 (one answer per row, scored on one attribute) or 3 (two answers compared)."""
    if "response1" in row:
        preference = read_score(row["overall_preference"], "overall_preference")  # -3: the first is far better
        first, second = row["response1"], row["response2"]
        if not preference:
            raise BadRow("equal_scores", "overall_preference")
        chosen, rejected = (first, second) if preference < 0 else (second, first)
        asked = prompt_fields(read_messages(row["context"], "context"), "context")
        return {**asked, "chosen": chosen, "rejected": rejected, "margin": abs(preference), "label": row.get("domain")}
    answer = Answer(_text(row, "response", "response"), _score(row, "score", "score"))
    return {**prompt_fields(_helpsteer_turns(_text(row, "prompt", "prompt")), "prompt"), "answers": [answer]}


def _helpsteer_turns(prompt: str) -> Messages:
    first, *rest = _HELPSTEER_TURN.split(prompt)
    later = zip(rest[::2], rest[1::2], strict=True)
    return (Message("user", first), *(Message(speaker.lower(), said) for speaker, said in later))


def _list(row: Row, column: str) -> list[Any]:
    value = row[column]
    if not isinstance(value, list):
        raise BadRow("no_answers", column, "a list of answers")
    return value


def _text(row: Any, name: str, column: str) -> str:
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, str):
        raise BadRow("not_text" if value is not None else "missing_field", column, f"a text as {name}")
    return value


def _score(row: Row, name: str, column: str) -> float:
    return read_score(row.get(name), column)


SCHEMAS = {
    "si": Schema(
        _parse_si, ("instruction", "chosen"), for_pairs=("rejected",),
        read=("instruction", "input", "chosen", "rejected", "label", "history"),
    ),
    "alpaca": Schema(
        _parse_alpaca, ("instruction", "output"), for_pairs=None, read=("instruction", "input", "output")
    ),
    "hh": Schema(_parse_hh, ("chosen",), for_pairs=("rejected",), read=("chosen", "rejected", "label")),
    "unpaired": Schema(
        _parse_unpaired, ("instruction", "response", "good"), for_pairs=None,
        read=("instruction", "input", "response", "good", "label"),
    ),
    "shp": Schema(_parse_shp, ("history", "human_ref_A", "human_ref_B", "labels")),
    "se": Schema(_parse_se, ("question",), one_of=("answers", "response_j")),
    "sharegpt": Schema(_parse_sharegpt, one_of=("conversations", "messages"), for_pairs=None),
    "dolly": Schema(_parse_dolly, ("instruction", "response"), for_pairs=None),
    "ultrafeedback": Schema(_parse_ultrafeedback, one_of=("completions", "chosen")),
    "beavertails": Schema(_parse_beavertails, ("prompt",), one_of=("response", "response_0")),
    "helpsteer": Schema(_parse_helpsteer, one_of=("response", "response1"), joined=True),
    "custom": Schema(
        parse_standard, one_of=("chosen", "completion", "messages", "responses"),
        read=(
            "prompt", "input", "system", "chosen", "rejected", "completion", "messages", "responses", "scores", "label"
        ),
    ),
}  # fmt: skip
