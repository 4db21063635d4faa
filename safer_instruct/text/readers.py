"""Stream rows from files: CSV, JSON, JSONL, Parquet, arrow, and folders saved by `datasets`.

No file is ever held in memory as a whole, and no error message quotes a text: it names the file, line and rule.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from config.checksums import CHECKSUMS, require_untouched
from config.errors import UserError
from config.reading import read_mapping
from safer_instruct.text.display import short_name, visible
from safer_instruct.text.formats import DATA_SUFFIXES, MAX_TEXT_CHARACTERS, BadLine, Row, data_suffix, read_file, refuse

DATASET_FILES = ("si.jsonl", "si.parquet")  # what induce.py calls its dataset: the rest of such a folder is not data
NOT_DATA = frozenset(
    {"report.json", "manifest.json", "dataset_info.json", "dataset_infos.json", "state.json", "test_set.csv", CHECKSUMS}
)
_SHARD = re.compile(r"(.*-)(\d+)(-of-0*(\d+)\..*)")  # train-00000-of-00002.parquet
# Words in the name of a split.
HELD_OUT_SPLIT, TRAIN_SPLIT = (
    re.compile(rf"(?<![a-z])({words})(?![a-z])", re.IGNORECASE)
    for words in ("test(ing|set)?|valid(ation)?|val|dev|eval(uation)?|(held|hold)[-_ ]?out", "train(ing|set)?")
)

# Other common names of the columns, for suggestions in error messages.
SYNONYMS = {
    "instruction": ("prompt", "question", "query", "goal", "behavior", "request"),
    "chosen": ("output", "response", "completion", "answer", "preferred"),
    "output": ("response", "completion", "answer", "chosen"),
    "prompt": ("instruction", "question", "query", "problem", "input"),
    "messages": ("conversation", "conversations", "dialogue", "chat"),
    "conversations": ("conversation", "messages", "dialogue", "chat"),
    "responses": ("generations", "completions", "answers", "candidates"),
    "scores": ("ratings", "rewards"),
    "good": ("label", "is_safe", "desirable"),
    "rejected": ("dispreferred", "unsafe", "bad"),
    "response": ("output", "text", "completion", "answer", "rejected", "messages", "conversations"),
}


def require_columns(
    columns: Collection[str], needed: Collection[str], where: str | Path, setting: str = "",
    renamed: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Raise a UserError that lists the columns found, unless all `needed` are among them.

    `setting` is the command line key that renames columns, for a hint; `renamed` holds the renames already in effect
    (our name -> the file's column).
    """
    names = renamed or {}
    missing = [name for name in needed if name not in columns]
    if missing:
        shown = [f"{short_name(names[name])} (as {name})" if name in names else short_name(name) for name in columns]
        found = ", ".join(shown) or "none"
        asked = ", ".join(f"{visible(names[name])} (for {name})" if name in names else name for name in missing)
        hints = [f"{setting}.{name}={guess}" for name in missing if setting and (guess := likely(name, columns))]
        hint = f"; to read another column in its place, write {' '.join(hints)}" if hints else ""
        if len(columns) == 1 and (";" in found or "\t" in found):
            hint = "; a CSV file has commas between its columns"
        raise UserError(f"{where}: missing column {asked}; the columns found are: {found}{hint}")


def likely(name: str, columns: Collection[str]) -> str:
    """Return the column that probably holds what `name` stands for, "" if none does."""
    by_name = {str(column).strip().lower(): str(column) for column in columns}
    return next((by_name[other] for other in (name, *SYNONYMS.get(name, ())) if other in by_name), "")


def data_files(path: Path, *, training: bool = False) -> list[Path]:
    """Return the files that `read_rows(path)` reads, sorted by name; for a `datasets` folder, its arrow files.

    With `training`, files named like an evaluation split are left out; see `splits_left_out`.

    Raises:
        UserError: `path` does not exist, or holds no data file.
    """
    if path.is_file():
        if not data_suffix(path):
            raise UserError(f"{path}: a data file ends in one of {', '.join(DATA_SUFFIXES)}")
        return [path]
    if not path.is_dir():
        odd = "neither a file nor a folder; what a pipe brings cannot be read twice, so write it into a file"
        raise UserError(f"{path}: {odd if path.exists() else 'no such file or folder'}")
    files = _folder_files(path)
    if not files:
        found = ", ".join(sorted(visible(file.name) for file in path.iterdir())[:10]) or "nothing"
        wanted = ", ".join(f"*{suffix}" for suffix in DATA_SUFFIXES)
        raise UserError(
            f"{path}: no data file ({wanted}) in it, give the path of a folder that has one; it holds {found}"
        )
    left_out = splits_left_out(path) if training else []
    files = [file for file in files if file.relative_to(path).parts[0] not in left_out]
    _require_shards(files)
    return files


def _require_shards(files: Iterable[Path]) -> None:
    """Refuse a part of the files that are numbered as one dataset's: a download that broke off."""
    numbers: dict[tuple[str, str, int], set[str]] = {}
    for file in files:
        if found := _SHARD.fullmatch(file.name):
            numbers.setdefault((str(file.with_name(found[1])), found[3], int(found[4])), set()).add(found[2])
    for (name, rest, total), there in numbers.items():
        if len(there) < total:
            raise UserError(
                f"{name}*{rest}: {len(there)} of {total} files are there; copy the others, or rename those that are"
            )


def other_entries(path: Path) -> list[str]:
    """Return what stands beside the data files of a folder and is not read, whatever it holds."""
    if not path.is_dir() or _is_datasets_folder(path) or any((path / name).is_file() for name in DATASET_FILES):
        return []
    is_known = re.compile(r"[._]|readme|licen[cs]e", re.IGNORECASE)
    names = [entry.name for entry in path.iterdir() if not data_suffix(entry) and not is_known.match(entry.name)]
    return sorted(names)


def splits_left_out(path: Path) -> list[str]:
    """Return the parts of a folder (files, or splits of a DatasetDict) that training leaves out by default.

    If any part has `train` in its name, all the others are left out; otherwise those named like an evaluation split.

    Raises:
        UserError: Nothing would be left.
    """
    if not path.is_dir():
        return []
    parts = sorted({file.relative_to(path).parts[0] for file in _folder_files(path)})
    return left_out_of(parts, str(path), f"the path of one, {path / parts[0]}," if parts else "")


def left_out_of(parts: Sequence[str], where: str, otherwise: str) -> list[str]:
    """Return the files or splits that training leaves out by default; see `splits_left_out`.

    For the error message, `where` says where they are, and `otherwise` what to give to use one of them anyway.
    """
    train = [part for part in parts if TRAIN_SPLIT.search(part)]
    left_out = [part for part in parts if (part not in train if train else HELD_OUT_SPLIT.search(part))]
    if parts and left_out == list(parts):
        raise UserError(
            f"{where}: holds only {', '.join(parts)}, which are not for training by their names; give "
            f"{otherwise} to train on it anyway"
        )
    return left_out


def _folder_files(path: Path) -> list[Path]:
    for name in DATASET_FILES:
        if (path / name).is_file():
            return [path / name]
    if _is_datasets_folder(path):
        return _datasets_files(path)
    files = [file for file in path.iterdir() if data_suffix(file) and file.name[0] not in "._"]
    files = sorted(file for file in files if file.name not in NOT_DATA)
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no file, but a folder, a pipe or a link that leads nowhere; mend or remove it")
    return files


def read_rows(
    path: Path,
    *,
    columns: Mapping[str, str] | None = None,
    training: bool = False,
    bad_line: Callable[[BadLine], None] = refuse,
) -> Iterator[tuple[str, Row]]:
    """Stream the rows of a file or of all data files in a folder, each with its location.

    Reads CSV (with a header), JSON (a list of objects) and JSONL, each plain or as .gz or .zst, Parquet, arrow, and
    folders saved by `datasets`; a folder made by induce.py yields only its dataset. NaN, which pandas writes for
    missing values, is read as None.

    Args:
        path: File or folder.
        columns: Our name -> the file's column to read under that name.
        training: Leave out files and splits named like an evaluation split.
        bad_line: Called with each row that cannot be read; the default raises it.

    Returns:
        (where, row) pairs; `where` is "file:line" (the line that the row starts on), or the row for Parquet and arrow.

    Raises:
        UserError: When called: a missing path, or one of our own files that has been modified. While iterating: an
            empty file, broken JSON or CSV, bytes that are not UTF-8.
    """
    files = data_files(Path(path), training=training)
    for file in files:
        require_untouched(file)
    return usable_rows(chain.from_iterable(map(read_file, files)), columns or {}, bad_line)


def usable_rows(
    rows: Iterable[tuple[str, Row | BadLine]], columns: Mapping[str, str], bad_line: Callable[[BadLine], None]
) -> Iterator[tuple[str, Row]]:
    """Yield the rows that can be read, with their columns renamed; see `read_rows`."""
    names = {column: name for name, column in columns.items()}
    for where, row in rows:
        if isinstance(row, BadLine):
            bad_line(row)
        elif any(isinstance(value, str) and len(value) > MAX_TEXT_CHARACTERS for value in row.values()):
            bad_line(BadLine(where, "too_long", _TOO_LONG))
        else:
            # A column is skipped if another one is read under its name.
            read = {
                names.get(column, column): None if isinstance(value, float) and math.isnan(value) else value
                for column, value in row.items()
                if column in names or column not in columns
            }
            yield where, read


_TOO_LONG = f"a text of more than {MAX_TEXT_CHARACTERS:,} characters; split it or leave it out"


def _is_datasets_folder(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _datasets_files(path: Path) -> list[Path]:
    """Return the arrow files of a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`, in order."""
    try:
        whole = path / "dataset_dict.json"
        folders = [path / name for name in sorted(read_mapping(whole)["splits"])] if whole.is_file() else [path]
        states = [read_mapping(folder / "state.json") for folder in folders]
        if any(state.get("_indices_data_files") for state in states):
            raise ValueError("its rows are in another order than in its files")
        files = [
            f / part["filename"] for f, state in zip(folders, states, strict=True) for part in state["_data_files"]
        ]
        for file in files:
            (path / file.relative_to(path)).stat()  # it is there, and below the folder
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: a folder of `datasets` that cannot be read ({type(error).__name__}); save it again, or copy all "
            "of its files"
        ) from error
    if not files:
        raise UserError(f"{path}: the dataset is empty; it must hold at least one row")
    return files
