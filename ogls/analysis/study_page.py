"""The page of a study: tables and a figure from its runs in the store, and the same numbers as Parquet files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ogls.analysis.study import CURVES, StudyConfig, curve_rows, mean_and_interval, result_rows, tuning_rows
from ogls.analysis.study_figure import figure_rows, study_figure
from ogls.analysis.study_problems import Solved, difference_cell, digits, gain_rows, gains_markdown, read_solved
from ogls.config import RunConfig, build_config
from ogls.config.fingerprint import flatten
from ogls.errors import StoreError
from ogls.evaluation.metrics import pass_at_k
from ogls.records.stages import STAGES
from ogls.stages.resume import is_complete
from ogls.stages.run import Run
from ogls.stages.summaries import read_deciding_summary, read_first_summary

_MAX_K = 16


def apply_tuning(study: StudyConfig, tuning: Sequence[RunConfig], runs: Sequence[RunConfig]) -> list[RunConfig]:
    """Return the configurations of the runs of the study, each with the selected value of the tuned setting."""
    if study.tune is None:
        return list(runs)
    key = study.tune.key
    best = {row["method"]: row["value"] for row in _tuning_results(study, tuning) if row["chosen"]}
    return [build_config(c.model_dump(mode="json"), [f"{key}={best[_method(study, c)]}"]) for c in runs]


def write_study_page(
    study: StudyConfig, configs: Sequence[RunConfig], tuning: Sequence[RunConfig] = ()
) -> tuple[Path, str]:
    """Write the page of a study to `StudyConfig.folder`/README.md. Returns the path and the text of the page.

    Writes `curves.png`, `results.parquet`, `gains.parquet`, `curves.parquet` and, with tuning runs, `tuning.parquet` to
    the same folder.
    Raises StoreError if a run is not finished.
    """
    keys = {c.name: (_method(study, c), c.seed) for c in configs}
    unfinished = [c.name for c in (*tuning, *configs) if not is_complete(c)]
    if unfinished:
        names = ", ".join(unfinished[:5])
        raise StoreError(
            f"{len(unfinished)} runs of the study are not finished ({names}), so their last round is not a result"
        )
    runs = {keys[c.name]: Run(c) for c in configs}
    summaries = {key: _summaries(run) for key, run in runs.items()}
    seconds = {key: _seconds(run) for key, run in runs.items()}
    before, last = ({key: read_solved(run, _rounds(run)[i]) for key, run in runs.items()} for i in (0, -1))
    pass_rows = _pass_rows(last)
    gains = gain_rows(before, last, study.references())
    results = result_rows(summaries, seconds, study.references())
    curves = {measure: curve_rows(summaries, measure) for measure in CURVES}
    budgets = dict.fromkeys(
        f"{c.rounds} rounds of {c.problems.per_round * c.rollout.samples} rollouts" for c in configs
    )

    folder = study.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "curves.png").write_bytes(study_figure(figure_rows(study), curves, pass_rows))
    for name, table in (("results", results), ("gains", gains)):
        lists = [{k: list(v) if isinstance(v, tuple) else v for k, v in row.items()} for row in table]
        pq.write_table(pa.Table.from_pylist(lists), folder / f"{name}.parquet")
    rows = [{"measure": m, **row} for m, part in curves.items() for row in part]
    pq.write_table(pa.Table.from_pylist(rows), folder / "curves.parquet")
    text = _markdown(study, results, gains, " or ".join(budgets))
    if tuning:
        tuned = _tuning_results(study, tuning)
        pq.write_table(pa.Table.from_pylist(tuned), folder / "tuning.parquet")
        text += _tuning_markdown(study, tuned, sum(_seconds(Run(c)) for c in tuning), len(tuning))
    (folder / "README.md").write_text(text)
    return folder / "README.md", text


def _method(study: StudyConfig, config: RunConfig) -> str:
    """Return the method of a run of the study, from the name of the run."""
    return config.name.removeprefix(f"{study.name}-").rpartition("-s")[0]


def _tuned_method(study: StudyConfig, config: RunConfig) -> str:
    """Return the method of a run of the tuning, from the name of the run."""
    return re.sub(r"^tune\d+-", "", _method(study, config))


def _tuning_results(study: StudyConfig, tuning: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """Return the rows of the tuning grid: mean accuracy on the holdout after the last round, over the tuning seeds."""
    accuracies: dict[tuple[str, float], list[float]] = {}
    for config in tuning:
        value = dict(flatten(config.model_dump()))[study.tune.key if study.tune else ""]
        summary = read_deciding_summary(Run(config).records, config.rounds)  # the holdout's
        accuracies.setdefault((_tuned_method(study, config), value), []).append(summary["accuracy"])
    return tuning_rows(accuracies)


def _tuning_markdown(study: StudyConfig, rows: list[dict[str, Any]], seconds: float, runs: int) -> str:
    assert study.tune
    values = list(dict.fromkeys(row["value"] for row in rows))
    cells = {(r["method"], r["value"]): f"{'**' if r['chosen'] else ''}{r['accuracy']:.3f}" for r in rows}
    lines = ["| method | " + " | ".join(f"{v:g}" for v in values) + " |", "|" + " --- |" * (len(values) + 1)]
    for method in dict.fromkeys(row["method"] for row in rows):
        row = [cells[method, v] + ("**" if cells[method, v].startswith("**") else "") for v in values]
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    table = "\n".join(lines)
    return f"""
## Tuning of {study.tune.key}

Mean accuracy after round {study.tune.rounds} on {study.tune.holdout} training problems that were set aside, with the
tuning seeds {", ".join(map(str, study.tune.seeds))}. The study uses neither. The value in bold was selected. All
methods were tuned on the same {len(values)} values: {runs} runs, {seconds:.0f} seconds in all stages except evaluation.
If the bold value is at an end of the grid, a better value may exist outside it.

{table}
"""


def _summaries(run: Run) -> list[dict[str, Any]]:
    """Return the summary of the first benchmark for every evaluated round, in order."""
    return [{"round": r, **read_first_summary(run.records, r)} for r in _rounds(run)]


def _rounds(run: Run) -> list[int]:
    """Return the evaluated rounds."""
    return [r for r in run.records.rounds("scores") if r <= run.config.rounds]


def _seconds(run: Run) -> float:
    """Return the wall time in seconds of all stages except evaluation, which takes the same time for every method."""
    tables = [stage.table for stage in STAGES if stage.in_rounds and stage.name != "evaluate"]
    manifests = [run.records.manifest(t, r) for t in tables for r in run.records.rounds(t) if r <= run.config.rounds]
    return sum(float(m.metrics["seconds"]) for m in manifests if m)


def _pass_rows(last: Mapping[tuple[str, int], Mapping[str, Solved]]) -> list[dict[str, Any]]:
    """Return the mean pass@k of the last round over seeds, by method, for k = 1 .. samples (at most 16)."""
    by_method: dict[str, list[list[float]]] = {}
    for (method, _), solved in last.items():
        correct = solved["sampled"]
        n = min(map(len, correct.values()))
        means = [
            sum(pass_at_k(len(v), sum(v), k) for v in correct.values()) / len(correct)
            for k in range(1, min(n, _MAX_K) + 1)
        ]
        by_method.setdefault(method, []).append(means)
    return [
        {"method": method, "k": k + 1, **dict(zip(("mean", "low", "high"), mean_and_interval(values), strict=True))}
        for method, seeds in by_method.items()
        for k, values in enumerate(zip(*seeds, strict=True))
    ]


def _cells(r: dict[str, Any]) -> list[str]:
    d = r["difference"]
    interval = f" ({r['accuracy_low']:.3f} .. {r['accuracy_high']:.3f})" if r["seeds"] > 1 else ""
    return [
        r["method"],
        digits(r["accuracy"]) + interval,
        f"{r['problem_interval']:.3f}",
        f"{d[0]:+.3f}" if d and r["paired_seeds"] == 1 else difference_cell(d),
        digits(r["greedy_accuracy"]),
        f"{r['mean_length']:.1f}",
        f"{r['entropy']:.3f}",
        "-" if r["kl_base"] is None else f"{r['kl_base']:.3f}",
        f"{r['truncated']:.1%}",
        f"{r['distinct_answers']:.2f}",
        "-" if r["rounds_to_90"] is None else str(r["rounds_to_90"]),
        f"{r['seconds']:.0f}",
    ]


def _markdown(study: StudyConfig, results: list[dict[str, Any]], gains: list[dict[str, Any]], budget: str) -> str:
    count, all_methods = f"{len(study.methods)} methods", "All methods"
    if study.cases:
        count, all_methods = f"{count} in each of {len(study.cases)} cases", "The methods of a case"
    of_case = " of the case" if study.cases else ""
    names = (
        *(
            "method",
            "accuracy, 95% over seeds" if any(r["seeds"] > 1 for r in results) else "accuracy",
            "± over problems",
            f"difference from {study.reference}{of_case}, paired",
        ),
        *("greedy", "length", "entropy", "KL to base", "truncated", "distinct", "rounds to 90%", "seconds"),
    )
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(_cells(r)) + " |" for r in results]
    table, seeds = "\n".join(lines), ", ".join(map(str, study.seeds))
    for own in dict.fromkeys(m.seeds for m in study.methods if m.seeds):
        seeds += f" ({', '.join(map(str, own))} for {', '.join(m.name for m in study.methods if m.seeds == own)})"
    return f"""# Study {study.name}

{count}, seeds {seeds}; {budget}. {all_methods} use the same
problems and sampling seeds. The results are those of the **last round**, not of the best round. Intervals are 95%
intervals: over seeds by Student's t, over problems by bootstrap within a run (mean half-width). Differences are paired
by seed. One seed has no interval over seeds.

{table}

length in tokens; entropy and KL(policy \\|\\| base) in nats per token; distinct: different answers per problem; rounds
to 90%: first round at which the mean accuracy reaches 90% of its final gain; seconds: all stages except evaluation.

![accuracy and length by round, pass@k of the last round](curves.png)

Dashed: the reference. Shaded: 95% intervals over seeds.

## By problem

The gain of the last round over round 0, and the difference from the reference (over the seeds of both), paired by
problem; means over seeds, 95% bootstrap intervals over problems for these seeds.

{gains_markdown(gains, study.reference + of_case)}

The numbers are in `results.parquet`, `gains.parquet` and `curves.parquet`, the runs in the store `{study.root}`
(`ogls runs`).
"""
