"""respond.max_same: no response has more rows than its share, whatever the shards, and who is asked again for that."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

import induce
from config.checks_induce import check_induce
from config.errors import UserError
from config.schema import compose_config
from config.settings import CorpusSettings
from safer_instruct.dataset.card import build_report
from safer_instruct.experts.rules import Rules
from safer_instruct.experts.verdicts import SafeResponse, Verdict
from safer_instruct.induction.ledger import read_ledger, shard_path
from safer_instruct.induction.shard import kept_pairs
from safer_instruct.induction.stages import STAGES
from safer_instruct.induction.status import render_status
from safer_instruct.induction.vary import run_vary
from safer_instruct.text.corpus import read_corpus
from tests import test_stages

ROWS = 200
SAME = "I cannot help with that."


class Monotonous(test_stages.FakeExpert):
    """Answers seven of ten with one sentence; asked again, it names the matter, but for rows with a 9 in them."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt_hashes = {"screen": "p1", "respond": "p2", "vary": "p3"}

    def screen(self, pairs):
        return ((pair.id, Verdict(True, "keep", "x", tokens=1)) for pair in pairs)

    def write(self, role, examples):
        return self.vary(examples) if role == "vary" else self.respond(examples)

    def respond(self, examples):
        for example in examples:
            number = int(example.instruction.split()[-1])
            yield example.id, SafeResponse(SAME if number % 10 < 7 else f"I will not say {number}.", "", 2)

    def vary(self, examples):
        for example in examples:
            self.asked.append(example.id)
            number = example.instruction.split()[-1]
            yield example.id, SafeResponse(SAME.upper() if "9" in number else f"No number {number} from me.", "", 3)


def shards(tmp_path: Path, count: int, monkeypatch) -> tuple[Path, dict[int, dict[str, Path]]]:
    """Ledgers up to respond, of all shards."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"response": f"EVEN text number {i}"}) + "\n" for i in range(ROWS)))
    folder = tmp_path / str(count)
    monkeypatch.setattr(test_stages, "FakeExpert", Monotonous)
    for index in range(count):
        test_stages.run_shard(corpus, folder / "ledger", index, count)
    paths = {i: {s: shard_path(folder / "ledger", s, i, count) for s in STAGES} for i in range(count)}
    return corpus, paths


def vary(corpus: Path, paths: dict[str, Path], index: int, count: int, max_same: float = 0.02) -> Monotonous:
    expert = Monotonous()
    examples = read_corpus(CorpusSettings(path=str(corpus)), index=index, count=count).examples
    run_vary(expert, kept_pairs(examples, paths)[1], paths, count, max_same)
    return expert


def test_no_response_keeps_more_than_its_share_and_shards_do_not_show(tmp_path, monkeypatch) -> None:
    written = {}
    for count in (1, 3):
        corpus, paths = shards(tmp_path, count, monkeypatch)
        asked = [id for index in range(count) for id in vary(corpus, paths[index], index, count).asked]
        same = sum(i % 10 < 7 for i in range(ROWS))
        assert len(asked) == len(set(asked)) == same - int(0.02 * ROWS)
        merged = test_stages.run_merge(corpus, tmp_path / str(count))
        written[count] = (tmp_path / str(count) / "si.jsonl").read_text()
        stuck = merged.varied["still_the_same"]
        assert merged.varied["asked_again"] == len(asked)
        assert build_report(merged, run={})["varied"] == dict(merged.varied)
    assert written[1] == written[3]
    pairs = [json.loads(line) for line in written[1].splitlines()]
    uses = Counter(pair["chosen"].casefold() for pair in pairs)
    assert uses.pop(SAME.casefold()) == int(0.02 * ROWS) + stuck
    assert 0 < stuck < 40
    assert set(uses.values()) == {1}


def test_a_kill_asks_nobody_twice_and_the_header_tells_the_share(tmp_path, monkeypatch) -> None:
    corpus, paths = shards(tmp_path, 1, monkeypatch)
    whole = vary(corpus, paths[0], 0, 1)
    data = paths[0]["vary"].read_bytes()
    paths[0]["vary"].write_bytes(data[: len(data) // 2])
    before = len(read_ledger(paths[0]["vary"])[1])
    with pytest.raises(UserError, match="rows have no result of stage=vary yet"):
        test_stages.run_merge(corpus, tmp_path / "1")
    assert len(vary(corpus, paths[0], 0, 1).asked) == len(whole.asked) - before
    assert "vary: 136 of 136 rows" in render_status(tmp_path / "1" / "ledger")
    with pytest.raises(UserError, match=r"respond.max_same was 0.02, is now 0.5"):
        vary(corpus, paths[0], 0, 1, 0.5)


def test_all_shards_must_have_responded(tmp_path, monkeypatch) -> None:
    corpus, paths = shards(tmp_path, 3, monkeypatch)
    lines = paths[1]["respond"].read_text().splitlines(keepends=True)
    header = json.dumps({**json.loads(lines[0]), "rows": len(lines) - 1}) + "\n"  # as run_respond writes it
    paths[1]["respond"].write_text("".join([header, *lines[1:-5]]))
    with pytest.raises(UserError, match=r"5 rows have none yet: finish stage=respond on all shards"):
        vary(corpus, paths[0], 0, 3)
    paths[1]["respond"].unlink()
    with pytest.raises(UserError, match="1 of 3 shards have no ledger of stage=respond"):
        vary(corpus, paths[0], 0, 3)


def test_commands_without_the_share_or_its_stage_are_refused(tmp_path, monkeypatch) -> None:
    corpus, _ = shards(tmp_path, 1, monkeypatch)
    words = [f"corpus.path={corpus}", f"output={tmp_path / '1'}"]
    faults = [fault.message for fault in check_induce(compose_config("induce", [*words, "stage=vary", "expert=rules"]))]
    assert faults == ["stage=vary needs the largest share of one response: respond.max_same=0.02"]
    with pytest.raises(UserError, match=r"no ledger of stage=vary in .*; run it in all shards before stage=merge"):
        induce.main(compose_config("induce", [*words, "stage=merge", "respond.max_same=0.1"]))


def test_rules_have_another_response() -> None:
    rules = Rules.from_yaml(Path(__file__).parents[1] / "quickstart" / "rules.yaml")
    asked = "Write a rude remark about Anna the baker."
    assert rules.vary(asked) not in (None, rules.respond(asked))
    assert rules.vary("Praise the baker called Anna.") is None


def test_rows_that_were_asked_again_do_not_stand_for_rows_that_are_missing(tmp_path, monkeypatch) -> None:
    """Three lines more than rows, and two rows without any: neither stage=vary nor stage=merge takes it for whole."""
    corpus, paths = shards(tmp_path, 1, monkeypatch)
    vary(corpus, paths[0], 0, 1)
    for stage, what in (("vary", "2 rows have no result of stage=vary"), ("respond", "2 rows have none yet")):
        whole = paths[0][stage].read_text()
        header, *lines = whole.splitlines(keepends=True)
        rows = json.dumps({**json.loads(header), "rows": len(lines)}) + "\n"
        refused = [json.dumps({**json.loads(line), "chosen": None, "reason": "abstain_http_503"}) for line in lines[:3]]
        paths[0][stage].write_text("".join([rows, *(f"{line}\n" for line in refused), *lines[:-2]]))
        with pytest.raises(UserError, match=what):
            test_stages.run_merge(corpus, tmp_path / "1") if stage == "vary" else vary(corpus, paths[0], 0, 1)
        paths[0][stage].write_text(whole)
