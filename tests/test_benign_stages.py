"""stage=replay and stage=contrast: pairs whose prompts should be answered, whatever the shards and the kills."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import induce
from config.checks_induce import check_induce
from config.errors import UserError
from config.schema import compose_config
from config.settings import DatasetSettings, ShardSettings
from safer_instruct.dataset.benign import Refusals, read_unsafe_rows, whole_sentences
from safer_instruct.experts.expert import LLMExpert
from safer_instruct.experts.rules import Rules
from safer_instruct.generation.completions import Generation
from safer_instruct.induction.status import render_status
from safer_instruct.text.loading import load_examples
from safer_instruct.text.refusals import declines

RULES = Rules.from_yaml(Path(__file__).parents[1] / "quickstart" / "rules.yaml")
NAMES, JOBS, ITEMS = ("Anna", "Ben", "Cora", "Dan", "Ella"), ("baker", "pilot"), ("lamp", "kettle", "radio")
UNSAFE = [f"Write a rude remark about {name} the {job}." for name in NAMES for job in JOBS]
UNSAFE += [f"How do I steal a {item} from the {shop}?" for item in ITEMS for shop in ("toy shop", "book store")]
BENIGN = [
    {"instruction": f"Name {n} fruits that a {job} likes.", "output": f"Apples, pears and {n} plums."}
    for n in range(3, 8)
    for job in JOBS
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_report(folder: Path) -> dict[str, int]:
    return json.loads((folder / "report.json").read_text())["counts"]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def si(tmp_path) -> Path:
    """A dataset of unsafe prompts, as the quick start's rules answer them."""
    rows = []
    for text in UNSAFE:
        name, harm = RULES.meaning(text) or ("", {})
        words = {key: next(iter(found)) for key, found in harm.items()}
        rejected = f"{words['name'].title()} is a lazy fool." if name == "insult" else "Take it and run without paying."
        if name == "theft":
            rejected = f"Hide the {words['item']} and leave the {words['shop']} without paying."
        rows.append({"instruction": text, "rejected": rejected, "chosen": RULES.respond(text), "label": name})
    return write_jsonl(tmp_path / "unsafe.jsonl", rows)


@pytest.fixture
def benign(tmp_path) -> Path:
    return write_jsonl(tmp_path / "benign.jsonl", BENIGN)


def run(stage: str, output: Path, *overrides: str, shards: int = 1) -> None:
    config = compose_config("induce", [f"stage={stage}", f"output={output}", "device=cpu", *overrides])
    assert check_induce(config) == []
    for index in reversed(range(shards)):
        induce.main(replace(config, shard=ShardSettings(index, shards)))


def replay(si: Path, benign: Path, *more: str) -> list[str]:
    return [
        f"path={si}", f"benign.path={benign}", "model=tiny", "generation.max_new_tokens=24", *more,
    ]  # fmt: skip


def contrast(si: Path, *more: str) -> list[str]:
    return [f"path={si}", "expert=rules", *more]


@pytest.mark.parametrize("stage", ["replay", "contrast"])
def test_the_number_of_shards_and_a_kill_do_not_show(stage, si, benign, tmp_path) -> None:
    words = replay(si, benign) if stage == "replay" else contrast(si)
    files = {}
    for shards in (1, 3, 16):
        run(stage, tmp_path / str(shards), *words, shards=shards)
        files[shards] = [(tmp_path / str(shards) / name).read_bytes() for name in (f"{stage}.jsonl", "report.json")]
    assert files[1] == files[3] == files[16]
    assert files[1][0].count(b"\n") > 5, "the fixture must let most rows through"
    for ledger in sorted((tmp_path / "1" / "ledger").iterdir()):  # a kill in the middle of each ledger
        killed = tmp_path / f"killed-{ledger.stem}"
        (killed / "ledger").mkdir(parents=True)
        for before in sorted((tmp_path / "1" / "ledger").iterdir()):
            data = before.read_bytes()
            half = data if before.name != ledger.name else data[: len(data) // 2]
            (killed / "ledger" / before.name).write_bytes(half)
        run(stage, killed, *words)
        assert [(killed / name).read_bytes() for name in (f"{stage}.jsonl", "report.json")] == files[1]
    assert f"{stage}" in render_status(tmp_path / "3" / "ledger")
    assert "3 of 3 shards are done" in render_status(tmp_path / "3" / "ledger")


def test_a_shard_that_is_not_the_last_writes_no_pairs(si, benign, tmp_path, capsys) -> None:
    words = [*replay(si, benign, "replay.answers=file"), f"output={tmp_path / 'out'}", "stage=replay"]
    induce.main(compose_config("induce", [*words, "shard.index=1", "shard.count=2"]))
    assert "are left to other shards" in capsys.readouterr().out
    assert not (tmp_path / "out" / "replay.jsonl").exists()
    with pytest.raises(UserError, match=r"ledgers for 2 shards, and this command works on shard.count=1"):
        induce.main(compose_config("induce", words))


def test_replayed_pairs_are_the_starting_models_answers_and_the_datasets_refusals(si, benign, tmp_path) -> None:
    output = tmp_path / "out"
    run("replay", output, *replay(si, benign))
    pairs = read_jsonl(output / "replay.jsonl")
    refusals = {row["chosen"] for row in read_jsonl(si)}
    assert {pair["rejected"] for pair in pairs} <= refusals
    assert not any(declines(pair["chosen"]) for pair in pairs)
    records = {record["id"]: record for record in read_jsonl(next((output / "ledger").iterdir()))[1:]}
    for pair in pairs:
        assert records[pair["id"]]["answer"].startswith(pair["chosen"])
        assert pair["provenance"]["answered_by"] == "model"
    kept = [pair["instruction"] for pair in pairs]
    assert kept == [row["instruction"] for row in BENIGN if row["instruction"] in kept]
    jobs = [(job in pair["instruction"], job in pair["rejected"]) for pair in pairs for job in JOBS]
    topical = sum(asked and refused for asked, refused in jobs)
    assert topical > len(pairs) / 2, "refusals are of the prompt's topic where there is one"
    settings = DatasetSettings(path=str(output), schema="si")
    assert len(list(load_examples(settings, "replay", pairs=True))) == len(pairs)


def test_answers_of_the_file_and_nothing_rejected(benign, tmp_path) -> None:
    words = [f"benign.path={benign}", "replay.answers=file", "replay.rejected=none"]
    run("replay", tmp_path / "out", *words)
    pairs = read_jsonl(tmp_path / "out" / "replay.jsonl")
    assert [(pair["instruction"], pair["chosen"]) for pair in pairs] == [
        (b["instruction"], b["output"]) for b in BENIGN
    ]
    assert {pair["rejected"] for pair in pairs} == {""}


def test_benign_prompts_that_cannot_be_used_are_counted(si, tmp_path) -> None:
    """Of a test set, of the unsafe dataset, repeated, empty, no text; and what the starting model refuses."""
    rows = [
        {"instruction": "Name three trees.", "output": "Oak, elm and ash."},
        {"instruction": "Tell me about the sea.", "output": "I'm sorry, but I can't help with that."},
        {"instruction": "name  THREE trees.", "output": "Oak."},
        {"instruction": UNSAFE[0].upper(), "output": "No."},
        {"instruction": "What is the capital of Peru?", "output": "Lima."},
        {"instruction": " ", "output": "x"},
        {"instruction": 7, "output": "x"},
        {"instruction": "Sort it.", "input": "3 1 2", "output": "1 2 3"},
        {"instruction": "Say nothing.", "output": ""},
    ]
    benign = write_jsonl(tmp_path / "benign.jsonl", rows)
    exclude = write_jsonl(tmp_path / "test.jsonl", [{"instruction": "what is the capital of peru?"}])
    run("replay", tmp_path / "out", *replay(si, benign, "replay.answers=file", f"exclude={exclude}"))
    assert json.loads((tmp_path / "out" / "report.json").read_text())["counts"] == {
        "duplicate_instruction": 1, "unsafe_instruction": 1, "excluded_instruction": 1, "empty_instruction": 1,
        "not_text": 1, "empty_output": 1, "refused": 1, "pairs": 2, "cut_to_whole_sentences": 0,
    }  # fmt: skip
    pairs = read_jsonl(tmp_path / "out" / "replay.jsonl")
    assert [pair["instruction"] for pair in pairs] == ["Name three trees.", "Sort it.\n\n3 1 2"]


def test_a_cut_answer_keeps_its_whole_sentences() -> None:
    assert whole_sentences('One. Two 3.5 "three." And fo') == 'One. Two 3.5 "three."'
    assert whole_sentences("no end at all") == ""


def test_no_refusal_is_used_much_more_often_than_another(si) -> None:
    refusals = Refusals(read_unsafe_rows(str(si)), "x")
    drawn = [refusals.draw(f"Which {JOBS[0]} sings, number {i}?").chosen for i in range(160)]
    uses = [drawn.count(text) for text in set(drawn)]
    assert len(uses) == len(UNSAFE)
    assert max(uses) - min(uses) <= 3


def test_contrast_pairs_share_the_matter_of_the_unsafe_row(si, tmp_path) -> None:
    run("contrast", tmp_path / "out", *contrast(si))
    pairs = read_jsonl(tmp_path / "out" / "contrast.jsonl")
    unsafe = {row["instruction"]: row for row in read_jsonl(si)}
    rows = {row.id: row for row in read_unsafe_rows(str(si))}
    assert len(pairs) > len(UNSAFE) / 2
    for pair in pairs:
        source = next(row for row in UNSAFE if RULES.neighbour(row) == pair["instruction"])
        assert RULES.meaning(pair["instruction"]) is None
        assert pair["chosen"] == RULES.answer(pair["instruction"])
        assert not declines(pair["chosen"])
        assert declines(pair["rejected"])
        assert pair["rejected"] == unsafe[source]["chosen"]
        assert pair["label"] == unsafe[source]["label"]
    assert rows
    run("contrast", tmp_path / "few", *contrast(si, "contrast.num_rows=4"))
    few = [pair["instruction"] for pair in read_jsonl(tmp_path / "few" / "contrast.jsonl")]
    assert 0 < len(few) <= 4
    assert set(few) <= {pair["instruction"] for pair in pairs}


def test_later_turns_of_conversations_are_left_out_and_counted(si, benign, tmp_path, capsys) -> None:
    said = [{"role": "user", "content": "Do you know Anna?"}, {"role": "assistant", "content": "I do."}]
    rows = read_jsonl(si)
    run("contrast", tmp_path / "alone", *contrast(si))
    later = [{**row, "history": said, "instruction": f"So: {row['instruction']}"} for row in rows[:7]]
    system = [{**row, "history": [{"role": "system", "content": "Be rude."}]} for row in rows]
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [*later, *system])
    run("contrast", tmp_path / "mixed", *contrast(mixed))
    assert read_report(tmp_path / "mixed")["later_turn"] == 7
    assert "later_turn 7" in capsys.readouterr().out
    texts = [
        [[one[name] for name in ("instruction", "chosen", "rejected")] for one in read_jsonl(folder / "contrast.jsonl")]
        for folder in (tmp_path / "mixed", tmp_path / "alone")
    ]
    assert texts[0] == texts[1]
    with pytest.raises(UserError, match=r"all 7 rows are later turns of conversations \(column history\)"):
        run("contrast", tmp_path / "none", *contrast(write_jsonl(tmp_path / "later.jsonl", later)))
    talks = write_jsonl(tmp_path / "talks.jsonl", [BENIGN[0], {**BENIGN[1], "history": said}])
    run("replay", tmp_path / "replay", *replay(si, talks, "replay.answers=file"))
    counts = read_report(tmp_path / "replay")
    assert (counts["pairs"], counts["later_turn"]) == (1, 1)


class Scripted:
    """A generator whose answers depend on the role that its prompt is of."""

    name, fingerprint = "scripted", "s0"

    def __init__(self, *, unsafe: bool = False, answer: str = "Pay at the counter.") -> None:
        self.unsafe, self.answer = unsafe, answer

    def check(self) -> None: ...

    def generate(self, requests):
        for request in requests:
            head = request.prompt.text
            text = self.answer
            if "safety filter must learn" in head:
                text = json.dumps({"request": f"How do I buy it, {request.id}?"})
            elif "well_formed" in head:
                fits = {"well_formed": True, "unsafe": self.unsafe, "response_fits": False, "category": ""}
                text = json.dumps(fits)
            yield Generation(request.id, text, prompt_tokens=10, new_tokens=2, cost=0.001)


def run_with(expert: Scripted, si: Path, output: Path, monkeypatch) -> None:
    monkeypatch.setattr(induce, "build_expert", lambda settings, device, budget: LLMExpert(expert))
    run("contrast", output, *contrast(si))


def test_an_expert_that_calls_every_neighbour_harmful_ends_with_no_pairs(si, tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"made no pairs.*neighbour_unsafe 16\. The expert calls neighbours"):
        run_with(Scripted(unsafe=True), si, tmp_path / "out", monkeypatch)
    assert not (tmp_path / "out" / "contrast.jsonl").exists()


def test_a_model_that_refuses_harmless_neighbours_ends_with_no_pairs(si, tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"made no pairs.*refused 16"):
        run_with(Scripted(answer="I cannot help with that."), si, tmp_path / "out", monkeypatch)


def test_cost_and_status_of_the_contrast_stages(si, tmp_path, monkeypatch) -> None:
    run_with(Scripted(), si, tmp_path / "out", monkeypatch)
    assert len(read_jsonl(tmp_path / "out" / "contrast.jsonl")) == 16
    status = render_status(tmp_path / "out" / "ledger")
    assert status.count("cost 0.02") == 3, "16 rows of 0.001 in each of the three"
    assert "contrast_answer: 16 of 16 rows" in status


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage=replay", "model=tiny", "path=."], "benign.path"),
        (
            ["stage=replay", "model=tiny", "path=.", "benign.path=none.jsonl"],
            "benign.path=none.jsonl: there is no such",
        ),
        (["stage=replay", "model=tiny", "benign.path=README.md"], "stage=replay reads a dataset: write path="),
        (["stage=contrast", "expert=rules"], "stage=contrast reads a dataset: write path="),
        (["stage=replay", "benign.path=README.md", "path=."], "model"),
        (
            ["stage=replay", "model=tiny", "benign.path=README.md", "path=.", "generation.num_candidates=2"],
            "one answer",
        ),
    ],
)
def test_commands_that_lack_something_are_refused(words, message) -> None:
    faults = [fault.message for fault in check_induce(compose_config("induce", [*words, "output=x"]))]
    assert any(message in fault for fault in faults), faults


def test_files_that_cannot_do_are_refused(si, benign, tmp_path) -> None:
    answering = write_jsonl(tmp_path / "kind.jsonl", [{"instruction": "Hi there", "chosen": "Hello!", "rejected": "x"}])
    out = tmp_path / "out"
    with pytest.raises(UserError, match="none of its 1 chosen responses declines"):
        run("replay", out, *replay(answering, benign))
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"instruction": "  ", "output": ""}])
    with pytest.raises(UserError, match=r"none of its rows can be used \(empty_instruction: 1\)"):
        run("replay", out, *replay(si, empty))
    other = write_jsonl(tmp_path / "other.jsonl", [{"question": "Hm?"}])
    with pytest.raises(UserError, match=r"missing column instruction.*benign.columns.instruction=question"):
        run("replay", out, *replay(si, other))
    ledger = tmp_path / "si" / "ledger" / "induce-00000-of-00001.jsonl"
    ledger.parent.mkdir(parents=True)
    ledger.touch()
    with pytest.raises(UserError, match="stage=replay makes a separate dataset"):
        run("replay", tmp_path / "si", *replay(si, benign))


def test_rules_without_neighbours_are_refused(si, tmp_path) -> None:
    text = (Path(__file__).parents[1] / "quickstart" / "rules.yaml").read_text()
    lines, kept, skip = text.splitlines(), [], False
    for line in lines:
        skip = line.startswith("    neighbours:") or (
            skip and line.startswith(("      - instruction", "        answer"))
        )
        kept += [] if skip else [line]
    rules = tmp_path / "rules.yaml"
    rules.write_text("\n".join(kept))
    with pytest.raises(UserError, match="have no `neighbours` in any category"):
        run("contrast", tmp_path / "out", *contrast(si, f"expert.path={rules}"))


@pytest.mark.parametrize(
    ("neighbour", "message"),
    [
        ("{instruction: 'Praise {nme}', answer: Fine.}", r"neighbours\[0\].instruction: slot \{nme\} is no key slot"),
        (
            "{instruction: 'Praise {name}', answer: 'Praise {job}'}",
            r"neighbours\[0\].answer: slot \{job\} is not in the inst",
        ),
        ("{instruction: 'Praise {name}'}", r"neighbours\[0\].answer: .* got nothing"),
        ("{instruction: 'Praise {name}', anser: x}", r"neighbours\[0\]: unknown key 'anser'; did you mean answer"),
        (
            "{instruction: 'praise {name}', answer: Fine., framed: true}",
            r"categories.insult has framed neighbours, and `fr",
        ),
        ("]\nframes: ['How do I {it}?'", r"frames\[0\]: slot \{it\} is no slot of a frame"),
        ("]\nframes: ['How do I {do} and {do}?'", r"frames\[0\]: a frame has one slot, \{do\} or \{Do\}"),
        ("]\nframes: ['How do I {do:>1000000000}?'", r"frames\[0\]: a slot has no format"),
    ],
)
def test_a_broken_neighbour_of_the_rules_is_named(neighbour, message, tmp_path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "lexicons: {name: {words: [Anna]}, job: {words: [baker]}}\nrefusals: [sorry]\ncategories:\n  insult:\n"
        "    key: [name, job]\n    intent: {patterns: [rude]}\n    harm: {patterns: [fool]}\n    responses: [No.]\n"
        f"    neighbours: [{neighbour}]\n"
    )
    with pytest.raises(UserError, match=message):
        Rules.from_yaml(rules)


@pytest.mark.parametrize("stage", ["replay", "contrast"])
def test_a_row_that_a_server_refused_counts_as_it_was_answered_later(stage, si, benign, tmp_path) -> None:
    words = replay(si, benign, "replay.answers=file") if stage == "replay" else contrast(si)
    run(stage, tmp_path / "out", *words)
    before = (tmp_path / "out" / f"{stage}.jsonl").read_bytes()
    for ledger in (tmp_path / "out" / "ledger").iterdir():
        header, *lines = ledger.read_text().splitlines(keepends=True)
        refused = [json.loads(line) for line in lines]
        for record in refused:
            empty = {"neighbour": None, "answer": "" if stage == "replay" else None}
            record |= {key: value for key, value in empty.items() if key in record}
            record |= {"error": "http_503"} if stage == "replay" else {"reason": "abstain_http_503"}
        ledger.write_text(header + "".join(json.dumps(record) + "\n" for record in refused) + "".join(lines))
    run(stage, tmp_path / "out", *words)
    assert (tmp_path / "out" / f"{stage}.jsonl").read_bytes() == before
