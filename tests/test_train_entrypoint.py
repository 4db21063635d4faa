"""`train.py` as a user runs it: every loss, resume after a kill, sweeps that share their caches, runs at once."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from config.schema import compose_config
from config.settings import TrainConfig
from tests.commands import metrics, run, start, without_times, write_alpaca, write_pairs
from trainers.run.next_command import typed
from trainers.run.speed import speed_notes

pytestmark = pytest.mark.slow

TRAIN_ROWS = 37  # of 40: the others are held out, by a hash of their instructions
LENGTHS = ["max_length=128", "max_prompt_length=100"]
FAST = [*LENGTHS, "batch_size=8", "lr=1e-3", "warmup_steps=2", "eval_every=16", "minimum_log_interval_secs=0"]


@pytest.fixture
def base(tiny_model_folder):
    """The part of a command that every test shares: the tiny model, short rows."""
    return ["model=blank_model", f"model.name_or_path={tiny_model_folder}", "wandb.enabled=false", *FAST]


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl", 40)


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "LATEST" / "model" / "model.safetensors")


def test_dpo_from_the_command_line(base, pairs, tmp_path, tiny_model_folder):
    """In a process of its own and a working directory that is not the repository."""
    command = ["-u", "loss=dpo", f"datasets.si.path={pairs}", "exp_name=d", *base][1:]
    out, err = run([*command, "sample_during_eval=true", "n_eval_model_samples=2", "max_new_tokens=6"], tmp_path)
    run_dir = tmp_path / "runs" / "d"
    assert "run directory: runs/d" in out
    assert "weights: runs/d/LATEST/model" in out
    assert "next: python evaluate.py" in out
    assert "si: 40 rows read" in err
    assert {path.name for path in run_dir.iterdir() if not path.name.startswith(".")} == {
        "LATEST", "checkpoints", "config.yaml", "manifest.json", "metrics.jsonl", "samples.jsonl",
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl", "runs", ".cache"}

    rows = metrics(run_dir)
    first = next(row for row in rows if "loss/train" in row)
    assert first["loss/train"] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert rows[0]["counters/examples"] == 0
    assert rows[0]["rewards_eval/margins"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["loss/eval"] == pytest.approx(rows[-1]["preference_loss_eval"])
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert [sample["counters/examples"] for sample in samples[:2]] == [0, 0]
    assert samples[0]["prompt"].endswith("### Response:")

    stored = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert (stored["loss"]["beta"], stored["batch_size"], stored["lr"]) == (0.1, 8, 1e-3)
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert "loss=dpo" in manifest["command"]
    assert manifest["packages"]["torch"].startswith("2.")
    assert set(manifest["git"]) == {"sha", "dirty"}
    assert manifest["data"]["train"]["rows"] + manifest["data"]["eval"]["rows"] == 40

    model = AutoModelForCausalLM.from_pretrained(run_dir / "LATEST" / "model")
    moved = [not torch.equal(a, b) for a, b in zip(
        model.parameters(), AutoModelForCausalLM.from_pretrained(tiny_model_folder).parameters(), strict=True
    )]  # fmt: skip
    assert all(moved)
    assert AutoTokenizer.from_pretrained(run_dir / "LATEST" / "model").eos_token == "</s>"


def test_the_text_of_the_corpus_is_not_printed(base, pairs, here):
    shown = ["exp_name=quiet", "sample_during_eval=true", "max_new_tokens=4"]
    printed = here("loss=dpo", f"datasets.si.path={pairs}", *shown, *base)
    assert "40 rows read" in printed
    assert "banana" not in printed


@pytest.mark.parametrize("loss", ["sft", "reverse", "ipo"])
def test_other_losses(base, loss, pairs, tmp_path, here):
    out = here(f"loss={loss}", f"datasets.si.path={pairs}", f"exp_name={loss}", *base)
    rows = metrics(tmp_path / "runs" / loss)
    assert rows[-1]["counters/examples"] == TRAIN_ROWS  # the rest is held out
    assert (tmp_path / "runs" / loss / "LATEST" / "model" / "model.safetensors").is_file()
    following = {"sft": "train.py loss=dpo", "reverse": "induce.py", "ipo": "evaluate.py"}
    assert f"next: python {following[loss]}" in out


def test_the_whole_chain_on_alpaca_data(base, pairs, tmp_path, here):
    """sft on alpaca, then dpo from that run's archive: the reference is the sft model."""
    alpaca = write_alpaca(tmp_path / "alpaca.json")
    here("loss=sft", "datasets=[alpaca]", f"datasets.alpaca.path={alpaca}", "exp_name=s", *base)
    here(
        *base, "loss=dpo", f"datasets.si.path={pairs}", "model.archive=runs/s", "exp_name=d", "n_examples=8", "lr=1e-9"
    )
    sft, dpo = final_weights(tmp_path / "runs" / "s"), final_weights(tmp_path / "runs" / "d")
    for name, tensor in sft.items():
        assert torch.allclose(tensor, dpo[name], atol=1e-6), name


def test_the_same_command_after_the_end_says_so(base, pairs, tmp_path, here):
    command = ["loss=sft", f"datasets.si.path={pairs}", "exp_name=twice", *base]
    here(*command)
    before = (tmp_path / "runs" / "twice" / "metrics.jsonl").read_bytes()
    assert f"runs/twice is finished: {TRAIN_ROWS} examples" in here(*command)
    assert (tmp_path / "runs" / "twice" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("dry_run", ["true", "data"])
def test_dry_run_tokenises_and_trains_nothing(base, pairs, tmp_path, here, dry_run):
    out = here("loss=dpo", f"datasets.si.path={pairs}", "exp_name=dry", f"dry_run={dry_run}", "n_epochs=2", *base)
    assert f"{TRAIN_ROWS} for training, 3 for evaluation; cut: 0 prompts, 0 responses" in out
    assert f"10 of 8 examples: {2 * TRAIN_ROWS} in all, in 10 micro-batches" in out
    assert "nothing was trained; the run would live in runs/dry" in out
    assert not (tmp_path / "runs").exists()
    assert len([path for path in (tmp_path / ".cache" / "tokens").iterdir() if path.is_dir()]) == 1


def test_gradient_accumulation_changes_nothing(base, pairs, tmp_path, here):
    for parts in (1, 8):
        arguments = [f"exp_name=a{parts}", f"gradient_accumulation_steps={parts}", "optimizer=SGD", "n_examples=16"]
        here("loss=dpo", f"datasets.si.path={pairs}", *arguments, *base)
    one, eight = (final_weights(tmp_path / "runs" / name) for name in ("a1", "a8"))
    for name, tensor in one.items():
        assert torch.allclose(tensor, eight[name], atol=1e-6), name


def wait_for_rows(path: Path, count: int, process) -> None:
    """Waits until a file has so many lines; fails if the process ends before."""
    deadline = time.monotonic() + 1500
    while not path.exists() or path.read_text().count("\n") < count:
        assert process.poll() is None, f"it ended too early: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_run_continues_to_the_same_weights(base, pairs, tmp_path, here):
    """SIGKILL in the middle of DPO, twice; then the same command: weights and metrics are those of an unbroken run."""
    lengthy = ["loss=dpo", f"datasets.si.path={pairs}", "n_epochs=6", *base]
    here(*lengthy, "exp_name=unbroken")
    broken = [*lengthy, "exp_name=broken"]
    run_dir = tmp_path / "runs" / "broken"
    for rows in (6, 18):  # the second kill comes after a resume
        process = start(broken, tmp_path)
        wait_for_rows(run_dir / "metrics.jsonl", rows, process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    seen = metrics(run_dir)[-1]["counters/examples"]
    assert 0 < seen < 6 * TRAIN_ROWS
    here(*broken)
    expected, resumed = final_weights(tmp_path / "runs" / "unbroken"), final_weights(run_dir)
    assert expected.keys() == resumed.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, resumed[name]), name
    assert without_times(metrics(run_dir)) == without_times(metrics(tmp_path / "runs" / "unbroken"))


def entries(folder: Path) -> list[tuple[str, int]]:
    """The cache entries of a folder, with the time at which each was made."""
    return [(path.name, path.stat().st_mtime_ns) for path in sorted(folder.iterdir()) if path.is_dir()]


def test_points_of_a_sweep_share_store_and_reference(base, pairs, tmp_path, here, monkeypatch):
    """Two points, two run dirs, one token store, one reference cache: encoded and computed once."""
    import trainers.reference

    passes = itertools.count()
    original = trainers.reference.sequence_logps

    def counted(*arguments, **options):
        next(passes)
        return original(*arguments, **options)

    monkeypatch.setattr(trainers.reference, "sequence_logps", counted)
    command = ["loss=dpo", f"datasets.si.path={pairs}", "n_examples=16", *base]
    here(*command, "exp_name=alone")
    alone = next(passes)
    made = entries(tmp_path / ".cache" / "reference"), entries(tmp_path / ".cache" / "tokens")
    here("-m", *command, "loss.beta=0.05,0.5", "exp_name=beta")
    assert next(passes) == alone + 1  # not one pass more, for two further runs
    assert (entries(tmp_path / ".cache" / "reference"), entries(tmp_path / ".cache" / "tokens")) == made
    runs = sorted(path.name for path in (tmp_path / "runs" / "beta").iterdir() if path.is_dir())
    assert runs == ["loss.beta=0.05", "loss.beta=0.5"]
    rewards = [metrics(tmp_path / "runs" / "beta" / name)[-1]["rewards_eval/margins"] for name in runs]
    assert rewards[0] != rewards[1]


@pytest.mark.timeout(1200)  # sixteen runs on a busy machine
def test_sixteen_trials_started_at_once_share_the_cache(base, pairs, tmp_path):
    command = ["loss=dpo", f"datasets.si.path={pairs}", "n_examples=8", "do_first_eval=false", *base]
    trials = [f"r{number}" for number in range(16)]
    processes = [start([*command, f"exp_name={name}", f"loss.beta=0.{name[1:]}1"], tmp_path) for name in trials]
    results = [process.communicate(timeout=900) for process in processes]
    assert [process.returncode for process in processes] == [0] * 16, results
    assert len(entries(tmp_path / ".cache" / "tokens")) == 1
    assert len(entries(tmp_path / ".cache" / "reference")) == 2  # training rows, evaluation rows
    assert not [text for _, text in results if "rebuilding it" in text]
    assert {path.name for path in (tmp_path / "runs").iterdir()} == set(trials)
    assert all((tmp_path / "runs" / name / "LATEST").exists() for name in trials)


def test_a_row_longer_than_the_models_context_is_refused(base, pairs, tmp_path, here, capsys):
    row = {"instruction": "List fruits.", "chosen": "xq zv " * 600, "rejected": "no"}
    pairs.write_text(pairs.read_text() + json.dumps(row) + "\n")
    with pytest.raises(SystemExit) as stopped:
        here("loss=sft", f"datasets.si.path={pairs}", "exp_name=long", *base, "datasets.si.eval_fraction=0",
             "max_length=4096", "model.fsdp_policy_mp=bfloat16")  # fmt: skip
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert "the context of" in printed
    assert "is 512; write max_length=512" in printed
    assert "note: model.fsdp_policy_mp" in printed
    assert "xq zv" not in printed
    assert not list((tmp_path / "runs" / "long").glob("checkpoints/*"))


def test_a_slow_gpu_run_is_told_which_keys_to_change():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    default = compose_config("config", ["loss=dpo", "model=tiny", "datasets.si.path=FILE", "exp_name=x"])
    said = " ".join(speed_notes(default, gpu))
    for key in ("model.autocast=bfloat16", "tf32=true", "batch_size=4", "experiment=[si_dpo,one_gpu]"):
        assert key in said
    assert speed_notes(default, cpu) == []
    assert "tf32" not in " ".join(speed_notes(replace(default, tf32=True), gpu))
    for name in ("si_sft", "si_dpo"):
        preset = compose_config("config", [f"experiment=[{name},one_gpu]", "model=tiny", "datasets.si.path=FILE"])
        assert (preset.model.autocast, preset.trainer.compile) == ("bfloat16", True)
        assert speed_notes(preset, gpu) == []


def test_weights_too_large_for_a_step_in_sixteen_bits_are_said():
    """Against the arithmetic itself: what the note calls too large does not move, an eighth of that does."""
    config = TrainConfig(exp_name="x", lr=5e-7)
    config.model.policy_dtype = "bfloat16"
    (note,) = speed_notes(config, torch.device("cpu"))
    largest = 2 * config.lr / torch.finfo(torch.bfloat16).eps
    assert f"about {largest:.1g}" in note
    for weight, moves in ((8 * largest, False), (largest / 8, True)):
        value = torch.tensor(weight, dtype=torch.bfloat16)
        assert (value + config.lr != value) == moves
    assert speed_notes(replace(config, lr=1e-2), torch.device("cpu")) == []


def test_printed_commands_survive_the_shell_and_hydra():
    import shlex

    from hydra.core.override_parser.overrides_parser import OverridesParser

    for path in ("runs/beta/loss.beta=0.1,seed=1", "runs/plain", "a folder/x [1]"):
        (word,) = shlex.split(typed("model.archive", path))
        assert OverridesParser.create().parse_override(word).value() == path
