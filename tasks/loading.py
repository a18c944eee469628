"""Where the rows of a data set come from: a local copy, else a pinned revision on the hub.

This module knows file formats and the hub, but not what a row means.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from repository import ROOT

_SUFFIXES = (".jsonl", ".parquet")
_HUB_TIMEOUT_S = 10.0


class MissingSplit(ValueError):
    """A split that is in none of the places where the loader looks for it."""


@dataclass(frozen=True)
class DatasetSource:
    """A data set on the hub, as Parquet files `<config>/<split>-*-of-*.parquet`.

    hub_name: such as "openai/gsm8k"; local copies are named by the part after the slash.
    revision: the commit that is read, so that runs on different days read the same data.
    columns: the columns that are read, with the Python type of their values.
    """

    hub_name: str
    config: str
    revision: str
    columns: Mapping[str, type]

    @property
    def short_name(self) -> str:
        return self.hub_name.rpartition("/")[2]


def load_rows(
    source: DatasetSource,
    split: str,
    path: str | None = None,
    *,
    limit: int | None = None,
    worked: bool = False,
) -> list[dict[str, Any]]:
    """The rows of a split in order, each with the columns of `source` and no others.

    `path` is one of two things:
    - the split itself: a file or a saved data set,
    - a folder with a file or a saved data set for each split.

    Without `path`, the function looks below DATASET_PATH, then on the hub.

    limit: read the first rows only.
    worked: the rows are for worked examples. A `path` to a single split has none, because worked
        examples must not come from the scored rows.

    Raises:
        MissingSplit: the split is not there; the error says what to place where.
        ValueError: the split cannot be read, or `path` or DATASET_PATH is wrong.
    """
    if path is not None:
        places = _below_path(source, split, path, worked)
    else:
        places = _below_root(source, split) or _on_hub(source, split)
    rows = list(islice(_rows(source, places), limit))
    if not rows:
        raise ValueError(f"dataset.path: '{places[0]}' has no rows; replace it")
    return rows


# ---------------------------------------------------------------------------------------------
# Where a split lies. A place is a file, or a folder that save_to_disk wrote.
# ---------------------------------------------------------------------------------------------


def _below_path(source: DatasetSource, split: str, path: str, worked: bool) -> list[Path]:
    if not isinstance(path, str) or not path:
        raise ValueError(f"dataset.path: {path!r} must be a path, or null")
    place = Path(path).expanduser()
    if not place.exists():
        raise ValueError(f"dataset.path: there is no '{place}'; correct it, or set it to null")
    if place.is_file() or _is_saved(place):
        if worked:
            raise ValueError(
                f"dataset.path: '{place}' is one split, and worked examples come from the split "
                f"'{split}'; give a folder with both, or set dataset.use_fewshot=false"
            )
        return [place]
    places = _in_folder(source, split, place)
    if not places:
        remedy = _remedy(source, place / f"{source.short_name}_{split}")
        raise MissingSplit(f"dataset.path: no split '{split}' in '{place}'; {remedy}")
    return places


def _below_root(source: DatasetSource, split: str) -> list[Path]:
    root = _data_root()
    if root is None:
        return []
    if not root.is_dir():
        raise ValueError(f"DATASET_PATH: there is no folder '{root}'; correct it, or unset it")
    in_folder = _in_folder(source, split, root / source.short_name)
    return in_folder or _named(root, f"{source.short_name}_{split}")


def _data_root() -> Path | None:
    """DATASET_PATH (environment or `.env`); a relative path starts at the repository's root."""
    root = os.environ.get("DATASET_PATH")
    return ROOT / Path(root).expanduser() if root else None


def _in_folder(source: DatasetSource, split: str, folder: Path) -> list[Path]:
    names = (split, f"{source.config}/{split}", f"{source.short_name}_{split}")
    return next(filter(None, (_named(folder, name) for name in names)), [])


def _named(folder: Path, name: str) -> list[Path]:
    """The split called `name` in `folder`: one path, or all files of its parts; else none."""
    if _is_saved(folder / name):
        return [folder / name]
    for suffix in _SUFFIXES:
        file = folder / f"{name}{suffix}"
        if file.is_file():
            return [file]
    parts = sorted(folder.glob(f"{name}-*-of-*.parquet"))
    # 'test-00000-of-00002': if only one of two files is there, a download was broken off.
    complete = parts and len(parts) == int(parts[0].stem.rpartition("-")[2])
    return parts if complete else []


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file()


def _on_hub(source: DatasetSource, split: str) -> list[Path]:
    """The hub's own files of the split, in the hub's cache.

    This does not use `datasets.load_dataset`. If the hub cannot be reached, that function retries
    for half a minute and then takes any revision from its cache. It also fetches all splits to read
    one.
    """
    problem = "it has no such split"
    try:
        places = _cached(source, split) or _fetched(source, split)
    except Exception as error:  # the client passes on all errors of its transport
        places, problem = [], _hub_problem(error)
    if not places:
        root = _data_root()
        folder = (root or Path("DATASET_PATH")) / source.short_name
        here = f"not below DATASET_PATH='{root}'" if root else "DATASET_PATH is not set"
        raise MissingSplit(
            f"dataset.path: no split '{split}' of {source.hub_name}: {here}, and not on the hub "
            f"({problem}); {_remedy(source, folder / split)}"
        )
    return places


def _cached(source: DatasetSource, split: str) -> list[Path]:
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return _snapshot(source, split, local_files_only=True)
    except LocalEntryNotFoundError:
        return []


def _fetched(source: DatasetSource, split: str) -> list[Path]:
    from huggingface_hub import HfApi

    # Ask one question first: a download keeps retrying when the hub cannot be reached.
    HfApi().dataset_info(source.hub_name, revision=source.revision, timeout=_HUB_TIMEOUT_S)
    return _snapshot(source, split)


def _snapshot(source: DatasetSource, split: str, **options: Any) -> list[Path]:
    from huggingface_hub import snapshot_download

    name = f"{source.config}/{split}"
    folder = snapshot_download(
        source.hub_name,
        repo_type="dataset",
        revision=source.revision,
        allow_patterns=f"{name}-*.parquet",
        **options,
    )
    return _named(Path(folder), name)


def _hub_problem(error: Exception) -> str:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE=1, and its cache has no such split of the revision that is read"
    return f"asking for it failed with {type(error).__name__}"


def _remedy(source: DatasetSource, place: Path) -> str:
    columns = ", ".join(source.columns)
    return (
        f"place it, with the columns {columns}, as '{place}.jsonl' or .parquet, or with "
        f"save_to_disk as the folder '{place}'"
    )


# ---------------------------------------------------------------------------------------------
# What a place holds
# ---------------------------------------------------------------------------------------------


def _rows(source: DatasetSource, places: Iterable[Path]) -> Iterator[dict[str, Any]]:
    for place in places:
        for position, row in enumerate(_read(place)):
            _check_row(source, row, f"dataset.path: row {position} of '{place}'")
            yield {column: row[column] for column in source.columns}


def _check_row(source: DatasetSource, row: object, where: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {row!r:.40}, no object with columns; replace the file")
    missing = [column for column in source.columns if column not in row]
    if missing:
        raise ValueError(
            f"{where} has no column {', '.join(missing)}, but {', '.join(row) or 'none'}; name the "
            f"columns as {source.hub_name} does"
        )
    for column, kind in source.columns.items():
        if not isinstance(row[column], kind):
            raise ValueError(
                f"{where}: {column} is {row[column]!r:.40} and must be of type {kind.__name__}, as "
                f"in {source.hub_name}; correct it"
            )


def _read(place: Path) -> Iterator[Any]:
    readers = {".jsonl": _read_jsonl, ".json": _read_jsonl, ".parquet": _read_parquet}
    reader = _read_saved if place.is_dir() else readers.get(place.suffix)
    if reader is None:
        raise ValueError(f"dataset.path: '{place}' must end in .jsonl or .parquet; rename it")
    try:
        yield from reader(place)
    except (OSError, ValueError, KeyError) as error:  # pyarrow and datasets raise these too
        reason = " ".join(str(error).split())
        raise ValueError(f"dataset.path: cannot read '{place}': {reason}; replace it") from error


def _read_saved(folder: Path) -> Iterator[Any]:
    import datasets  # imported here: it takes seconds, and few runs read such a folder

    yield from datasets.load_from_disk(str(folder))


def _read_parquet(file: Path) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(batch_size=1024):
            yield from batch.to_pylist()


def _read_jsonl(file: Path) -> Iterator[Any]:
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from error
