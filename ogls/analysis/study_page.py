"""The page of a study: a table, figures, and the numbers behind them, from its runs in the store."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ogls.analysis.figures import study_figure
from ogls.analysis.study import CURVES, StudyConfig, curve_rows, mean_and_interval, result_rows, tuning_rows
from ogls.config import RunConfig, build_config
from ogls.config.fingerprint import flatten
from ogls.errors import StoreError
from ogls.evaluation.metrics import pass_at_k
from ogls.records.stages import STAGES
from ogls.stages.run import Run, is_complete
from ogls.stages.summaries import read_first_summary

_MOST_K = 16


def apply_tuning(study: StudyConfig, tuning: Sequence[RunConfig], runs: Sequence[RunConfig]) -> list[RunConfig]:
    """The runs of the study with the best value of the tuned setting for each method."""
    if study.tune is None:
        return list(runs)
    key = study.tune.key
    best = {row["method"]: row["value"] for row in _tuning(study, tuning) if row["chosen"]}
    return [build_config(c.model_dump(mode="json"), [f"{key}={best[_method(study, c)]}"]) for c in runs]


def write_study_page(
    study: StudyConfig, configs: Sequence[RunConfig], tuning: Sequence[RunConfig] = ()
) -> tuple[Path, str]:
    """Write the page of a study. Raises StoreError if a run is unfinished.

    It is `<out>/<study>/README.md`, with `curves.png`, `results.parquet`, `curves.parquet` and, where something was
    tuned, `tuning.parquet`; returns the path and the text of the page.
    """
    keys = {c.name: (_method(study, c), c.seed) for c in configs}
    unfinished = [c.name for c in (*tuning, *configs) if not is_complete(c)]
    if unfinished:
        names = ", ".join(unfinished[:5])
        raise StoreError(
            f"{len(unfinished)} runs of the study are not finished ({names}), so their last round is not a result"
        )
    summaries = {keys[c.name]: _summaries(Run(c)) for c in configs}
    seconds = {keys[c.name]: _seconds(Run(c)) for c in configs}
    passes = _pass_rows({keys[c.name]: Run(c) for c in configs})
    results = result_rows(summaries, seconds, study.reference)
    curves = {measure: curve_rows(summaries, measure) for measure in CURVES}
    first = configs[0]
    a_round = first.problems.per_round * first.rollout.samples

    folder = Path(study.out) / study.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "curves.png").write_bytes(study_figure(curves, passes, a_round, f"study {study.name}"))
    flat = [{**r, "difference": r["difference"] and list(r["difference"])} for r in results]
    pq.write_table(pa.Table.from_pylist(flat), folder / "results.parquet")
    rows = [{"measure": m, **row} for m, part in curves.items() for row in part]
    pq.write_table(pa.Table.from_pylist(rows), folder / "curves.parquet")
    text = _markdown(study, results, first, a_round)
    if tuning:
        tried = _tuning(study, tuning)
        pq.write_table(pa.Table.from_pylist(tried), folder / "tuning.parquet")
        text += _tuning_markdown(study, tried, sum(_seconds(Run(c)) for c in tuning), len(tuning))
    (folder / "README.md").write_text(text)
    return folder / "README.md", text


def _method(study: StudyConfig, config: RunConfig) -> str:
    """The method of a run of the study or of its tuning, from the name of the run."""
    return re.sub(r"^tune\d+-(?=.)", "", config.name.removeprefix(f"{study.name}-").rpartition("-s")[0])


def _tuning(study: StudyConfig, tuning: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """The rows of the tuning grid: mean accuracy of the last round over the tuning seeds."""
    found: dict[tuple[str, float], list[float]] = {}
    for config in tuning:
        value = dict(flatten(config.model_dump()))[study.tune.key if study.tune else ""]
        found.setdefault((_method(study, config), value), []).append(_summaries(Run(config))[-1]["accuracy"])
    return tuning_rows(found)


def _tuning_markdown(study: StudyConfig, tried: list[dict[str, Any]], seconds: float, runs: int) -> str:
    assert study.tune
    values = list(dict.fromkeys(row["value"] for row in tried))
    cells = {(r["method"], r["value"]): f"{'**' if r['chosen'] else ''}{r['accuracy']:.3f}" for r in tried}
    lines = ["| method | " + " | ".join(f"{v:g}" for v in values) + " |", "|" + " --- |" * (len(values) + 1)]
    for method in dict.fromkeys(row["method"] for row in tried):
        mine = [cells[method, v] + ("**" if cells[method, v].startswith("**") else "") for v in values]
        lines.append(f"| {method} | " + " | ".join(mine) + " |")
    table = "\n".join(lines)
    return f"""
## Tuning of {study.tune.key}

Accuracy after round {study.tune.rounds}, seeds {", ".join(map(str, study.tune.seeds))} (none of the study's); the
bold value was taken. The same {len(values)} values for every method: {runs} runs, {seconds:.0f} seconds of all stages
but evaluation. Bold at an end of the grid means that a better value may lie beyond it.

{table}
"""


def _summaries(run: Run) -> list[dict[str, Any]]:
    """The first benchmark's summary of every evaluated round, in order."""
    rounds = [r for r in run.records.rounds("scores") if r <= run.config.rounds]
    return [{"round": r, **read_first_summary(run.records, r)} for r in rounds]


def _seconds(run: Run) -> float:
    """Wall time in seconds of all stages except evaluation, which costs the same for every method."""
    tables = [stage.table for stage in STAGES if stage.in_rounds and stage.name != "evaluate"]
    found = [run.records.manifest(t, r) for t in tables for r in run.records.rounds(t) if r <= run.config.rounds]
    return sum(float(m.metrics["seconds"]) for m in found if m)


def _pass_rows(runs: dict[tuple[str, int], Run]) -> list[dict[str, Any]]:
    """Mean pass@k of the last round over seeds, by method, for k = 1 .. samples (at most 16)."""
    by_method: dict[str, list[list[float]]] = {}
    for (method, _), run in runs.items():
        last = max(r for r in run.records.rounds("scores") if r <= run.config.rounds)
        correct: dict[str, list[bool]] = {}
        for row in run.records.read("scores", last, ["problem_id", "greedy", "verdict"]).to_pylist():
            if not row["greedy"]:
                correct.setdefault(row["problem_id"], []).append(row["verdict"] == "correct")
        n = min(map(len, correct.values()))
        means = [
            sum(pass_at_k(len(v), sum(v), k) for v in correct.values()) / len(correct)
            for k in range(1, min(n, _MOST_K) + 1)
        ]
        by_method.setdefault(method, []).append(means)
    return [
        {"method": method, "k": k + 1, **dict(zip(("mean", "low", "high"), mean_and_interval(values), strict=True))}
        for method, runs_ in by_method.items()
        for k, values in enumerate(zip(*runs_, strict=True))
    ]


def _cells(r: dict[str, Any]) -> list[str]:
    d = r["difference"]
    return [
        r["method"],
        f"{r['accuracy']:.3f} ({r['accuracy_low']:.3f} .. {r['accuracy_high']:.3f})",
        f"{r['problem_interval']:.3f}",
        f"{d[0]:+.3f} ({d[1]:+.3f} .. {d[2]:+.3f})" if d else "-",
        f"{r['greedy_accuracy']:.3f}",
        f"{r['mean_length']:.1f}",
        f"{r['entropy']:.3f}",
        "-" if r["kl_base"] is None else f"{r['kl_base']:.3f}",
        f"{r['truncated']:.1%}",
        f"{r['distinct_answers']:.2f}",
        "-" if r["rounds_to_90"] is None else str(r["rounds_to_90"]),
        f"{r['seconds']:.0f}",
    ]


def _markdown(study: StudyConfig, results: list[dict[str, Any]], first: RunConfig, a_round: int) -> str:
    names = (
        *("method", "accuracy, 95% over seeds", "± over problems", f"against {study.reference}, paired", "greedy"),
        *("length", "entropy", "KL to base", "truncated", "distinct", "rounds to 90%", "seconds"),
    )
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(_cells(r)) + " |" for r in results]
    table, seeds = "\n".join(lines), ", ".join(map(str, study.seeds))
    return f"""# Study {study.name}

{len(results)} methods, seeds {seeds}; {first.rounds} rounds of {a_round} rollouts, the same problems and sampling seeds
for each method. Numbers are the **last round's**, never the best one's. Intervals are 95%: over seeds by Student's t,
over problems by bootstrap within a run (its mean half-width). Differences are paired by seed.

{table}

length in tokens; entropy and KL(policy \\|\\| base) in nats a token; distinct: answers a problem; rounds to 90% of the
final gain of the mean curve; seconds: all stages but evaluation.

![curves](curves.png)

The numbers are in `results.parquet` and `curves.parquet`, the runs in `{study.root}` (`ogls runs`).
"""
