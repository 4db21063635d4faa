"""Limit each safe response to its share of the rows: for the rows beyond it, ask again for one that names the topic.

Which rows these are depends on the responses of all shards, so `stage=vary` has to run after `stage=respond` has
finished on all of them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from config.errors import UserError
from safer_instruct.experts.expert import Expert
from safer_instruct.induction.ledger import Record
from safer_instruct.induction.ledgers import StageLedgers, stage_ledgers
from safer_instruct.induction.shard import complete
from safer_instruct.induction.stages import RESPOND, VARY, expert_configuration, stage_respond, unfinished
from safer_instruct.text.examples import Example, normalise, text_id


def run_vary(
    expert: Expert, examples: Sequence[Example], paths: Mapping[str, Path], count: int, max_same: float
) -> None:
    """Answer again those kept `examples` whose response exceeds its share, unless the ledger already has them.

    Raises:
        UserError: Some of the `count` shards have not finished stage=respond yet.
    """
    answered = stage_ledgers(paths[RESPOND].parent, RESPOND, count)
    configuration = expert_configuration(expert, answered.configuration, "vary", **{"respond.max_same": max_same})
    again = overused(answered, max_same)
    own = [example for example in examples if example.id in again]
    complete(paths[VARY], configuration, own, stage_respond(expert, VARY))


def overused(answered: StageLedgers, max_same: float) -> set[str]:
    """Return the rows to answer again because their response exceeds its share; a hash draws which rows keep it.

    Raises:
        UserError: Some rows have no response yet.
    """
    uses = Counter(key for _, key in _responses(answered))
    if missing := answered.num_missing():
        raise UserError(
            f"respond.max_same={max_same} counts the responses of all shards, but {missing} rows have none yet: "
            "finish stage=respond on all shards before stage=vary"
        )
    allowed = max(1, int(max_same * uses.total()))
    holders: dict[str, list[str]] = defaultdict(list)
    for id, key in _responses(answered):
        if uses[key] > allowed:
            holders[key].append(id)
    drawn = (sorted(ids, key=lambda id: text_id("vary", id)) for ids in holders.values())
    return {id for ids in drawn for id in ids[allowed:]}


def _responses(answered: StageLedgers) -> Iterator[tuple[str, str]]:
    """Yield (row, hash of its response) where there is one."""
    seen: set[str] = set()
    for record, _ in answered.records():
        if record["chosen"] is not None and record["id"] not in seen:
            seen.add(record["id"])
            yield record["id"], text_id(normalise(record["chosen"]))


def require_varied(ledgers: Mapping[str, StageLedgers]) -> None:
    """Raise a UserError if rows that were to be answered again have not been."""
    if VARY in ledgers and (missing := ledgers[VARY].num_missing()):
        raise unfinished(missing, VARY)


def final_response(records: Mapping[str, Record]) -> Record:
    """Return the record of the safe response; the second answer takes precedence if it has a text."""
    again = records.get(VARY, {})
    return again if again.get("chosen") is not None else records.get(RESPOND, {})


def variation(records: Mapping[str, Record]) -> list[str]:
    """Return the names under which a row is counted; none if it was not asked again."""
    if VARY not in records:
        return []
    before, now = records[RESPOND]["chosen"], final_response(records)["chosen"]
    return ["asked_again", *(["still_the_same"] if normalise(before) == normalise(now) else [])]
