"""The source of a dataset's rows: local files, or a dataset that the library `datasets` reads from the hub."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from config.errors import UserError
from config.paths import find_path, may_be_on_hub
from config.settings import DatasetSettings
from safer_instruct.text.display import visible
from safer_instruct.text.formats import Row
from safer_instruct.text.readers import data_files, left_out_of, other_entries, splits_left_out


class Source(NamedTuple):
    """What the rows of a dataset depend on."""

    files: list[Path]  # the files to read; empty for a dataset on the hub
    version: str  # on the hub: dataset, config and commit
    read: list[str]  # what is read, for a report
    left_out: list[str]  # files or splits that nothing is trained on, by their names
    others: list[str]  # what is no data file by its name


def source_of(name: str, settings: DatasetSettings) -> Source:
    """Return the source of `datasets.NAME` for training.

    Raises:
        UserError: There is no such file, folder or dataset, or no network to find it.
    """
    hub = hub_dataset(name, settings)
    if hub is not None:
        return hub.source
    path = find_path(settings.path)
    files = data_files(path, training=True)
    return Source(files, "", [file.name for file in files], splits_left_out(path), other_entries(path))


def hub_dataset(name: str, settings: DatasetSettings) -> HubDataset | None:
    """Return the dataset if the library has to read it: it is on the hub, or a local folder in the hub's layout."""
    by_library = settings.split or settings.config or settings.streaming or may_be_on_hub(settings.path)
    return HubDataset(name, settings) if by_library else None


class HubDataset:
    """A dataset read by `datasets`; only its card and file names are loaded before the first row is requested."""

    def __init__(self, name: str, settings: DatasetSettings) -> None:
        self._name, self._settings = name, settings
        folder = find_path(settings.path)
        self._is_folder = folder.exists()
        try:
            path = str(folder.resolve()) if self._is_folder else settings.path
            self._builder = _builder(path, settings.config, settings.revision)
        except Exception as error:  # the library, its network code and its file systems may raise anything
            raise self._refused("", error) from error
        files: dict[str, list[str]] = self._builder.config.data_files or {}
        names = [str(split) for split in files or self._builder.info.splits or ()]
        left_out = [] if settings.split else left_out_of(names, settings.path, f"datasets.{name}.split=NAME")
        self._splits = [settings.split] if settings.split else [split for split in names if split not in left_out]
        if self._is_folder:  # hash the files themselves, as the library's cache does not notice that one has changed
            found = [Path(file) for split in self._splits for file in files.get(split, ())]
            self.source = Source(found, "", [file.name for file in found], left_out, [])  # what its rows depend on
        else:
            version = "/".join(Path(self._builder.cache_dir).parts[-4:])
            self.source = Source([], version, [f"{version} {split}" for split in self._splits], left_out, [])

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Yield ("path/split:number", row): streamed, or from the library's local copy of the dataset.

        A local folder is always streamed.

        Raises:
            UserError: There is no such split, or reading breaks off.
        """
        for split in self._splits:
            number = 0
            try:
                for number, row in enumerate(self._load(split), start=1):
                    yield f"{self._settings.path}/{split}:{number}", dict(row)
            except Exception as error:  # as above
                raise self._refused(f" after row {number} of split={split}", error) from error

    def _load(self, split: str) -> Any:
        if self._settings.streaming or self._is_folder:
            return self._builder.as_streaming_dataset(split)
        self._builder.download_and_prepare()
        return self._builder.as_dataset(split).with_format(None)

    def _refused(self, place: str, error: Exception) -> UserError:
        settings, key = self._settings, f"datasets.{self._name}"
        given = {"config": settings.config, "revision": settings.revision}
        asked = ", ".join([repr(settings.path), *(f"{name}={value}" for name, value in given.items() if value)])
        reason = visible(" ".join(str(error).split())[:300]) or type(error).__name__
        hint = (
            f"; there is no such local file or folder either. Without a network: hf download {settings.path} "
            f"--repo-type dataset --local-dir FOLDER where there is one, then {key}.path=FOLDER {key}.split=train"
        )
        hint *= not self._is_folder
        return UserError(f"{key}.path={settings.path}: load_dataset({asked}) failed{place}: {reason}{hint}")


@lru_cache
def _builder(path: str, config: str | None, revision: str | None) -> Any:
    import datasets  # slow to import, and not needed for plain files

    return datasets.load_dataset_builder(path, config, revision=revision)
