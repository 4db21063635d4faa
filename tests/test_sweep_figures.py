"""The figures of a sweep: what stands in their SVG, read by its own axes, is what was put in."""

from __future__ import annotations

import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from scipy.stats import binomtest

from safer_instruct.report.sweeps import coordinate, estimated_kl, plot_frontiers, plot_sweep
from safer_instruct.report.training_runs import TrainingRun, read_training_run
from tests.evaluations import run_evaluate

SVG = "{http://www.w3.org/2000/svg}"
# beta, learning rate, schedule; log policy/reference of chosen and of rejected (nats), accuracy, loss
POINTS = [
    (0.05, 1e-5, "cosine", -10.0, -60.0, 0.875, 0.40),
    (0.1, 1e-6, "linear", -6.0, -18.0, 0.75, 0.55),
    (0.5, 1e-5, "cosine", 2.0, -8.0, 0.625, 0.65),
]


def run(number, beta, lr, schedule, chosen, rejected, accuracy, loss, held_out=64, **settings):
    metrics = {"rewards_eval/accuracies": accuracy, "loss/eval": loss}
    metrics |= {"rewards_eval/chosen": beta * chosen, "rewards_eval/rejected": beta * rejected}
    told = {"loss.name": "dpo", "loss.beta": beta, "lr": lr, "schedule": schedule, **settings}
    return TrainingRun(f"r{number}", f"/runs/r{number}", told, metrics, held_out)


RUNS = [run(number, *point) for number, point in enumerate(POINTS, start=1)]
DIFFERING = ["loss.beta", "lr", "schedule"]


def group(svg, gid):
    (found,) = [one for one in ElementTree.fromstring(svg).iter(f"{SVG}g") if one.get("id") == gid]
    return found


def line(svg, gid):
    """The (x, y) of the corners of a drawn line."""
    path = next(group(svg, gid).iter(f"{SVG}path")).get("d")
    return np.array([[float(x), float(y)] for x, y in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", path)])


def drawn_at(svg, gid):
    """Where the marker of a point is, in the units of the drawing."""
    marker = next(group(svg, gid).iter("{http://www.w3.org/2000/svg}use"))
    return float(marker.get("x")), float(marker.get("y"))


def scale(svg, which, *, log=False):
    """What turns a place of the drawing into a value, from the numbered lines of the grid that a reader sees."""
    grid = rf'<g id="{which}tick_\d+">\s*<g id="line2d_\d+">\s*<path d="M (\S+) (\S+) (?:(?!tick_).)*?<!-- (\S+?) -->'
    lines = re.findall(grid, svg, re.DOTALL)
    places = [float(x if which == "x" else y) for x, y, _ in lines]
    values = [float(text.replace("\u2212", "-").rstrip("%")) / (100 if "%" in text else 1) for *_, text in lines]
    slope, start = np.polyfit(places, np.log(values) if log else values, 1)
    return lambda place: math.exp(slope * place + start) if log else slope * place + start


def test_a_point_of_the_frontier_is_at_its_kl_and_its_accuracy_with_wilsons_interval():
    frontier, _ = plot_sweep(RUNS, DIFFERING, {})
    x, y = scale(frontier.svg, "x", log=True), scale(frontier.svg, "y")
    for number, (_, _, _, chosen, rejected, accuracy, _) in enumerate(POINTS, start=1):
        at = drawn_at(frontier.svg, f"run-{number}")
        assert x(at[0]) == pytest.approx(-(chosen + rejected) / 2, rel=1e-3)  # 35, 12, 3 nats: more than a decade
        assert y(at[1]) == pytest.approx(accuracy, abs=1e-3)
        whisker = sorted(y(place) for place in line(frontier.svg, f"interval-{number}")[:, 1])
        low, high = binomtest(round(64 * accuracy), 64).proportion_ci(method="wilson")
        assert whisker == pytest.approx([low, high], abs=1e-3)
    assert "r1: KL 35, 87.5% [77.2, 93.5]" in frontier.alt
    assert "n = 64 held-out pairs" in frontier.caption
    assert len({re.search(r"fill: (#\w+)", ElementTree.tostring(group(frontier.svg, f"run-{n}"), "unicode"))[1]
                for n in (1, 2, 3)}) == 3, "a colour for each beta"  # fmt: skip


def test_a_line_of_the_parallel_coordinates_passes_each_axis_at_its_value():
    _, parallel = plot_sweep(RUNS, DIFFERING, {})
    axes = [line(parallel.svg, f"axis-{index}") for index in range(5)]
    beta, lr = np.log([0.05, 0.1, 0.5]), np.log([1e-5, 1e-6, 1e-5])
    expected = [
        (beta - beta.min()) / np.ptp(beta),
        (lr - lr.min()) / np.ptp(lr),
        [0.0, 1.0, 0.0],  # cosine, linear
        [1.0, 0.5, 0.0],  # accuracy
        [0.0, 0.6, 1.0],  # loss
    ]
    for index, (axis, places) in enumerate(zip(axes, expected, strict=True)):
        bottom, top = axis[:, 1]
        assert bottom > top
        for number, place in enumerate(places, start=1):
            corner = line(parallel.svg, f"run-{number}")[index]
            assert corner[0] == pytest.approx(axis[0, 0], abs=1e-3)
            assert (bottom - corner[1]) / (bottom - top) == pytest.approx(place, abs=1e-4)
    shown = re.findall("<!-- (.*?) -->", parallel.svg)
    assert {"beta (log)", "lr (log)", "schedule", "1 r1", "2 r2", "3 r3"} <= set(shown)
    assert "2 r2: loss.beta 0.1, lr 1e-06, schedule linear, held-out accuracy 0.75, held-out loss 0.55" in parallel.alt


def test_what_has_no_kl_to_its_reference_is_no_point():
    assert estimated_kl(RUNS[0]) == pytest.approx(35)
    for key, value in (
        ("loss.average_logps", True), ("loss.reference_free", True), ("loss.name", "simpo"), ("loss.name", "sft"),
        ("loss.name", "dpo_norm"), ("loss.beta", "half"),
    ):  # fmt: skip
        assert estimated_kl(run(1, *POINTS[0], **{key: value})) is None
    assert plot_frontiers({1: RUNS[0], 2: run(2, *POINTS[1], **{"loss.reference_free": True})}, {}) == []
    assert plot_sweep(RUNS, [], {}) == []
    assert plot_frontiers({1: RUNS[0], 2: run(2, *POINTS[1][:5], 1.5, 0.4)}, {}) == []  # an accuracy of 150%
    frontier, _ = plot_sweep([run(n, *point, held_out=0) for n, point in enumerate(POINTS)], DIFFERING, {})
    assert "no whiskers: n is not known" in frontier.caption
    assert "interval-" not in frontier.svg


def test_a_coordinate_without_a_number_is_left_open_and_words_have_equal_steps():
    open_at = coordinate("loss", [1.0, math.nan, 2.0])
    assert (open_at.places[0], open_at.places[2]) == (0.0, 1.0)
    assert math.isnan(open_at.places[1])
    assert coordinate("n", [None, 8, 16]).places == [0.0, 1.0, 0.5]  # -, 16, 8: null is a value like others
    assert coordinate("beta", [0.05, 0.5]).labels == [(0.0, "0.05"), (1.0, "0.5")]
    assert coordinate("packing", [True, False]).labels == [(0.0, "False"), (1.0, "True")]
    assert coordinate("n", [10**400, math.nan]).places == [0.0, 1.0]  # of an edited file
    assert coordinate("n", [math.inf, math.nan]).places == [0.0, 1.0]
    assert [text for _, text in coordinate("x", [1, 2, 2.1, 3]).labels] == ["1", "2", "3"]  # 2.1 would cover 2


def saved(folder, beta, chosen, accuracy):
    folder.mkdir(parents=True)
    config = {"exp_name": folder.name, "loss": {"name": "dpo", "beta": beta}, "n_eval_examples": 40, "datasets": {}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    row = {"rewards_eval/accuracies": accuracy, "rewards_eval/chosen": beta * chosen, "rewards_eval/rejected": 0.0}
    (folder / "metrics.jsonl").write_text(json.dumps({**row, "counters/examples": 8}) + "\n")
    (folder / "manifest.json").write_text(json.dumps({"data": {"eval": {"rows": 100}}}))
    return folder


def test_a_compared_sweep_and_the_evaluation_of_its_models_share_a_figure(tmp_path):
    runs = [saved(tmp_path / "beta" / f"loss.beta={beta}", beta, -20, 0.75) for beta in (0.1, 0.5)]
    assert read_training_run("a", runs[0]).held_out == 40
    out = tmp_path / "out"
    run_evaluate(f"compare=[{tmp_path}/beta]", f"output={out}")
    page = (out / "report.html").read_text()
    assert "Held-out reward accuracy against KL to the reference, coloured by beta. loss.beta=0.1: KL 10, 75.0%" in page
    assert "Settings and results, as parallel coordinates. 1 loss.beta=0.1: loss.beta 0.1, held-out acc" in page
    models = {
        name: {"path": f"{folder}/LATEST", "safe_and_useful": {"value": value, "low": 0.1, "high": 0.9, "n": 4}}
        for name, folder, value in zip("ab", runs, (0.4, 0.8), strict=True)
    }
    of_models = plot_sweep([read_training_run(f.name, f) for f in runs], ["loss.beta"], models)
    assert [plot.title.split(" against")[0] for plot in of_models[:2]] == [
        "Safe and useful (harmonic mean)",
        "Held-out reward accuracy",
    ]
    y = scale(of_models[0].svg, "y")
    assert [y(drawn_at(of_models[0].svg, f"run-{n}")[1]) for n in (1, 2)] == pytest.approx([0.4, 0.8], abs=1e-3)
    assert "safe and useful" in of_models[-1].alt.lower()
