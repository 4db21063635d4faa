"""The boundaries of CONTRIBUTING.md that import-linter cannot see: single files, and libraries bound to one module."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path
    for pattern in ("*.py", "config/*.py", "trainers/**/*.py", "safer_instruct/**/*.py", "quickstart/**/*.py")
    for path in ROOT.glob(pattern)
)
assert len(SOURCES) > 100, "a glob misses folders of the packages"
ENTRYPOINTS = {"train.py", "induce.py", "evaluate.py"}

PARALLEL = {
    "trainers/distributed/launch.py", "trainers/distributed/layout.py", "trainers/distributed/parallelize.py",
    "trainers/distributed/sharding.py", "trainers/run/checkpoint.py", "trainers/run/data_only.py",
    "trainers/run/resume.py", "trainers/run/state_writer.py", "trainers/reference.py",
}  # fmt: skip
# library -> the only files that may import it
HOMES = {
    "hydra": ENTRYPOINTS | {"config/schema.py", "config/overrides.py", "config/spelling.py"},
    "omegaconf": ENTRYPOINTS | {"config/schema.py", "config/overrides.py", "config/spelling.py"},
    "wandb": {"trainers/run/metrics_log.py"},
    "torch.distributed": PARALLEL,
    "openai": {"safer_instruct/generation/server.py"},
    "scipy": {"safer_instruct/measures/statistics.py", "safer_instruct/measures/reward_checks.py"},
    "statsmodels": {"safer_instruct/measures/statistics.py"},
    "lm_eval": set(),  # in a process of its own
    "matplotlib": {
        "safer_instruct/report/plots.py",
        "safer_instruct/report/dataset_plots.py",
        "safer_instruct/report/sweeps.py",
    },
    "datasketch": {"safer_instruct/dataset/similarity.py"},
    "duckdb": {"safer_instruct/dataset/scratch.py"},
    "peft": {"safer_instruct/generation/adapters.py", "trainers/lora.py"},
    "vllm": {"safer_instruct/generation/vllm.py"},
    "ray": {"safer_instruct/engine_ray.py"},
}
# first-party package -> what it must not import
FORBIDDEN = {
    "preference_datasets.py": {"hydra", "omegaconf", "wandb", "train", "induce", "evaluate", "config.schema"},
}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imported_modules(path: Path) -> set[str]:
    """Dotted names of everything that the file imports, at any depth of the code."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def within(module: str, package: str) -> bool:
    """Whether the dotted name is the package or something inside it."""
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize("library", sorted(HOMES))
def test_a_library_stays_in_its_home(library):
    strangers = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if any(within(module, library) for module in imported_modules(path))
    } - HOMES[library]
    assert not strangers, f"{library} is imported by {sorted(strangers)}; its home is {sorted(HOMES[library])}"


@pytest.mark.parametrize("file", sorted(FORBIDDEN))
def test_a_single_file_keeps_its_boundary(file):
    found = {m for m in imported_modules(ROOT / file) for package in FORBIDDEN[file] if within(m, package)}
    assert not found, f"{file} imports {sorted(found)}"


def test_sources_are_ascii():
    strange = [p.relative_to(ROOT).as_posix() for p in SOURCES if not p.read_bytes().isascii()]
    assert not strange, f"write \\u escapes instead: {strange}"


LONGEST_FILE, LONGEST_FUNCTION = 330, 60  # lines; the worst today are train.py and trainers/reference.py


def test_files_and_functions_stay_readable():
    long_functions, long_files = [], []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > LONGEST_FILE and "quickstart" not in path.parts:
            long_files.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                length = node.end_lineno - node.lineno + 1
                if length > LONGEST_FUNCTION:
                    long_functions.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {length} lines")
    assert not long_functions, long_functions
    assert not long_files, long_files
