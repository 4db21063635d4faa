"""What a command line composes to: published commands, the DPO repo's keys, groups, recipes, sweeps."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from config import names, settings
from config.checks_train import check_train
from config.errors import UserError
from config.paths import REPOSITORY, find_path
from config.rules import Fault, check_values
from config.schema import compose_config
from config.settings import (
    LOSSES,
    DatasetSettings,
    DPOSettings,
    IPOSettings,
    ReverseSettings,
    SFTSettings,
    TrainConfig,
)
from tests.commands import configs_of, write_pairs

# DESIGN: these work verbatim, with model.name_or_path= and datasets.si.path= added.
PUBLISHED = [
    "model=alpaca7b datasets=[si] loss=sft exp_name=si_sft gradient_accumulation_steps=4 batch_size=64 "
    "eval_batch_size=32 trainer=FSDPTrainer sample_during_eval=false",
    "model=alpaca7b model.archive=policy.pt datasets=[si] loss=dpo loss.beta=0.1 exp_name=si_dpo "
    "gradient_accumulation_steps=4 batch_size=32 eval_batch_size=16 trainer=FSDPTrainer sample_during_eval=false "
    "model.fsdp_policy_mp=bfloat16",
]

# Every key of the DPO repo's config.yaml, model/*.yaml and loss/*.yaml, with a value that must arrive.
DPO_REPO_KEYS: dict[str, Any] = {
    "seed": 3,
    "exp_name": "name",
    "batch_size": 8,
    "eval_batch_size": 8,
    "debug": True,
    "fsdp_port": 12345,
    "wandb.enabled": False,
    "wandb.entity": "me",
    "wandb.project": "mine",
    "local_dirs": ["a", "b"],
    "sample_during_eval": True,
    "n_eval_model_samples": 4,
    "do_first_eval": False,
    "local_run_dir": "there",
    "lr": 1e-6,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 1.5,
    "max_length": 128,
    "max_prompt_length": 64,
    "n_epochs": None,
    "n_examples": 100,
    "n_eval_examples": 10,
    "optimizer": "AdamW",
    "warmup_steps": 5,
    "activation_checkpointing": True,
    "eval_every": 20,
    "minimum_log_interval_secs": 0.5,
    "model.name_or_path": "somewhere",
    "model.tokenizer_name_or_path": "elsewhere",
    "model.archive": "policy.pt",
    "model.block_name": "LlamaDecoderLayer",
    "model.policy_dtype": "bfloat16",
    "model.fsdp_policy_mp": "bfloat16",
    "model.reference_dtype": "float16",
    "loss.beta": 0.3,
    "loss.label_smoothing": 0.1,
    "loss.reference_free": True,
}


def value_of(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part] if isinstance(config, dict) else vars(config)[part]
    return config


def written(value: Any) -> str:
    return (
        {None: "null", True: "true", False: "false"}.get(value, str(value))
        if not isinstance(value, list)
        else (f"[{','.join(value)}]")
    )


@pytest.mark.parametrize("command", PUBLISHED)
def test_published_commands_compose(command):
    config = compose_config("config", [*command.split(), "model.name_or_path=weights"])
    assert isinstance(config, TrainConfig)
    assert config.trainer.name == "FSDPTrainer"
    assert list(config.datasets) == ["si"]
    assert config.gradient_accumulation_steps == 4
    assert config.sample_during_eval is False
    assert config.model.block_name == "LlamaDecoderLayer"


def test_published_dpo_command_in_full():
    config = compose_config("config", [*PUBLISHED[1].split(), "model.name_or_path=weights"])
    assert config.loss == DPOSettings(name="dpo", beta=0.1)
    assert (config.batch_size, config.eval_batch_size) == (32, 16)
    assert (config.model.archive, config.model.fsdp_policy_mp) == ("policy.pt", "bfloat16")
    assert (config.optimizer, config.lr, config.warmup_steps, config.max_grad_norm) == ("RMSprop", 5e-7, 150, 10.0)
    assert (config.max_length, config.max_prompt_length, config.n_epochs) == (512, 256, 1)


@pytest.mark.parametrize("key", DPO_REPO_KEYS)
def test_every_key_of_the_dpo_repo_is_accepted(key):
    arguments = ["loss=dpo", "model=blank_model", f"{key}={written(DPO_REPO_KEYS[key])}"]
    assert value_of(compose_config("config", arguments), key) == DPO_REPO_KEYS[key]


def test_the_list_of_dpo_repo_keys_is_frozen():
    """A key that is taken away here breaks somebody's launch script."""
    assert len(DPO_REPO_KEYS) == 37
    choices = ["loss=sft", "datasets=[hh]", "trainer=BasicTrainer", "model=blank_model", "loss.name=sft"]
    config = compose_config("config", choices)
    assert (config.loss.name, list(config.datasets), config.trainer.name) == ("sft", ["hh"], "BasicTrainer")


def test_defaults_are_the_dataclass_defaults():
    """The YAML says nothing that config/settings.py does not."""
    config = compose_config("config", ["loss=dpo", "model=blank_model"])
    same = {field.name for field in dataclasses.fields(TrainConfig)} - {"loss", "datasets"}
    for name in same:
        assert vars(config)[name] == vars(TrainConfig())[name], name


def test_several_datasets():
    config = compose_config("config", ["loss=sft", "model=tiny", "datasets=[si,alpaca]", "datasets.si.path=a.csv"])
    assert list(config.datasets) == ["si", "alpaca"]
    assert config.datasets["si"] == DatasetSettings(path="a.csv", schema="si", template="alpaca")
    assert config.datasets["alpaca"].schema == "alpaca"


def test_a_dataset_of_ones_own_needs_no_file():
    arguments = ["loss=sft", "model=tiny", "datasets.mine.path=x", "datasets.mine.schema=alpaca", "~datasets.si"]
    config = compose_config("config", arguments)
    assert config.datasets == {"mine": DatasetSettings(path="x", schema="alpaca")}


@pytest.mark.parametrize(
    ("name", "words", "where"),
    [
        ("config", "loss=sft model=tiny datasets.si.path=a exp_name=a datasets.si.columns.chosen=good", "datasets.si"),
        (
            "config",
            "loss=sft model=tiny datasets.own.path=a exp_name=a datasets.own.columns.chosen=good",
            "datasets.own",
        ),
        ("evaluate", "output=a prompts.v1.5.path=a prompts.v1.5.columns.chosen=good", "prompts.v1.5"),
        ("induce", "output=a corpus.path=a corpus.columns.chosen=good", "corpus"),
    ],
)
def test_columns_are_renamed_on_the_command_line(name, words, where):
    group, _, entry = where.partition(".")
    settings = getattr(compose_config(name, words.split()), group)
    assert (settings[entry] if entry else settings).columns == {"chosen": "good"}
    assert (settings[entry] if entry else settings).path == "a"


def test_optimizer_arguments_are_free():
    arguments = ["loss=sft", "model=tiny", "optimizer=AdamW"]
    for form in (["optimizer_args.betas=[0.9,0.98]", "optimizer_args.weight_decay=0.1"],
                 ["optimizer_args={betas:[0.9,0.98],weight_decay:0.1}"],
                 ["+optimizer_args.betas=[0.9,0.98]", "++optimizer_args.weight_decay=0.1"]):  # fmt: skip
        config = compose_config("config", arguments + form)
        assert config.optimizer_args == {"betas": [0.9, 0.98], "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("name", "loss"), [("sft", SFTSettings("sft", "sequence_sum")),
                       ("reverse", ReverseSettings("reverse", "token_mean")),
                       ("dpo", DPOSettings("dpo", 0.1)),
                       ("ipo", IPOSettings("ipo", 0.1))]
)  # fmt: skip
def test_losses(name, loss):
    assert compose_config("config", [f"loss={name}", "model=tiny"]).loss == loss


def test_reverse_recipe_is_alpacas():
    config = compose_config("config", ["experiment=reverse", "model=llama7b"])
    assert (config.optimizer, config.lr, config.lr_scheduler, config.warmup_ratio) == ("AdamW", 2e-5, "cosine", 0.03)
    assert (config.batch_size, config.n_epochs, config.max_length) == (128, 3, 512)
    assert (config.loss.name, config.loss.reduction, list(config.datasets)) == ("reverse", "token_mean", ["alpaca"])
    assert config.optimizer_args == {"betas": [0.9, 0.999], "weight_decay": 0.0}


@pytest.mark.parametrize(("experiment", "command"), [("si_sft", PUBLISHED[0]), ("si_dpo", PUBLISHED[1])])
def test_recipes_are_the_published_commands(experiment, command):
    recipe = compose_config("config", [f"experiment={experiment}", "model=alpaca7b", "trainer=FSDPTrainer"])
    published = compose_config("config", command.split())
    published.model.archive = None  # a path of the user's
    assert recipe == published


def test_the_command_line_wins_over_a_recipe():
    config = compose_config("config", ["experiment=si_dpo", "model=tiny", "batch_size=8", "loss=ipo", "loss.beta=0.7"])
    assert (config.batch_size, config.loss.name, config.loss.beta) == (8, "ipo", 0.7)


def test_every_choice_of_every_group_composes():
    for group in ("model", "loss", "trainer", "datasets"):
        for file in (REPOSITORY / "config" / group).glob("*.yaml"):
            choice = f"[{file.stem}]" if group == "datasets" else file.stem
            given = {"model": "blank_model", "loss": "sft", group: choice}
            compose_config("config", [f"{name}={value}" for name, value in given.items()])
    for file in (REPOSITORY / "config" / "experiment").glob("*.yaml"):
        is_machine = file.stem in ("laptop", "one_gpu", "one_node", "many_nodes")  # it stands behind a recipe
        names = f"[si_sft,{file.stem}]" if is_machine else file.stem
        config = compose_config("config", [f"experiment={names}", "model=tiny"])
        # What is left to say is about files of the user's and of the quick start.
        assert not [
            error for error in check_train(config) if "is not set" not in str(error) and "no such" not in str(error)
        ]


def test_errors_of_compose_config_are_user_errors():
    with pytest.raises(UserError, match="no key lrr; did you mean lr"):
        compose_config("config", ["loss=sft", "model=tiny", "lrr=1"])


@pytest.fixture
def command(tmp_path, tiny_model_folder, monkeypatch):
    """A command without mistakes, and the working directory that it is typed in."""
    monkeypatch.chdir(tmp_path)
    pairs = write_pairs(tmp_path / "pairs.jsonl", 4)
    return ["loss=dpo", "model=blank_model", f"model.name_or_path={tiny_model_folder}", f"datasets.si.path={pairs}"]


def test_run_dir_has_no_timestamp(command, monkeypatch):
    (config,) = configs_of([*command, "exp_name=a"], monkeypatch)
    assert config.run_dir == str(Path("runs/a"))
    (config,) = configs_of([*command, "exp_name=a", "local_run_dir=there"], monkeypatch)
    assert config.run_dir == "there"
    (config,) = configs_of([*command, "exp_name=a", "run_dir=here"], monkeypatch)
    assert config.run_dir == "here"


def test_hydra_leaves_the_working_directory_alone(command, tmp_path, monkeypatch):
    before = sorted(tmp_path.iterdir())
    configs_of([*command, "exp_name=a"], monkeypatch)
    assert sorted(tmp_path.iterdir()) == before


def test_points_of_a_sweep_never_share_a_run_dir(command, tmp_path, monkeypatch):
    arguments = ["-m", *command, "exp_name=beta", "loss.beta=0.05,0.1,0.5", "seed=0,1", "lr=1e-6"]
    configs = configs_of(arguments, monkeypatch)
    assert [config.run_dir for config in configs] == [
        f"runs/beta/loss.beta={beta},seed={seed}" for beta in (0.05, 0.1, 0.5) for seed in (0, 1)
    ]
    assert [(config.loss.beta, config.seed) for config in configs][-1] == (0.5, 1)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left == {"pairs.jsonl", "runs", "runs/beta", "runs/beta/multirun.yaml"}


def test_sweep_over_groups_and_paths(command, tiny_model_folder, monkeypatch):
    arguments = ["-m", "exp_name=a", "loss=dpo,ipo", f"model.archive=null,{tiny_model_folder}", *command[1:]]
    dirs = [config.run_dir for config in configs_of(arguments, monkeypatch)]
    assert len(set(dirs)) == 4
    assert dirs[0] == "runs/a/loss=dpo,model.archive=null"
    assert all(len(Path(run_dir).parts) == 3 for run_dir in dirs)  # the slashes of a path make no folders


def test_long_sweep_names_stay_file_names_and_apart(command, monkeypatch):
    values = ["a" * 200 + end for end in "xy"]
    configs = configs_of(["-m", *command, "exp_name=a", f"wandb.group={','.join(values)}"], monkeypatch)
    names = [Path(config.run_dir).name for config in configs]
    assert len(set(names)) == 2
    assert max(map(len, names)) < 200


def test_wandb_mode_on_the_command_line(command, monkeypatch):
    (config,) = configs_of([*command, "exp_name=a", "wandb.mode=disabled"], monkeypatch)
    assert config.wandb.mode == "disabled"


def test_shipped_paths_are_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_path("config/config.yaml") == REPOSITORY / "config" / "config.yaml"
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.yaml").touch()
    assert find_path("config/config.yaml") == Path("config/config.yaml")  # the user's own comes first


def test_names_mean_something_to_their_owners():
    """The lists of config/names.py against the modules that give the names their meaning."""
    import torch

    from safer_instruct.dataset.files import FILES
    from safer_instruct.generation.models import DTYPES
    from safer_instruct.text.loading import SCHEMAS
    from safer_instruct.text.prompts import TEMPLATE_NAMES

    kinds = {name for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    # Not the base, nor those that evaluate the loss by themselves or step sparse gradients alone.
    assert set(names.OPTIMIZERS) == kinds - {"Optimizer", "LBFGS", "SparseAdam"}
    assert set(names.TEMPLATES) == set(TEMPLATE_NAMES)
    assert set(names.SCHEMAS) == set(SCHEMAS)
    assert set(names.FORMATS) == set(FILES)
    assert set(names.DTYPES) == set(DTYPES)
    assert set(LOSSES) == {file.stem for file in (REPOSITORY / "config" / "loss").glob("*.yaml")}


def test_every_annotation_can_be_read():
    """A rule that is misspelled would only show when its dataclass is used."""
    for kind in vars(settings).values():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            assert all(isinstance(fault, Fault) for fault in check_values(kind()))


def test_reading_a_command_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from config import checks_evaluate, checks_induce, checks_train, schema; "
        "schema.compose_config('config', ['loss=dpo', 'model=tiny']); "
        "assert not {'torch', 'transformers', 'wandb', 'numpy'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_tab_key_completes(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    command = [sys.executable, str(REPOSITORY / "induce.py"), "--shell-completion", "query=bash"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COMP_LINE": "python induce.py engine=r"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["engine=ray"]


@pytest.mark.parametrize(
    "command",
    [
        "train.py --help",
        "induce.py --help=all",
        "train.py lr=abc",
        "train.py loss=dpo model=tiny --cfg job",
        "induce.py stage=status output=nowhere",
        "evaluate.py models.base=x --cfg job",
    ],
)
def test_an_answer_that_needs_no_model_imports_no_torch(command, tmp_path):
    """The entrypoints answer before they import what takes seconds: here, importing torch is a crash."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    script, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / script), *arguments], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert "torch was imported" not in done.stderr
    assert done.returncode == (2 if "lr=abc" in command or "nowhere" in command else 0), done.stderr
