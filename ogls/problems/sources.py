"""Reading rows from a JSONL or Parquet file, a folder, or a Hugging Face dataset."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ogls.config import DataSource
from ogls.errors import DataError

MAX_LISTED = 5  # how many rows an error or a report names


def read_rows(source: DataSource) -> Iterable[dict[str, Any]]:
    """All rows of a source. Raises DataError if it cannot be read."""
    path = source.source
    if path.endswith(".jsonl"):
        return _jsonl(path)
    if path.endswith(".parquet"):
        return _parquet(path)
    return _hub(source)


def _jsonl(path: str) -> list[dict[str, Any]]:
    rows, malformed = [], []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line) if line.strip() else {}
                    if not isinstance(row, dict):
                        raise ValueError(f"a {type(row).__name__} instead of an object")
                    rows += [row] if row else []
                except ValueError as error:
                    malformed.append(f"line {number}: {error}")
    except OSError as error:
        raise DataError(f"cannot read problems from {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from None
    if malformed:
        raise DataError(f"{path}: {len(malformed)} malformed lines:\n  " + "\n  ".join(malformed[:MAX_LISTED]))
    return rows


def _parquet(path: str) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except FileNotFoundError:
        raise DataError(f"cannot read problems from {path}: no such file") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} is not readable Parquet: {error}") from None
    return rows


def _hub(source: DataSource) -> list[dict[str, Any]]:
    """Rows of a dataset folder, or of a dataset on the Hugging Face hub. Dataset scripts are never run."""
    import datasets

    if not Path(source.source).exists() and source.source.count("/") != 1:
        raise DataError(
            f"problems from {source.source}: neither a .jsonl or .parquet file, nor a folder, "
            "nor a Hugging Face id (owner/name)"
        )
    datasets.disable_progress_bars()
    try:
        data = datasets.load_dataset(source.source, source.subset, split=source.split, revision=source.revision)
    except Exception as error:  # many types, from a missing network to an unknown split
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"cannot load the dataset {source.source} (split {source.split}): {first_line}") from error
    return list(data)
