"""The documentation holds: blocks of commands run, or say what they need and compose; links, files and figures exist.

One rule for every page: a block of ```bash runs here, in the order of its page and in an empty folder, unless its
first line is `# needs: ...`. A paragraph that is the name of a file in code and a colon writes the block behind it.
The pages of docs/stages are one story: they run in the order of the navigation, in one folder.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from config.checks_evaluate import check_evaluate
from config.checks_induce import check_induce
from config.checks_train import check_train
from config.paths import REPOSITORY
from config.schema import compose_configs
from config.settings import LOSSES, EvaluateConfig, InduceConfig, TrainConfig
from tests.commands import run_entrypoint

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
NEEDS = {
    "weights", "data", "network", "a GPU", "a cluster", "make demo", "minutes", "wandb", "a shell",
    "hydra-optuna-sweeper",
}  # fmt: skip
ENTRYPOINTS = {
    "train.py": ("config", TrainConfig, check_train),
    "induce.py": ("induce", InduceConfig, check_induce),
    "evaluate.py": ("evaluate", EvaluateConfig, check_evaluate),
}
# Batch scripts whose arguments are overrides.
STARTERS = {"scripts/slurm/train.sbatch": "train.py"}


class Block(NamedTuple):
    """A fenced block of a page."""

    file: str  # that it is the content of; "" for a block that is none
    language: str
    text: str


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def blocks(page: Path) -> list[Block]:
    found = re.findall(
        r"(?:^`([\w./-]+)`:\n\n)?^```([a-z]*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    return [Block(*parts) for parts in found]


def needs(block: Block) -> list[str]:
    first = block.text.splitlines()[0]
    return first.removeprefix("# needs: ").split(", ") if first.startswith("# needs: ") else []


def lines_of(block: Block) -> list[list[str]]:
    """The words of each command, without the variables that stand before it."""
    lines = [shlex.split(line, comments=True) for line in block.text.replace("\\\n", " ").splitlines()]
    stripped = [re.sub(r"^(\w+=\S* )+", "", shlex.join(words)) for words in lines if words]
    return [shlex.split(line) for line in stripped]


def overrides_in(words: list[str]) -> tuple[str, list[str]] | None:
    """("train.py", arguments) of a command that starts an entrypoint, by whatever launcher."""
    if "#" in words:
        words = words[: words.index("#")]
    for place, word in enumerate(words):
        program = STARTERS.get(word, word)
        if program in ENTRYPOINTS:
            return program, words[place + 1 :]
    return None


def documented_commands(*, running: bool) -> list[tuple[str, str, list[str]]]:
    """(page, "train.py", arguments) of each line that starts an entrypoint, in blocks that run here or do not."""
    return [
        (name_of(page), *found)
        for page in PAGES
        for block in blocks(page)
        if block.language == "bash" and running == (not needs(block))
        for words in lines_of(block)
        if (found := overrides_in(words))
    ]


COMMANDS = documented_commands(running=False)


def test_the_pages_show_all_three_entrypoints_and_both_published_commands():
    assert {entrypoint for _, entrypoint, _ in COMMANDS} == set(ENTRYPOINTS)
    keys = {"trainer=FSDPTrainer", "gradient_accumulation_steps=4", "datasets=[si]", "model=alpaca7b"}
    published = [arguments for page, _, arguments in COMMANDS if page == "docs/paper.md" and keys <= set(arguments)]
    assert [("loss=sft" in one, "loss=dpo" in one) for one in published] == [(True, False), (False, True)]


@pytest.mark.parametrize(
    ("entrypoint", "arguments"),
    [(entrypoint, arguments) for _, entrypoint, arguments in COMMANDS],
    ids=[f"{page} {' '.join(arguments)}"[:90] for page, _, arguments in COMMANDS],
)
def test_a_command_that_does_not_run_here_composes(entrypoint, arguments):
    name, config_class, _ = ENTRYPOINTS[entrypoint]
    configs = compose_configs(name, [word for word in arguments if word != "-m"], multirun="-m" in arguments)
    assert (len(configs) > 1) == ("-m" in arguments)
    assert all(isinstance(config, config_class) for config in configs)


def navigation(entry: object) -> list[str]:
    """The pages of the site in their order, as mkdocs.yml names them."""
    if isinstance(entry, str):
        return [entry]
    inner = entry.values() if isinstance(entry, dict) else entry
    return [page for one in inner for page in navigation(one)]


NAVIGATION = navigation(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])


def stories() -> dict[str, list[Path]]:
    """The pages with commands that run: each by itself, those of the stages one behind the other."""
    runs = [page for page in PAGES if any(block.language == "bash" and not needs(block) for block in blocks(page))]
    stages = [DOCS / name for name in NAVIGATION if name.startswith("stages/")]
    return {"docs/stages": stages} | {name_of(page): [page] for page in runs if page not in stages}


STORIES = stories()


@pytest.mark.parametrize("story", STORIES)
def test_the_commands_of_a_page_run(story, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    num_run = 0
    for block in [block for page in STORIES[story] for block in blocks(page)]:
        if block.file:
            path = tmp_path / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        elif block.language == "bash" and not needs(block):
            for words in lines_of(block):
                run_command_line(words, monkeypatch)
                num_run += 1
    assert num_run > 0


def run_command_line(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one command as a shell would, in this process."""
    found = overrides_in(words)
    if words[0] == "make":
        return  # its target exists, and CI makes it
    if words[:2] == ["python", "-m"]:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run([sys.executable, *words[1:]], env=environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        return
    assert found, f"no rule how to run {words}: begin the block with `# needs: ...`"
    program, arguments = found
    main = importlib.import_module(program.removesuffix(".py")).main  # here: it imports torch
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    status = None
    try:
        run_entrypoint(*ENTRYPOINTS[program], main)
    except SystemExit as stopped:  # of --help, too
        status = stopped.code
    assert not status, f"{shlex.join(words)}: status {status}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_say_what_they_need(page):
    for block in blocks(page):
        if block.language == "bash":
            assert set(needs(block)) <= NEEDS, f"unknown need in: {block.text}"
        else:
            commands = re.findall(r"^(?:python|make|torchrun|sbatch|pip|wandb) \S+.*", block.text, re.MULTILINE)
            assert block.file or not commands, f"commands belong into a block of ```bash: {commands}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert not [target for target in links if not (page.parent / target).exists()]
    named = re.findall(
        r"`((?:config|scripts|trainers|safer_instruct|quickstart|benchmarks|tests|docs)/[\w./-]*\w)`(?!:\n)", text
    )
    modules = re.findall(r"python -m ((?:benchmarks|scripts)\.\w+)", text)
    missing = [name for name in named if not (REPOSITORY / name).exists() and "NAME" not in name]
    missing += [name for name in modules if not (REPOSITORY / (name.replace(".", "/") + ".py")).exists()]
    assert not missing


def test_make_targets_of_the_pages_exist():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    named = {name for page in PAGES for name in re.findall(r"\bmake ([a-z-]+)\b", "\n".join(code(page)))}
    assert {"demo", "test", "docs"} <= named
    assert all(re.search(rf"^{name}:", makefile, re.MULTILINE) for name in named), named


def code(page: Path) -> list[str]:
    """What stands in blocks of commands, and in spans of code."""
    text = page.read_text(encoding="utf-8")
    return [block.text for block in blocks(page) if block.language == "bash"] + re.findall(r"`(make [^`]+)`", text)


def test_every_page_is_in_the_navigation():
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert set(NAVIGATION) == pages, "name the page under `nav` of mkdocs.yml"
    assert len(NAVIGATION) == len(pages)


def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("material", reason="pip install -r requirements-docs.txt")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(list(DOCS.rglob("*.md"))) - 1
    loads = r"""<(?:script|img|link|iframe)[^>]*?(?:src|href)=["']?(?:https?:)?//(?!squidfunk)"""
    assert not [page.name for page in pages if re.search(loads, page.read_text(encoding="utf-8"))]
    dpo = (tmp_path / "site" / "stages" / "dpo.html").read_text(encoding="utf-8")
    assert dpo.count("<math") >= 2
    assert "arithmatex" not in dpo
    for page, braces in (("configuration", "{instruction: prompt}"), ("data", "{role, content}")):
        html = (tmp_path / "site" / f"{page}.html").read_text(encoding="utf-8")
        assert braces in html, "at the end of a cell, braces outside of code are read as attributes and vanish"


def test_messages_that_the_questions_quote_are_those_of_the_code():
    text = (DOCS / "faq.md").read_text(encoding="utf-8")
    leads = re.findall(r"^\*\*(.+?)\*\*", text, re.MULTILINE)
    quoted = {span for lead in leads for span in re.findall(r"`(.+?)`", lead) if " " in span}
    quoted -= {"no matches found: datasets=[si]"}  # the shell's
    folders = ("config", "trainers", "safer_instruct")
    sources = [*REPOSITORY.glob("*.py"), *(path for one in folders for path in (REPOSITORY / one).rglob("*.py"))]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in sources))
    assert len(quoted) > 4
    keys = [span.removeprefix("dropped: ") for span in quoted]  # of counts, shown with blanks
    assert not [key for key in keys if key not in code and key.replace(" ", "_") not in code]


def test_every_loss_is_on_the_page_of_losses_or_of_its_stage():
    pages = [DOCS / "losses.md", DOCS / "stages" / "sft.md", DOCS / "stages" / "reverse.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    assert not [name for name in LOSSES if f"`{name}`" not in text and f"loss={name}" not in text]
