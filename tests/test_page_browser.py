"""The page of a report in a real browser: hostile outputs run nothing and fetch nothing, and the layout holds.

Chromium is installed by the set-up where apt is there and may be used; elsewhere these tests are skipped.
"""

import json
import os
import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from safer_instruct.experts.verdicts import Judgement
from safer_instruct.measures.comparisons import compare_models
from safer_instruct.measures.rates import JudgedOutput, summarize
from safer_instruct.report.curves import COMPARED, plot_compared
from safer_instruct.report.document import build_report
from safer_instruct.report.evaluations import sample_row
from safer_instruct.report.page import pick_samples, render_page
from safer_instruct.text.prompt_sets import EvaluationPrompt

WIDTHS = (400, 1400)
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


@pytest.fixture(scope="module")
def chromium():
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None and shutil.which("apt-get") and os.geteuid() == 0:
        subprocess.run(["apt-get", "update"], capture_output=True, check=False)
        install = ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]
        subprocess.run(
            install, capture_output=True, check=False, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        )
        found = shutil.which("chromium")
    if found is None:
        pytest.skip("no chromium here, and it cannot be installed: apt-get install chromium")
    return found


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
                texts[-1 - i],
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
    curves = {name: {"loss/train": [(0.0, 2.0), (64.0, 1.0)]} for name in [*models, *texts[:6]]}
    metrics = [metric for _, _, metric in COMPARED if metric != "loss/train"]
    figures = plot_compared({name: {**of_run, **{m: [] for m in metrics}} for name, of_run in curves.items()})
    return render_page(report, pick_samples(rows, 20), figures)


def browse(chromium, folder, *arguments):
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
        "--virtual-time-budget=4000", f"--user-data-dir={folder}/profile", *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def opened(html):
    """The page with all that is behind a click shown."""
    return html.replace("<details", "<details open")


def title_of(dom):
    return re.search(r"<title>(.*?)</title>", dom, re.DOTALL).group(1)


@pytest.mark.slow
def test_a_hostile_page_runs_nothing_and_asks_for_nothing(chromium, beacon, tmp_path):
    url, asked = beacon
    html = opened(hostile_page(url))
    page, naked, control = tmp_path / "page.html", tmp_path / "naked.html", tmp_path / "control.html"
    page.write_text(html, encoding="utf-8")
    assert POLICY.search(html)
    naked.write_text(POLICY.sub("", html), encoding="utf-8")  # the escaping alone must hold
    control.write_text("<title>fine</title>" + "".join(payloads(url)[:3]), encoding="utf-8")
    for file in (page, naked):
        dom = browse(chromium, tmp_path, "--dump-dom", file.as_uri())
        assert title_of(dom).startswith("Evaluation: base, ")
        assert "<script" not in dom
        assert dom.rstrip().endswith("</html>")
    assert asked == []
    dom = browse(chromium, tmp_path, "--dump-dom", control.as_uri())
    assert "taken over" in title_of(dom)  # the same texts unescaped: this browser would have run them
    assert len(asked) >= 2


@pytest.mark.slow
def test_the_layout_holds_on_a_phone_and_on_a_screen(chromium, beacon, tmp_path):
    html = POLICY.sub("", opened(hostile_page(beacon[0])))
    measure = """<script>
      const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll")
        && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + "." + e.className);
      parent.postMessage([innerWidth, document.documentElement.scrollWidth, wide.slice(0, 5)], "*")</script>"""
    (tmp_path / "page.html").write_text(html.replace("</body>", measure + "</body>"), encoding="utf-8")
    for width in WIDTHS:
        # In a frame: a window of the browser has a least width that a phone does not have.
        harness = tmp_path / f"harness-{width}.html"
        harness.write_text(
            "<script>onmessage = e => document.title = JSON.stringify(e.data)</script><title>nothing</title>"
            f'<body style="margin:0"><iframe src="page.html" style="border:0;width:{width}px;height:3000px"></iframe>'
        )
        found = json.loads(title_of(browse(chromium, tmp_path, "--dump-dom", harness.as_uri())))
        assert found == [width, width, []]
        shot = screenshot_folder(tmp_path) / f"hostile-{width}.png"
        size = f"--window-size={max(width, 500)},3000"
        browse(chromium, tmp_path, size, f"--screenshot={shot}", harness.as_uri())
        assert shot.read_bytes().startswith(b"\x89PNG")


def screenshot_folder(tmp_path):
    """Where CI keeps them (SCREENSHOTS=FOLDER), else the test's own folder."""
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
