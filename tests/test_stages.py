"""Corpus, stages, merge and card with a generator and an expert whose answers are known."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
from filelock import FileLock

from config.errors import UserError
from config.settings import CorpusSettings, DuplicatesSettings, InductionSettings
from safer_instruct.dataset.card import build_report, push_dataset, write_report
from safer_instruct.dataset.files import SCHEMA, write_dataset
from safer_instruct.dataset.merge import merge
from safer_instruct.dataset.scratch import lock_output, record_batches
from safer_instruct.dataset.similarity import LeakageGuard
from safer_instruct.experts.verdicts import SafeResponse, Verdict
from safer_instruct.generation.completions import Generation
from safer_instruct.induction.ledger import Ledger, is_final, read_ledger, run_stage, shard_path
from safer_instruct.induction.ledgers import find_ledgers
from safer_instruct.induction.stages import (
    cheap_check,
    expert_configuration,
    induce_configuration,
    kept,
    stage_filter,
    stage_induce,
    stage_respond,
    with_instructions,
)
from safer_instruct.text.corpus import read_corpus
from safer_instruct.text.examples import Example, text_id
from safer_instruct.text.exclusion import read_instruction_keys
from safer_instruct.text.prompts import render_reversed
from safer_instruct.text.readers import read_rows

SECRET = "zebra-secret"
INDUCED = induce_configuration("fake", "f0", InductionSettings())


class FakeGenerator:
    """Knows the right answer for each kind of row; yields in a shuffled order."""

    name, fingerprint = "fake", "f0"

    def check(self) -> None: ...

    def generate(self, requests) -> Iterator[Generation]:
        requests = list(requests)
        random.Random(len(requests)).shuffle(requests)
        for request in requests:
            body = request.prompt.body
            assert request.prompt == render_reversed(body)
            text, truncated = f"  Say number {body.split()[-1]}\n", False
            if body.startswith("EMPTY"):
                text = " \n"
            elif body.startswith("COPY"):
                text = body
            elif body.startswith("CUT"):
                truncated = True
            elif body.startswith("SAME"):
                text = "Say the same"
            yield Generation(request.id, text, truncated, prompt_tokens=10, new_tokens=3)


class FakeExpert:
    """Keeps even numbers, abstains on some; counts what it was asked."""

    name, prompt_hashes = "fake-expert", {"screen": "p1", "respond": "p2"}

    def __init__(self) -> None:
        self.asked: list[str] = []

    def check(self) -> None: ...

    def fingerprint(self, role) -> str:
        return "e0"

    def screen(self, pairs) -> Iterator[tuple[str, Verdict]]:
        for pair in reversed(pairs):
            self.asked.append(pair.id)
            keep = "ODD" not in pair.rejected
            yield pair.id, Verdict(keep, "keep" if keep else "does_not_fit", "by-expert", tokens=5)

    def write(self, role, examples) -> Iterator[tuple[str, SafeResponse]]:
        for example in reversed(examples):
            if "ABSTAIN" in example.rejected:
                yield example.id, SafeResponse(None, "abstain_empty", 2)
            elif "ECHO" in example.rejected:
                yield example.id, SafeResponse(example.rejected, "", 2)
            else:
                yield example.id, SafeResponse(f"I decline: {example.instruction}", "", 2)


def write_corpus(path: Path) -> list[dict]:
    rows = []
    for i in range(60):
        kind = ("EVEN", "ODD", "ABSTAIN", "EMPTY", "COPY", "CUT", "ECHO", "SAME", "EVEN", "EVEN")[i % 10]
        rows.append({"response": f"{kind} {SECRET} answer with some more words {i}", "label": ("a", "b", "")[i % 3]})
    rows.insert(5, {"response": "  ", "label": "a"})
    rows.insert(9, dict(rows[3]))
    rows.insert(12, {"response": None, "label": "a"})
    rows.insert(30, {"response": 17, "label": "a"})
    rows.insert(31, {"response": "broken \ud800", "label": "a"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def run_shard(corpus_path: Path, folder: Path, index: int, count: int, *, batch_size: int = 7) -> FakeExpert:
    examples = read_corpus(CorpusSettings(path=str(corpus_path)), index=index, count=count).examples
    paths = {stage: shard_path(folder, stage, index, count) for stage in ("induce", "filter", "respond")}
    expert = FakeExpert()
    with Ledger(paths["induce"], INDUCED) as ledger:
        run_stage(examples, ledger, stage_induce(FakeGenerator()), batch_size=batch_size)
    before, induced = read_ledger(paths["induce"])
    pairs = with_instructions(examples, induced)
    with Ledger(paths["filter"], expert_configuration(expert, before, "screen")) as ledger:
        run_stage(pairs, ledger, stage_filter(expert), batch_size=batch_size)
    before, verdicts = read_ledger(paths["filter"])
    with Ledger(paths["respond"], expert_configuration(expert, before, "respond")) as ledger:
        run_stage(kept(pairs, verdicts), ledger, stage_respond(expert), batch_size=batch_size)
    return expert


def run_merge(corpus_path: Path, output: Path, *, exclude: str | None = None, format: str = "jsonl", **columns):
    guard = LeakageGuard(read_instruction_keys(exclude), None)
    settings = CorpusSettings(path=str(corpus_path), **columns)
    exact = DuplicatesSettings(threshold=None)
    return merge(settings, find_ledgers(output / "ledger"), output, guard=guard, duplicates=exact, format=format)


def run_all(tmp_path: Path, count: int, *, exclude: str | None = None, format: str = "jsonl"):
    corpus_path = tmp_path / "corpus.jsonl"
    rows = write_corpus(corpus_path)
    output = tmp_path / f"out{count}{format}"
    order = list(range(count))
    random.Random(1).shuffle(order)
    for index in order:
        run_shard(corpus_path, output / "ledger", index, count, batch_size=3 + index)
    merged = run_merge(corpus_path, output, exclude=exclude, format=format)
    report = build_report(merged, run={"command": "x"})
    write_report(report, output)
    return rows, output, report


def test_the_dataset_is_what_the_definition_says(tmp_path) -> None:
    rows, output, report = run_all(tmp_path, 1)
    pairs = [json.loads(line) for line in (output / "si.jsonl").read_text().splitlines()]
    seen: set[str] = set()
    expected = []
    for line, row in enumerate(rows, start=1):
        response = row["response"]
        if not isinstance(response, str) or response in seen or not response.startswith(("EVEN", "SAME")):
            continue
        seen.add(response)
        number = response.split()[-1]
        instruction = "Say the same" if response.startswith("SAME") else f"Say number {number}"
        expected.append((line, response, instruction, row["label"] or "by-expert"))
    assert len(expected) == 24
    found = [(p["provenance"]["source"], p["rejected"], p["instruction"], p["label"]) for p in pairs]
    assert found == [(f"corpus.jsonl:{line}", *rest) for line, *rest in expected]
    assert all(list(p) == ["id", "instruction", "rejected", "chosen", "label", "provenance"] for p in pairs)
    assert all(p["id"] == text_id(p["rejected"]) == p["provenance"]["response_id"] for p in pairs)
    assert all(p["chosen"] == f"I decline: {p['instruction']}" for p in pairs)
    assert pairs[0]["provenance"]["reversed_model_fingerprint"] == "f0"
    assert pairs[0]["provenance"]["filter_expert"] == "fake-expert"
    assert {"temperature", "top_p", "seed", "max_new_tokens"} <= set(pairs[0]["provenance"])
    assert report["num_rows"] == 24


def test_shards_do_not_show(tmp_path) -> None:
    _, one, report_one = run_all(tmp_path, 1)
    _, three, report_three = run_all(tmp_path, 3)
    assert (one / "si.jsonl").read_bytes() == (three / "si.jsonl").read_bytes()
    assert report_one == report_three
    assert (one / "README.md").read_bytes() == (three / "README.md").read_bytes()
    settings = CorpusSettings(path=str(tmp_path / "corpus.jsonl"))
    sizes = [len(read_corpus(settings, index=i, count=3).examples) for i in range(3)]
    assert sum(sizes) == 60
    assert min(sizes) > 0


def test_every_drop_has_a_reason_and_a_count(tmp_path) -> None:
    exclude = tmp_path / "test_set.csv"
    exclude.write_text("instruction,label\nSAY  number 0,x\n")
    rows, _, report = run_all(tmp_path, 3, exclude=str(exclude))
    drops = {stage["stage"]: stage["drops"] for stage in report["funnel"]}
    assert drops["corpus"] == {
        "empty_response": 2, "response_not_text": 1, "response_not_unicode": 1, "duplicate_response": 1,
    }  # fmt: skip
    assert drops["filter"] == {
        "copies_response": 6, "does_not_fit": 6, "empty_instruction": 6, "truncated_instruction": 6,
    }  # fmt: skip
    assert drops["respond"] == {"abstain_empty": 6}
    assert drops["merge"] == {"chosen_equals_rejected": 6, "excluded_instruction": 1}
    assert report["funnel"][0]["in"] == len(rows)
    for before, after in zip(report["funnel"], report["funnel"][1:], strict=False):
        assert before["out"] == after["in"]
        assert before["out"] == before["in"] - sum(before["drops"].values())
    assert report["num_rows"] == report["funnel"][-1]["out"] == 23
    assert report["kept_rate"] == report["funnel"][2]["rate"] == 0.6
    assert report["tokens"] == {"induce": 60 * 13, "filter": 42 * 5, "respond": 36 * 2}
    labels = report["by_label"]
    assert sum(counts["induced"] for counts in labels.values()) == 60
    assert sum(counts["out"] for counts in labels.values()) == 23
    reasons = Counter()
    for counts in labels.values():
        assert counts["induced"] - sum(counts["drops"].values()) == counts["out"]
        reasons.update(counts["drops"])
    assert reasons == Counter(drops["filter"]) + Counter(drops["respond"]) + Counter(drops["merge"])
    assert report["corpus_drops_at"]["response_not_text"] == ["corpus.jsonl:31"]


def test_duplicate_pairs_are_merged_once(tmp_path) -> None:
    corpus_path = tmp_path / "corpus.csv"
    corpus_path.write_text("response,label\nSAME words 1,a\nSAME  words 1,a\nEVEN other 2,a\n")
    run_shard(corpus_path, tmp_path / "ledger", 0, 1)
    assert run_merge(corpus_path, tmp_path).num_dropped() == {"duplicate_pair": 1}
    pairs = [json.loads(line) for line in (tmp_path / "si.jsonl").read_text().splitlines()]
    assert [pair["rejected"] for pair in pairs] == ["SAME words 1", "EVEN other 2"], "the first stays"


@pytest.mark.parametrize("answered_in", [0, 1])
@pytest.mark.parametrize("later", [True, False])
def test_a_row_that_a_server_refused_counts_as_it_was_answered(tmp_path, answered_in: int, later: bool) -> None:
    """Refused before or after its answer, in the same shard's ledger or another's: the dataset is as without."""
    _, output, _ = run_all(tmp_path, 2)
    corpus_path = tmp_path / "corpus.jsonl"
    expected = run_merge(corpus_path, output)
    before = (output / "si.jsonl").read_bytes()
    ledgers = [shard_path(output / "ledger", "respond", index, 2) for index in range(2)]
    lines = [ledger.read_text().splitlines(keepends=True) for ledger in ledgers]
    answers = [json.loads(line) for of_shard in lines for line in of_shard[1:]]
    answered, refused = [one for one in answers if one["chosen"] and "decline" in one["chosen"]][:2]
    headers, others = [of_shard[0] for of_shard in lines], [one for one in answers if one not in (answered, refused)]

    def refusal(record: dict) -> dict:
        return {**record, "chosen": None, "reason": "abstain_http_503", "tokens": 0}

    def write(*records: tuple[int, dict]) -> None:
        for index, ledger in enumerate(ledgers):
            rest = others if index == 0 else []
            own = [*rest, *(record for shard, record in records if shard == index)]
            ledger.write_text(headers[index] + "".join(json.dumps(record) + "\n" for record in own))

    once_refused = [(0, refusal(answered)), (1, refusal(answered))]
    once_refused.insert(2 if later else 0, (answered_in, answered))
    write(*once_refused, (0, refused))
    assert run_merge(corpus_path, output).fates == expected.fates
    assert (output / "si.jsonl").read_bytes() == before

    write(*once_refused, (0, refusal(refused)), (1, refusal(refused)))
    assert run_merge(corpus_path, output).num_dropped(stage="respond")["abstain_http_503"] == 1
    ids = [json.loads(line)["id"] for line in (output / "si.jsonl").read_text().splitlines()]
    kept_before = [json.loads(line)["id"] for line in before.splitlines()]
    assert ids == [id for id in kept_before if id != refused["id"]]


def test_a_row_whose_instruction_a_server_did_not_give_is_induced_and_judged_later(tmp_path, monkeypatch) -> None:
    """What the filter says of such a row is as open as it is: the dataset is that of a server that always answers."""
    _, output, _ = run_all(tmp_path, 1)
    whole, answer = (output / "si.jsonl").read_bytes(), FakeGenerator.generate

    def fail(self, requests) -> Iterator[Generation]:
        for one in answer(self, requests):
            yield Generation(one.id, "", error="http_500") if one.text.endswith("8\n") else one

    later, corpus = tmp_path / "later", tmp_path / "corpus.jsonl"
    with monkeypatch.context() as broken:
        broken.setattr(FakeGenerator, "generate", fail)
        run_shard(corpus, later / "ledger", 0, 1)
    dropped = run_merge(corpus, later).num_dropped(stage="filter")
    assert dropped["induction_failed"] == 6
    asked = run_shard(corpus, later / "ledger", 0, 1).asked
    assert len(asked) == 6
    assert run_merge(corpus, later).num_dropped()["induction_failed"] == 0
    assert (later / "si.jsonl").read_bytes() == whole
    with monkeypatch.context() as broken:  # induced again, and not judged yet
        (later / "ledger" / "filter-00000-of-00001.jsonl").unlink()
        (later / "ledger" / "induce-00000-of-00001.jsonl").unlink()
        broken.setattr(FakeGenerator, "generate", fail)
        run_shard(corpus, later / "ledger", 0, 1)
    with Ledger(later / "ledger" / "induce-00000-of-00001.jsonl", INDUCED) as ledger:
        run_stage(
            read_corpus(CorpusSettings(path=str(corpus))).examples, ledger, stage_induce(FakeGenerator()), batch_size=9
        )
    with pytest.raises(UserError, match="have no result of stage=filter yet"):
        run_merge(corpus, later)


def test_of_several_candidates_one_that_came_is_enough() -> None:
    """A row is asked again where none came; its instruction is the first that did."""

    class Server:
        def __init__(self, errors: str) -> None:
            self.errors = errors

        def generate(self, requests) -> Iterator[Generation]:
            for request, error in zip(requests, self.errors, strict=True):
                yield Generation(request.id, "" if error == "x" else error, error="http_500" if error == "x" else "")

    (record,) = stage_induce(Server("xab"), 3)([Example("r", rejected="text")])
    assert (record["instruction"], is_final(record)) == ("a", True)
    (record,) = stage_induce(Server("xxx"), 3)([Example("r", rejected="text")])
    assert not is_final(record)


def test_parquet_holds_the_same_rows(tmp_path) -> None:
    _, jsonl, _ = run_all(tmp_path, 1)
    _, parquet, _ = run_all(tmp_path, 1, format="parquet")
    table = pyarrow.parquet.read_table(parquet / "si.parquet")
    rows = [{**row, "provenance": json.loads(row["provenance"])} for row in table.to_pylist()]
    assert rows == [json.loads(line) for line in (jsonl / "si.jsonl").read_text().splitlines()]
    assert [row["id"] for _, row in read_rows(parquet)] == [row["id"] for _, row in read_rows(jsonl)]


def test_report_and_card_quote_no_text(tmp_path) -> None:
    _, output, _ = run_all(tmp_path, 1)
    for name in ("report.json", "README.md"):
        text = (output / name).read_text()
        assert SECRET not in text
        assert "Say number" not in text
    card = (output / "README.md").read_text()
    assert "Content warning" in card
    assert "| filter | 60 | 36 | 60.0% |" in card
    assert "| filter | truncated_instruction | 6 |" in card
    assert str(tmp_path) not in card


def test_the_expert_is_not_asked_what_a_cheap_check_knows(tmp_path) -> None:
    corpus_path = tmp_path / "corpus.jsonl"
    write_corpus(corpus_path)
    expert = run_shard(corpus_path, tmp_path / "ledger", 0, 1)
    assert len(expert.asked) == len(set(expert.asked)) == 42


@pytest.mark.parametrize(
    ("instruction", "response", "reason"),
    [
        ("Say one", "one", ""),
        ("", "one", "empty_instruction"),
        ("The  ANSWER is", "the answer\nis", "copies_response"),
        ("Repeat: a b c d e f g h", "a b c d e f g h", "copies_response"),
        ("a b c d e f g h", "And a b c d e f g h i", "copies_response"),
        ("Repeat: a b c d e f g", "a b c d e f g", ""),
        ("a b c d e f g h", "xa b c d e f g hx", ""),
    ],
)
def test_cheap_checks(instruction, response, reason) -> None:
    pair = Example("x", instruction=instruction, rejected=response, provenance={"truncated": False})
    assert cheap_check(pair) == reason


def test_a_corpus_that_changed_under_its_ids_is_noticed(tmp_path) -> None:
    corpus_path = tmp_path / "corpus.csv"
    settings = CorpusSettings(path=str(corpus_path), id_column="key")
    corpus_path.write_text("key,response\n1,EVEN one 1\n2,EVEN two 2\n")
    examples = read_corpus(settings).examples
    with Ledger(tmp_path / "l.jsonl", {}) as ledger:
        run_stage(examples, ledger, stage_induce(FakeGenerator()), batch_size=4)
        corpus_path.write_text("key,response\n1,EVEN one 1\n2,EVEN changed 2\n")
        with pytest.raises(UserError, match=r"row 2 \(corpus\.csv:3\): the corpus has changed"):
            with_instructions(read_corpus(settings).examples, ledger.records)


def test_an_unfinished_stage_is_counted(tmp_path) -> None:
    corpus_path = tmp_path / "corpus.jsonl"
    write_corpus(corpus_path)
    run_shard(corpus_path, tmp_path / "ledger", 0, 3)
    with pytest.raises(UserError, match=r"2 of 3 shards have no ledger of stage=induce \(first missing: 1, 2\)"):
        find_ledgers(tmp_path / "ledger")
    run_shard(corpus_path, tmp_path / "ledger", 1, 3)
    run_shard(corpus_path, tmp_path / "ledger", 2, 3)
    path = shard_path(tmp_path / "ledger", "filter", 1, 3)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    with pytest.raises(UserError, match="2 of 60 rows have no result of stage=filter yet"):
        run_merge(corpus_path, tmp_path)
    assert not (tmp_path / "si.jsonl").exists()


def test_shards_of_different_configurations_are_not_merged(tmp_path) -> None:
    corpus_path = tmp_path / "corpus.jsonl"
    write_corpus(corpus_path)
    for index in range(2):
        run_shard(corpus_path, tmp_path / "ledger", index, 2)
    path = shard_path(tmp_path / "ledger", "filter", 1, 2)
    path.write_bytes(path.read_bytes().replace(b'"expert_fingerprint": "e0"', b'"expert_fingerprint": "e1"'))
    with pytest.raises(UserError, match=r"filter-00001-of-00002.*expert_fingerprint"):
        find_ledgers(tmp_path / "ledger")


def test_ledgers_that_do_not_belong_together_are_not_merged(tmp_path) -> None:
    """Of a finished run, induce is run again with another seed: what filter and respond say is about other texts."""
    corpus_path = tmp_path / "corpus.jsonl"
    write_corpus(corpus_path)
    folder = tmp_path / "ledger"
    run_shard(corpus_path, folder, 0, 1)
    assert list(find_ledgers(folder)) == ["induce", "filter", "respond"]
    path = shard_path(folder, "induce", 0, 1)
    path.unlink()
    examples = read_corpus(CorpusSettings(path=str(corpus_path))).examples
    with Ledger(path, induce_configuration("fake", "f0", InductionSettings(seed=1))) as ledger:
        run_stage(examples, ledger, stage_induce(FakeGenerator()), batch_size=7)
    with pytest.raises(UserError, match=r"the ledgers of stage=filter were made from other ledgers of stage=induce"):
        find_ledgers(folder)
    shard_path(folder, "filter", 0, 1).unlink()
    before, induced = read_ledger(path)
    with Ledger(shard_path(folder, "filter", 0, 1), expert_configuration(FakeExpert(), before, "filter")) as ledger:
        run_stage(with_instructions(examples, induced), ledger, stage_filter(FakeExpert()), batch_size=7)
    with pytest.raises(UserError, match=r"stage=respond were made from other .* of stage=filter .* Delete respond-\*"):
        find_ledgers(folder)


def test_one_merge_or_audit_at_a_time_in_an_output(tmp_path) -> None:
    corpus_path = tmp_path / "corpus.jsonl"
    write_corpus(corpus_path)
    run_shard(corpus_path, tmp_path / "ledger", 0, 1)
    (tmp_path / ".merge").mkdir()
    (tmp_path / ".merge" / "corpus.parquet").write_text("of a merge that is under way")
    with FileLock(tmp_path / ".lock"), pytest.raises(UserError, match=r"another stage=merge or stage=audit is writing"):
        run_merge(corpus_path, tmp_path)
    assert (tmp_path / ".merge" / "corpus.parquet").exists()
    assert not (tmp_path / "si.jsonl").exists()
    with lock_output(tmp_path):  # the holder itself merges: induce.py holds the lock until its report is written
        assert run_merge(corpus_path, tmp_path).num_rows == 24
    with FileLock(tmp_path / ".lock").acquire(timeout=0):
        pass


def test_the_card_escapes_what_files_name(tmp_path) -> None:
    """`push_to_hub` uploads the card, so a label of the corpus must not become markup there."""
    corpus_path = tmp_path / "corpus.jsonl"
    rows = [
        {"response": "EVEN number 1", "label": "<img src=x>"},
        {"response": "EVEN number 2", "label": "x \u202e|y"},
    ]
    corpus_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_shard(corpus_path, tmp_path / "ledger", 0, 1)
    write_report(build_report(run_merge(corpus_path, tmp_path), run={}), tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| &lt;img src=x> | 1 | 1 | 1 |" in card
    assert "| x \\\\u202e\\|y | 1 | 1 | 1 |" in card
    assert "<img" not in card
    assert "\u202e" not in card


def test_all_formats_hold_the_same_rows(tmp_path) -> None:
    _, output, _ = run_all(tmp_path, 3, format="all")
    jsonl = [json.loads(line) for line in (output / "si.jsonl").read_text().splitlines()]
    for table in (
        pyarrow.parquet.read_table(output / "si.parquet").to_pylist(),
        datasets.load_from_disk(output / "arrow"),
    ):
        assert [{**row, "provenance": json.loads(row["provenance"])} for row in table] == jsonl
    assert not (output / ".merge").exists()


def test_a_dataset_is_replaced_as_a_whole_or_not_at_all(tmp_path) -> None:
    def batches(text: str, *, breaks: bool = False):
        yield from record_batches(SCHEMA, [(str(n), text, text, text, "", '{"source": "x"}') for n in range(5000)])
        if breaks:
            raise RuntimeError("the disk is full")

    assert write_dataset(tmp_path, "all", batches("old")) == 5000
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(RuntimeError, match="the disk is full"):
        write_dataset(tmp_path, "all", batches("new", breaks=True))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    state = json.loads((tmp_path / "arrow" / "state.json").read_text())
    assert write_dataset(tmp_path, "all", batches("new")) == 5000
    loaded = datasets.load_from_disk(tmp_path / "arrow")
    assert set(loaded["chosen"]) == {"new"}
    assert loaded._fingerprint != state["_fingerprint"], "else `map` would find what it cached of the old rows"
    assert write_dataset(tmp_path, "parquet", batches("new")) == 5000
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["checksums.xxh3.json", "si.parquet"], "the folder holds one dataset, not two"


def test_near_duplicates_and_near_leaks_are_found_across_shards(tmp_path) -> None:
    """Row 0 and row 6 differ in one word of many; row 3's instruction is nearly one of the test set."""
    corpus_path = tmp_path / "corpus.jsonl"
    words = " ".join(f"w{i}" for i in range(40))
    texts = [
        f"EVEN {words} {i}" if i in (0, 6) else f"EVEN text {i} {' '.join(f'v{i}{j}' for j in range(20))} {i}"
        for i in range(9)
    ]
    corpus_path.write_text("".join(json.dumps({"response": text}) + "\n" for text in texts))
    results = []
    for count in (1, 4):
        output = tmp_path / f"out{count}"
        for index in range(count):
            run_shard(corpus_path, output / "ledger", index, count)
        merged = merge(
            CorpusSettings(path=str(corpus_path)),
            find_ledgers(output / "ledger"),
            output,
            guard=LeakageGuard(["say number 3 please"], 0.6),
            duplicates=DuplicatesSettings(index="disk" if count == 4 else "memory"),
            format="jsonl",
        )
        assert merged.num_dropped() == {"near_duplicate_pair": 1, "near_excluded_instruction": 1}
        results.append((output / "si.jsonl").read_bytes())
    assert results[0] == results[1]
    kept = [json.loads(line)["rejected"] for line in results[0].splitlines()]
    assert kept == [text for i, text in enumerate(texts) if i not in (3, 6)]


def test_upload_to_the_hub(tmp_path, monkeypatch) -> None:
    seen = {}

    class Api:
        def create_repo(self, name, **options):
            if name == "nobody/x":
                raise OSError("no login")
            return f"https://hub/{name}"

        def upload_folder(self, **options):
            seen.update(options)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert push_dataset(tmp_path, "me/si", ("si.jsonl", "si.parquet", "arrow")) == "https://hub/me/si"
    assert "si.parquet" in seen["allow_patterns"]
    assert not any("ledger" in name or name == "arrow" for name in seen["allow_patterns"])
    with pytest.raises(UserError, match=r"push_to_hub=nobody/x: the upload failed \(no login\)"):
        push_dataset(tmp_path, "nobody/x", ("si.jsonl",))


def test_records_about_another_instruction_are_refused(tmp_path) -> None:
    """Induced anew with another seed, verdicts and answers kept: they are about what was asked before."""
    corpus_path = tmp_path / "corpus.csv"
    corpus_path.write_text("response,label\nEVEN one 1,a\nEVEN two 2,b\n")
    run_shard(corpus_path, tmp_path / "ledger", 0, 1)
    induced = shard_path(tmp_path / "ledger", "induce", 0, 1)
    induced.write_text(induced.read_text().replace("Say number 2", "Say another 2"))
    examples = read_corpus(CorpusSettings(path=str(corpus_path))).examples
    pairs = with_instructions(examples, read_ledger(induced)[1])
    verdicts = read_ledger(shard_path(tmp_path / "ledger", "filter", 0, 1))[1]
    with pytest.raises(UserError, match=r"\(corpus\.csv:3\): its record of stage=filter is about another instruction"):
        kept(pairs, verdicts)
    with pytest.raises(UserError, match="is about another instruction"):
        run_merge(corpus_path, tmp_path)
    for stage in ("filter", "respond"):  # as written before records said it
        path = shard_path(tmp_path / "ledger", stage, 0, 1)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text(
            "".join(json.dumps({k: v for k, v in line.items() if k != "instruction_id"}) + "\n" for line in lines)
        )
    assert run_merge(corpus_path, tmp_path).num_rows == 2
