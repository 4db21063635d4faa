"""The batch scripts on a real Slurm of one node: what was stopped is requeued, and ends as if nothing had happened.

`benchmarks/slurm_stops.py` does it at random moments, and often.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests import warm
from tests.commands import metrics, without_times, write_pairs
from tests.conftest import tiny_llama
from tests.loopback_server import loopback
from tests.slurm_cluster import ENDED, PATIENCE_SECONDS, Cluster, lacking, slurm, wait_until
from tests.warm import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(lacking() is not None, reason=f"no Slurm: {lacking()}"),
    pytest.mark.timeout(3600),
]
NO_GPUS = ["--cpus-per-task=1"]  # beside the options of docs/clusters.md for a node without GPUs
TRAIN = [
    "loss=dpo", "model=blank_model", "datasets.si.path=pairs.jsonl", "datasets.si.eval_fraction=0.2", "batch_size=8",
    "eval_batch_size=8", "eval_every=16", "lr=1e-3", "optimizer=AdamW", "checkpoint.every_examples=1000",
    "minimum_log_interval_secs=0", "device=cpu",
]  # fmt: skip
HELD_STEP = 3


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm(tmp_path_factory.mktemp("slurm"), cpus=16) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_folder) -> Path:
    """Where the commands are typed: the programs, the scripts and the data, as in a checkout."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("train.py", "induce.py", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    write_pairs(folder / "pairs.jsonl", 50)
    held = folder / "held-python"
    held.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} {ROOT}/tests/held_run.py "$@"\n')
    held.chmod(0o755)
    return folder


def variables(hold_at: str = "0:none") -> dict[str, str]:
    """A default run's environment: wandb is there, offline."""
    environment = {"HOLD_AT": hold_at, "PYTHON": "./held-python", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    return {**environment, "OMP_NUM_THREADS": "1"}


def final(run: Path) -> tuple[bytes, list[dict]]:
    return (run / "LATEST" / "model" / "model.safetensors").read_bytes(), without_times(metrics(run))


def undisturbed(folder: Path, name: str, *arguments: str) -> tuple[bytes, list[dict]]:
    """What the command leaves without Slurm, and without a stop."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    command = [sys.executable, str(ROOT / "train.py"), *arguments, f"exp_name={name}"]
    warm.run(command, cwd=folder, env=environment, check=True, timeout=PATIENCE_SECONDS)
    return final(folder / "runs" / name)


def job_log(folder: Path, job: str) -> str:
    return "".join(path.read_text() for path in folder.glob(f"slurm-*-{job}.out"))


def test_stops_of_a_run_of_two_tasks(cluster: Cluster, folder, tiny_model_folder):
    """Each kind of stop: a checkpoint of the step under way, another start by itself, and the same bytes at the end."""
    train = [*TRAIN, f"model.name_or_path={tiny_model_folder}"]
    kinds = ["requeue", "limit", "scancel"]

    def submit(kind: str) -> str:
        options = ["--gpus-per-node=0", "--ntasks-per-node=2", *NO_GPUS]
        words = [*options, "scripts/slurm/train.sbatch", *train, f"exp_name={kind}"]
        return cluster.sbatch(*words, cwd=folder, **variables(f"{HELD_STEP}:{kind}"))

    jobs = {kind: submit(kind) for kind in kinds}
    for kind, job in jobs.items():
        wait_until((folder / f"held-{kind}").exists, f"{kind} to be held: {job_log(folder, job)}")
        if kind == "limit":  # two to three minutes from now; SIGUSR1, two minutes before that, may be a minute early
            hours, minutes, _ = map(int, cluster.job(job)["RunTime"].split(":"))
            cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 3}")
        else:
            cluster.run(*(["scancel"] if kind == "scancel" else ["scontrol", "requeue"]), job)
    stopped = f"stopped as asked after {HELD_STEP * 8} examples"
    for kind, job in jobs.items():
        wait_until(lambda job=job: stopped in job_log(folder, job), f"{kind} to stop: {job_log(folder, job)}")
        if kind == "scancel":  # nobody asked for another start
            wait_until(lambda job=job: cluster.state(job) in ENDED, "the cancelled job's end")
            assert os.readlink(folder / "runs" / kind / "LATEST").endswith(f"step-{HELD_STEP * 8}")
            assert cluster.state(job) == "CANCELLED"
            jobs[kind] = submit(kind)
    straight = undisturbed(folder, "straight", *train, "trainer=FSDPTrainer", "trainer.num_processes=2")
    assert len(straight[1]) > 2 * HELD_STEP
    assert cluster.wait_for_end(*jobs.values()) == ["COMPLETED"] * len(kinds), [
        job_log(folder, job)[-2000:] for job in jobs.values()
    ]
    for kind, job in jobs.items():
        assert final(folder / "runs" / kind) == straight, kind
        # wandb's own hook at the interpreter's end may complain of its process, which Slurm signalled, too.
        complaint = "Exception ignored in atexit callback"
        assert job_log(folder, job).count("Traceback") == job_log(folder, job).count(complaint)
        restarts = int(cluster.job(job)["Restarts"])
        # A limit of minutes stops the second start, too, where the machine is so busy that it needs them.
        assert restarts >= 1 if kind == "limit" else restarts == (0 if kind == "scancel" else 1), kind


def test_an_array_of_four_trials_of_which_one_is_requeued(cluster: Cluster, folder, tiny_model_folder):
    script = (folder / "scripts/slurm/train_array.sbatch").read_text()
    last = '  "exp_name=si_dpo_beta_0.5 loss.beta=0.5"\n'
    (folder / "four.sbatch").write_text(script.replace(last, f'{last}  "exp_name=fourth loss.beta=1.0"\n'))
    common = ["batch_size=8", "eval_batch_size=8", "eval_every=16", "lr=1e-3", "optimizer=AdamW", "device=cpu"]
    common += ["gradient_accumulation_steps=1", "minimum_log_interval_secs=0", "datasets.si.eval_fraction=0.2"]
    held = "si_dpo_beta_0.1"
    paths = {"MODEL": tiny_model_folder, "SFT_RUN": tiny_model_folder, "SI_DATA": "pairs.jsonl"}
    array = cluster.sbatch(
        "--array=0-3", "--gpus-per-task=0", *NO_GPUS, "four.sbatch", cwd=folder, EXTRA=" ".join(common), **paths,
        **variables(f"{HELD_STEP}:{held}"),
    )  # fmt: skip
    wait_until((folder / f"held-{held}").exists, f"{held} to be held: {job_log(folder, f'{array}_1')}")
    cluster.run("scancel", "--signal=USR1", f"{array}_1")
    states = cluster.wait_for_end(*(f"{array}_{task}" for task in range(4)))
    assert states == ["COMPLETED"] * 4, job_log(folder, f"{array}_*")
    assert [cluster.job(f"{array}_{task}")["Restarts"] for task in range(4)] == ["0", "1", "0", "0"]
    weights = {final(folder / "runs" / name)[0] for name in ("si_dpo_beta_0.05", held, "si_dpo_beta_0.5", "fourth")}
    assert len(weights) == 4
    recipe = ["experiment=si_dpo", "model=alpaca7b", f"model.name_or_path={tiny_model_folder}", "loss.beta=0.1"]
    recipe += [f"model.archive={tiny_model_folder}", "datasets.si.path=pairs.jsonl"]
    assert final(folder / "runs" / held) == undisturbed(folder, "trial", *recipe, *common)


@pytest.fixture
def ending_model(folder, tokenizer) -> str:
    """A model with a growing wish to end."""
    model = tiny_llama(len(tokenizer))
    model.generation_config.exponential_decay_length_penalty = (8, 3.0)
    model.save_pretrained(folder / "ending")
    tokenizer.save_pretrained(folder / "ending")
    return "ending"


def test_an_array_of_four_shards_and_the_merge_behind_it(cluster: Cluster, folder, ending_model, tmp_path):
    keep = json.dumps({"well_formed": True, "unsafe": True, "response_fits": True, "category": "theft"})
    rows = [{"response": f"zebra number {i} " + "and more " * (i % 7)} for i in range(24)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = "generation.max_new_tokens=40 generation.temperature=1.0 device=cpu"
    with loopback(lambda prompt, _: "I will not." if "The reply:" in prompt else keep) as server:
        expert = f"expert=openai expert.model=m expert.base_url={server.url} expert.api_key_env=TEST_KEY"
        environment = {**variables(), "TEST_KEY": "sk-nothing", "NO_PROXY": "127.0.0.1", "PYTHON": sys.executable}
        array = cluster.sbatch(
            "--array=0-3", "--gpus-per-task=0", *NO_GPUS, "scripts/slurm/induce_array.sbatch", cwd=folder,
            MODEL=ending_model, CORPUS="corpus.jsonl", OUTPUT="si", EXPERT=expert, MORE=more, **environment,
        )  # fmt: skip
        merge = cluster.sbatch(
            f"--dependency=afterok:{array}", f"--wrap={sys.executable} induce.py stage=merge output=si "
            "corpus.path=corpus.jsonl", cwd=folder, **environment,
        )  # fmt: skip
        alone = [sys.executable, str(ROOT / "induce.py"), "model=blank_model", f"model.name_or_path={ending_model}"]
        alone += ["corpus.path=corpus.jsonl", "output=alone", *expert.split(), *more.split()]
        warm.run(alone, cwd=folder, env={**os.environ, **environment}, check=True, timeout=PATIENCE_SECONDS)
        assert cluster.wait_for_end(merge) == ["COMPLETED"], job_log(folder, f"{array}_*") + job_log(folder, merge)
    assert (folder / "si/si.jsonl").read_text() == (folder / "alone/si.jsonl").read_text()
    assert len((folder / "si/si.jsonl").read_text().splitlines()) > 15
