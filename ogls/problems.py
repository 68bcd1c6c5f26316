r"""Problems from JSONL, Parquet or a Hugging Face dataset: read, cleaned, split, and every loss counted."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ogls.config import DataSource, RunConfig
from ogls.errors import DataError
from ogls.records import Problem
from ogls.seeds import derive_seed
from ogls.verify import find_answer

_LISTED = 5  # how many offenders an error or a report names
_MARKUP = re.compile(r"\s|\$|\\[()\[\],!;]")


@dataclass
class Report:
    """What was left out, by reason, and the first few names of each."""

    counts: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)

    def note(self, reason: str, name: str) -> None:
        self.counts[reason] += 1
        self.named.setdefault(reason, [])
        if len(self.named[reason]) < _LISTED:
            self.named[reason].append(name)

    def words(self, reason: str) -> str:
        more = self.counts[reason] - len(self.named[reason])
        return ", ".join(self.named[reason]) + (f" and {more} more" if more else "")


def load_problems(source: DataSource, split: str, report: Report) -> list[Problem]:
    """The source's problems, without those of equal text and those without text or answer (both reported).

    Raises DataError for a file that is missing or malformed (with line numbers), for a column that is not
    there, and for one id given to two problems.
    """
    columns = source.columns
    rows = list(_rows(source))
    if rows and not any(columns.problem in row for row in rows):
        raise DataError(
            f"{source.source} has no column {columns.problem}; it has {', '.join(sorted(rows[0]))}: "
            "set the names under columns"
        )
    problems: dict[str, Problem] = {}
    ids: dict[str, str] = {}
    for number, row in enumerate(rows[: source.limit], start=1):
        problem = _problem(row, source, split)
        text = normalised(problem.problem)
        if not text or not problem.answer:
            report.note("empty problem" if not text else "no answer", f"{problem.problem_id} (row {number})")
        elif text in problems:
            report.note("duplicate", problem.problem_id)
        elif problem.problem_id in ids:
            report.note("one id, two problems", problem.problem_id)
        else:
            problems[text] = problem
            ids[problem.problem_id] = text
    if n := report.counts["one id, two problems"]:
        raise DataError(
            f"{source.source}: {n} ids stand for two different problems: {report.words('one id, two problems')}; "
            "make ids unique, or set columns.id to a name that is not there to have them made"
        )
    return list(problems.values())


def _problem(row: dict[str, Any], source: DataSource, split: str) -> Problem:
    def text(column: str) -> str:
        value = row.get(column)
        clean = "" if value is None else str(value).strip()
        return clean.encode("utf-8", "replace").decode()  # a lone surrogate fits in JSON, and in no table

    columns = source.columns
    problem, solution = text(columns.problem), text(columns.solution)
    made = "p-" + hashlib.sha256(normalised(problem).encode(errors="replace")).hexdigest()[:12]
    return Problem(text(columns.id) or made, problem, _answer(text(columns.answer), solution), solution or None, split)


def _answer(answer: str, solution: str) -> str:
    """The answer's own box or ####, the answer bare, or the box or #### of the solution."""
    return find_answer(answer) or answer or find_answer(solution) or ""


def normalised(text: str) -> str:
    """Text for comparison: compatibility forms unified, case, white space and math delimiters ignored."""
    return _MARKUP.sub("", unicodedata.normalize("NFKC", text).casefold())


def _rows(source: DataSource) -> Iterable[dict[str, Any]]:
    path = source.source
    if path.endswith(".jsonl"):
        return _jsonl(path)
    if path.endswith(".parquet"):
        return _parquet(path)
    return _hub(source)


def _jsonl(path: str) -> list[dict[str, Any]]:
    rows, bad = [], []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line) if line.strip() else {}
                    if not isinstance(row, dict):
                        raise ValueError(f"a {type(row).__name__} instead of an object")
                    rows += [row] if row else []
                except ValueError as error:
                    bad.append(f"line {number}: {error}")
    except OSError as error:
        raise DataError(f"cannot read problems from {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from None
    if bad:
        raise DataError(f"{path}: {len(bad)} malformed lines:\n  " + "\n  ".join(bad[:_LISTED]))
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
    """A dataset's folder, or its id on the Hugging Face hub. No code of a dataset is ever run."""
    import datasets

    if not Path(source.source).exists() and source.source.count("/") != 1:
        raise DataError(
            f"problems from {source.source}: neither a .jsonl or .parquet file, nor a folder, "
            "nor a Hugging Face id (owner/name)"
        )
    datasets.disable_progress_bars()
    try:
        data = datasets.load_dataset(source.source, source.subset, split=source.split)
    except Exception as error:  # a dozen kinds, from no network to no such split
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"cannot load the dataset {source.source} (split {source.split}): {first}") from error
    return list(data)


def prepare(
    config: RunConfig,
    usable: Callable[[Sequence[str]], list[bool]],
    too_long: Callable[[Problem, int], str],
    seen: Collection[str] = (),
) -> tuple[list[Problem], Report]:
    """All problems of a run: `train`, then each benchmark; splits never overlap.

    Training problems whose normalised text is in `seen` are left out and counted. `usable` says which answers the
    verifier can work with; `too_long(problem, max_tokens)` why a problem does not fit the model (or nothing). A
    training problem whose normalised text stands in any benchmark is dropped and counted. Raises DataError where
    more than problems.max_unusable of a source are unusable, and where nothing is left.
    """
    report = Report()
    benchmarks: list[Problem] = []
    for benchmark in config.evaluate.benchmarks:
        loaded = load_problems(benchmark, benchmark.name, report)
        benchmarks += _sound(loaded, benchmark.source, config, config.evaluate.max_tokens, usable, too_long, report)
    train = load_problems(config.problems, "train", report)
    train = _sound(train, config.problems.source, config, config.rollout.max_tokens, usable, too_long, report)
    held = {normalised(p.problem): p.split for p in benchmarks}
    apart = []
    for problem in train:
        if split := held.get(normalised(problem.problem)):
            report.note(f"in benchmark {split}", problem.problem_id)
        elif normalised(problem.problem) in seen:
            report.note("trained on before", problem.problem_id)
        else:
            apart.append(problem)
    order = np.random.default_rng(derive_seed(config.seed, "holdout")).permutation(len(apart))
    holdout = set(order[: config.problems.holdout].tolist())
    train = [p for i, p in enumerate(apart) if i not in holdout]
    benchmarks += [replace(p, split="holdout") for i, p in enumerate(apart) if i in holdout]
    if not train or not benchmarks:
        raise DataError(
            f"{len(train)} problems to train on and {len(benchmarks)} to evaluate on are left of "
            f"{config.problems.source}; left out: {dict(report.counts)}"
        )
    return train + benchmarks, report


def _sound(
    problems: list[Problem],
    source: str,
    config: RunConfig,
    max_tokens: int,
    usable: Callable[[Sequence[str]], list[bool]],
    too_long: Callable[[Problem, int], str],
    report: Report,
) -> list[Problem]:
    """The problems that can be judged and fit the model; DataError if too many cannot or do not."""
    kept, why = [], Report()
    for problem, ok in zip(problems, usable([p.answer for p in problems]), strict=True):
        if not ok:
            why.note("unusable answer", f"{problem.problem_id} ({problem.answer[:40]!r})")
        elif reason := too_long(problem, max_tokens):
            why.note("too long", f"{problem.problem_id} ({reason})")
        else:
            kept.append(problem)
    lost = len(problems) - len(kept)
    if lost > config.problems.max_unusable * len(problems):
        listed = "; ".join(f"{n} {reason}: {why.words(reason)}" for reason, n in why.counts.items())
        raise DataError(
            f"{source}: {lost} of {len(problems)} problems cannot be used ({listed}); mend them, or raise "
            "problems.max_unusable"
        )
    report.counts += why.counts
    report.named |= why.named
    return kept


def round_problems(train: Sequence[Problem], per_round: int, round_: int, run_seed: int) -> list[Problem]:
    """The problems of round 1, 2, ...: pass after pass over all of them, each in a seeded order of its own."""
    chosen: dict[str, Problem] = {}
    orders: dict[int, np.ndarray] = {}
    for place in range((round_ - 1) * per_round, round_ * per_round):
        epoch, index = divmod(place, len(train))
        if epoch not in orders:
            orders[epoch] = np.random.default_rng(derive_seed(run_seed, "problems", epoch)).permutation(len(train))
        problem = train[orders[epoch][index]]
        chosen[problem.problem_id] = problem  # one that two passes meet on is posed once
    return list(chosen.values())
