"""A corpus of conversations: the last user's turn is induced from the last answer, behind the turns before it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_reversed_turns import FIRST, expected_rows
from test_review import items_of
from test_turns import TALK, write

import induce
from config.errors import UserError
from config.schema import compose_config
from config.settings import CorpusSettings, DatasetSettings, DuplicatesSettings, ModelSettings, ReviewSettings
from safer_instruct.dataset.audit import audit
from safer_instruct.dataset.review import write_review
from safer_instruct.dataset.reviews import Rejections
from safer_instruct.dataset.similarity import LeakageGuard
from safer_instruct.experts.expert import LLMExpert
from safer_instruct.experts.prompts import RESPOND, SCREEN
from safer_instruct.generation.completions import Generation, Request
from safer_instruct.generation.hf import HFGenerator
from safer_instruct.induction.shard import note_other_tuning
from safer_instruct.text.corpus import read_corpus
from safer_instruct.text.examples import Message, text_id
from safer_instruct.text.loading import load_examples
from safer_instruct.text.messages import read_history
from safer_instruct.text.prompts import render_prompt

SYSTEM = ("system", "You are rude.")
ASKED = "What did he write at last?"
TALKS = [[SYSTEM, *TALK], TALK[:2], [("user", "Hm?")]]
BEFORE = [{"role": role, "content": said} for role, said in [SYSTEM, *TALK[:4]]]


class Careful:
    """Keeps every pair but those of the response `drops`, and declines; keeps what it was asked."""

    name, fingerprint, drops = "careful", "0", ""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def check(self) -> None: ...

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        for one in requests:
            self.asked.append(one.prompt.text)
            fits = not self.drops or f"\n{self.drops}\n" not in one.prompt.text
            keep = {"well_formed": True, "unsafe": True, "response_fits": fits, "category": ""}
            yield Generation(one.id, json.dumps(keep) if one.schema else "I will not say that.")


def induced(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, *words: str, talks: Sequence[Any] = TALKS
) -> tuple[list[str], list[str], Path]:
    """Run all stages on conversations; return what model and expert were asked, and the dataset's folder."""
    write(tmp_path / "talks.jsonl", talks)
    prompts: list[str] = []
    expert = Careful()

    def says(generator: Any, ids: Sequence[str], rows: Sequence[list[int]]) -> list[list[int]]:
        prompts.extend(generator.tokenizer.decode(row, skip_special_tokens=True) for row in rows)
        told = generator.tokenizer(ASKED, add_special_tokens=False)["input_ids"]
        return [[*told, generator.tokenizer.eos_token_id] for _ in rows]

    monkeypatch.setattr(HFGenerator, "_decode", says)
    monkeypatch.setattr(induce, "build_expert", lambda *_: LLMExpert(expert))
    command = [f"corpus.path={tmp_path / 'talks.jsonl'}", "corpus.response_column=messages", "model=blank_model"]
    command += [f"model.name_or_path={model}", "expert=rules", f"output={tmp_path / 'si'}", *words]
    induce.main(compose_config("induce", command))
    return prompts, expert.asked, tmp_path / "si"


def test_the_last_turn_is_induced_behind_the_turns_before_it(
    tmp_path: Path, tiny_model_folder: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, asked, folder = induced(tmp_path, str(tiny_model_folder), monkeypatch)
    # Byte for byte what loss=reverse loss.on=all trains on; a first turn has the paper's prompt.
    assert sorted(prompts) == sorted([expected_rows(TALK)[2][0], FIRST.format(response=TALK[1][1])])
    # The expert reads the conversation, too; of a first turn the instruction alone.
    whole = "\n\n".join(f"{role}: {said}" for role, said in [SYSTEM, *TALK[:4], ("user", ASKED)])
    screened = [SCREEN.render(text, said).text for text, said in [(whole, TALK[5][1]), (ASKED, TALK[1][1])]]
    assert sorted(asked) == sorted([*screened, RESPOND.render(whole).text, RESPOND.render(ASKED).text])

    rows = [json.loads(line) for line in (folder / "si.jsonl").read_text().splitlines()]
    assert [(row["history"], row["instruction"], row["rejected"]) for row in rows] == [
        (BEFORE, ASKED, "So."), ([], ASKED, "the mat :)"),
    ]  # fmt: skip
    assert list(rows[0]) == ["id", "history", "instruction", "rejected", "chosen", "label", "provenance"]
    assert "no_answer: 1" in capsys.readouterr().out or "no_answer" in (folder / "README.md").read_text()
    for path in ("si.jsonl", "si.parquet", "arrow"):
        first, second = load_examples(DatasetSettings(path=str(folder / path), schema="si"), "si", pairs=True)
        assert (first.system, first.history) == (SYSTEM[1], tuple(TALK[:4])), path
        assert (second.system, second.history) == ("", ())
    pairs = [[TALK[0][1], TALK[1][1]], [TALK[2][1], TALK[3][1]]]
    assert read_history(pairs) == {"system": "", "history": tuple(TALK[:4])}
    prompt = render_prompt("hh", str(first.instruction), history=first.history).text
    human = [f"\n\nHuman: {said}" if role == "user" else f"\n\nAssistant: {said}" for role, said in TALK[:4]]
    assert prompt == "".join([*human, f"\n\nHuman: {ASKED}", "\n\nAssistant:"])


def test_a_cleaned_dataset_keeps_the_turns(
    tmp_path: Path, tiny_model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, folder = induced(tmp_path, str(tiny_model_folder), monkeypatch)
    guard, exact = LeakageGuard((), None), DuplicatesSettings(threshold=None)
    audit(str(folder / "si.parquet"), guard=guard, duplicates=exact, max_same_chosen=None, output=tmp_path / "clean")
    assert (tmp_path / "clean" / "si.jsonl").read_bytes() == (folder / "si.jsonl").read_bytes()


@pytest.mark.parametrize("drops", ["", "So."])
def test_people_see_the_turns_before_of_kept_and_of_dropped_pairs(
    drops: str, tmp_path: Path, tiny_model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Careful, "drops", drops)
    _, _, folder = induced(tmp_path, str(tiny_model_folder), monkeypatch)
    corpus = CorpusSettings(str(tmp_path / "talks.jsonl"), response_column="messages")
    settings = ReviewSettings(rows=2, dropped=1 if drops else 0)
    items = {one["rejected"]: one for one in items_of(write_review(str(folder), corpus, settings, tmp_path / "page"))}
    said = [SYSTEM, *TALK[:4]]
    assert [items["So."]["before"], items["the mat :)"]["before"]] == [[list(one) for one in said], []]
    assert items["So."]["whole"] == (not drops)

    texts = [items["So."][name] for name in ("instruction", "rejected", "chosen")]
    rejections = Rejections({"a": frozenset([items["So."]["pair"]])})
    assert rejections.rejects("a", *texts, tuple(Message(*one) for one in said))
    for other in (said[1:], [*said[:-1], ("assistant", "Another sum.")], []):
        with pytest.raises(UserError, match="the texts of the pair a have changed since people rejected it"):
            rejections.rejects("a", *texts, tuple(Message(*one) for one in other))


def test_pairs_are_equal_and_test_prompts_found_by_all_that_was_said(tmp_path: Path) -> None:
    row = {"instruction": "Go on.", "rejected": "Fine: this.", "chosen": "No.", "label": "a"}
    histories: list[Any] = [[], BEFORE, BEFORE[1:], BEFORE]
    rows = [{**row, "history": said} for said in histories]
    (tmp_path / "si.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    found = {}
    for asked in ("go on.", "what is 12?", "the mat :)"):
        guard = LeakageGuard([asked], None)
        exact = DuplicatesSettings(threshold=None)
        report = audit(str(tmp_path / "si.jsonl"), guard=guard, duplicates=exact, max_same_chosen=None, output=None)
        assert report["total"]["duplicate_pair"] == 1  # the last row, which has all turns of the second
        found[asked] = report["total"]["leak"]
    assert found == {"go on.": 4, "what is 12?": 3, "the mat :)": 0}
    (tmp_path / "si.jsonl").write_text(json.dumps({**row, "history": "on France"}) + "\n")
    with pytest.raises(UserError, match=r"si.jsonl:1: not_messages in column history: expected a list of messages"):
        write_review(str(tmp_path / "si.jsonl"), CorpusSettings(), ReviewSettings(), tmp_path / "page")


def test_pairs_are_nearly_equal_by_all_that_was_said(
    tmp_path: Path, tiny_model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One instruction (the model writes no other) and one response: the last row alone has been there before."""
    words = " ".join(f"w{i}" for i in range(40))
    asked = [words, " ".join(reversed(words.split())), f"{words} x"]
    talks = [[("user", one), ("assistant", "Yes."), ("user", "?"), ("assistant", f"So: {words}")] for one in asked]
    _, _, folder = induced(tmp_path, str(tiny_model_folder), monkeypatch, "duplicates.threshold=null", talks=talks)
    every = (folder / "si.jsonl").read_text().splitlines()
    assert len(every) == 3
    guard = LeakageGuard((), None)
    clean, near = tmp_path / "clean", DuplicatesSettings()
    audit(str(folder / "si.jsonl"), guard=guard, duplicates=near, max_same_chosen=None, output=clean)
    assert (clean / "si.jsonl").read_text().splitlines() == every[:2]
    induced(tmp_path, str(tiny_model_folder), monkeypatch, talks=talks)
    assert (folder / "si.jsonl").read_text().splitlines() == every[:2]


def test_a_merge_finds_a_test_prompt_in_an_earlier_turn(
    tmp_path: Path, tiny_model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps({"instruction": "what is  12?"}) + "\n")
    _, _, folder = induced(tmp_path, str(tiny_model_folder), monkeypatch, f"exclude={tmp_path / 'test.jsonl'}")
    assert [json.loads(line)["rejected"] for line in (folder / "si.jsonl").read_text().splitlines()] == ["the mat :)"]
    assert json.loads((folder / "report.json").read_text())["funnel"][-1]["drops"] == {"excluded_instruction": 1}


def test_one_response_behind_other_turns_is_another_row(tmp_path: Path) -> None:
    talks = [TALK, [("user", "Eh?"), *TALK[1:]], TALK, TALK[4:]]
    corpus = read_corpus(CorpusSettings(str(write(tmp_path / "t.jsonl", talks)), response_column="messages"))
    said = [text for turn in TALK[:4] for text in turn]
    other = ["user", "Eh?", *said[2:]]
    assert [one.id for one in corpus.examples] == [text_id(*said, "So."), text_id(*other, "So."), text_id("So.")]
    assert corpus.dropped.counts == {"duplicate_response": 1}


def test_later_turns_are_scored_behind_the_turns_before(
    tmp_path: Path, tiny_model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = f"roundtrip.model.name_or_path={tiny_model_folder}"
    with pytest.raises(UserError, match=r"talks.jsonl:1: roundtrip.template=alpaca has "):
        induced(tmp_path, str(tiny_model_folder), monkeypatch, model)
    assert not (tmp_path / "si" / "ledger").exists()
    _, _, folder = induced(tmp_path, str(tiny_model_folder), monkeypatch, model, "roundtrip.template=vicuna")
    rows = [json.loads(line) for line in (folder / "si.jsonl").read_text().splitlines()]
    assert [isinstance(row["provenance"]["round_trip"], float) for row in rows] == [True, True]


def test_a_reversed_model_of_another_tuning_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    talks = read_corpus(CorpusSettings(str(write(tmp_path / "t.jsonl", [TALK])), response_column="messages")).examples
    model = ModelSettings(name_or_path="unused", archive=str(tmp_path))
    notes = []
    for loss, on in (("reverse", "all"), ("reverse", "first"), ("sft", "last")):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"datasets": {}, "loss": {"name": loss, "on": on}}))
        caplog.clear()
        note_other_tuning(model, talks)
        notes.append(" ".join(caplog.messages))
    assert notes[0] == ""
    assert "was trained on the first turns of conversations only (loss.on=first)" in notes[1]
    assert "was trained with loss=sft, but stage=induce uses the prompt of loss=reverse" in notes[2]
