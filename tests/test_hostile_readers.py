"""No file ends in a traceback: whatever it holds, its reader returns values or raises a UserError."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings

from config.errors import UserError
from config.reading import load_yaml, read_json_lines, read_mapping
from safer_instruct.generation.trained_as import run_datasets
from safer_instruct.report.training_runs import read_metrics
from tests.hostile import CONFIG, HOSTILE_JSON, LAUGHS, SUBJECTS

EXAMPLES = 50  # of each of the ten kinds; benchmarks/hostile_readers.py draws 20,000


@pytest.mark.parametrize("kind", SUBJECTS)
def test_a_reader_returns_or_says_what_is_wrong(kind):
    subject = SUBJECTS[kind]
    read = []

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(subject.content)
    def check(content):
        with tempfile.TemporaryDirectory() as folder:
            subject.check(Path(folder), content)
        read.append(content)

    check()
    assert read  # each drawn file was read to a value or a UserError: anything else is raised by `subject.check`


@pytest.mark.parametrize("value", ["9" * 5000, "2001-99-99", "!!bool maybe", "&a [*a]", "[" * 400, "!!int ''"])
def test_yaml_that_cannot_be_built_is_no_yaml(value):
    """What PyYAML lets through as ValueError, KeyError, IndexError, RecursionError."""
    with pytest.raises(yaml.YAMLError):
        load_yaml(f"a: {value}")


def test_aliases_that_stand_for_billions_are_refused_and_others_are_read():
    with pytest.raises(yaml.YAMLError, match="1,000,000 values"):
        load_yaml(LAUGHS)
    assert load_yaml("a: &a [1, 2]\nb: *a\n<<: {c: 3}") == {"a": [1, 2], "b": [1, 2], "c": 3}
    assert load_yaml("") is None


def test_a_mapping_is_read_and_what_is_none_is_named(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"a": 1}')
    assert read_mapping(file) == {"a": 1}
    # A nested mapping is one, or too deep: hypothesis raises Python's limit for all tests of a process.
    for content in (*HOSTILE_JSON[:3], "[1]", "{", "\udcff"):
        file.write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(UserError, match=r"a\.json cannot be read \(.*\); copy it again"):
            read_mapping(file)
    with pytest.raises(UserError, match="No such file"):
        read_mapping(tmp_path / "b.yaml")


def test_json_lines_end_at_a_torn_one_and_name_a_broken_one(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a": \xff')
    assert list(read_json_lines(file)) == [{"a": 1}, {"a": 2}]
    for broken in (b'{"a": \xff}\n', b"[1]\n", b"9" * 5000 + b"\n"):
        file.write_bytes(b'{"a": 1}\n' + broken)
        with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a JSON object"):
            list(read_json_lines(file))


def test_a_row_of_metrics_holds_numbers_alone(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"a": 1, "b": "x", "c": ' + "9" * 400 + ', "d": [1], "e": null}\n')
    assert list(read_metrics(file)) == [{"a": 1.0, "c": float("inf")}]


def test_a_changed_config_of_a_run_names_the_key(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    assert run_datasets(str(tmp_path))["si"].eval_fraction == 0.05
    (tmp_path / "config.yaml").write_text(CONFIG.replace("0.05", "[0.05]"))
    with pytest.raises(UserError, match=r"config\.yaml of .*: eval_fraction: "):
        run_datasets(str(tmp_path))
