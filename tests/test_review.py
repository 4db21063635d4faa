"""Review of pairs by people: the page worked through by real keys and clicks, its export audited and merged."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import yaml

import induce
from config.checks_induce import check_induce
from config.errors import UserError
from config.schema import compose_config
from config.settings import CorpusSettings, ReviewSettings
from safer_instruct.dataset.review import write_review
from safer_instruct.dataset.reviews import Rejections, measure_reviews, pair_hash, read_rejections, read_reviews
from safer_instruct.dataset.tables import review_tables
from safer_instruct.measures.statistics import weighted_interval, wilson_interval
from tests.browser import Browser, find_chromium, screenshot_folder
from tests.test_stages import SECRET, run_all

LABELS = ["theft"] * 60 + ["insult"] * 30 + ["rare"] * 3
ROWS = [
    {
        "id": f"r{i}",
        "instruction": f"ask number {i} of {label} </script><script>document.title = 'taken over'</script>",
        "rejected": f"unsafe text {i} {'words ' * (i % 9)}",
        "chosen": f"No, I will not do number {i}.",
        "label": label,
        "provenance": {},
    }
    for i, label in enumerate(LABELS)
]


@pytest.fixture
def dataset(tmp_path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def items_of(page: Path) -> list[dict]:
    _, _, rest = page.read_text().partition('<script type="application/json" id="sample">')
    return json.loads(rest.partition("</script>")[0])["items"]


def draw(dataset: Path, output: Path, **settings) -> list[dict]:
    return items_of(write_review(str(dataset), CorpusSettings(), ReviewSettings(**settings), output))


def export(path: Path, reviewer: str, decisions: dict[str, str], rows: list[dict] = ROWS, whole: bool = True) -> str:
    texts = {row["id"]: [row[name] for name in ("instruction", "rejected", "chosen")] for row in rows}
    found = []
    for id, decision in decisions.items():
        instruction, rejected, chosen = texts.get(id, (id, id, ""))
        pair = pair_hash(instruction, rejected, chosen if whole else "")
        found.append({"id": id, "pair": pair, "label": "theft", "whole": whole, "decision": decision})
    path.write_text(json.dumps({"format": "safer-instruct review", "reviewer": reviewer, "decisions": found}))
    return str(path)


def test_the_sample_is_balanced_seeded_and_the_same_whatever_the_order_of_the_rows(dataset, tmp_path) -> None:
    items = draw(dataset, tmp_path / "a", rows=23)
    assert Counter(item["label"] for item in items) == {"theft": 10, "insult": 10, "rare": 3}
    assert all(item["whole"] for item in items)
    dataset.write_text("".join(json.dumps(row) + "\n" for row in ROWS[::-1]))
    assert draw(dataset, tmp_path / "b", rows=23) == items
    other = draw(dataset, tmp_path / "c", rows=23, seed=1)
    assert {item["id"] for item in other} != {item["id"] for item in items}
    assert len({item["id"] for item in draw(dataset, tmp_path / "d", rows=500)}) == len(ROWS)


def test_precision_weighs_the_labels_by_their_rows(dataset, tmp_path) -> None:
    """By hand: theft 9 of 10 right, insult 5 of 10, rare 0 of 2 (a third is skipped); 60, 30 and 3 rows."""
    decisions = {f"r{i}": "wrong_instruction" if i == 0 else "keep" for i in range(10)}
    decisions |= {f"r{i}": "unsafe_answer" if i < 65 else "keep" for i in range(60, 70)}
    decisions |= {"r90": "unsafe_answer", "r91": "wrong_instruction", "r92": "skip"}
    found = measure_reviews(read_reviews([export(tmp_path / "a.json", "ann", decisions)]), str(dataset))
    by_label = found["by_label"]
    assert [by_label[label]["precision"]["value"] for label in ("theft", "insult", "rare")] == [0.9, 0.5, 0.0]
    assert (by_label["insult"]["precision"]["low"], by_label["insult"]["precision"]["high"]) == wilson_interval(5, 10)
    assert found["total"]["precision"]["value"] == pytest.approx((60 * 0.9 + 30 * 0.5 + 3 * 0) / 93)
    assert {key: found["total"][key] for key in ("rows", "reviewed", "kept", "wrong_instruction", "unsafe_answer")} == {
        "rows": 93, "reviewed": 22, "kept": 14, "wrong_instruction": 2, "unsafe_answer": 6,
    }  # fmt: skip
    assert found["covered"] == 1.0
    assert found["agreement"][0]["kappa"] is None  # the expert kept all of these


def test_the_weighted_interval_covers_the_truth() -> None:
    """Equal draws of unequal strata: over 1,000 samples the interval holds the true share in 93% or more."""
    generator = random.Random(0)
    strata = [(0.95, 20, 700), (0.8, 20, 250), (0.5, 20, 50)]
    truth = sum(p * size for p, _, size in strata) / 1000
    hits = 0
    for _ in range(1000):
        drawn = [(sum(generator.random() < p for _ in range(n)), n, size) for p, n, size in strata]
        value, low, high = weighted_interval(drawn)
        assert 0 <= low <= value <= high <= 1
        hits += low <= truth <= high
    assert hits >= 930
    assert weighted_interval([(7, 10, 3.0)])[1:] == pytest.approx(wilson_interval(7, 10))
    assert weighted_interval([(5, 5, 1), (5, 5, 9)])[0] == 1.0


def test_people_are_compared_with_each_other_and_with_the_expert(dataset, tmp_path) -> None:
    """Kappa by hand, with pairs that the expert dropped: (observed - chance) / (1 - chance)."""
    ann = {"r0": "keep", "r1": "keep", "r2": "wrong_instruction", "d0": "wrong_instruction", "d1": "keep"}
    bob = {"r0": "keep", "r1": "wrong_instruction", "r2": "wrong_instruction", "d0": "wrong_instruction", "d1": "skip"}
    files = [export(tmp_path / f"{name}.json", name, of, whole=False) for name, of in (("ann", ann), ("bob", bob))]
    between, with_ann, with_bob = measure_reviews(read_reviews(files), str(dataset))["agreement"]
    assert (between["first"], between["second"], between["n"], between["agreed"]) == ("ann", "bob", 4, 3)
    assert between["kappa"]["value"] == pytest.approx((0.75 - (0.5 * 0.25 + 0.5 * 0.75)) / 0.5)
    # The expert kept r0, r1, r2 and dropped d0, d1: it agrees with ann on r0, r1, d0.
    assert (with_ann["second"], with_ann["n"], with_ann["agreed"]) == ("the expert", 5, 3)
    assert with_ann["kappa"]["value"] == pytest.approx((0.6 - (0.6 * 0.6 + 0.4 * 0.4)) / (1 - 0.52))
    assert with_ann["by_label"]["theft"]["n"] == 5
    assert (with_bob["n"], with_bob["agreed"]) == (4, 2)


def test_half_of_the_people_are_enough_to_reject_a_pair(tmp_path) -> None:
    files = [
        export(tmp_path / "a.json", "ann", {"r0": "keep", "r1": "unsafe_answer", "r2": "skip", "r3": "keep"}),
        export(tmp_path / "b.json", "bob", {"r0": "wrong_instruction", "r1": "unsafe_answer", "r2": "keep"}),
    ]
    rejections = read_rejections(files)
    assert rejections.pairs.keys() == {"r0", "r1"}
    assert rejections.counts() == {"reviewers": 2, "pairs": 4, "rejected": 2}
    texts = [ROWS[0][name] for name in ("instruction", "rejected", "chosen")]
    assert rejections.rejects("r0", *texts)
    assert rejections.rejects("r0", texts[0].upper() + " ", *texts[1:])
    assert not rejections.rejects("r2", "a", "b", "c")
    with pytest.raises(UserError, match="the texts of the pair r0 have changed since people rejected it"):
        rejections.rejects("r0", "another", "b", "c")
    assert not Rejections().rejects("r0", "a", "b", "c")


def test_a_merge_leaves_out_what_people_rejected_and_the_card_tells(tmp_path) -> None:
    _, output, _ = run_all(tmp_path, 1)
    pairs = [json.loads(line) for line in (output / "si.jsonl").read_text().splitlines()]
    decided = {pairs[0]["id"]: "wrong_instruction", pairs[1]["id"]: "keep"}
    review = export(tmp_path / "ann.json", "ann", decided, pairs)
    corpus = f"corpus.path={tmp_path / 'corpus.jsonl'}"
    merge = ["stage=merge", corpus, f"output={output}", "duplicates.threshold=null", "format=jsonl"]
    induce.main(compose_config("induce", [*merge, f"reviews=[{review}]", "card.license=cc-by-4.0"]))
    assert [json.loads(line) for line in (output / "si.jsonl").read_text().splitlines()] == pairs[1:]
    report = json.loads((output / "report.json").read_text())
    assert report["funnel"][-1]["drops"]["rejected_by_people"] == 1
    _, front_matter, card = (output / "README.md").read_text().split("---\n", 2)
    told = yaml.safe_load(front_matter)
    assert (told["license"], told["language"], told["size_categories"]) == ("cc-by-4.0", ["en"], ["n<1K"])
    assert told["configs"] == [{"config_name": "default", "data_files": "si.jsonl"}]
    assert "1 reviewer(s) looked at 2 of the pairs; the 1 that they rejected are left out." in card
    assert SECRET not in (output / "dataset.html").read_text()


def test_dropped_pairs_are_shown_like_kept_ones_and_a_person_who_decides_as_the_expert_agrees_with_it(tmp_path) -> None:
    _, output, _ = run_all(tmp_path, 1)
    kept = {json.loads(line)["id"] for line in (output / "si.jsonl").read_text().splitlines()}
    corpus = CorpusSettings(path=str(tmp_path / "corpus.jsonl"))
    items = items_of(write_review(str(output), corpus, ReviewSettings(rows=6, dropped=8), tmp_path / "page"))
    halves = [item for item in items if not item["whole"]]
    assert len(items) - len(halves) == 6
    assert Counter(item["id"] in kept for item in halves) == {True: 8, False: 8}
    assert {item["chosen"] for item in halves} == {""}
    decisions = [
        {key: item[key] for key in ("id", "pair", "label", "whole")}
        | {"decision": "keep" if item["id"] in kept else "wrong_instruction"}
        for item in items
    ]
    (tmp_path / "a.json").write_text(
        json.dumps({"format": "safer-instruct review", "reviewer": "a", "decisions": decisions})
    )
    found = measure_reviews(read_reviews([str(tmp_path / "a.json")]), str(output / "si.jsonl"))
    (agreement,) = found["agreement"]
    assert (agreement["n"], agreement["agreed"], agreement["kappa"]["value"]) == (22, 22, 1.0)
    assert found["total"]["precision"]["n"] == 6


def test_files_that_are_no_reviews_of_this_dataset_are_named(dataset, tmp_path) -> None:
    def complaint(*paths: str) -> str:
        with pytest.raises(UserError) as raised:
            measure_reviews(read_reviews(list(paths)), str(dataset))
        return str(raised.value)

    good = export(tmp_path / "good.json", "ann", {"r0": "keep"})
    (tmp_path / "no.json").write_text("{")
    assert "no.json is not an export of a review page" in complaint(str(tmp_path / "no.json"))
    (tmp_path / "other.json").write_text('{"format": "x"}')
    assert "other.json is not an export of a review page" in complaint(str(tmp_path / "other.json"))
    assert "'maybe' of r0 is not one of keep" in complaint(export(tmp_path / "m.json", "m", {"r0": "maybe"}))
    assert "holds no decision yet" in complaint(export(tmp_path / "s.json", "s", {"r0": "skip"}))
    assert "second file of the reviewer 'ann'" in complaint(
        good, export(tmp_path / "again.json", "ann", {"r1": "keep"})
    )
    assert "1 of the 1 reviewed pairs" in complaint(export(tmp_path / "strange.json", "x", {"r999": "keep"}))
    changed = [{**ROWS[0], "chosen": "Something else."}]
    assert "the texts of the pair r0 have changed since its review" in complaint(
        export(tmp_path / "old.json", "x", {"r0": "keep"}, changed)
    )
    dataset.write_text('{"instruction": "a", "chosen": "b"}\n')
    with pytest.raises(UserError, match="it holds no pair with a rejected response"):
        draw(dataset, tmp_path / "none")
    dataset.write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(UserError, match="no ledgers"):
        draw(dataset, tmp_path / "none", dropped=1)
    stage = "\n".join(
        map(str, check_induce(compose_config("induce", ["stage=status", "output=x", f"reviews=[{good}]"])))
    )
    assert "give them to stage=audit or stage=merge" in stage
    missing = check_induce(compose_config("induce", ["stage=review", f"output={tmp_path}/none"]))
    assert "draws from a dataset" in str(missing[0])
    needed = check_induce(compose_config("induce", ["stage=review", f"path={dataset}", "output=x", "review.dropped=5"]))
    assert [fault.key for fault in needed] == ["corpus.path"]


@pytest.mark.slow
def test_what_was_said_before_is_folded_marked_by_role_and_text_alone(tmp_path, browser) -> None:
    """Two pairs, in either order: one with a conversation whose texts are markup, one with none."""
    script = "</script><img src=x onerror=\"document.title = 'taken over'\">"
    said = [("system", f"Be rude. {script}"), ("user", "Hi\u200b"), ("assistant", "Ho" + " ho" * 400)]
    history = [{"role": role, "content": text} for role, text in said]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({**ROWS[i], "history": history if i else []}) + "\n" for i in range(2)))
    page = write_review(str(path), CorpusSettings(), ReviewSettings(), tmp_path / "out")
    browser.resize(400)
    browser.open(page)
    begin(browser, "ann")
    seen = {}
    for _ in range(2):
        asked = browser.run("document.getElementById('instruction').textContent")
        if browser.run("document.getElementById('before').checkVisibility()"):
            folded = browser.run("document.querySelector('#before h3').checkVisibility()")
            browser.click("#before summary")
            texts = browser.run("[...document.querySelectorAll('#before h3, #before p')].map(one => one.innerText)")
            images = browser.run("document.querySelectorAll('#before img').length")
            seen[asked] = browser.run("document.querySelector('#before summary').innerText"), folded, texts, images
            assert browser.run("document.documentElement.scrollWidth") == 400
            browser.screenshot(screenshot_folder(tmp_path) / "review-before-400.png")
        else:
            seen[asked] = None
        browser.press("k")
    shown = [part for role, text in said for part in (role, text.replace("\u200b", r"\u200b"))]
    (folded_pair,) = filter(None, seen.values())
    assert seen[ROWS[0]["instruction"]] is None
    assert folded_pair == ("Conversation before it: 3 messages", False, shown, 0)
    assert browser.run("document.title") == "Review: talks.jsonl"
    assert browser.faults() == []


PAIRS = 20
KEYS = {"k": "keep", "w": "wrong_instruction", "a": "unsafe_answer", "s": "skip"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(find_chromium(), tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


def begin(browser: Browser, name: str = "") -> None:
    """Go through the gate as a person does."""
    browser.run("document.querySelector('[name=reviewer]').focus()")
    for letter in name:
        browser.press(letter)
    for _ in range(100):  # a page that was just loaded again may still be put where it was scrolled to: a click misses
        browser.click("#begin button")
        if browser.run("document.getElementById('gate').hidden"):
            return
        browser.run("new Promise(done => setTimeout(done, 50))")
    pytest.fail("the gate does not open")


@pytest.mark.slow
def test_twenty_pairs_by_keys_and_clicks_a_reload_the_export_and_the_audit(dataset, tmp_path, browser, capsys) -> None:
    """What the page shows is answered by a rule of this test; the audit must find the rule's own figures."""
    config = compose_config(
        "induce", ["stage=review", f"path={dataset}", f"output={tmp_path / 'out'}", f"review.rows={PAIRS}"]
    )
    assert check_induce(config) == []
    induce.main(config)
    page = tmp_path / "out" / "review.html"
    browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    for dark in (False, True):
        browser.media(dark=dark)
        browser.resize(400)
        browser.open(page)
        assert browser.faults() == []
        assert browser.run("document.documentElement.scrollWidth") == 400
    assert not browser.run("document.getElementById('work').checkVisibility()")  # the warning comes first
    begin(browser, "ann")
    assert browser.faults() == []
    browser.screenshot(screenshot_folder(tmp_path) / "review-400-dark.png")
    generator = random.Random(0)
    wanted: dict[str, str] = {}
    ids = {row["instruction"]: row["id"] for row in ROWS}
    for number in range(PAIRS):
        if number == 7:  # in the middle the page is loaded again, and nothing is lost
            browser.reload()
            begin(browser)
        assert browser.run("document.getElementById('place').textContent") == f"Pair {number + 1} of {PAIRS}"
        key = generator.choice("kkkwas")
        if number in (3, 12):  # another key first, which is undone
            browser.press("w")
            browser.press("u") if number == 3 else browser.click("#undo")
        wanted[ids[browser.run("document.getElementById('instruction').textContent")]] = KEYS[key]
        browser.press(key) if number % 2 else browser.click(f"[data-decision={KEYS[key]}]")
    assert browser.run("document.title") == "Review: pairs.jsonl"
    assert not browser.run("document.getElementById('work').checkVisibility()")
    browser.click("#export")
    exported = tmp_path / "review-ann.json"
    for _ in range(600):
        if exported.is_file() and exported.read_text().endswith("}\n"):
            break
        browser.run("new Promise(done => setTimeout(done, 50))")
    decisions = {row["id"]: row["decision"] for row in json.loads(exported.read_text())["decisions"]}
    assert decisions == wanted
    assert len(wanted) == PAIRS

    config = compose_config(
        "induce", ["stage=audit", f"path={dataset}", f"output={tmp_path / 'out'}", f"reviews=[{exported}]"]
    )
    assert check_induce(config) == []
    induce.main(config)
    reviews = json.loads((tmp_path / "out" / "audit.json").read_text())["reviews"]
    counts = Counter(wanted.values())
    assert reviews["total"]["reviewed"] == PAIRS - counts["skip"]
    assert [reviews["total"][key] for key in ("kept", "wrong_instruction", "unsafe_answer")] == [
        counts[key] for key in ("keep", "wrong_instruction", "unsafe_answer")
    ]
    expected = 0.0
    for label, rows in Counter(LABELS).items():
        of_label = [wanted[row["id"]] for row in ROWS if row["label"] == label and row["id"] in wanted]
        of_label = [decision for decision in of_label if decision != "skip"]
        assert reviews["by_label"][label]["reviewed"] == len(of_label)
        expected += rows / len(LABELS) * of_label.count("keep") / len(of_label)
    assert reviews["total"]["precision"]["value"] == pytest.approx(expected)
    assert f"{100 * expected:.1f} [" in capsys.readouterr().out
    assert [table.title for table in review_tables(reviews)] == ["Precision, by people", "Agreement"]
    browser.media()
    browser.resize(1280)
    browser.open(tmp_path / "out" / "audit.html")
    assert browser.faults() == []
    assert f"{100 * expected:.1f}%" in browser.run("document.body.innerText")
    assert "ask number" not in browser.run("document.body.textContent")
    browser.screenshot(screenshot_folder(tmp_path) / "audit-1280.png")
