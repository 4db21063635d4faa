"""Bad input to `train.py`: exit status 2, one message that lists everything, and nothing started or lost."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import train
from config.checks_train import check_train
from config.errors import UserError
from config.help import KEYS, short_help
from config.names import WITHOUT_SHARDS
from config.overrides import PROGRAMS
from config.schema import CONFIGS, compose_config
from config.settings import DatasetSettings, DPOSettings, ModelSettings, TrainConfig
from tests.commands import ROOT, errors_of, run_entrypoint, write_pairs


@pytest.fixture
def command(tmp_path, tiny_model_folder, monkeypatch):
    """A command without mistakes, typed in an empty directory; what is added to it is the mistake."""
    monkeypatch.chdir(tmp_path)
    pairs = write_pairs(tmp_path / "pairs.jsonl", 12)
    return [
        "model=blank_model", f"model.name_or_path={tiny_model_folder}", f"datasets.si.path={pairs}", "exp_name=a",
        "wandb.enabled=false", "loss=dpo",
    ]  # fmt: skip


@pytest.fixture
def mistakes(command, monkeypatch, capsys):
    """The lines about the mistakes of `command` + these arguments."""

    def lines(*arguments: str) -> list[str]:
        first, *rest = errors_of([*command, *arguments], monkeypatch, capsys)
        assert first.startswith("train.py: ")
        count = "one error" if len(rest) == 1 else f"{len(rest)} errors"
        assert first == f"train.py: {count} in this command, nothing was started:"
        return [line.removeprefix("  - ") for line in rest]

    return lines


# Found while the command line is read: (argument, part of the message)
OVERRIDES = [
    ("lrr=1", "lrr=1: there is no key lrr; did you mean lr?"),
    ("learning_rate=1", "learning_rate=1: there is no key learning_rate; did you mean lr?"),
    ("model.archve=x", "did you mean model.archive?"),
    ("datasets.si.pth=x", "did you mean datasets.si.path? Keys of datasets.si: path, schema"),
    ("datasets.hh.path=x", "datasets hh is not selected: write datasets=[...,hh]"),
    ("datasets.sii.path=x", "did you mean datasets.si.path?"),
    ("+new_key=1", "there is no key new_key"),
    ("~lr", "lr cannot be removed"),
    ("hydra.swep.dir=x", "there is no key hydra.swep.dir"),
    ("loss.bta=1", "there is no key loss.bta; did you mean loss.beta? Keys of loss: name, beta"),
    ("loss=srf", "loss=srf: loss has no choice 'srf'; did you mean sft? Choices: alphapo, aot, apo_down, apo_zero"),
    ("model=tinny", "did you mean tiny?"),
    ("trainer=TensorParallelTrainer", "Choices: BasicTrainer, FSDPTrainer"),
    ("datasets=[si,alpca]", "datasets=[si,alpca]: datasets has no choice 'alpca'; did you mean alpaca?"),
    ("experiment=si_dpoo", "did you mean si_dpo?"),
    ("lr=abc", "lr=abc: must be a number"),
    ("batch_size=1.5", "batch_size=1.5: must be a whole number"),
    ("debug=maybe", "debug=maybe: must be true or false"),
    ("seed=null", "seed=null: must be a whole number"),
    ("wandb=off", "is a group of keys; set one of them: wandb.enabled, wandb.mode"),
    ("wandb.tags=x", "wandb.tags=x: must be a list: wandb.tags=[...]"),
    ("local_dirs=x", "must be a list: local_dirs=[...]"),
    ("--lr=1", "--lr=1: unknown flag; overrides have no dashes: lr=1"),
    ("lr 1", "lr 1: not a valid override: write key=value"),
    ("lr=[1", "not a valid override"),
    ("lr=1,2", "lr=1,2: several values need -m (one run each); a list is written lr=[1,2]"),
]  # fmt: skip

# Found by config/checks.py: (key, value, part of the message)
VALUES = [
    ("batch_size", -3, "batch_size=-3: must be 1 or more"),
    ("eval_batch_size", 0, "eval_batch_size=0: must be 1 or more"),
    ("max_prompt_length", 512, "max_prompt_length=512: must be smaller than max_length=512"),
    ("gradient_accumulation_steps", 5, "gradient_accumulation_steps=5: each micro-batch needs a row"),
    ("lr", -1.0, "lr=-1.0: must be above 0"),
    ("lr", float("inf"), "lr=inf: must be above 0, and finite"),
    ("lr", float("nan"), "lr=nan: must be above 0, and finite"),
    ("optimizer", "Adamm", "optimizer=Adamm: no such choice; did you mean Adam?"),
    ("optimizer", "adamw", "optimizer=adamw: no such choice; did you mean AdamW?"),
    ("optimizer", "LBFGS", "optimizer=LBFGS: no such choice."),  # evaluates the loss by itself
    ("optimizer", "SparseAdam", "optimizer=SparseAdam: no such choice"),
    ("optimizer_args", {"beta": 1}, "do not fit optimizer=RMSprop"),
    ("optimizer", "Muon", "optimizer=Muon steps matrices alone"),
    ("fallback_optimizer", "AdamW", "fallback_optimizer=AdamW: optimizer=RMSprop steps all parameters"),
    ("fallback_args", {"eps": 1e-6}, "there is no fallback_optimizer that takes them"),
    ("weight_decay_on", "matrix", "weight_decay_on=matrix: no such choice; did you mean matrices?"),
    ("decay_ratio", 0.0, "decay_ratio=0.0: must lie in (0, 1]"),
    ("decay_ratio", 0.2, "decay_ratio=0.2: lr_scheduler=constant does not read it"),
    ("lr_scheduler", "cosin", "lr_scheduler=cosin: no such choice; did you mean cosine? Choices: constant"),
    ("warmup_ratio", 1.5, "warmup_ratio=1.5: must lie in [0, 1)"),
    ("max_grad_norm", 0.0, "max_grad_norm=0.0: must be above 0"),
    ("loss.beta", 0.0, "loss.beta=0.0: must be above 0"),
    ("loss.label_smoothing", 0.5, "loss.label_smoothing=0.5: must lie in [0, 0.5)"),
    ("model.policy_dtype", "fp16", "model.policy_dtype=fp16: no such choice; did you mean float16?"),
    ("model.archive", "nowhere", "model.archive=nowhere: there is no such file or folder"),
    ("n_epochs", None, "n_epochs=null and n_examples=null: training would never end"),
    ("n_examples", 0, "n_examples=0: must be 1 or more"),
    ("device", "gpu", "device=gpu: must be auto, cpu or cuda"),
    ("device", "mps", "(Apple's mps lacks float64)"),
    ("exp_name", "a/b", "exp_name='a/b': it names a folder"),
    ("exp_name", ".", "exp_name='.': it names a folder"),
    ("exp_name", "..", "exp_name='..': it names a folder"),
    ("datasets.si.path", "pears.jsonl", "did you mean pairs.jsonl?"),
    ("datasets.si.split", "train", "it is for datasets of the hub, and"),
    ("datasets.si.revision", "v1", "pairs.jsonl is a file of this machine; leave it out"),
    ("datasets.si.streaming", True, "datasets.si.streaming=true: it is for datasets of the hub"),
    ("datasets.si.eval_fraction", 1.0, "datasets.si.eval_fraction=1.0: must lie in [0, 1)"),
    ("datasets.si.template", "alpacca", "did you mean alpaca?"),
    ("wandb.mode", "of", "wandb.mode=of: no such choice"),
    ("checkpoint.keep_last", 0, "checkpoint.keep_last=0: must be 1 or more"),
    ("on_non_finite", "sotp", "did you mean stop?"),
]  # fmt: skip


@pytest.mark.parametrize(("argument", "message"), OVERRIDES, ids=[argument for argument, _ in OVERRIDES])
def test_one_bad_override_is_one_line(argument, message):
    with pytest.raises(UserError) as refused:
        compose_config("config", ["loss=dpo", "model=blank_model", argument])
    (line,) = str(refused.value).splitlines()
    assert message in line


@pytest.mark.parametrize(("key", "value", "message"), VALUES, ids=[f"{key}={value}" for key, value, _ in VALUES])
def test_one_bad_value_is_one_line(key, value, message, tmp_path, tiny_model_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(
        exp_name="a",
        model=ModelSettings(name_or_path=tiny_model_folder),
        loss=DPOSettings(),
        datasets={"si": DatasetSettings(path=str(write_pairs(tmp_path / "pairs.jsonl", 4)), schema="si")},
    )
    assert check_train(config) == []
    *parents, leaf = key.split(".")
    owner: Any = config
    for name in parents:
        owner = owner[name] if isinstance(owner, dict) else vars(owner)[name]
    setattr(owner, leaf, value)
    (fault,) = check_train(config)
    assert message in fault.message
    assert key in (fault.key, *fault.others)


@pytest.mark.parametrize(
    "words",
    [
        "optimizer=AdamW optimizer_args.betas=[0.9]",
        "optimizer=AdamW optimizer_args.betas=[0.9,0.98,0.99]",
        "optimizer=AdamW optimizer_args.fused=true optimizer_args.foreach=true",
        "optimizer=AdamW optimizer_args.differentiable=true",
        "optimizer=Muon fallback_optimizer=AdamW fallback_args.betas=[0.9,0.98,0.99]",
        "optimizer=Muon fallback_optimizer=AdamW optimizer_args.ns_steps=1000",
        "optimizer=RMSprop optimizer_args.alpha=2",
    ],
)
def test_arguments_that_a_step_would_stumble_over(mistakes, words):
    (line,) = mistakes(*words.split())
    assert "}: these do not fit " in line


@pytest.mark.parametrize("name", WITHOUT_SHARDS)
def test_optimizers_that_step_no_shards(mistakes, name):
    (line,) = mistakes(f"optimizer={name}", "trainer=FSDPTrainer")
    assert line.startswith(f"optimizer={name}: torch cannot take its step on sharded weights; write trainer=Basic")


@pytest.mark.parametrize(
    "roles", ["optimizer=SGD optimizer_args", "optimizer=Muon fallback_optimizer=SGD fallback_args"]
)
def test_a_fused_step_of_sgd_takes_no_shards(mistakes, roles):
    (line,) = mistakes(*f"{roles}.fused=true".split(), "trainer=FSDPTrainer")
    assert "args.fused=true: torch cannot take this step of SGD on sharded weights" in line


def test_an_interpolation_of_nothing(mistakes):
    (line,) = mistakes("wandb.group=${loss.betta}")
    assert "loss.betta" in line
    assert not Path("runs").exists()


def test_all_mistakes_of_a_command_are_listed(mistakes):
    lines = mistakes(
        "lr=abc", "los.beta=1", "batch_size=-3", "--seed=3", "datasets=[si,alpca]", "max_prompt_length=900"
    )
    expected = [
        "--seed=3:",
        "datasets=[si,alpca]:",
        "lr=abc:",
        "los.beta=1:",
        "batch_size=-3:",
        "max_prompt_length=900:",
    ]
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected


def test_a_key_of_another_loss_is_an_error(mistakes):
    (line,) = mistakes("loss=sft", "loss.beta=0.1")
    assert line.startswith("loss.beta=0.1: loss=sft has no key loss.beta; it belongs to loss=alphapo, loss=aot, ")


def test_a_key_that_a_loss_does_not_read_is_an_error(mistakes):
    (line,) = mistakes("loss=ipo", "loss.label_smoothing=0.3")
    owners = ", ".join(f"loss={name}" for name in ("aot", "cdpo", "dpo", "exo_pair", "robust", "rpo"))
    assert line == f"loss.label_smoothing=0.3: loss=ipo has no key loss.label_smoothing; it belongs to {owners}"


OF_DPO = "defaults: [/schema/loss/dpo@_here_, _self_]\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{OF_DPO}name: sftt\n", "loss.name=sftt: there is no such loss; did you mean sft?"),
        (f"{OF_DPO}name: ipo\n", "loss.name=ipo: the other keys are another loss's; write loss=ipo"),
        ("name: dpo\nbeta: 0.1\n", "its YAML file names no settings"),
    ],
)  # fmt: skip
def test_a_loss_file_whose_name_is_no_loss(mistakes, tmp_path, content, message):
    (tmp_path / "mine" / "loss").mkdir(parents=True)
    (tmp_path / "mine" / "loss" / "new.yaml").write_text(content)
    (line,) = mistakes("--config-dir", str(tmp_path / "mine"), "loss=new")
    assert message in line


def test_a_dataset_file_without_its_name(mistakes, tmp_path):
    (tmp_path / "mine" / "datasets").mkdir(parents=True)
    (tmp_path / "mine" / "datasets" / "mine.yaml").write_text("path: x\nschema: si\n")
    (line,) = mistakes("--config-dir", str(tmp_path / "mine"), "datasets=[mine]")
    assert line.startswith("datasets=[mine]: ")
    assert "holds its own name, and below it the settings" in line


@pytest.mark.parametrize(
    "content",
    [
        b"mine:\n  path: [", b"mine:\n  path: \xff", b"mine:\n  max_rows: " + b"9" * 5000, b"mine: 2001-99-99",
        b"mine: " + b"[" * 400, b"mine: !!bool maybe", b"- mine", b"mine: &a [*a]", b"mine: {path: \0}",
    ],
    ids=range(9),
)  # fmt: skip
def test_a_dataset_file_that_is_no_yaml(mistakes, tmp_path, content):
    (tmp_path / "mine" / "datasets").mkdir(parents=True)
    (tmp_path / "mine" / "datasets" / "mine.yaml").write_bytes(content)
    (line,) = mistakes("--config-dir", str(tmp_path / "mine"), "datasets=[mine]")
    assert line.startswith("datasets=[mine]: ")


def test_one_mistake_is_one_error(mistakes):
    """What a wrong word leaves behind, a default, is not complained of."""
    for arguments, start in (
        (["datasets=[alpca]", "datasets.alpca.path=x"], "datasets=[alpca]: "),
        (["max_length=abc", "max_prompt_length=600"], "max_length=abc: must be a whole number"),
        (["model=/a/folder"], "model=/a/folder: model has no choice '/a/folder'; a folder is written model=blank_model "
         "model.name_or_path=/a/folder."),
        (["wandb={mod:online}"], "wandb={mod:online}: there is no key wandb.mod; did you mean wandb.mode?"),
        (["lr.x=1"], "lr.x=1: there is no key lr.x"),
        (["exp_name=???", "exp_nam=b"], "exp_nam=b: there is no key exp_nam; did you mean exp_name?"),
    ):  # fmt: skip
        (line,) = mistakes(*arguments)
        assert line.startswith(start)


def test_a_wrong_name_beside_cfg_is_no_traceback(mistakes):
    (line,) = mistakes("datasets=[sj]", "--cfg", "job")
    assert line.startswith("datasets=[sj]: datasets has no choice 'sj'; did you mean si?")


def test_missing_values_are_listed_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, *lines = errors_of(["model=alpaca7b"], monkeypatch, capsys)
    assert [line.split()[1] for line in lines] == ["loss", "exp_name", "model.name_or_path", "datasets.si.path"]
    assert "Choices: alphapo, aot, " in lines[0]


def test_no_arguments_at_all(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, *lines = errors_of([], monkeypatch, capsys)
    assert [line.split()[1] for line in lines] == ["loss", "model", "exp_name", "datasets.si.path"]


def test_every_point_of_a_sweep_is_checked_first(mistakes):
    lines = mistakes("-m", "loss.beta=0.1,x,0", "lr=1e-6,-1", "loss.label_smoothing=0,0.7")
    assert len(lines) == 4
    assert lines[0] == "loss.beta=x: must be a number"
    assert any(line.startswith("loss.beta=0.0: must be above 0, and finite (at loss.beta=0") for line in lines)
    assert any(line.startswith("lr=-1.0: must be above 0") for line in lines)


def test_model_folders(mistakes, tiny_model_folder, tmp_path):
    empty, no_weights = tmp_path / "empty", tmp_path / "no_weights"
    empty.mkdir()
    shutil.copytree(tiny_model_folder, no_weights)
    (no_weights / "model.safetensors").unlink()
    for folder, message in (
        (tmp_path / "empti", f"there is no such folder; did you mean {empty}?"),
        (tmp_path / "x" / "y", f"({tmp_path / 'x'} does not exist either)"),
        (empty, "the folder has no config.json, so it holds no model"),
        (no_weights, "the folder has a config.json but no weights (*.safetensors)"),
    ):
        (line,) = mistakes(f"model.name_or_path={folder}")
        assert line == f"model.name_or_path={folder}: {message}" or message in line


# Mistakes that only the files show


@pytest.fixture
def refused(command, monkeypatch, capsys):
    """The message with which `train.main` refuses `command` + these arguments."""

    def message(*arguments: str) -> str:
        lines = errors_of(
            [*command, "max_length=128", "max_prompt_length=100", *arguments], monkeypatch, capsys, train.main
        )
        start = next(i for i, line in enumerate(lines) if line.startswith("train.py: "))
        return "\n".join(lines[start:])

    return message


def test_run_dir_of_another_config(command, refused, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *command, "max_length=128", "max_prompt_length=100"])
    run_entrypoint("config", TrainConfig, check_train, train.main)
    before = sorted((path, path.stat().st_mtime_ns) for path in Path("runs/a/checkpoints").rglob("*"))
    message = refused("lr=1e-3", "loss.beta=0.5")
    assert "holds a run of another config" in message
    assert "lr: 5e-07 there, 0.001 now" in message
    assert "loss.beta: 0.1 there, 0.5 now" in message
    assert sorted((path, path.stat().st_mtime_ns) for path in Path("runs/a/checkpoints").rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ('{"instruction": "a", "chosen": "b", "rejected": "c"}\n{"instruction": \n', "pairs.jsonl:2"),
        ('{"instruction": "a", "chosen": "b"}\n', "rejected"),
        ('{"prompt": "a"}\n', "prompt"),
        ('{"instruction": "a", "chosen": "same", "rejected": "same"}\n', "no usable row"),
    ],
)
def test_data_files(refused, tmp_path, content, message):
    (tmp_path / "pairs.jsonl").write_text(content)
    assert message in refused("datasets.si.on_bad_row=error" if 'instruction": \n' in content else "seed=0")
    assert not list(tmp_path.glob("runs/*/checkpoints/*"))


def test_archive_that_is_damaged(refused, tmp_path):
    torch.save({"state": {"a": torch.zeros(3)}}, tmp_path / "policy.pt")
    assert "do not fit the architecture" in refused(f"model.archive={tmp_path / 'policy.pt'}")
    (tmp_path / "policy.pt").write_bytes((tmp_path / "policy.pt").read_bytes()[:100])
    assert "truncated" in refused(f"model.archive={tmp_path / 'policy.pt'}")


def test_a_mistake_in_one_point_leaves_the_others_of_a_sweep(command, monkeypatch, capsys, tmp_path):
    """The point that fails is told at once, the next one still runs, and the status is 2."""
    ran = []

    def main(config: TrainConfig) -> None:
        if config.seed == 0:
            raise UserError("this point is wrong")
        ran.append(config.seed)

    lines = errors_of(["-m", *command, "seed=0,1"], monkeypatch, capsys, main)
    assert lines == ["train.py: this point is wrong"]
    assert ran == [1]


def test_a_defect_keeps_its_traceback(command, monkeypatch):
    def main(config: TrainConfig) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(sys, "argv", ["train.py", *command])
    with pytest.raises(ZeroDivisionError, match="a defect"):
        run_entrypoint("config", TrainConfig, check_train, main)


@pytest.mark.slow
def test_as_a_process(tmp_path):
    """Exit status and streams of the real thing; and the help, which needs no arguments."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "lr=abc", "model=tiny"], cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert "lr=abc: must be a number" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit) as left:
        run_entrypoint("config", TrainConfig, check_train, train.main)
    assert not left.value.code
    out = capsys.readouterr().out
    assert "| cpo | discopop | dpo | dpo_norm |" in " ".join(out.split())
    assert "experiment=" in out
    assert "batch_size=4" in out
    assert "max_prompt_length" not in out


@pytest.mark.parametrize(("name", "kind"), CONFIGS.items())
def test_the_ten_keys_of_the_help_are_keys_with_a_meaning(name, kind):
    program = PROGRAMS[name]
    text = short_help(program, kind, {"loss": ["dpo"]}).partition("The most important keys")[2]
    shown = dict(re.findall(r"^  (\S+?)=\S+ +(\S.*)$", text, re.MULTILINE))
    assert tuple(shown) == KEYS[program]
    assert len(shown) == 10


def test_help_all_has_every_key(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help=all"])
    with pytest.raises(SystemExit) as left:
        run_entrypoint("config", TrainConfig, check_train, train.main)
    assert not left.value.code
    assert {"max_prompt_length", "trainer", "datasets", "license"} <= yaml.safe_load(capsys.readouterr().out).keys()
