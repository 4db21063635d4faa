"""`pip install .`: what the wheel holds, and the programs run from it, in a folder where nothing else is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from config.paths import REPOSITORY, program
from tests.commands import write_pairs

PACKAGES = ("config", "trainers", "safer_instruct", "quickstart")
MODULES = ("train.py", "induce.py", "evaluate.py", "preference_datasets.py")
DATA = (".py", ".yaml", ".json", ".jsonl", ".safetensors", ".css", ".html", ".js")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the sources without a network, unpacked."""
    sources, folder = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(REPOSITORY / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (*MODULES, "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, sources)
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    subprocess.run([sys.executable, *build, str(sources)], check=True)
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def installed(wheel: Path, folder: Path, *words: str, status: int = 0) -> str:
    """What `safer-instruct WORDS` prints in `folder`, which sees the wheel and not the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(wheel), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "safer_instruct", *words],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


def test_the_wheel_holds_all_that_the_programs_read(wheel):
    def files(root: Path) -> set[str]:
        found = {path for name in PACKAGES for path in (root / name).rglob("*") if path.is_file()}
        return {path.relative_to(root).as_posix() for path in found if "__pycache__" not in path.parts}

    assert files(wheel) == files(REPOSITORY)
    assert {Path(name).suffix for name in files(wheel)} <= set(DATA)
    assert all((wheel / name).is_file() for name in MODULES)
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    required = set(re.findall(r"^Requires-Dist: ([\w.-]+)[^;\n]*$", metadata.read_text(), re.MULTILINE))
    lines = [line.split("#")[0].strip() for line in (REPOSITORY / "requirements.txt").read_text().splitlines()]
    assert required == {re.split(r"[=<>]", line)[0] for line in lines if line}
    (entry,) = wheel.glob("*.dist-info/entry_points.txt")
    assert "safer-instruct = safer_instruct.__main__:main" in entry.read_text()


def test_the_command_runs_from_any_folder(wheel, tmp_path):
    assert "safer-instruct PROGRAM --help" in installed(wheel, tmp_path, "--help")
    assert "there is no program trian" in installed(wheel, tmp_path, "trian", status=2)
    shown = installed(wheel, tmp_path, "train", "--help")
    assert "Usage: safer-instruct train KEY=VALUE" in shown
    assert "alphapo | aot | apo_down" in " ".join(shown.split())
    assert "did you mean lr?" in installed(wheel, tmp_path, "train", "lrr=1", status=2)
    write_pairs(tmp_path / "pairs.jsonl", 12)
    run = ["loss=dpo", "model=tiny", "datasets.si.path=pairs.jsonl", "exp_name=run", "local_dirs=[cache]", "device=cpu"]
    said = installed(wheel, tmp_path, "train", *run, "dry_run=data")
    assert "the run would live in runs/run" in said


def test_a_checkout_says_python():
    assert program("train") == "python train.py"


def test_the_extras_are_those_of_the_requirement_files():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = [line.split("#")[0].strip() for line in (REPOSITORY / "requirements-docs.txt").read_text().splitlines()]
    assert extras["docs"] == [line for line in lines if line]
    assert extras["eval"][0] in (REPOSITORY / "requirements-dev.txt").read_text()


def test_the_lock_has_all_that_is_required_with_hashes_and_names_no_host():
    lock = (REPOSITORY / "requirements.lock").read_text()
    assert not re.search(r"https?://|--(extra-)?index-url|--find-links", lock)
    packages = re.split(r"\n(?=\S)", lock.strip())
    locked = {}
    for package in packages:
        name, version = re.match(r"([\w.-]+)==([\w.]+)", package).groups()
        assert "--hash=sha256:" in package, name
        locked[name] = Version(version)
    lines = [line.split("#")[0].strip() for line in (REPOSITORY / "requirements.txt").read_text().splitlines()]
    for requirement in map(Requirement, filter(None, lines)):
        assert locked[requirement.name] in requirement.specifier, requirement
