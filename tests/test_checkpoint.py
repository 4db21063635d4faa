"""What a checkpoint holds, who can read it, and what is left when writing one fails."""

import errno
import io
import json
import math
import os
import pickle
import shutil
import subprocess
from contextlib import suppress
from dataclasses import asdict, replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint import staging
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from transformers import AutoModelForCausalLM

from config import checksums
from config.checksums import CHECKSUMS, write_checksums
from config.errors import UserError
from config.paths import saved_checkpoints
from config.run_keys import differing_keys
from config.settings import CheckpointSettings
from safer_instruct.generation.models import resolve_archive
from scripts.runs import read_status
from tests.tiny_models import PACKABLE, SUPPORTED, VOCABULARY, tiny_model
from tests.tiny_runs import tiny_settings, tiny_trainer
from trainers.distributed import launch as parallel
from trainers.distributed.layout import Layout
from trainers.kernels.shortcuts import use_fast_norms
from trainers.optimizers import build_optimizer
from trainers.run import checkpoint
from trainers.run.checkpoint import CheckpointWriter
from trainers.run.resume import load_checkpoint, load_weights
from trainers.run.run_dir import RunDir
from trainers.run.saved import RunProgress, best_checkpoint, discard, repair_links

IDS = torch.arange(3, 15)[None]


def train(folder, settings, *, run_path=None, **arguments):
    kept = {}

    def worker(layout):
        with RunDir.open(run_path or folder / "run", config=asdict(settings), manifest={}) as run:
            kept["trainer"] = tiny_trainer(folder, layout, run, settings, **arguments)
            kept["trainer"].train()

    parallel.launch(worker, settings)
    return kept["trainer"]


@pytest.mark.parametrize("name", PACKABLE)
def test_from_pretrained_reads_what_was_trained(tmp_path, name):
    trainer = train(tmp_path, tiny_settings(eval_every=100), model=tiny_model(name))
    reread = AutoModelForCausalLM.from_pretrained(resolve_archive(str(tmp_path / "run")))
    assert type(reread) is type(trainer.policy)
    use_fast_norms(reread)  # as the trained one has them: to the last bit
    with torch.no_grad():
        expected = trainer.policy.eval()(IDS).logits
        assert torch.equal(reread.eval()(IDS).logits, expected)
    initial = tiny_model(name)
    assert not torch.equal(initial(IDS).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_checkpoint_is_put_back_bit_for_bit(tmp_path, name, dtype):
    settings = tiny_settings(optimizer="AdamW")

    def worker(layout):
        with RunDir.open(tmp_path / "run", config={}, manifest={}) as run:
            writer = CheckpointWriter(run, CheckpointSettings(), layout, None)
            model = tiny_model(name, dtype=dtype)
            optimizer = build_optimizer(model.parameters(), settings)
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            kept = {key: tensor.clone() for key, tensor in model.state_dict().items()}
            kept_state = {
                one: {key: value.clone() for key, value in optimizer.state[one].items()} for one in model.parameters()
            }
            progress = RunProgress(examples=7, updates=1)
            writer.save(policy=model, optimizer=optimizer, progress=progress, unlogged={"loss/train": (0.1, 3.0)})
            optimizer.step()  # while it is written: what is written is what was there before
            writer.wait()

            other = tiny_model(name, dtype=dtype, seed=1)
            other_optimizer = build_optimizer(other.parameters(), settings)
            restored, unlogged = load_checkpoint(run, policy=other, optimizer=other_optimizer, layout=layout)
            assert restored.examples == 7
            assert unlogged["loss/train"] == [0.1, 3.0]
            for key, tensor in kept.items():
                assert torch.equal(tensor, other.state_dict()[key]), key
            for one, two in zip(model.parameters(), other.parameters(), strict=True):
                assert kept_state[one].keys() == other_optimizer.state[two].keys()
                for key, value in kept_state[one].items():
                    assert torch.equal(value, other_optimizer.state[two][key]), key

    parallel.launch(worker, settings)


def test_a_gpus_stager_serves_every_checkpoint(tmp_path, monkeypatch):
    """Its buffers are kept from one checkpoint to the next, and hold what that one saves."""
    make = staging._create_cpu_state_dict
    monkeypatch.setattr(staging, "_create_cpu_state_dict", lambda state, pin_memory=False: make(state))
    settings = tiny_settings(checkpoint=CheckpointSettings(every_examples=8, keep_last=None))
    train(tmp_path, settings, run_path=tmp_path / "plain")
    stager, save = checkpoint.pinned_stager(), dcp.async_save
    monkeypatch.setattr(dcp, "async_save", lambda state, **how: save(state, **{**how, "async_stager": stager}))
    train(tmp_path, settings, run_path=tmp_path / "staged")
    folders = sorted((tmp_path / "plain" / "checkpoints").glob("step-*"))
    assert len(folders) >= 3
    for folder in folders:
        one, other = (
            _optimizer_state(path) for path in (folder, tmp_path / "staged" / "checkpoints" / folder.name)
        )  # fmt: skip
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def _optimizer_state(folder):
    """The tensors of a checkpoint's optimizer, by their names."""
    metadata = dcp.FileSystemReader(folder / "state").read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if hasattr(entry, "size")
    }
    dcp.load(state, checkpoint_id=folder / "state", no_dist=True)
    return state


def test_resolve_takes_a_run_a_checkpoint_and_a_folder(tmp_path):
    settings = tiny_settings()
    train(tmp_path, settings)
    run = tmp_path / "run"
    newest = (run / "checkpoints" / "step-22" / "model").resolve()
    for path in (run, run / "LATEST", run / "checkpoints" / "step-22", newest):
        assert resolve_archive(str(path)).resolve() == newest
    (run / "LATEST").unlink()  # killed between the two renames
    assert resolve_archive(str(run)).resolve() == newest
    with pytest.raises(UserError, match="there is no such file or folder"):
        resolve_archive(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="holds no model"):
        resolve_archive(str(tmp_path))


def test_policy_pt_is_the_dpo_repos(tmp_path):
    trainer = train(tmp_path, tiny_settings(checkpoint=CheckpointSettings(policy_pt=True)))
    archive = torch.load(tmp_path / "run" / "LATEST" / "policy.pt", weights_only=True)
    assert archive["step_idx"] == 22
    for key, tensor in trainer.policy.state_dict().items():
        assert torch.equal(archive["state"][key], tensor)


def test_keep_last(tmp_path):
    train(tmp_path, tiny_settings(checkpoint=CheckpointSettings(keep_last=1)))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-22"]


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path):
    """A learning rate that makes things worse after the first steps: the best is not the last."""
    settings = tiny_settings(
        n_epochs=3, eval_every=8, lr=3e-2, checkpoint=CheckpointSettings(keep_last=1, keep_best="loss/eval")
    )
    train(tmp_path, settings)
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = {row["counters/examples"]: row["loss/eval"] for row in rows if "loss/eval" in row}
    del evaluations[0]  # before the first step there is no checkpoint
    best = min(evaluations, key=lambda examples: (evaluations[examples], -examples))
    assert best != 66
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == sorted([f"step-{best}", "step-66"])
    assert (run / "BEST").resolve().name == f"step-{best}"
    assert (run / "LATEST").resolve().name == "step-66"


def test_accuracies_are_best_when_large(tmp_path):
    for step, accuracy, evaluated_at in ((4, 0.5, 4), (8, 0.75, 8), (12, 0.75, 12), (16, 0.25, 16), (20, 1.0, 16)):
        progress = RunProgress(
            examples=step, evaluated_at=evaluated_at, evaluation={"rewards_eval/accuracies": accuracy}
        )
        state = tmp_path / "checkpoints" / f"step-{step}" / "state"
        state.mkdir(parents=True)
        (state / "progress.json").write_text(json.dumps(asdict(progress)))
    folders = saved_checkpoints(tmp_path)
    # The later of two equals; step-20 carries the figures of another step.
    assert best_checkpoint(folders, "rewards_eval/accuracies").name == "step-12"
    assert best_checkpoint(folders, "loss/eval") is None


@pytest.mark.parametrize("metric", ["loss/eval", "refusals_eval/benign"])
def test_the_best_is_the_smallest_loss_or_over_refusal_and_never_nan(tmp_path, metric):
    for step, value in ((4, math.nan), (8, 0.25), (12, 0.5), (16, math.nan)):
        progress = RunProgress(examples=step, evaluated_at=step, evaluation={metric: value})
        state = tmp_path / "checkpoints" / f"step-{step}" / "state"
        state.mkdir(parents=True)
        (state / "progress.json").write_text(json.dumps(asdict(progress)))
    assert best_checkpoint(saved_checkpoints(tmp_path), metric).name == "step-8"


def test_a_best_that_is_not_measured_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"keep_best=loss/evil: .*choose one of .*loss/eval"):
        train(tmp_path, tiny_settings(checkpoint=CheckpointSettings(keep_best="loss/evil")))


class FullDisk:
    """Lets so many calls of a writer through, then the disk is full."""

    def __init__(self, original, allowed):
        self.original, self.allowed = original, allowed

    def __call__(self, *args, **kwargs):
        self.allowed -= 1
        if self.allowed < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.original(*args, **kwargs)


@pytest.mark.parametrize("writer", ["_save_model", "_save_policy_pt", "fsync_tree", "point"])
def test_a_full_disk_leaves_the_checkpoint_before_it_whole(tmp_path, monkeypatch, writer):
    settings = tiny_settings(checkpoint=CheckpointSettings(policy_pt=True))
    monkeypatch.setattr(checkpoint, writer, FullDisk(vars(checkpoint)[writer], allowed=1))
    with pytest.raises(UserError, match="No space left on device") as caught:
        train(tmp_path, settings)
    assert "step-8 is intact" in str(caught.value)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    assert (tmp_path / "run" / "LATEST").resolve().name == "step-8"
    monkeypatch.undo()
    train(tmp_path, settings)  # the same command, with room
    straight = train(tmp_path, settings, run_path=tmp_path / "straight")
    reread = AutoModelForCausalLM.from_pretrained(resolve_archive(str(tmp_path / "run")))
    for one, two in zip(reread.parameters(), straight.policy.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_is_really_full(tmp_path):
    """1.5 MiB of tmpfs: room for some checkpoints of a model of 0.1 MB with RMSprop's state, and then for none."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this root may not mount")
    try:
        settings = tiny_settings(n_epochs=20)
        with pytest.raises(UserError, match="could not save the checkpoint") as caught:
            train(tmp_path, settings, run_path=small / "run")
        assert "is intact" in str(caught.value)
        assert not list((small / "run" / "checkpoints").glob(".*"))
        AutoModelForCausalLM.from_pretrained(resolve_archive(str(small / "run")))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    settings = tiny_settings()
    train(tmp_path, settings)

    def worker(layout):
        with RunDir.open(tmp_path / "run", config=asdict(settings), manifest={}) as run:
            model = tiny_model("gpt_neox")
            load_checkpoint(run, policy=model, optimizer=build_optimizer(model.parameters(), settings), layout=layout)

    with pytest.raises(UserError, match=r"do not fit the model: .* missing keys"):
        parallel.launch(worker, settings)


DAMAGES = ["model/model.safetensors", "state/progress.json", "state/.metadata", "state/__0_0.distcp"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    settings = tiny_settings()
    train(tmp_path, settings)
    path = tmp_path / "run" / "LATEST" / damage
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"checkpoints/step-22 cannot be used .* delete that folder"):
        train(tmp_path, settings)


def test_a_missing_shard_is_named(tmp_path):
    settings = tiny_settings()
    train(tmp_path, settings)
    (tmp_path / "run" / "LATEST" / "state" / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match=r"step-22 cannot be used \(.*__0_0\.distcp.*\); delete that folder"):
        train(tmp_path, settings)


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


def index_with(payload, state):
    """DCP's index, whose free field holds the payload."""
    metadata = pickle.loads((state / ".metadata").read_bytes())
    metadata.planner_data = payload
    (state / ".metadata").write_bytes(pickle.dumps(metadata))


def value_with(payload, state):
    """A value of the optimizer's (its learning rate) that is the payload, where the index says that it is."""
    metadata = pickle.loads((state / ".metadata").read_bytes())
    index = next(one for one in metadata.storage_data if one.fqn.endswith(".lr"))
    info, buffer = metadata.storage_data[index], io.BytesIO()
    torch.save(payload, buffer)
    shard = state / info.relative_path
    info.offset, info.length = shard.stat().st_size, len(buffer.getvalue())
    shard.write_bytes(shard.read_bytes() + buffer.getvalue())
    (state / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("attack", [index_with, value_with])
def test_a_run_from_elsewhere_runs_no_code(tmp_path, attack):
    """Its checksums are right: whoever made it made these, too."""
    settings = tiny_settings()
    train(tmp_path, settings)
    run = tmp_path / "run"
    step = (run / "LATEST").resolve()
    attack(Payload(tmp_path / "canary"), step / "state")
    owner = json.loads((step / CHECKSUMS).read_text())["owner"]
    write_checksums(step, owner=owner)
    with pytest.raises(UserError, match="step-22 cannot be used"):
        train(tmp_path, settings)
    assert not (tmp_path / "canary").exists()
    with suppress(CheckpointException):
        _load_state_dict_from_keys(checkpoint_id=step / "state")  # the payload works: DCP's own reader runs it
    assert (tmp_path / "canary").exists()


def test_links_are_pointed_anew_on_every_start(tmp_path):
    """As a process leaves them that is killed between a checkpoint and its links."""
    settings = tiny_settings(checkpoint=CheckpointSettings(keep_best="loss/eval", keep_last=None))
    train(tmp_path, settings)
    run = RunDir(tmp_path / "run", None)
    kept = [os.readlink(link) for link in (run.latest, run.best)]
    for stale in ("checkpoints/step-8", "checkpoints/step-4", None):
        for link in (run.latest, run.best):
            link.unlink()
            if stale is not None:
                link.symlink_to(stale)
        repair_links(run, settings.checkpoint)
        assert [os.readlink(link) for link in (run.latest, run.best)] == kept


def test_a_latest_that_is_no_link_is_refused(tmp_path):
    train(tmp_path, tiny_settings())
    copy = shutil.copytree(tmp_path / "run", tmp_path / "copy")  # follows links, as cp -rL does
    with pytest.raises(UserError, match=r"copy/LATEST is not a link: .* Delete it"):
        repair_links(RunDir(copy, None), CheckpointSettings())
    shutil.rmtree(copy / "LATEST")
    repair_links(RunDir(copy, None), CheckpointSettings())
    assert os.readlink(copy / "LATEST") == "checkpoints/step-22"


def test_strange_names_among_the_checkpoints_are_left_alone(tmp_path):
    settings = tiny_settings(checkpoint=CheckpointSettings(every_examples=4, keep_last=1))
    checkpoints = tmp_path / "run" / "checkpoints"
    for name in ("step-old", "step-\u00b2", "step-", "notes"):
        (checkpoints / name).mkdir(parents=True)
    (checkpoints / "step-99").write_text("a file")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "weights").write_text("")
    (checkpoints / ".step-3.discarded.partial").symlink_to(elsewhere)
    train(tmp_path, settings)
    assert saved_checkpoints(tmp_path / "run") == [checkpoints / "step-22"]
    assert resolve_archive(str(tmp_path / "run")).parent.resolve() == (checkpoints / "step-22").resolve()
    assert {"step-old", "step-\u00b2", "step-", "notes", "step-99"} < {path.name for path in checkpoints.iterdir()}
    assert (elsewhere / "weights").exists()  # the link is gone, not what it pointed to


def test_a_checkpoint_that_is_a_link_retires(tmp_path):
    settings = tiny_settings(checkpoint=CheckpointSettings(keep_last=None))
    train(tmp_path, settings)
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-8").rename(tmp_path / "moved")
    (checkpoints / "step-8").symlink_to(tmp_path / "moved")
    train(tmp_path, replace(settings, n_epochs=1, checkpoint=CheckpointSettings(keep_last=1)))
    discard(checkpoints / "step-8")
    assert (tmp_path / "moved" / "model").is_dir()
    assert not (checkpoints / "step-8").exists()


def test_a_link_to_nothing_makes_place_for_a_checkpoint(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-8").symlink_to(tmp_path / "gone")
    train(tmp_path, tiny_settings(checkpoint=CheckpointSettings(keep_last=None)))
    assert (tmp_path / "run" / "checkpoints" / "step-8" / "model" / "model.safetensors").is_file()


def test_an_empty_folder_in_place_of_a_checkpoint_is_named(tmp_path):
    settings = tiny_settings()
    train(tmp_path, settings)
    (tmp_path / "run" / "checkpoints" / "step-40").mkdir()
    with pytest.raises(UserError, match=r"step-40 cannot be used .* delete that folder"):
        train(tmp_path, settings)


def test_shards_are_hashed_while_they_are_written_and_not_read_again(tmp_path, monkeypatch):
    read = []
    original = checksums.hash_prefix
    monkeypatch.setattr(checksums, "hash_prefix", lambda path: read.append(path.name) or original(path))
    monkeypatch.setattr(checksums, "CHUNK_BYTES", 1000)
    train(tmp_path, tiny_settings())
    assert "model.safetensors" in read
    assert not [name for name in read if name.endswith(".distcp")]
    for step in saved_checkpoints(tmp_path / "run"):
        record = json.loads((step / CHECKSUMS).read_text())["files"]
        (shard,) = (step / "state").glob("*.distcp")
        assert record[f"state/{shard.name}"] == [shard.stat().st_size, original(shard)]


def test_files_have_the_permissions_of_all_others(tmp_path):
    train(tmp_path, tiny_settings())
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {oct(path.stat().st_mode) for path in files if path.name != ".lock"} == {
        oct((tmp_path / "run" / "config.yaml").stat().st_mode)
    }


def test_a_second_process_in_the_same_run_dir_is_told_who_has_it(tmp_path):
    first = RunDir.open(tmp_path, config={}, manifest={})
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on .* since"):
        RunDir.open(tmp_path, config={}, manifest={})
    first.close()
    with RunDir.open(tmp_path, config={}, manifest={}):
        pass


def test_a_run_dir_without_results_takes_a_corrected_command(tmp_path):
    with RunDir.open(tmp_path, config={"lr": 1.0}, manifest={}):
        pass
    with RunDir.open(tmp_path, config={"lr": 2.0}, manifest={"command": "python train.py"}) as run:
        run.metrics.write_text('{"counters/examples": 1}\n')
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"command": "python train.py"}
    with pytest.raises(UserError, match=r"lr: 2.0 there, 3.0 now"):
        RunDir.open(tmp_path, config={"lr": 3.0}, manifest={})


def test_every_setting_survives_the_stored_config(tmp_path):
    settings = replace(tiny_settings(), optimizer_args={"betas": [0.9, 0.95], "eps": 1e-8}, lr=5e-7)
    for _ in range(2):
        with RunDir.open(tmp_path, config=asdict(settings), manifest={}) as run:
            run.metrics.write_text("{}\n")
        stored = yaml.safe_load((tmp_path / "config.yaml").read_text())
        assert differing_keys(stored, asdict(settings)) == []


def test_differing_keys_are_the_ones_that_change_the_result():
    there = {"lr": 1.0, "loss": {"beta": 0.1}, "wandb": {"mode": "auto"}, "device": "cpu", "seed": 0}
    now = {"lr": 1.0, "loss": {"beta": 0.5}, "wandb": {"mode": "offline"}, "device": "cuda"}
    assert differing_keys(there, now) == ["loss.beta: 0.1 there, 0.5 now", "seed: 0 there, (absent) now"]


def test_a_run_dir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        RunDir.open(tmp_path / "file" / "run", config={}, manifest={})


def test_weights_of_another_vocabulary_are_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    other = tiny_model()
    other.resize_token_embeddings(VOCABULARY + 1)
    with pytest.raises(UserError, match="do not fit the model"):
        load_weights(other, tmp_path, Layout(0, 1, torch.device("cpu")))


def test_foreign_names_among_checkpoints_and_links_are_left_alone(tmp_path):
    """`step-old`, a superscript digit, a file, a link where a killed process wrote: none of them ends a run."""
    settings = tiny_settings(checkpoint=CheckpointSettings(every_examples=4, keep_last=1))
    train(tmp_path, tiny_settings(checkpoint=CheckpointSettings(every_examples=4, keep_last=1)))
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-old").mkdir()
    (checkpoints / "step-\u00b2").mkdir()
    (checkpoints / "step-99999").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (checkpoints / ".step-26.partial").symlink_to(tmp_path / "elsewhere")
    assert read_status(tmp_path / "run", 0.0).examples == 22
    train(tmp_path, settings)
    assert (tmp_path / "elsewhere" / "kept").exists()
    assert {path.name for path in checkpoints.iterdir()} == {"step-22", "step-old", "step-\u00b2", "step-99999"}


def test_a_checkpoint_that_is_a_link_to_another_disk_is_used_and_retired_without_what_it_points_to(tmp_path):
    settings = tiny_settings(checkpoint=CheckpointSettings(every_examples=4, keep_last=2))
    straight = train(tmp_path, settings, run_path=tmp_path / "straight")
    stopped = shutil.copytree(tmp_path / "straight", tmp_path / "run", symlinks=True)
    shutil.rmtree(stopped / "checkpoints" / "step-22")
    (first,) = saved_checkpoints(stopped)
    first.rename(tmp_path / first.name)
    first.symlink_to(tmp_path / first.name)
    ended = train(tmp_path, tiny_settings(checkpoint=CheckpointSettings(every_examples=4, keep_last=1)))
    for one, two in zip(ended.policy.parameters(), straight.policy.parameters(), strict=True):
        assert torch.equal(one, two)
    assert [path.name for path in saved_checkpoints(stopped)] == ["step-22"]
    assert (tmp_path / first.name / "model").is_dir()
