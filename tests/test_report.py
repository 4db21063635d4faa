"""The report of hand-made judgements: its JSON, its tables, and a page that hostile text cannot break out of."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from config.errors import UserError
from safer_instruct.experts.verdicts import Judgement
from safer_instruct.measures.comparisons import compare_models
from safer_instruct.measures.rates import JudgedOutput, summarize
from safer_instruct.report.curves import RunCurves, plot_compared, plot_curves, plot_runs, read_curves, thin
from safer_instruct.report.dataset import funnel, read_induction_report, read_stages
from safer_instruct.report.dataset_plots import plot_parts
from safer_instruct.report.document import (
    build_report,
    describe_prompts,
    render_markdown,
    summary_sentence,
    write_json,
)
from safer_instruct.report.evaluations import sample_row, write_samples
from safer_instruct.report.forest import plot_forest
from safer_instruct.report.headline import headline_answers
from safer_instruct.report.html import FOLDER
from safer_instruct.report.page import TEXT_LIMIT, pick_samples, render_page
from safer_instruct.report.plots import MODEL_COLORS, OUTCOMES, outcome_shares, plot_outcomes, plot_rates
from safer_instruct.report.tables import extra_tables
from safer_instruct.text.display import visible
from safer_instruct.text.prompt_sets import EvaluationPrompt, Overlap

RUN = {
    "command": "python evaluate.py models.a.path=m",
    "stages": [{"name": "sft", "command": "python train.py loss=sft", "seconds": 14.0}],
    "seed": 0,
    "judge": {"name": "rules", "fingerprint": "ab"},
    "generation": {"temperature": 0.0, "max_new_tokens": 8},
    "git": {"sha": None, "dirty": None},
    "versions": {"python": "3.11"},
}
DATASET = {
    "funnel": [
        {"stage": "corpus", "in": 100, "out": 98, "drops": {"empty": 2}},
        {"stage": "induce", "in": 98, "out": 98, "drops": {}},
        {
            "stage": "filter",
            "in": 98,
            "out": 60,
            "drops": {f"reason_{i}": n for i, n in enumerate([20, 9, 4, 3, 1, 1])},
        },
    ]
}
HOSTILE = [
    "<script>alert(1)</script>",
    "</script></style></textarea><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "{{ 7 * 7 }} {% raw %}",
    "<svg/onload=fetch('http://example.org')>",
    "\u202egnitrever\u202c \u2066x\u2069 \u200b \x00 \x1b[31m \u2028",
    "https://example.org/beacon.png",
    "x" * 1_000_000,
]


def outputs(outcomes, text="fine", label="theft"):
    """One output for each outcome: unsafe prompts, and one benign prompt that is answered rightly."""
    rows = [
        JudgedOutput(
            EvaluationPrompt(f"u{i}", f"ask {i}", "set", "si", label, "unsafe"),
            text,
            False,
            Judgement(outcome, specific=True),
        )
        for i, outcome in enumerate(outcomes)
    ]
    benign = EvaluationPrompt("b", "capital?", "set", "plain", "facts", "benign", ("rome",))
    return [*rows, JudgedOutput(benign, "Rome", True, Judgement("safe"))]


def make_report(models, *, dataset=None, overlaps=()):
    described = {
        name: {"path": name, "template": "alpaca", "fingerprint": "00", **summarize(rows)}
        for name, rows in models.items()
    }
    prompts = [row.prompt for row in next(iter(models.values()))]
    return build_report(
        models=described,
        prompts={"set": describe_prompts("p.jsonl", prompts)},
        overlaps=overlaps,
        dataset=dataset,
        run=RUN,
    )


def samples_of(models, per_set=10):
    return pick_samples((sample_row(name, row) for name, rows in models.items() for row in rows), per_set)


BASE, DPO = outputs(["harmful"] * 18 + ["safe"] * 2), outputs(["refusal"] * 19 + ["abstain"])

# what the README and other programs rely on
PROMISED = [
    "harmful_rate", "refusal_rate", "neither_rate", "specific_refusal_rate", "over_refusal_rate", "benign_accuracy",
    "near_accuracy",
]  # fmt: skip


class Page(HTMLParser):
    """What a browser would see: elements, attributes, and text by the class of its element."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_data(self, data):
        self.text.append(data)


def test_report_has_the_promised_numbers_of_each_model(tmp_path):
    report = make_report({"base": BASE, "dpo": DPO})
    write_json(tmp_path / "report.json", report)
    read = json.loads((tmp_path / "report.json").read_text())
    for name in ("base", "dpo"):
        model = read["models"][name]
        for metric in PROMISED:
            assert model[metric].keys() == {"value", "low", "high", "n"}
        assert model["by_label"]["theft"]["harmful_rate"]["n"] == (20 if name == "base" else 19)
        assert model["by_source"].keys() == {"si", "plain"}
    assert read["models"]["base"]["harmful_rate"]["value"] == 0.9
    assert read["models"]["dpo"]["near_accuracy"] == {"value": None, "low": None, "high": None, "n": 0}
    assert read["prompts"]["set"]["kinds"] == {"benign": 1, "unsafe": 20}
    assert read["run"]["stages"][0]["seconds"] == 14.0


def test_summary_calls_a_change_one_only_where_intervals_do_not_touch():
    clear = make_report({"base": BASE, "dpo": DPO})["summary"]
    assert clear.startswith("Harmful answers to unsafe prompts: from 90.0% (base) down to 0.0% (dpo)")
    assert "dpo refuses 100.0% of them" in clear
    close = make_report({"a": outputs(["harmful"] * 3 + ["safe"]), "b": outputs(["harmful"] * 2 + ["safe"] * 2)})[
        "summary"
    ]
    assert "from 75.0% (a) to 50.0% (b), the intervals overlap" in close
    alone = make_report({"a": BASE})["summary"]
    assert "90.0% (95% interval 69.9 to 97.2, n = 20)" in alone


def test_summary_without_a_countable_answer():
    nothing = summarize([JudgedOutput(BASE[0].prompt, "", False, Judgement("abstain"))])
    assert summary_sentence({"a": nothing}) == "The judge gave no answer that could be counted."


def test_abstentions_cut_answers_and_overlap_are_said():
    report = make_report({"dpo": DPO}, overlaps=[Overlap("train.jsonl", 9, ("set/u1",)), Overlap("other.jsonl", 9, ())])
    assert len(report["warnings"]) == 3
    assert "the judge abstained on 1 of 21 answers" in " ".join(report["warnings"])
    assert "4.8% of 21 answers were cut" in " ".join(report["warnings"])
    assert report["overlap"][0]["prompt_ids"] == ("set/u1",)
    assert "other.jsonl" not in " ".join(report["warnings"])
    assert "abstained on 1 of 21" in render_page(report, {}, [])
    assert "abstained on 1 of 21" in render_markdown(report)


def test_markdown_tables_are_rectangular_and_hold_intervals_and_n():
    hostile = outputs(["harmful"] * 4, label="a|b <i>`x`\n\u202e")
    text = render_markdown(make_report({"base": BASE, "x|y": hostile}, dataset=DATASET))
    assert "90.0 [69.9, 97.2] (n=20)" in text
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) >= 4
    for table in tables:
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(columns) == 1, table
    assert "<i>" not in text
    assert "\u202e" not in text


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_stays_text(text, tmp_path):
    """Everywhere that text of others reaches the page: answers, instructions, labels, sources, ids, names, paths."""
    prompt = EvaluationPrompt(text, text, "set", text, text, "unsafe")
    rows = [JudgedOutput(prompt, text, False, Judgement("harmful", label=text)), *BASE]
    models = {"base": rows, text[:100]: rows}
    report = make_report(models, dataset={"funnel": [{"stage": text, "in": 1, "out": 0, "drops": {text: 1}}]})
    html = render_page(report, samples_of(models, per_set=30), [])
    page = Page(html)
    assert page.tags.count("script") == 1
    assert html.rstrip().endswith(f"<script>{(FOLDER / 'page.js').read_text()}</script>\n</body>\n</html>")
    assert not {"iframe", "object", "embed", "link", "base", "form", "svg"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    loaded = [
        value for _, name, value in page.attributes if name in ("src", "href", "srcset", "action", "data", "poster")
    ]
    assert loaded
    assert all(value.startswith("data:image/svg+xml;base64,") for value in loaded)
    assert page.tags.count("img") == html.count("<img ")
    assert "url(" not in html
    assert "@import" not in html
    shown = visible(text)[: TEXT_LIMIT - 1]
    assert shown in "".join(page.text)
    write_samples(tmp_path / "samples.jsonl", [sample_row("base", row) for row in rows])
    assert json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])["output"] == text


def test_page_forbids_requests_and_every_script_but_its_own():
    html = render_page(make_report({"base": BASE}), {}, [])
    policy = next(
        value for tag, name, value in Page(html).attributes if tag == "meta" and value.startswith("default-src")
    )
    script = html[html.index("<script>") + len("<script>") : html.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )


def test_long_answers_are_cut_on_the_page_and_say_so():
    rows = [JudgedOutput(BASE[0].prompt, "y" * 50_000, False, Judgement("harmful"))]
    html = render_page(make_report({"base": rows}), samples_of({"base": rows}), [])
    assert "46,000 more characters" in html
    assert "y" * 4001 not in html


def test_samples_hide_behind_a_content_warning():
    models = {"base": BASE, "dpo": DPO}
    html = render_page(make_report(models), samples_of(models), [])
    gate = html.index('<details class="gate">')
    assert "Content warning" in html[gate:]
    assert "ask 1" not in html[:gate]
    assert "Answers side by side" not in render_page(make_report(models), {}, [])


def test_visible_writes_out_what_cannot_be_seen():
    assert visible("a\u202eb\x00\u200d\ud800\n\tc") == "a\\u202eb\\u0000\\u200d\\ud800\n\tc"
    assert visible("\U000e0041") == "\\U000e0041"
    assert visible("na\u00efve \u4f60\u597d") == "na\u00efve \u4f60\u597d"


def test_sample_choice_is_stable_and_the_same_for_all_models():
    rows = [sample_row(name, row) for name, all_rows in {"base": BASE, "dpo": DPO}.items() for row in all_rows]
    picked = pick_samples(rows, 4)["set"]
    assert len(picked) == 4
    assert all([answer["model"] for answer in prompt["answers"]] == ["base", "dpo"] for prompt in picked)
    assert {p["id"] for p in picked} == {p["id"] for p in pick_samples(rows[::-1], 4)["set"]}
    assert {p["id"] for p in picked} <= {p["id"] for p in pick_samples(rows, 9)["set"]}
    assert pick_samples(rows, 0) == {}


def test_verdicts_on_the_page():
    rows = [sample_row("m", row) for row in [BASE[0], BASE[18], DPO[0], DPO[19], BASE[20]]]
    picked = {p["id"] + p["answers"][0]["verdict"] for row in rows for p in pick_samples([row], 1)["set"]}
    assert picked == {"u0harmful", "u18neither", "u0refusal, names the matter", "u19judge abstained", "bcorrect"}


def test_figures_are_valid_svg_with_their_numbers_as_text():
    report = make_report({"base": BASE, "$x_1$": DPO})  # a name that mathtext would choke on
    plots = [plot_outcomes(report["models"]), plot_rates("Harm", "harmful_rate", report["models"], "by_label")]
    for plot in plots:
        assert ElementTree.fromstring(plot.svg).tag.endswith("svg")
    assert "theft 90.0%" in plots[1].alt
    assert "harmful 90.0%" in plots[0].alt
    assert plots[1].svg == plot_rates("Harm", "harmful_rate", report["models"], "by_label").svg  # same bytes each time
    assert plot_rates("Near", "near_accuracy", report["models"], "by_label") is None


def test_embedded_figures_decode():
    page = Page(render_page(make_report({"base": BASE, "dpo": DPO}), {}, []))
    images = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert images
    assert all(base64.b64decode(value.split(",", 1)[1]).startswith(b"<svg") for value in images)
    assert all(value for tag, name, value in page.attributes if (tag, name) == ("img", "alt"))


def test_outcome_shares_add_up_and_keep_unknown_specificity_apart():
    model = summarize(outputs(["harmful", "refusal", "refusal", "safe"]))
    assert outcome_shares(model) == {
        "harmful": 0.25,
        "neither": 0.25,
        "safe_helpful": 0.0,
        "refusal_vague": 0.0,
        "refusal_specific": 0.5,
    }
    silent = summarize([JudgedOutput(BASE[0].prompt, "", False, Judgement("refusal", specific=None))])
    assert outcome_shares(silent)["refusal_vague"] == 1.0


def test_funnel_steps_and_their_reasons():
    steps = funnel(DATASET)
    assert [step.rows for step in steps] == [100, 98, 98, 60]
    assert steps[0].note == steps[2].note == ""
    assert steps[3].note == "38 dropped: reason 0 20, reason 1 9, reason 2 4, reason 3 3, other reasons 2"
    html = render_page(make_report({"base": BASE}, dataset=DATASET), {}, [])
    assert "width:60.00%" in html


def test_induction_report_that_is_none(tmp_path):
    path = tmp_path / "report.json"
    with pytest.raises(UserError, match="No such file"):
        read_induction_report(str(path))
    path.write_text("{}")
    with pytest.raises(UserError, match=r"not the report\.json of induce\.py"):
        read_induction_report(str(path))
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_induction_report(str(path))
    path.write_text(json.dumps(DATASET))
    assert read_induction_report(str(path)) == DATASET


def test_stages_file(tmp_path):
    path = tmp_path / "stages.jsonl"
    with pytest.raises(UserError, match="no such file"):
        read_stages(str(path))
    path.write_text('{"name": "sft", "command": "c", "seconds": 2}\n\n{"name": "dpo"}\n')
    with pytest.raises(UserError, match=r"stages\.jsonl:3"):
        read_stages(str(path))
    path.write_text('{"name": "sft", "command": "c", "seconds": 2}\n')
    assert read_stages(str(path)) == [{"name": "sft", "command": "c", "seconds": 2.0}]


def test_curves_of_a_run_that_was_killed_and_resumed(tmp_path):
    lines = [
        {"counters/examples": 0, "loss/eval": 2.0},
        {"counters/examples": 4, "loss/train": 1.5},
        {"counters/examples": 8, "loss/train": 1.2},
        {"counters/examples": 8, "loss/train": 1.25},
        {"counters/examples": 12, "loss/train": None, "rewards_eval/margins": 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"counters/exa')
    curves = read_curves("sft", str(tmp_path))
    assert curves.of("loss/train") == [(4.0, 1.5), (8.0, 1.25)]
    assert curves.of("loss/eval") == [(0.0, 2.0)]
    assert [plot.title for plot in plot_runs({"sft": curves})] == ["sft: loss"]
    with pytest.raises(UserError, match=r"curves\.sft"):
        read_curves("sft", str(tmp_path / "none"))
    (tmp_path / "metrics.jsonl").write_text('{"counters/exa\n{"counters/examples": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:1"):
        read_curves("sft", str(tmp_path))


def test_thinning_keeps_means():
    points = [(float(x), float(x % 2)) for x in range(1000)]
    thinned = thin(points, 300)
    assert len(thinned) == 250
    assert thinned[0] == (1.5, 0.5)
    assert thin(points[:5], 300) == points[:5]


def two_points(*metrics):
    return {metric: [(16.0, 0.69), (32.0, 0.4)] for metric in metrics}


def test_a_preference_run_shows_its_loss_without_the_likelihood_beside_ln_2():
    points = two_points(
        "loss/train", "preference_loss_train", "preference_loss_eval", "nll_train", "logps_train/chosen",
        "logps_train/rejected", "rewards_train/margins",
    )  # fmt: skip
    plots = {plot.title: plot for plot in plot_runs({"dpo": RunCurves(points, "dpo")})}
    assert list(plots) == [
        "dpo: preference loss", "dpo: log-probabilities", "dpo: likelihood of the chosen", "dpo: reward margin",
    ]  # fmt: skip
    level, without = (
        plot_curves("loss", "nats", {"training": points["loss/train"]}, level).svg
        for level in ((math.log(2), "ln 2"), None)
    )
    assert level.count("<path") > without.count("<path")
    assert "chosen, training from 0.69 to 0.4" in plots["dpo: log-probabilities"].alt


def test_losses_of_different_kinds_share_no_axis():
    runs = {"a": RunCurves(two_points("loss/train"), "sft"), "b": RunCurves(two_points("loss/train"), "dpo")}
    assert [plot.title for plot in plot_compared(runs)] == ["Training loss, dpo", "Training loss, sft"]
    assert [plot.title for plot in plot_compared({"b": runs["b"]})] == ["Training loss"]


def test_the_last_two_models_are_compared_first_and_drawn():
    entries = compare_models(
        {"base": BASE, "sft": BASE, "dpo": DPO}, make_report({"base": BASE, "sft": BASE, "dpo": DPO})["models"]
    )
    first, others = (table for table in extra_tables({"comparisons": entries}))
    assert {row[1] for row in first.rows} == {"sft -> dpo"}
    assert {row[1] for row in others.rows} == {"base -> sft", "base -> dpo"}
    assert len(first.rows) + len(others.rows) == len(entries)
    forest = plot_forest(entries)
    assert forest.title == "dpo against sft"
    assert "harmful answers -94.7" in forest.alt
    assert plot_forest([]) is None


def test_the_first_screen_answers_with_the_numbers_of_the_report():
    models = {"base": BASE, "dpo": DPO}
    report = make_report(models)
    report["comparisons"] = compare_models(models, report["models"])
    safer, useful, sure = headline_answers(report)
    assert (safer.value, safer.interval) == ("0.0%", "95% interval 0.0 to 16.8")
    assert [(bar.name, bar.value) for bar in safer.bars] == [("base", 0.9), ("dpo", 0.0)]
    assert useful.value == "100.0%"
    assert sure.value == "-94.7 points"  # 18 of the 19 prompts that both were judged on
    assert sure.words.endswith("more than chance (McNemar p <0.001, corrected for 4 comparisons)")
    assert sure.bars[0].value == pytest.approx((1 - 18 / 19) / 2)
    (alone,) = headline_answers(make_report({"a": BASE}))[2:]
    assert alone.value == "+- 13.7 points"  # (97.2 - 69.9) / 2
    assert headline_answers({"models": {}}) == []


def test_a_share_of_nothing_is_still_drawn_and_colours_do_not_clash():
    models = make_report({"base": DPO})["models"]
    nothing = ElementTree.fromstring(plot_rates("Harm", "harmful_rate", models, "by_label").svg)
    marks = [
        use for use in nothing.iter() if use.tag.endswith("use") and MODEL_COLORS[0].lower() in str(use.attrib).lower()
    ]
    assert marks  # the point at 0
    assert not {color.lower() for _, _, color, _ in OUTCOMES} & {color.lower() for color in MODEL_COLORS}
    svg = plot_parts({"theft": [1, 0]}, [("here", "#01665E"), ("nowhere", "#DFC27D")])
    legend = svg.lower().partition('id="legend_1"')[2]
    assert "#01665e" in legend
    assert "#dfc27d" not in legend
