"""Losses on single answers: rows, metrics, and the divergence term against a loop over explicit mismatched pairs."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from config.errors import UserError
from config.settings import LOSSES, DatasetSettings
from preference_datasets import build_stores
from tests.test_objectives import log_pi
from tests.tiny_models import tiny_model
from tests.tiny_runs import random_store, tiny_settings
from trainers.data.batching import BatchLoader
from trainers.data.cutters import build_cutter
from trainers.data.mismatched import with_mismatched
from trainers.data.token_store import TokenStore, TokenStoreWriter
from trainers.distributed.launch import launch
from trainers.kernels.attention import use_packed_attention
from trainers.kernels.logps import sequence_logps
from trainers.objectives import build_objective
from trainers.run.metrics import MetricSums

ROWS = 7


def store_of(folder, rows) -> TokenStore:
    """(prompt, answer, is_good) of token lists."""
    with TokenStoreWriter(folder, key="k", num_segments=2) as writer:
        for i, (prompt, answer, is_good) in enumerate(rows):
            writer.append(f"row-{i}", [prompt, answer], is_good=is_good)
        writer.finish({})
    return TokenStore(folder)


def test_each_row_has_an_answer_to_another_prompt(tmp_path):
    rows = [([3 + i // 2] * (1 + i % 3), [20 + i] * (1 + i), i % 2 == 0) for i in range(9)]
    store = store_of(tmp_path, rows)
    mismatched = with_mismatched(store)
    assert (mismatched.num_segments, len(mismatched)) == (3, 9)
    answers = [answer for _, answer, _ in rows]
    longest = int((store.lengths.sum(1)).max())
    partners = []
    for i, (prompt, answer, is_good) in enumerate(rows):
        own_prompt, own, other = (segment.tolist() for segment in mismatched.row(i))
        assert (own_prompt, own) == (prompt, answer)
        assert bool(mismatched.columns["is_good"][i]) is is_good
        (partner,) = [j for j in range(9) if answers[j][0] == other[0]]
        assert other == answers[partner][: longest - len(prompt)]
        assert rows[partner][0] != prompt
        assert mismatched.lengths[i].tolist() == [len(prompt), len(answer), len(other)]
        partners.append(partner)
    chosen = mismatched.select(torch.tensor([5, 2])).select(torch.tensor([1]))
    assert [segment.tolist() for segment in chosen.row(0)] == [segment.tolist() for segment in mismatched.row(2)]
    assert chosen.ids(0) == "row-2"
    assert chosen.content != mismatched.content != store.content


def test_one_prompt_alone_is_refused(tmp_path):
    store = store_of(tmp_path, [([3, 4], [5 + i], True) for i in range(3)])
    with pytest.raises(UserError, match=r"all 3 rows of a split have the same prompt.*loss=apo_zero_unpaired"):
        with_mismatched(store)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("parts", [1, 3])
def test_the_divergence_is_the_mean_over_explicit_mismatched_pairs(tmp_path, packing, parts):
    """Losses and z0 of a batch, against log pi and log ref of every (prompt, answer) by itself, in a loop."""
    loss = LOSSES["kto"](beta=0.7, good_weight=1.3, bad_weight=0.6)
    base = random_store(tmp_path, num_rows=ROWS, segments=2, judged=True, seed=3)
    store = with_mismatched(base)
    policy, reference = (tiny_model(dtype=torch.float64, seed=seed) for seed in (0, 1))
    ratios = []
    for i in range(ROWS):
        prompt, own, other = (segment.tolist() for segment in store.row(i))
        ratios.append(
            [(log_pi(policy, prompt + y, len(prompt)) - log_pi(reference, prompt + y, len(prompt))).item()
             for y in (own, other)]
        )  # fmt: skip
    z0 = max(0.0, sum(other for _, other in ratios) / ROWS)
    assert z0 > 0.1  # else the clamp would be all that is tested
    expected = []
    for (own, _), is_good in zip(ratios, base.columns["is_good"].tolist(), strict=True):
        value = 1 / (1 + torch.exp(torch.tensor(-0.7 * ((own - z0) if is_good else (z0 - own))))).item()
        expected.append((1.3 if is_good else 0.6) * (1 - value))

    cutter = build_cutter(packing=packing, device=torch.device("cpu"), pad_token_id=0, num_microbatches=parts)
    loader = BatchLoader(store, cutter, batch_size=ROWS)
    if packing:
        use_packed_attention(policy)
        use_packed_attention(reference)
    logps = BatchLoader(store, cutter, batch_size=ROWS)
    (batch,) = logps.batches()
    column = torch.zeros(ROWS, 2, dtype=torch.float64)
    with torch.no_grad():
        for microbatch in batch.microbatches:
            column[microbatch["row"]] = sequence_logps(reference, microbatch)[0]
    loader.columns["reference_logps"] = column
    (batch,) = loader.batches()
    assert len(batch.microbatches) == parts
    found = torch.zeros(ROWS, dtype=torch.float64)
    kl = torch.zeros(ROWS, dtype=torch.float64)

    def worker(layout):
        objective = build_objective(loss)
        logps_of = partial(sequence_logps, policy)
        objective.begin_batch(logps_of, batch.passes, layout.device)
        for microbatch in batch.microbatches:
            output = objective(logps_of, microbatch)
            found[microbatch["row"]] = output.metrics["preference_loss_{split}"]
            kl[microbatch["row"]] = output.metrics["kl_{split}"]

    launch(worker, tiny_settings())
    assert kl.tolist() == pytest.approx([other for _, other in ratios], abs=1e-6)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_metrics_of_good_and_bad_answers_are_means_over_their_own(tmp_path):
    is_good = torch.tensor([True, False, True])
    batch = {"row": torch.arange(3), "is_good": is_good, "reference_logps": torch.zeros(3, 1, dtype=torch.float64)}
    logps = torch.tensor([-1.0, -2.0, -4.0], dtype=torch.float64)
    objective = build_objective(LOSSES["apo_zero_unpaired"](beta=0.5))
    output = objective(lambda batch: (logps, torch.tensor([1, 2, 4])), batch)
    assert output.some["rewards_{split}/chosen"].tolist() == [-0.5, -2.0]
    assert output.some["rewards_{split}/rejected"].tolist() == [-1.0]
    assert output.is_finite().tolist() == [True] * 3
    sums = MetricSums()
    for name, values in output.detached(counts=True).some.items():
        sums.add(name, values.sum(), values.numel())
    assert sums.state()["logps_{split}/chosen"] == (-5.0, 2.0)


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def build(tmp_path, tokenizer, settings):
    return build_stores(
        {"d": settings}, loss="answers", tokenizer=tokenizer, max_length=64, max_prompt_length=48,
        cache_dir=tmp_path / "cache",
    )  # fmt: skip


def test_judged_answers_are_read(tmp_path, tokenizer):
    words = [True, "good", 1, "true", False, "bad", 0, "False", "maybe", None]
    rows = [{"instruction": f"List {i} fruits", "response": f"apple {i}", "good": one} for i, one in enumerate(words)]
    path = write(tmp_path / "answers.jsonl", rows)
    stores = build(
        tmp_path, tokenizer, DatasetSettings(path=path, schema="unpaired", template="plain", eval_fraction=0)
    )
    assert stores.train.columns["is_good"].tolist() == [True] * 4 + [False] * 4
    assert [tokenizer.decode(stores.train.row(i)[1][:-1]).strip() for i in (0, 7)] == ["apple 0", "apple 7"]
    assert stores.report["datasets"]["d"]["dropped"] == {"not_judged": 2}


ASKED = {"role": "user", "content": "Name a fruit"}
ONE_JUDGEMENT = [
    *((word, True) for word in (True, 1, 1.0, "True", "1", "1.0", " Good ", "desirable", "safe", "yes")),
    *((word, False) for word in (False, 0, 0.0, "False", "0", "0.0", "bad", "UNDESIRABLE", "unsafe", "no")),
]


@pytest.mark.parametrize("form", ["completion", "messages", "csv"])
def test_every_form_of_unpaired_answers_is_judged_by_one_rule(form, tmp_path, tokenizer):
    words, expected = zip(*ONE_JUDGEMENT, strict=True)
    if form == "csv":
        lines = ["prompt,completion,label", *(f"Name a fruit,apple {i},{word}" for i, word in enumerate(words))]
        (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
        path = str(tmp_path / "a.csv")
    else:
        answers = [{"role": "assistant", "content": f"apple {i}"} for i in range(len(words))]
        forms = {
            "completion": lambda i: {"prompt": "Name a fruit", "completion": f"apple {i}"},
            "messages": lambda i: {"messages": [ASKED, answers[i]]},
        }
        path = write(tmp_path / "a.jsonl", [{**forms[form](i), "label": word} for i, word in enumerate(words)])
    settings = DatasetSettings(path=path, schema="custom", template="plain", eval_fraction=0)
    stores = build(tmp_path, tokenizer, settings)
    assert stores.train.columns["is_good"].tolist() == list(expected)
    named = [{"prompt": "Name a fruit", "chosen": "apple", "label": label} for label in ("hate", None, "False")]
    settings = replace(settings, path=write(tmp_path / "named.jsonl", named))
    assert build(tmp_path, tokenizer, settings).train.columns["is_good"].tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("label", "where"),
    [
        ({"label": "violence"}, "column label"), ({"label": 0.7}, "column label"), ({"label": None}, "column label"),
        ({"label": 2}, "column label"), ({}, "column label"),
        ({"completion": None, "responses": ["apple"], "scores": [1]}, "column responses"),
    ],
)  # fmt: skip
def test_what_is_no_judgement_is_no_good_answer(label, where, tmp_path, tokenizer):
    row = {"prompt": "Name a fruit", "completion": "apple", **label}
    settings = DatasetSettings(path=write(tmp_path / "a.jsonl", [row]), schema="custom", template="plain")
    with pytest.raises(UserError, match=rf"a\.jsonl:1: {where} does not say whether the answer is good.* expected .*"):
        build(tmp_path, tokenizer, settings)
    good = {"completion": "apple", "responses": None, "label": "good"}
    some = replace(settings, path=write(tmp_path / "b.jsonl", [{**row, **good}, row]))
    strict = r"b\.jsonl:2: bad row \w+: not judged in column \w+ \(.* is expected\)"
    with pytest.raises(UserError, match=strict):
        build(tmp_path, tokenizer, replace(some, on_bad_row="error"))
    if "responses" not in label:  # a label of fine-tuning is a category
        stores = build_stores(
            {"d": replace(settings, eval_fraction=0)}, loss="likelihood", tokenizer=tokenizer, max_length=64,
            max_prompt_length=48, cache_dir=tmp_path / "cache",
        )  # fmt: skip
        assert len(stores.train) == 1


def test_judged_answers_of_some_labels(tmp_path, tokenizer):
    rows = [{"instruction": f"List {i} fruits", "response": "apple", "good": 1, "label": "ab"[i % 2]} for i in range(4)]
    path = write(tmp_path / "answers.jsonl", rows)
    settings = DatasetSettings(path=path, schema="unpaired", template="plain", eval_fraction=0, labels=["a"])
    stores = build(tmp_path, tokenizer, settings)
    assert len(stores.train) == 2
    assert stores.report["datasets"]["d"]["dropped"] == {"other_label": 2}


def test_a_pair_is_two_answers_on_request(tmp_path, tokenizer):
    rows = [{"instruction": f"List {i} fruits", "chosen": f"apple {i}", "rejected": "none"} for i in range(4)]
    settings = DatasetSettings(
        path=write(tmp_path / "pairs.jsonl", rows), schema="si", template="plain", eval_fraction=0, split_pairs=True
    )
    store = build(tmp_path, tokenizer, settings).train
    assert (len(store), store.num_segments) == (8, 2)
    assert store.columns["is_good"].tolist() == [True, False] * 4
    assert store.row(0)[0].tolist() == store.row(1)[0].tolist()
    assert tokenizer.decode(store.row(3)[1][:-1]).strip() == "none"
