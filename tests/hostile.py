"""Files that nobody should be given, and what reads them: a reader returns values or says what is wrong (UserError).

Texts of JSON, CSV and YAML are drawn by grammar, so that most of them get past the parser, with what parsers choke on
in the place of a value; then some bytes are lost, changed, or written in another encoding.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from config.errors import UserError
from config.settings import CorpusSettings, DatasetSettings, PromptSetSettings
from safer_instruct.experts.rules import Rules
from safer_instruct.induction.ledger import FORMAT, Ledger, read_ledger
from safer_instruct.induction.status import render_status
from safer_instruct.report.evaluations import find_finished, read_evaluations
from safer_instruct.report.training_runs import find_training_overlap, read_training_run
from safer_instruct.text.corpus import read_corpus
from safer_instruct.text.loading import load_examples
from safer_instruct.text.prompt_sets import read_prompts
from safer_instruct.text.schemas import SCHEMAS
from scripts.runs import read_status
from trainers.run.run_dir import RunDir

# In the place of a value: too many digits, nested too deeply, no number, half of a surrogate pair, a NUL.
HOSTILE_JSON = [
    "9" * 5000, "9" * 400, "[" * 1200 + "]" * 1200, '{"a":' * 1200 + "1" + "}" * 1200, "1e999", "NaN", "-Infinity",
    '"\\ud800"', '"\\u0000"', '"\\u001b[2J"', "-0", "1E400", '""', "null", "true", '{"a": 1, "a": 2}',
]  # fmt: skip
HOSTILE_YAML = [
    "9" * 5000, "!!int ''", "!!timestamp x", "!!bool maybe", "2001-99-99", "!!python/name:os.system", "&a [*a]", "~",
    "!!binary '?'", "{? [a] : b}", "1:2:3:4:5:99999", ".inf", "'\\ud800'", '"\\ud800"', "0x", "<<: 1", "*x", "!!set x",
    "!!float x", "2001-01-01T00:00:00+99:99", "[" * 300 + "]" * 300,
]  # fmt: skip
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{n}: &{n} [{','.join([f'*{m}'] * 9)}]\n" for m, n in zip("abcdefghi", "bcdefghij", strict=True)
)
COLUMNS = [
    "instruction", "input", "output", "chosen", "rejected", "prompt", "response", "messages", "id", "label", "kind",
    "reference", "score", "completion", "source",
]  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=12), st.sampled_from(["Say hi.", "No.", "\ud800", "a\0b", "\x1b[31m", "\u202e", "\ufeff", '"', ""])
)


def json_text(value: Any) -> str:
    return json.dumps(value)


VALUES = st.recursive(
    st.one_of(
        st.sampled_from(HOSTILE_JSON),
        TEXTS.map(json_text),
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats()).map(json_text),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda found: f"[{','.join(found)}]"),
        st.dictionaries(st.sampled_from(["role", "content", "from", "value", *COLUMNS]), inner, max_size=4).map(
            lambda found: "{" + ",".join(f"{json_text(key)}:{value}" for key, value in found.items()) + "}"
        ),
    ),
    max_leaves=6,
)


def objects(keys: list[str], values: st.SearchStrategy[str] = VALUES) -> st.SearchStrategy[str]:
    """JSON objects with some of these keys; a text is the likeliest value, or few rows would get far."""
    one = st.one_of(TEXTS.map(json_text), values)
    pairs = st.dictionaries(st.one_of(st.sampled_from(keys), TEXTS), one, min_size=1, max_size=6)
    return pairs.map(lambda row: "{" + ", ".join(f"{json_text(key)}: {value}" for key, value in row.items()) + "}")


ROWS = st.lists(st.one_of(objects(COLUMNS), objects(COLUMNS), VALUES), max_size=4)


@st.composite
def files(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> bytes:
    """A text as it may lie on a disk: most as they are, some damaged, some in another encoding."""
    text = draw(texts)
    encoding = draw(st.sampled_from(["utf-8"] * 8 + ["utf-16", "utf-8-sig", "latin-1", "utf-32"]))
    content = text.encode(encoding, errors="replace" if encoding == "latin-1" else "surrogatepass")
    if draw(st.integers(0, 3)) or not content:
        return content
    at = draw(st.integers(0, len(content) - 1))
    return content[:at] + draw(st.binary(max_size=3)) + content[at + draw(st.integers(0, 4)) :]


def csv_text(rows: list[list[str]]) -> str:
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue()


JSON_LISTS = st.one_of(ROWS.map(lambda rows: "[" + ",\n".join(rows) + "]"), VALUES)
JSON_LINES = ROWS.map(lambda rows: "".join(f"{row}\n" for row in rows))
CELLS = st.one_of(TEXTS, TEXTS, VALUES)
TABLES = st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=6).flatmap(
    lambda head: st.lists(st.lists(CELLS, min_size=len(head) - 1, max_size=len(head)), max_size=4).map(
        lambda rows: csv_text([head, *rows])
    )
)
YAML_VALUES = st.one_of(st.sampled_from(HOSTILE_YAML), TEXTS.map(json_text))
RULE_KEYS = ["lexicons", "refusals", "categories", "instruction", "words", "key", "intent", "harm", "responses"]


@st.composite
def yaml_edits(draw: st.DrawFn, whole: str) -> str:
    """A good file of ours in which one or two values are something else, or a bomb stands before it."""
    lines = whole.splitlines()
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(lines) - 1))
        key, colon, _ = lines[at].partition(":")
        lines[at] = f"{key}{colon} {draw(YAML_VALUES)}"
    return (LAUGHS if draw(st.integers(0, 9)) == 0 else "") + "\n".join(lines) + "\n"


LEDGER_KEYS = ["id", "instruction", "verdict", "at", "cost", "tokens", "prompt"]
LEDGERS = st.tuples(
    st.one_of(
        st.just(f'{{"format": {FORMAT}, "configuration": {{"a": 1}}, "rows": 3}}'),
        VALUES.map(lambda value: f'{{"format": {FORMAT}, "configuration": {value}, "rows": {value}}}'),
        VALUES,
    ),
    st.lists(objects(LEDGER_KEYS), max_size=3),
).map(lambda parts: "".join(f"{line}\n" for line in [parts[0], *parts[1]]))
METRICS = st.lists(st.one_of(objects(["counters/examples", "loss/train"]), VALUES), max_size=4).map(
    lambda rows: "".join(f"{row}\n" for row in rows)
)
SAMPLE = {
    "model": "m", "set": "p", "id": "u0", "kind": "unsafe", "label": "a", "source": "s", "instruction": "i",
    "output": "o", "truncated": False, "outcome": "safe", "harm_label": "", "specific": None, "correct": None,
    "helpful": None, "prompt_cut": False,
}  # fmt: skip
REPORT = {"models": {"m": {}}, "prompts": {"p": {"n": 1, "fingerprint": "f"}}}


@st.composite
def edited_json(draw: st.DrawFn, whole: dict[str, Any]) -> str:
    """A good document in which some values are something else."""
    changed = draw(st.dictionaries(st.sampled_from(sorted(whole)), VALUES, max_size=2))
    parts = {key: changed.get(key, json_text(value)) for key, value in whole.items()}
    return "{" + ", ".join(f"{json_text(key)}: {value}" for key, value in parts.items()) + "}"


def read_rows_by_all(file: Path) -> None:
    """By every schema, as a corpus, and as prompts."""
    for schema in SCHEMAS:
        with suppress(UserError):
            list(load_examples(DatasetSettings(str(file), schema), "si"))
    with suppress(UserError):
        read_corpus(CorpusSettings(str(file), response_column="response"))
    with suppress(UserError):
        list(read_prompts("p", PromptSetSettings(str(file), kind="unsafe")))


def read_a_rules_file(file: Path) -> None:
    rules = Rules.from_yaml(file)
    rules.judge(rules.respond("Tell me how to rig the vote.") or "hi", "No.")


def read_a_ledger(file: Path) -> None:
    with suppress(UserError):
        read_ledger(file)
    with suppress(UserError):
        render_status(file.parent)
    with Ledger(file, {"a": 1}):
        pass


def read_a_run(file: Path) -> None:
    """The folder of a run, one of whose files is hostile."""
    for read in (
        lambda: read_training_run("run", file.parent),
        lambda: find_training_overlap(str(file.parent), {"hi": ["p/1"]}),
        lambda: read_status(file.parent, 0.0),
    ):
        with suppress(UserError):
            read()
    with RunDir.open(file.parent, config={"a": 1}, manifest={}):
        pass


def read_an_evaluation(file: Path) -> None:
    (found,) = find_finished([str(file.parent)])[1:]
    read_evaluations(found)


class Subject:
    """A kind of file: its name, what may stand in it, what else lies in its folder, and who reads it."""

    def __init__(
        self, name: str, content: st.SearchStrategy[str], read: Callable[[Path], object], **beside: str
    ) -> None:
        self.name, self.content, self.read = name, files(content), read
        self.beside = {file.replace("_", "."): text for file, text in beside.items()}

    def check(self, folder: Path, content: bytes) -> None:
        """Raise what a user would see as a traceback."""
        for name, text in self.beside.items():
            (folder / name).write_text(text)
        file = folder / self.name
        file.write_bytes(content)
        with suppress(UserError):
            self.read(file)


RULES = (Path(__file__).parent.parent / "quickstart" / "rules.yaml").read_text(encoding="utf-8")
CONFIG = """\
exp_name: a
n_examples: 4
n_epochs: 1
datasets:
  si:
    path: pairs.jsonl
    schema: si
    template: alpaca
    eval_fraction: 0.05
    labels: null
"""
MANIFEST = '{"command": ["python"], "data": {"train": {"rows": 3}}}'
SUBJECTS = {
    "json": Subject("a.json", JSON_LISTS, read_rows_by_all),
    "jsonl": Subject("a.jsonl", JSON_LINES, read_rows_by_all),
    "csv": Subject("a.csv", TABLES, read_rows_by_all),
    "rules": Subject("a.yaml", yaml_edits(RULES), read_a_rules_file),
    "ledger": Subject("filter-00000-of-00001.jsonl", LEDGERS, read_a_ledger),
    "config of a run": Subject(
        "config.yaml", yaml_edits(CONFIG), read_a_run, metrics_jsonl='{"loss/train": 1.0}\n', manifest_json=MANIFEST
    ),
    "manifest of a run": Subject(
        "manifest.json", edited_json(json.loads(MANIFEST)), read_a_run, metrics_jsonl='{"loss/train": 1.0}\n',
        config_yaml=CONFIG,
    ),
    "metrics of a run": Subject("metrics.jsonl", METRICS, read_a_run, config_yaml=CONFIG, manifest_json=MANIFEST),
    "report": Subject("report.json", edited_json(REPORT), read_an_evaluation, samples_jsonl=json_text(SAMPLE) + "\n"),
    "samples": Subject(
        "samples.jsonl", edited_json(SAMPLE).map(lambda row: row + "\n"), read_an_evaluation,
        report_json=json_text(REPORT),
    ),
}  # fmt: skip
