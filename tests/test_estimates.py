"""What `dry_run` says: counts against batches that are really made, bytes and numbers against runs that are made."""

import json
import re
import signal
from dataclasses import asdict, replace
from multiprocessing import util
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import train
from config.settings import CheckpointSettings, ReferenceSettings
from tests.commands import run, write_pairs
from tests.test_batching import loader, make_store
from tests.test_train_entrypoint import FAST, entries
from tests.tiny_runs import tiny_settings, tiny_trainer
from trainers import dry_run, reference
from trainers.data.packing import num_positions, num_tokens
from trainers.distributed.launch import launch
from trainers.estimates import (
    Measured,
    Work,
    count_work,
    describe_measured,
    num_checkpoints,
    num_evaluations,
    num_renewed_evaluations,
    renewal_positions,
    renewals,
)
from trainers.run.run_dir import RunDir
from trainers.trainer import Trainer

CUTS = {
    "packed": {"packing": True},
    "packed, small": {"packing": True, "max_tokens": 40},
    "packed, parts": {"packing": True, "num_microbatches": 3},
    "padded": {},
    "padded, small": {"max_tokens": 60},
    "padded, parts": {"num_microbatches": 2, "num_examples": 28},
}


@pytest.mark.parametrize("segments", [2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("cuts", CUTS)
def test_counts_are_those_of_the_batches(tmp_path, cuts, ranks, segments):
    store = make_store(tmp_path / "store", 23, segments)
    options = {"world_size": ranks, **CUTS[cuts]}
    made = [list(loader(store, rank=rank, **options).batches()) for rank in range(ranks)]
    steps = [[one for batch in step for one in batch.microbatches] for step in zip(*made, strict=True)]
    work = count_work(loader(store, **options))
    assert work.ends == [batch.start_examples + batch.num_examples for batch in made[0]]
    assert work.microbatches == sum(map(len, steps))
    assert work.tokens == sum(int(num_tokens(one)) for step in steps for one in step)
    assert work.positions == sum(num_positions(one) for step in steps for one in step)
    largest = [max(map(num_positions, step)) for step in steps]
    assert work.largest_microbatch == max(largest)
    assert torch.equal(work.first, made[0][0].rows)
    assert torch.equal(work.largest, made[0][largest.index(max(largest))].rows)
    empty = sum(int((~one["attention_mask"]).sum()) for step in steps for one in step if "attention_mask" in one)
    assert work.padding == pytest.approx(empty / work.positions)


@pytest.mark.parametrize("cuts", CUTS)
def test_an_excerpt_is_the_batch_of_the_run(tmp_path, cuts):
    store = make_store(tmp_path / "store", 23)
    for rank in range(2):
        whole = loader(store, rank=rank, world_size=2, **CUTS[cuts])
        for batch in whole.batches():
            (same,) = whole.excerpt(batch.rows).batches()
            assert (len(same.fillers), same.num_examples) == (len(batch.fillers), batch.num_examples)
            for one, other in zip(same.microbatches, batch.microbatches, strict=True):
                assert torch.equal(one["input_ids"], other["input_ids"])


@pytest.mark.parametrize("cuts", ["packed, small", "packed, parts", "padded, small", "padded, parts"])
def test_an_excerpt_of_few_microbatches_has_the_largest_ones(tmp_path, cuts):
    whole = loader(make_store(tmp_path / "store", 23), **CUTS[cuts])
    shorter = 0
    for batch in whole.batches():
        sizes = {tuple(sorted(one["row"].tolist())): num_positions(one) for one in batch.microbatches}
        for number in (1, 2, len(sizes)):
            few = whole.excerpt(batch.rows, number)
            (cut,) = few.batches()
            largest = sorted(sizes, key=lambda rows: -sizes[rows])[:number]
            of_largest = {whole.store.ids(row) for rows in largest for row in rows}
            assert {few.store.ids(row) for row in cut.rows.tolist()} == of_largest
            assert len(cut.microbatches) == min(number, len(sizes))
            shorter += number < len(sizes)
    assert shorter


def test_the_update_of_the_weights_is_counted_once_a_step():
    """However many positions the steps have that are measured: 94 steps of 2 s, and 10,000 positions of 10 ms."""
    work = Work(list(range(4, 377, 4)), 500, 9000, 10_000, 0.1, 64, torch.arange(4), torch.arange(4))
    lines = describe_measured(tiny_settings(), [work], Measured(0.01, 2.0, 0.001, 1.0, 2**20, 2**20), 0)
    assert "training     4 min 48 s" in lines
    assert f"step         {288 / 94:.3g} s (35 positions/s)" in lines


SCHEDULES = {
    "every 8": {},
    "at the end alone": {"do_first_eval": False, "eval_every": 1000},
    "checkpoints between": {"checkpoint": CheckpointSettings(every_examples=5)},
    "the last two": {"checkpoint": CheckpointSettings(every_examples=5, keep_last=2)},
    "the end is due": {"eval_every": 11, "n_examples": 22},
    "none": {"debug": True},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_evaluations_and_checkpoints_are_those_of_a_run(tmp_path, name):
    settings = tiny_settings(n_epochs=2, **SCHEDULES[name])
    trainers: list[Trainer] = []

    def work(layout):
        with RunDir.open(tmp_path / "run", config=asdict(settings), manifest={}) as run:
            trainers.append(tiny_trainer(tmp_path, layout, run, settings))
            trainers[0].train()

    launch(work, settings)
    ends = count_work(trainers[0].train_loader).ends
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert num_evaluations(ends, settings) == sum("loss/eval" in row for row in rows)
    assert num_checkpoints(ends, settings) == len(list(tmp_path.glob("run/checkpoints/step-*")))
    best = replace(settings, checkpoint=CheckpointSettings(keep_last=1, keep_best="loss/eval"))
    assert num_checkpoints(ends, best) == (0 if settings.debug else min(2, num_evaluations(ends[-1:], settings)))


@pytest.mark.parametrize(("refresh", "eval_every"), [(10, 12), (20, 1000)])
def test_renewals_are_those_of_a_run(tmp_path, monkeypatch, refresh, eval_every):
    """22 rows in batches of 4 for two epochs, and 7 rows to evaluate on; a filler's row is computed beside them."""
    settings = tiny_settings(
        n_epochs=2, eval_every=eval_every, reference=ReferenceSettings(refresh_examples=refresh, refresh_alpha=0.6)
    )
    trainers, computed, original = [], [], reference.computed_logps

    def spied(model, store, rows, **options):
        computed.append((len(store), len(rows)))
        return original(model, store, rows, **options)

    def work(layout):
        with RunDir.open(tmp_path / "run", config=asdict(settings), manifest={}) as run:
            trainers.append(tiny_trainer(tmp_path, layout, run, settings))
            monkeypatch.setattr(reference, "computed_logps", spied)
            trainers[0].train()

    launch(work, settings)
    loaders = [trainers[0].train_loader, trainers[0].eval_loader]
    works = [count_work(one) for one in loaders]
    trained = [rows for size, rows in computed if size == 22]
    evaluated = [rows for size, rows in computed if size == 7]
    assert len(renewals(works[0].ends, settings)) == len(trained)
    assert num_renewed_evaluations(works[0].ends, settings) == len(evaluated)
    said = renewal_positions(settings, loaders, works) - len(evaluated) * works[1].positions
    made = sum(trained) * works[0].positions / works[0].ends[-1]
    assert made - len(trained) * works[0].positions / works[0].ends[-1] - 1 <= said <= made * 1.3  # rows seen twice


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer):
    """A million parameters: beside them the tokenizer and the random states of a checkpoint are small."""
    folder = tmp_path_factory.mktemp("larger")
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, tie_word_embeddings=True, pad_token_id=0, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def command(model_folder, tmp_path, monkeypatch):
    pairs = write_pairs(tmp_path / "pairs.jsonl", 40)
    util.get_temp_dir()  # of the test session, where the server of tests/warm.py has its socket
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return ["model=blank_model", f"model.name_or_path={model_folder}", "wandb.enabled=false", *FAST,
            f"datasets.si.path={pairs}", "exp_name=d"]  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leftovers(tmp_path: Path) -> set[str]:
    """What there is but the data, and the token store."""
    return {path.name for folder in (tmp_path, tmp_path / ".cache", tmp_path / "temporary")
            for path in folder.iterdir()} - {"pairs.jsonl", ".cache", "tokens", "temporary"}  # fmt: skip


@pytest.mark.slow
def test_three_real_steps_leave_nothing_behind(command, model_folder, tmp_path, here, monkeypatch):
    before, taken = files(model_folder), []
    original = Trainer.train_step

    def spied(self, batch, *arguments):
        taken.append([self.train_loader.store.ids(row) for row in batch.rows.tolist()])
        return original(self, batch, *arguments)

    monkeypatch.setattr(Trainer, "train_step", spied)
    renewed = "reference.refresh_examples=20"
    out = here("loss=dpo", "dry_run=true", "sample_during_eval=true", renewed, *command, "seed=1")
    assert "now three real steps, of up to " in out
    assert "from three real steps (cpu, processes: 1):" in out
    for name in ("step", "training", "reference", "renewals", "evaluations", "in all", "memory", "checkpoint"):
        assert re.search(rf"^  {name} +\S", out, re.MULTILINE), name
    assert "4 of" in out  # at the start, after 16 and 32 examples, at the end
    assert len(taken) == 3
    assert taken[0] == taken[2] != taken[1]  # between two of the run's first, its largest batch
    assert leftovers(tmp_path) == set()
    assert files(model_folder) == before


@pytest.mark.slow
def test_a_signal_ends_a_dry_run_after_a_step(command, tmp_path, here, monkeypatch, capsys):
    taken, original = [], Trainer.train_step

    def asked(self, batch, *arguments):
        self.layout.stop.ask(signal.SIGTERM)
        taken.append(batch)
        return original(self, batch, *arguments)

    monkeypatch.setattr(Trainer, "train_step", asked)
    with pytest.raises(SystemExit) as stopped:
        here("loss=sft", "dry_run=true", *command)
    assert (stopped.value.code, len(taken)) == (75, 1)
    assert "stopped as asked; a dry run leaves nothing behind" in capsys.readouterr().err
    assert leftovers(tmp_path) == set()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [[], ["optimizer=AdamW", "checkpoint.policy_pt=true"]])
def test_a_checkpoint_is_as_large_as_was_said(command, changes, tmp_path, here):
    here("loss=dpo", "n_examples=8", *changes, *command)
    made = entries(tmp_path / ".cache" / "reference")
    out = here("loss=dpo", "n_examples=8", *changes, *command, "dry_run=true")
    said = re.search(r"checkpoint +([\d.]+) MiB .*; 1 kept: \1 MiB", out)
    (checkpoint,) = (tmp_path / "runs" / "d" / "checkpoints").iterdir()
    assert float(said[1]) * 2**20 == pytest.approx(sum(map(len, files(checkpoint).values())), rel=0.02)
    assert entries(tmp_path / ".cache" / "reference") == made


@pytest.mark.slow
def test_sharded_steps(command, tmp_path):
    """In processes of their own; only the first speaks. 37 rows in batches of 8, dealt to two."""
    where = {"TMPDIR": str(tmp_path / "temporary")}
    layout = ["trainer=FSDPTrainer", "trainer.num_processes=2", "device=cpu", "activation_checkpointing=selective"]
    out, _ = run(["loss=dpo", "dry_run=true", *layout, *command], tmp_path, **where)
    assert out.count("5 of 8 examples: 37 in all, in 10 micro-batches") == 1
    assert out.count("from three real steps (cpu, processes: 2):") == 1
    assert leftovers(tmp_path) == set()


@pytest.mark.slow
def test_no_model_is_loaded_where_nobody_would_train_it(command, here, monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(train, "load_causal_lm", fail)
    assert "real steps" not in here("loss=sft", "dry_run=data", *command)
    monkeypatch.setattr(dry_run, "LARGE_ON_A_CPU", 0.001)
    out = here("loss=sft", "dry_run=true", *command)
    assert "no steps were taken: device=auto found no GPU" in out
    assert "nothing was trained" in out
    with pytest.raises(AssertionError, match="were loaded"):
        here("loss=sft", "dry_run=true", "device=cpu", *command)


@pytest.mark.slow
def test_what_would_stop_the_run_stops_the_dry_run(command, here, capsys):
    with pytest.raises(SystemExit) as stopped:
        here("loss=sft", "dry_run=true", "checkpoint.keep_best=rewards_eval/margins", *command)
    assert stopped.value.code == 2
    assert "an evaluation of this run does not measure it" in capsys.readouterr().err
