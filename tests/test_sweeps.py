"""Sweep files and batch scripts: the commands that they build compose, and each run has a directory of its own."""

from __future__ import annotations

import importlib.metadata
import itertools
import operator
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import yaml
from hydra import initialize_config_dir
from wandb.sdk.launch.sweeps import utils as agent

from config.overrides import CONFIG_DIR, Reader
from config.paths import REPOSITORY
from config.schema import compose_config, register_schemas
from config.settings import TrainConfig
from tests.commands import errors_of, metrics, run, write_pairs
from trainers.distributed.preemption import PREEMPTED_STATUS

SCRIPTS = REPOSITORY / "scripts"


def agent_command(sweep: dict, point: dict[str, object]) -> list[str]:
    """The command that wandb's agent builds for one point, with the agent's own functions.

    The last step is what `wandb_agent.Agent._command_run` does: only an item that is one whole macro is replaced.
    """
    template = agent.create_sweep_command(list(sweep["command"]))
    macros = agent.create_sweep_command_args({"args": {name: {"value": value} for name, value in point.items()}})
    macros |= {"interpreter": ["python"], "program": [sweep["program"]], "env": ["/usr/bin/env"]}
    command: list[str] = []
    for item in template:
        is_macro = item.startswith("${") and item.endswith("}")
        command += macros.get(item[2:-1]) or [] if is_macro else [item]
    return command


def sweep_points(parameters: dict[str, dict]) -> list[dict[str, object]]:
    """Every point of a grid; of a search, the corners of what it searches."""
    values = [spec.get("values") or [spec["min"], spec["max"]] for spec in parameters.values()]
    return [dict(zip(parameters, point, strict=True)) for point in itertools.product(*values)]


@pytest.mark.parametrize("file", sorted((SCRIPTS / "sweeps").glob("*.yaml")), ids=lambda file: file.name)
def test_commands_of_a_wandb_agent_compose(file, monkeypatch):
    for name, value in {"MODEL": "/models/alpaca", "SFT_RUN": "runs/si_sft", "SI_DATA": "/data/si"}.items():
        monkeypatch.setenv(name, value)
    sweep = yaml.safe_load(file.read_text())
    points = sweep_points(sweep["parameters"])
    assert len(points) > 2
    names = set()
    for point in points:
        command = agent_command(sweep, point)
        assert command[:4] == ["/usr/bin/env", "python", "-u", "train.py"]
        config = compose_config("config", command[4:])
        for key, value in point.items():
            assert operator.attrgetter("loss.name" if key == "loss" else key)(config) == value
        assert (config.model.name_or_path, config.model.archive) == ("/models/alpaca", "runs/si_sft")
        assert config.datasets["si"].path == "/data/si"
        names.add(config.exp_name)
    assert len(names) == len(points), "two points of the sweep would share a run directory"
    if file.name == "dpo_beta.yaml":
        assert names == {"si_dpo_beta_0.05_seed_0", "si_dpo_beta_0.1_seed_0", "si_dpo_beta_0.5_seed_0"}


def shell_scripts() -> list[Path]:
    return sorted([*SCRIPTS.glob("*.sh"), *(SCRIPTS / "slurm").iterdir()])


@pytest.mark.parametrize("script", shell_scripts(), ids=lambda script: script.name)
def test_shell_scripts_parse(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_batch_scripts_name_no_site():
    for script in (SCRIPTS / "slurm").glob("*.sbatch"):
        options = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
        assert options
        assert not [line for line in options if "partition" in line or "account" in line or "--chdir" in line]
        assert {"#SBATCH --requeue", "#SBATCH --signal=USR1@120", "#SBATCH --open-mode=append"} <= set(options)
        assert "\nsource scripts/slurm/step.sh\n" in script.read_text()


@pytest.fixture
def fake_srun(tmp_path):
    """A PATH on which `srun` prints the words of the command that it would run, one a line."""
    program = tmp_path / "bin" / "srun"
    program.parent.mkdir()
    program.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return f"{program.parent}{os.pathsep}{os.environ['PATH']}"


def batch(script: str, path: str, **variables: str) -> subprocess.CompletedProcess[str]:
    slurm = {"SLURM_SUBMIT_DIR": str(REPOSITORY), "SLURM_JOB_ID": "7"}
    environment = {**os.environ, "PATH": path, **slurm, **variables}
    command = ["bash", str(SCRIPTS / "slurm" / script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def overrides_of(lines: list[str], program: str) -> list[str]:
    assert program in lines, lines
    return lines[lines.index(program) + 1 :]


def test_train_array_runs_the_line_of_its_task(fake_srun):
    paths = {"MODEL": "/models/alpaca", "SFT_RUN": "runs/si_sft", "SI_DATA": "/data/si"}
    configs = []
    for index in range(3):
        done = batch("train_array.sbatch", fake_srun, SLURM_ARRAY_TASK_ID=str(index), EXTRA="seed=4", **paths)
        assert done.returncode == 0, done.stderr
        configs.append(compose_config("config", overrides_of(done.stdout.splitlines(), "train.py")))
    assert [config.loss.beta for config in configs] == [0.05, 0.1, 0.5]
    assert len({config.exp_name for config in configs}) == 3
    assert {(config.model.name_or_path, config.datasets["si"].path, config.seed) for config in configs} == {
        ("/models/alpaca", "/data/si", 4)
    }
    beyond = batch("train_array.sbatch", fake_srun, SLURM_ARRAY_TASK_ID="3", **paths)
    assert beyond.returncode == 2
    assert "sbatch --array=0-2" in beyond.stderr


@pytest.fixture
def fake_slurm(fake_srun, tmp_path):
    """As `fake_srun`, which ends with $STATUS; `scontrol` names two hosts, and says what it was asked to requeue."""
    folder = tmp_path / "bin"
    (folder / "srun").write_text(
        '#!/usr/bin/env bash\nprintf "%s\\n" "$MASTER_ADDR:$MASTER_PORT" "$@"\nexit "${STATUS:-0}"\n'
    )
    program = folder / "scontrol"
    program.write_text(
        '#!/usr/bin/env bash\nif [ "$1" = show ]; then printf "node1\\nnode2\\n"; else echo "scontrol $@"; fi\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return fake_srun


@pytest.mark.parametrize("status", [0, 1, 2, 75])
def test_a_run_over_nodes_is_requeued_if_it_was_asked_to_stop(fake_slurm, status):
    script = str(SCRIPTS / "slurm" / "train.sbatch")
    arguments = ["loss=sft", "model=alpaca7b", "model.name_or_path=/models/alpaca", "exp_name=run", "batch_size=64"]
    slurm = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_SUBMIT_DIR": str(REPOSITORY)}
    done = subprocess.run(
        ["bash", script, *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": fake_slurm, "STATUS": str(status), **slurm},
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "node1:21234"
    assert lines[1] == "--kill-on-bad-exit=1"
    config = compose_config("config", overrides_of(lines[: len(arguments) + 6], "train.py"))
    assert (config.trainer.name, config.batch_size) == ("FSDPTrainer", 64)
    assert ("scontrol requeue 41234" in lines) == (status == PREEMPTED_STATUS)
    assert status == PREEMPTED_STATUS or "requeue" not in done.stdout


def test_a_task_of_an_array_is_requeued_and_not_the_array(fake_slurm):
    """The last task's SLURM_JOB_ID is that of the array: by it all tasks would start again."""
    paths = {"MODEL": "/models/alpaca", "SFT_RUN": "runs/si_sft", "SI_DATA": "/data/si", "STATUS": "75"}
    array = {"SLURM_JOB_ID": "50", "SLURM_ARRAY_JOB_ID": "50", "SLURM_ARRAY_TASK_ID": "2"}
    done = batch("train_array.sbatch", fake_slurm, **paths, **array)
    assert done.returncode == PREEMPTED_STATUS
    assert done.stdout.splitlines()[-1] == "scontrol requeue 50_2"


def test_train_array_says_which_variable_is_missing(fake_srun):
    done = batch("train_array.sbatch", fake_srun, SLURM_ARRAY_TASK_ID="0")
    assert done.returncode != 0
    assert "MODEL=FOLDER" in done.stderr


def test_induce_array_leaves_the_shard_to_the_array_variables(fake_srun):
    variables = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8", "CORPUS": "unsafe.jsonl"}
    expert = "expert=openai expert.model=a-model"
    done = batch("induce_array.sbatch", fake_srun, EXPERT=expert, MODEL="runs/reverse", **variables)
    assert done.returncode == 0, done.stderr
    config = compose_config("induce", overrides_of(done.stdout.splitlines(), "induce.py"))
    assert (config.corpus.path, config.output, config.model.name_or_path) == ("unsafe.jsonl", "data/si", "runs/reverse")
    assert config.expert.model == "a-model"
    assert (config.shard.index, config.shard.count) == (None, None)


def test_evaluate_array_leaves_the_share_to_the_array_variables_and_then_reads_all(fake_srun):
    variables = {
        "ARGS": "models.dpo.path=runs/si_dpo prompts.si.path=test.csv prompts.si.kind=unsafe", "OUTPUT": "runs/report",
        "EXPERT": "expert=openai expert.model=a-model",
    }  # fmt: skip
    done = batch("evaluate_array.sbatch", fake_srun, SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_TASK_COUNT="8", **variables)
    assert done.returncode == 0, done.stderr
    task = compose_config("evaluate", overrides_of(done.stdout.splitlines(), "evaluate.py"))
    assert (task.models["dpo"].path, task.output, task.expert.model) == ("runs/si_dpo", "runs/report", "a-model")
    assert (task.shard.index, task.shard.count) == (None, None)
    done = batch("evaluate_array.sbatch", fake_srun, SHARD="shard.index=0 shard.count=1", **variables)
    report = compose_config("evaluate", overrides_of(done.stdout.splitlines(), "evaluate.py"))
    assert (report.shard.index, report.shard.count) == (0, 1)
    assert batch("evaluate_array.sbatch", fake_srun).returncode != 0


def test_reproduce_prints_commands_that_compose(tmp_path):
    """The dry run of scripts/reproduce.sh: all stages, in order, each a command that its entrypoint accepts."""
    paths = {name: f"/data/{name.lower()}" for name in ("LLAMA", "ALPACA", "ALPACA_DATA", "CORPUS", "TEST_SET")}
    done = subprocess.run(
        ["bash", str(SCRIPTS / "reproduce.sh")],
        env={**os.environ, **paths, "EXPERT": "expert=openai expert.model=a-model", "DRY_RUN": "1", "PYTHON": "python"},
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    commands = [line[2:].split() for line in done.stdout.splitlines() if line.startswith("+ ")]
    programs = [command[2] for command in commands]
    assert programs == ["train.py", "induce.py", "train.py", "train.py", "evaluate.py"]
    configs = {"train.py": "config", "induce.py": "induce"}
    composed = [compose_config(configs[command[2]], command[3:]) for command in commands if command[2] in configs]
    assert [config.exp_name for config in (composed[0], *composed[2:])] == ["reverse", "si_sft", "si_dpo"]
    assert composed[1].model.name_or_path == "runs/reverse"
    assert composed[2].datasets["si"].path == composed[1].output
    assert composed[3].model.archive == "runs/si_sft"


def test_scripts_are_clean_for_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", *map(str, shell_scripts())], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


PLUGINS = {
    "hydra/launcher=slurm": ("hydra-submitit-launcher", "SlurmLauncher"),
    "hydra/launcher=joblib": ("hydra-joblib-launcher", "JoblibLauncher"),
    "hydra/sweeper=optuna": ("hydra-optuna-sweeper", "OptunaSweeper"),
}


@pytest.mark.parametrize("choice", PLUGINS)
def test_plugins_compose_or_are_refused_with_their_package(choice, monkeypatch, capsys):
    words = ["-m", choice, "loss=dpo", "model=tiny", f"datasets.si.path={__file__}", "exp_name=x", "loss.beta=0.1,0.2"]
    words += ["sweep_metric=loss/eval"]
    package, target = PLUGINS[choice]
    if find_plugin(package) is None:
        (line,) = errors_of(words, monkeypatch, capsys)[1:]
        assert f"without a plug-in that is not installed: pip install {package}" in line
        pytest.skip(f"{package} is not installed: its refusal was tested, not what it composes to")
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        read = Reader("config", TrainConfig, words[1:], multirun=True)
    assert not read.faults
    group = choice.split("=")[0].removeprefix("hydra/")
    assert all(point.config.hydra[group]._target_.endswith(target) for point in read.points)
    assert [point.config.loss.beta for point in read.points] == [0.1, 0.2]


def needs_optuna() -> None:
    if find_plugin("hydra-optuna-sweeper") is None:
        pytest.skip("hydra-optuna-sweeper is not installed")


SEARCH = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.sampler.seed=0", "hydra.sweeper.n_jobs=1"]


@pytest.mark.parametrize(
    ("words", "key", "expected"),
    [
        (["-m"], "lr=interval", "a range needs a search: add hydra/sweeper=optuna"),
        (SEARCH, "hydra/sweeper=optuna", "write sweep_metric=METRIC"),
        (
            [*SEARCH, "sweep_metric=rewards_eval/accuracies"],
            "hydra.sweeper.direction=minimize",
            "write hydra.sweeper.direction=maximize",
        ),
        ([*SEARCH, "sweep_metric=loss/eval", "dry_run=true"], "dry_run=true", "leave hydra/sweeper=optuna out"),
        ([*SEARCH, "sweep_metric=loss/train"], "sweep_metric=loss/train", "must be an evaluation metric"),
    ],
)
def test_a_search_that_could_not_end_does_not_begin(words, key, expected, monkeypatch, capsys):
    if words != ["-m"]:
        needs_optuna()
    command = [*words, "loss=dpo", "model=tiny", f"datasets.si.path={__file__}", "exp_name=x", "lr=interval(1e-7,1e-5)"]
    (line,) = errors_of(command, monkeypatch, capsys)[1:]
    assert line.strip().startswith(f"- {key}")
    assert expected in line


@pytest.mark.slow
def test_a_search_finds_the_best_of_its_runs_and_typed_again_trains_none(tmp_path):
    needs_optuna()
    command = [
        *SEARCH, "hydra.sweeper.n_trials=3", "hydra.sweeper.max_failure_rate=1", "sweep_metric=loss/eval",
        "lr=tag(log,interval(1e-4,1e-2))", "loss=sft", "model=tiny", "optimizer=AdamW", "warmup_steps=0",
        f"datasets.si.path={write_pairs(tmp_path / 'pairs.jsonl')}", "exp_name=found", "n_examples=8",
    ]  # fmt: skip
    runs = tmp_path / "runs" / "found"
    best = []
    for done in (0, 3):
        out, _ = run(command, tmp_path)
        assert out.count(" is finished: 8 examples") == done
        found = yaml.safe_load((runs / "optimization_results.yaml").read_text())
        best.append((found["best_value"], found["best_params"]["lr"]))
    losses = {}
    for folder in runs.glob("lr=*"):
        last = [row["loss/eval"] for row in metrics(folder) if "loss/eval" in row][-1]
        losses[last] = float(folder.name.removeprefix("lr="))
    assert len(losses) == 3
    assert best == [(min(losses), losses[min(losses)])] * 2

    out, err = run(
        [*command, "sweep_metric=rewards_eval/accuracies", "hydra.sweeper.direction=maximize"], tmp_path, status=2
    )
    assert err.rstrip().endswith("no point of the search finished")
    assert "Traceback" not in err


def find_plugin(package: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None
