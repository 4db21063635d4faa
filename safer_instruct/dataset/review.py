"""stage=review: put a sample of pairs on one page, for people to judge without seeing the verdict of anyone else.

The sample of the dataset is balanced over labels. To compare people with the expert, pairs that the filter dropped are
mixed in, with as many that it kept. Dropped pairs have no safe response, so both kinds are shown without one, and
nothing on the page tells them apart.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from config.errors import UserError
from config.files import write_text
from config.paths import find_path
from config.settings import CorpusSettings, ReviewSettings
from safer_instruct.dataset.reviews import pair_hash
from safer_instruct.dataset.rows import dataset_rows, row_example, row_label
from safer_instruct.induction.ledger import Record
from safer_instruct.induction.ledgers import find_ledgers
from safer_instruct.induction.stages import FILTER, INDUCE, SCORE, with_instruction, with_score
from safer_instruct.report.html import render
from safer_instruct.text.corpus import CorpusRows
from safer_instruct.text.display import visible
from safer_instruct.text.examples import Example, text_id
from safer_instruct.text.messages import Messages

PAGE = "review.html"

Rank = Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class Item:
    """One pair of the page."""

    id: str  # id of its row
    pair: str  # `reviews.pair_hash` of its texts
    label: str  # its category, which the page does not show
    whole: bool  # whether the safe response is shown
    instruction: str  # the induced instruction
    rejected: str  # the unsafe response
    chosen: str  # the safe response; "" unless `whole`
    before: Messages  # the conversation before the instruction


def write_review(dataset: str, corpus: CorpusSettings, settings: ReviewSettings, output: Path) -> Path:
    """Draw the sample and write its page.

    The corpus is read only if `settings.dropped` is not 0.

    Raises:
        UserError: The dataset has no pair, or `settings.dropped` is not 0 and there are no ledgers.
    """
    rows = ((row_example(*one), row_label(one[1])) for one in dataset_rows(dataset) if one[2]["rejected"])
    rank = _ranked(settings.seed)
    wanted = settings.rows + settings.dropped
    by_label = _smallest((_item(pair, label, whole=True) for pair, label in rows), wanted, rank)
    drawn = balanced(by_label, wanted, rank)
    if not drawn:
        raise UserError(f"path={dataset}: it holds no pair with a rejected response, so there is nothing to review")
    whole, kept = drawn[: settings.rows], drawn[settings.rows :]
    halves = [
        replace(one, pair=pair_hash(one.instruction, one.rejected, "", one.before), whole=False, chosen="")
        for one in kept
    ]
    if settings.dropped:
        folder = find_path(dataset)
        ledgers = (folder if folder.is_dir() else folder.parent) / "ledger"
        halves += draw_dropped(ledgers, corpus, settings.dropped, rank)
    items = sorted([*whole, *halves], key=lambda item: rank(f"{item.id} shown"))
    sample = text_id(*(f"{item.id}:{item.pair}" for item in items))
    page = render(
        "review.html", script="review.js", name=Path(dataset).name, items=[_shown(one) for one in items],
        sample=sample, halves=bool(halves),
    )  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / PAGE, page)
    return output / PAGE


def _ranked(seed: int) -> Rank:
    """Return a function from an id to its random rank, which depends on the seed but not on the order of the rows."""
    key = str(seed).encode()
    return lambda id: hashlib.blake2b(id.encode("utf-8", "surrogatepass"), key=key, digest_size=8).digest()


def _item(pair: Example, label: str, *, whole: bool) -> Item:
    texts = (pair.instruction or "").strip(), (pair.rejected or "").strip(), (pair.chosen or "") if whole else ""
    return Item(pair.id, pair_hash(*texts, pair.before), label, whole, *texts, pair.before)


def _shown(item: Item) -> dict[str, Any]:
    """Return an item as the page shows it, with invisible characters written out."""
    texts = {key: visible(value) if isinstance(value, str) else value for key, value in asdict(item).items()}
    return {**texts, "before": [(role, visible(said)) for role, said in item.before]}


def _smallest(items: Iterable[Item], number: int, rank: Rank) -> dict[str, list[Item]]:
    """Return the `number` items of each label with the lowest ranks, in that order; holds at most twice as many."""
    heaps: dict[str, dict[str, Item]] = {}

    def smallest(held: dict[str, Item]) -> list[Item]:
        return heapq.nsmallest(number, held.values(), key=lambda item: rank(item.id))

    for item in items:
        held = heaps.setdefault(item.label, {})
        held.setdefault(item.id, item)
        if len(held) > 2 * number:
            heaps[item.label] = {one.id: one for one in smallest(held)}
    return {label: smallest(held) for label, held in heaps.items()}


def balanced(by_label: dict[str, list[Item]], number: int, rank: Rank) -> list[Item]:
    """Take one item from each label in turn until there are `number`; the order of the labels in a turn is random."""
    drawn: list[Item] = []
    turn = 0
    while len(drawn) < number and any(turn < len(items) for items in by_label.values()):
        labels = sorted(by_label, key=lambda label: rank(f"{turn} {label}"))
        drawn += [by_label[label][turn] for label in labels if turn < len(by_label[label])]
        turn += 1
    return drawn[:number]


def draw_dropped(folder: Path, corpus: CorpusSettings, number: int, rank: Rank) -> list[Item]:
    """Draw pairs that the filter dropped, from the ledgers that the dataset was made from."""
    ledgers = find_ledgers(folder)
    dropped = {record["id"]: record["label"] for record, _ in ledgers[FILTER].records() if not record["keep"]}
    ids = set(heapq.nsmallest(number, dropped, key=rank))
    records: dict[str, dict[str, Record]] = {
        stage: dict(_first(ledgers[stage].records(), ids)) for stage in (INDUCE, SCORE) if stage in ledgers
    }
    items: dict[str, Item] = {}
    for example in CorpusRows(corpus):
        if example.id in ids and example.id not in items:
            pair = with_instruction(example, records[INDUCE][example.id])
            if example.id in records.get(SCORE, {}):
                pair = with_score(pair, records[SCORE][example.id])
            label = pair.label or dropped[example.id]
            items[pair.id] = _item(pair, label, whole=False)
    return list(items.values())


def _first(records: Iterable[tuple[Record, int]], ids: set[str]) -> Iterator[tuple[str, Record]]:
    """Yield the first record of each of these ids."""
    seen: set[str] = set()
    for record, _ in records:
        if record["id"] in ids - seen:
            seen.add(record["id"])
            yield record["id"], record
