"""A run that is killed, wherever, and started again by the same command ends bit-equal to one that is not.

The processes come from the fork server of `tests/warm.py`: each start costs milliseconds.
"""

import json
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from config.checksums import CHECKSUMS, write_checksums
from config.errors import UserError
from config.settings import CheckpointSettings, LikelihoodLossSettings
from tests.tiny_models import tiny_model
from tests.tiny_runs import tiny_settings, tiny_trainer
from tests.warm import fork_server
from trainers import trainer
from trainers.distributed import launch as parallel
from trainers.run import checkpoint
from trainers.run.run_dir import RunDir
from trainers.run.state import random_state, set_random_state

TIMINGS = {"examples_per_second", "tokens_per_second", "data_wait_seconds", "memory/peak"}


def settings_of(kind: str):
    """Three epochs of 22 rows in batches of 4, saved every 10 examples."""
    common = {
        "n_epochs": 3, "optimizer": "AdamW", "lr_scheduler": "cosine", "eval_every": 16,
        "checkpoint": CheckpointSettings(every_examples=10, keep_last=2), "gradient_accumulation_steps": 2,
    }  # fmt: skip
    if kind == "dpo":
        return tiny_settings(**common)
    # Dropout, which packed attention has not, draws random numbers; all metrics wait for one row at the end.
    loss = LikelihoodLossSettings(name="sft")
    return tiny_settings(**common, loss=loss, minimum_log_interval_secs=1e9, packing=False)


def model_of(kind: str):
    model = tiny_model()
    if kind != "dpo":
        model.config.attention_dropout = 0.1
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
    return model


def run(folder: Path, kind: str, run_name: str, kill: tuple[str, int] | None) -> None:
    """One command. `kill` = (function, n): SIGKILL on entering its n-th call."""
    torch.set_num_threads(1)
    if kill is not None:
        arm(*kill)
    settings = settings_of(kind)

    def worker(layout):
        torch.manual_seed(settings.seed)
        with RunDir.open(folder / run_name, config=asdict(settings), manifest={}) as run_dir:
            tiny_trainer(folder, layout, run_dir, settings, model=model_of(kind)).train()

    parallel.launch(worker, settings)


def arm(function: str, calls: int) -> None:
    owner, name = {
        "step": (torch.optim.AdamW, "step"),
        "clip": (trainer, "clip_grad_norm"),
        "evaluate": (trainer.Trainer, "_evaluation_means"),
        "write model": (checkpoint, "_save_model"),
        "fsync": (checkpoint, "fsync_tree"),
        "point": (checkpoint, "point"),
        "discard": (checkpoint, "discard"),
        "rmtree": (checkpoint.shutil, "rmtree"),
        "resume": (trainer, "load_checkpoint"),
    }[function]
    original, count = getattr(owner, name), [0]

    def killing(*args, **kwargs):
        count[0] += 1
        if count[0] == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, killing)


@pytest.fixture(scope="module")
def start():
    def start_and_wait(*arguments):
        process = fork_server().Process(target=run, args=arguments)
        process.start()
        process.join(240)
        return process.exitcode

    return start_and_wait


def final_weights(run_path: Path) -> bytes:
    return (run_path / "LATEST" / "model" / "model.safetensors").read_bytes()


def rows_of(run_path: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run_path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


KILLS = [
    ("clip", 2), ("step", 5), ("fsync", 1), ("point", 1), ("evaluate", 1), ("resume", 1), ("discard", 1),
    ("rmtree", 3), ("write model", 2), ("step", 7),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_killed_anywhere_and_started_again(tmp_path, start, kind):
    assert start(tmp_path, kind, "straight", None) == 0
    statuses = [start(tmp_path, kind, "killed", kill) for kill in KILLS]
    assert set(statuses) <= {0, -signal.SIGKILL}, statuses  # a kill that does not find its function is none
    assert statuses.count(-signal.SIGKILL) >= 8, statuses
    assert start(tmp_path, kind, "killed", None) == 0
    assert final_weights(tmp_path / "killed") == final_weights(tmp_path / "straight")
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "straight")
    assert len(list((tmp_path / "killed" / "checkpoints").iterdir())) == 2  # nothing half-written stays
    # Once more, at the end: nothing to do, nothing changes.
    assert start(tmp_path, kind, "killed", None) == 0
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "straight")
    assert final_weights(tmp_path / "killed") == final_weights(tmp_path / "straight")


@pytest.mark.parametrize("lost", ["optimizer", "rng", "position"])
def test_what_the_state_is_for(tmp_path, start, lost):
    """Negative controls: without one part of it the resumed run ends elsewhere."""
    assert start(tmp_path, "sft", "straight", None) == 0
    assert start(tmp_path, "sft", "killed", ("step", 8)) == -signal.SIGKILL
    state = (tmp_path / "killed" / "LATEST" / "state").resolve()
    if lost == "rng":
        other = json.loads((state / "rank0.json").read_text())
        other["random"]["torch"] = torch.Generator().manual_seed(99).get_state().numpy().tobytes().hex()
        (state / "rank0.json").write_text(json.dumps(other))
    elif lost == "position":
        progress = json.loads((state / "progress.json").read_text())
        (state / "progress.json").write_text(json.dumps({**progress, "examples": progress["examples"] - 4}))
    else:
        settings = settings_of("sft")
        model = model_of("sft")
        optimizer = trainer.build_optimizer(model.parameters(), settings)
        checkpoint.dcp.save(
            {"optimizer": checkpoint.get_optimizer_state_dict(model, optimizer)}, checkpoint_id=state, no_dist=True
        )
    write_checksums(state.parent, owner=json.loads((state.parent / CHECKSUMS).read_text())["owner"])
    assert start(tmp_path, "sft", "killed", None) == 0
    assert final_weights(tmp_path / "killed") != final_weights(tmp_path / "straight")


def in_run(folder, settings, *, model=None, identity=None, train=True):
    def worker(layout):
        with RunDir.open(folder / "run", config=asdict(settings), manifest={}) as run_dir:
            made = tiny_trainer(folder, layout, run_dir, settings, model=model, identity=identity)
            if train:
                made.train()

    parallel.launch(worker, settings)


def test_a_resumed_run_stands_on_the_same_data_and_initial_weights(tmp_path):
    settings = tiny_settings()
    in_run(tmp_path, settings, identity={"train data": "aa"})
    with pytest.raises(UserError, match="train data: aa at its start, bb now"):
        in_run(tmp_path, settings, identity={"train data": "bb"})
    # An archive that has moved on meanwhile: its reference would be another one.
    with pytest.raises(UserError, match="initial weights: "):
        in_run(tmp_path, settings, model=tiny_model(seed=1), identity={"train data": "aa"})


def test_the_reference_of_a_resumed_run_is_never_of_trained_weights(tmp_path, start):
    """The cache is deleted between the two starts; it is computed again, from the initial weights."""
    assert start(tmp_path, "dpo", "straight", None) == 0
    assert start(tmp_path, "dpo", "killed", ("step", 9)) == -signal.SIGKILL
    for path in sorted((tmp_path / "cache").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert start(tmp_path, "dpo", "killed", None) == 0
    assert final_weights(tmp_path / "killed") == final_weights(tmp_path / "straight")


def test_another_config_is_refused_and_free_keys_are_not(tmp_path):
    settings = tiny_settings()
    in_run(tmp_path, settings)
    with pytest.raises(UserError) as caught:
        in_run(tmp_path, replace(settings, n_epochs=2, lr=0.5), train=False)
    assert "lr: 0.001 there, 0.5 now" in str(caught.value)
    assert "n_epochs: 1 there, 2 now" in str(caught.value)
    assert "exp_name" in str(caught.value)
    in_run(tmp_path, replace(settings, minimum_log_interval_secs=3.0, on_non_finite="skip"), train=False)


def test_random_state_round_trip():
    import random

    state = json.loads(json.dumps(random_state()))
    drawn = (random.random(), np.random.rand(), torch.rand(1).item())
    set_random_state(state)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == drawn
