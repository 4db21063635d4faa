"""Every command of the documentation composes as it is printed, and every file that it names is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from config.schema import compose_configs
from config.settings import EvaluateConfig, InduceConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = {
    "train.py": ("config", TrainConfig),
    "induce.py": ("induce", InduceConfig),
    "evaluate.py": ("evaluate", EvaluateConfig),
}


def documented_commands() -> list[tuple[str, list[str]]]:
    """("train.py", arguments) of each `python ENTRYPOINT ...` line in a bash block of the pages."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = [word for word in shlex.split(line, comments=True) if word != "-u"]
                if words[:1] == ["python"] and words[1] in CONFIGS:
                    found.append((words[1], words[2:]))
    return found


COMMANDS = documented_commands()


def test_the_readme_shows_all_three_entrypoints_and_both_published_commands():
    assert {entrypoint for entrypoint, _ in COMMANDS} == set(CONFIGS)
    keys = {"trainer=FSDPTrainer", "gradient_accumulation_steps=4", "datasets=[si]"}
    published = [arguments for _, arguments in COMMANDS if keys <= set(arguments)]
    assert [("loss=sft" in one, "loss=dpo" in one) for one in published] == [(True, False), (False, True)]


@pytest.mark.parametrize(("entrypoint", "arguments"), COMMANDS, ids=[f"{e} {' '.join(a)}"[:90] for e, a in COMMANDS])
def test_a_documented_command_composes(entrypoint, arguments):
    name, config_class = CONFIGS[entrypoint]
    overrides = [word for word in arguments if word != "-m"]
    configs = compose_configs(name, overrides, multirun="-m" in arguments)
    assert len(configs) == (3 if "-m" in arguments else 1)
    assert all(isinstance(config, config_class) for config in configs)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_hold(page):
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_make_targets_of_the_pages_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {
        name
        for page in PAGES
        for name in re.findall(r"^make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert named
    assert all(re.search(rf"^{name}:", makefile, re.MULTILINE) for name in named), named
