"""docs/configuration.md is what config/ says now: every key with its meaning, its default and what it may be."""

import re
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Annotated

from config import rules, settings
from config.help import comments
from config.paths import REPOSITORY
from config.schema import compose_config
from scripts.config_reference import CHOSEN, PAGE, _type, render_page


def test_the_page_is_not_stale():
    assert PAGE.read_text(encoding="utf-8") == render_page(), "run `make reference` and commit docs/configuration.md"


def rows() -> dict[str, list[str]]:
    """The cells of each key's row, by key."""
    lines = [line.replace("\\|", "/") for line in render_page().splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in cells if len(row) == 4}


def test_rows_say_what_the_command_line_takes():
    found = rows()
    assert found["warmup_ratio"][:2] == ["float in [0, 1) or null", "`null`"]
    assert found["batch_size"][:2] == ["int (1 or more)", "`4`"]
    assert found["lr_scheduler"][0].split(" / ")[:3] == ["constant", "linear", "cosine"]
    assert found["exp_name"][1] == "*must be set*"
    assert found["run_dir"][2].endswith("runs/&lt;exp_name>")
    assert found["expert.max_cost"][2] == "in the currency of the prices; null: no limit"


def test_every_key_of_a_composed_command_has_a_row():
    """The keys as OmegaConf has them, which is what can be typed, against those of the page."""
    page = rows()
    command = ["loss=dpo", "model=tiny", "datasets.si.path=x", "exp_name=x"]
    todo = [("", compose_config("config", command))]
    keys = []
    while todo:
        prefix, config = todo.pop()
        for name, value in vars(config).items():
            key = f"{prefix}{name}"
            if name == "datasets":
                todo.append(("datasets.NAME.", value["si"]))
            elif hasattr(value, "__dataclass_fields__"):
                todo.append((f"{key}.", value))
            else:
                keys.append(key)
    assert len(keys) > 70
    assert not [key for key in keys if key not in page]
    assert not [key for key in keys if not page[key][2]], "a field has no comment"


def test_every_choice_of_a_loss_and_an_expert_has_a_section_that_names_its_keys():
    page = re.split(r"^#{2,3} (.*)$", render_page(), flags=re.MULTILINE)
    sections = dict(zip(page[1::2], page[2::2], strict=True))
    kinds = {**CHOSEN["loss"], **CHOSEN["expert"]}
    files = [path for group in ("loss", "expert") for path in (REPOSITORY / "config" / group).glob("*.yaml")]
    assert {f"{path.parent.name}={path.stem}" for path in files} == set(kinds)
    for choice, kind in kinds.items():
        keys = [f"`{choice.partition('=')[0]}.{field.name}" for field in fields(kind)]
        assert not [key for key in keys if key not in sections[choice]], choice
    shared = re.findall(r"^[|] (`.*?`)", sections["Keys of several losses"], re.MULTILINE)
    assert len(shared) == len(set(shared)) > 5


def test_comments_stand_behind_a_field_or_above_it():
    @dataclass
    class Settings:
        """Two keys."""

        plain: int = 3  # behind
        # Above, in
        # two lines.
        ruled: Annotated[float, rules.above(0)] = 1.0
        bare: str = "#no comment"

    assert comments(Settings) == {"plain": "behind", "ruled": "Above, in two lines.", "bare": ""}
    assert _type(Annotated[float, rules.above(0)]) == "float (above 0)"


def test_a_choice_of_the_group_inheritscomments():
    assert comments(settings.ReverseSettings)["reduction"].startswith("What the loss is a mean over")


def test_the_script_needs_no_torch():
    code = "import sys, scripts.config_reference; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
