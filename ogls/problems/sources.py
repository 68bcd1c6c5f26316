"""Reading rows from a JSON, CSV or Parquet file, a folder of such files, or a Hugging Face dataset."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ogls.config import DataSource
from ogls.errors import DataError
from ogls.hub import prepare_hub

Row = dict[str, Any]

MAX_LISTED = 5  # how many rows an error or a report names
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev"), "validation"
)


def read_rows(source: DataSource) -> list[Row]:
    """All rows of a source. Raises DataError if it cannot be read or has no rows."""
    path = Path(source.source)
    if path.is_dir() and source.subset is None:
        rows = _folder(path, source.split)
    elif read := _reader(path):
        rows = read(path)
    else:
        rows = _hub(source)
    if not rows:
        raise DataError(f"{source.source} has no rows: set source to a file or data set that has some")
    return rows


def read_lines(source: DataSource) -> tuple[list[tuple[int, Row]], list[tuple[int, str]]]:
    """(line, row) of every row of a source, and (line, reason) of every malformed line.

    Only a JSON Lines file may have malformed lines. Rows of other sources are numbered from 1. Raises DataError as
    `read_rows` does.
    """
    path = Path(source.source)
    if path.is_file() and _reader(path) is _jsonl:
        rows, malformed = _parse_lines(path)
        if not rows and not malformed:
            raise DataError(f"{source.source} has no rows: name a file or data set that has some")
        return rows, malformed
    return list(enumerate(read_rows(source), start=1)), []


def _reader(path: Path) -> Callable[[Path], list[Row]] | None:
    """The function that reads a file with this ending; None for an unknown ending."""
    name = path.name.lower().removesuffix(".gz")
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    return next((read for ending, read in readers.items() if name.endswith(ending)), None)


def _folder(folder: Path, split: str) -> list[Row]:
    """The rows of all files of a folder; if file names tell splits, of the files of `split`."""
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        return _saved_dataset(folder, split)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".") and _reader(p))
    if not files:
        raise DataError(f"the folder {folder} has no .jsonl, .json, .csv or .parquet file")
    split_of = {path: _split(str(path.relative_to(folder))) for path in files}
    if found := set(split_of.values()) - {None}:
        files = [path for path in files if split_of[path] == _SPLITS.get(split, split)]
        if not files:
            raise DataError(f"the folder {folder} has no files of the split {split}; set split to {_listed(found)}")
    return [row for path in files if (read := _reader(path)) for row in read(path)]


def _split(name: str) -> str | None:
    """The split that a file name tells, such as data/train-00000-of-00002.parquet."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)


def _text(path: Path) -> str:
    """The content of a text file, which may be compressed with gzip and may begin with a byte order mark."""
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.name.lower().endswith(".gz") else content).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from None
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read problems from {path}: {getattr(error, 'strerror', None) or error}") from None


def _jsonl(path: Path) -> list[Row]:
    rows, malformed = _parse_lines(path)
    if malformed:
        listed = "\n  ".join(f"line {number}: {reason}" for number, reason in malformed[:MAX_LISTED])
        raise DataError(f"{path}: {len(malformed)} malformed lines:\n  {listed}")
    return [row for _, row in rows]


def _parse_lines(path: Path) -> tuple[list[tuple[int, Row]], list[tuple[int, str]]]:
    """(line, row) of every object of a JSON Lines file, and (line, reason) of every malformed line."""
    rows: list[tuple[int, Row]] = []
    malformed: list[tuple[int, str]] = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        try:
            row = json.loads(line) if line.strip() else {}
            if not isinstance(row, dict):
                raise ValueError(f"a {type(row).__name__} instead of an object")
            rows += [(number, row)] if row else []
        except ValueError as error:
            malformed.append((number, str(error)))
    return rows, malformed


def _json(path: Path) -> list[Row]:
    """The objects of a JSON array. A file with an object per line is read as JSON Lines."""
    try:
        value = json.loads(_text(path))
    except ValueError:
        return _jsonl(path)
    rows = value if isinstance(value, list) else [value]
    if wrong := [i for i, row in enumerate(rows) if not isinstance(row, dict)]:
        raise DataError(f"{path}: {len(wrong)} entries of the array are no objects, first entry {wrong[0] + 1}")
    return rows


def _csv(path: Path) -> list[Row]:
    try:
        return list(csv.DictReader(io.StringIO(_text(path), newline=""), strict=True))
    except csv.Error as error:
        raise DataError(f"{path} is not readable CSV: {error}") from None


def _parquet(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[Row] = pq.read_table(path).to_pylist()
    except FileNotFoundError:
        raise DataError(f"cannot read problems from {path}: no such file") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} is not readable Parquet: {error}") from None
    return rows


def _saved_dataset(folder: Path, split: str) -> list[Row]:
    """Rows of a dataset that `save_to_disk` wrote."""
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # many types, from a missing file to another version of datasets
        raise DataError(f"cannot load the dataset in {folder}: {_first_line(error)}") from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise DataError(f"the dataset in {folder} has no split {split}; set split to {_listed(set(data))}")
        data = data[split]
    return list(data)


def _hub(source: DataSource) -> list[Row]:
    """Rows of a dataset on the Hugging Face hub, or of a subset of a dataset folder. Dataset scripts are never run."""
    import datasets

    if not Path(source.source).exists() and source.source.count("/") != 1:
        raise DataError(
            f"problems from {source.source}: neither a .jsonl, .json, .csv or .parquet file, nor a folder, "
            "nor a Hugging Face id (owner/name)"
        )
    if Path(source.source).is_file():
        raise DataError(f"{source.source}: unknown kind of file; use .jsonl, .json, .csv or .parquet")
    prepare_hub(source.source)
    datasets.disable_progress_bars()
    try:
        data = datasets.load_dataset(source.source, source.subset, split=source.split, revision=source.revision)
    except Exception as error:  # many types, from a missing network to an unknown split
        raise DataError(
            f"cannot load the dataset {source.source} (split {source.split}): {_first_line(error)}"
        ) from error
    return list(data)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _listed(names: Any) -> str:
    return " or ".join(sorted(map(str, names)))
