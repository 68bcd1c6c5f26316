"""The report of one or several runs: one self-contained HTML file that fetches nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ogls.analysis.curves import steering_curves, training_curves
from ogls.analysis.health_table import health_in_words
from ogls.analysis.render import render
from ogls.analysis.rounds import HEADINGS, LEGEND, read_rounds, round_cells
from ogls.analysis.token_view import build_token_view
from ogls.config import to_toml
from ogls.config.fingerprint import fingerprint, flatten
from ogls.config.redact import redact_credentials
from ogls.errors import UserError
from ogls.evaluation.metrics import bootstrap_interval
from ogls.progress import Progress, no_progress
from ogls.revision import code_version
from ogls.seeds import derive_seed
from ogls.stages.run import Run
from ogls.store import named_queries, run_query

REPORT, _FINGERPRINT_FILE = "report.html", "report.json"  # in the folder of the run
_MAX_ROUNDS = 12  # maximum number of rounds in the token view; they are evenly spaced
_RESAMPLES = 2000  # bootstrap resamples of the comparison


def render_report(
    runs: Sequence[Run], tokens: bool = True, policy: bool = True, progress: Progress = no_progress
) -> str:
    """Return the report as HTML. Raises UserError if a run has not been evaluated, or if a run is named twice.

    `tokens` embeds the token view of some rollouts of each run; with `policy`, the policies run on these rollouts (see
    `build_token_view`).
    """
    names = [r.config.name for r in runs]
    if len(set(names)) < len(names):
        raise UserError(f"a run is named twice: {', '.join(names)}")
    for run in runs:
        if not run.records.rounds("scores"):
            raise UserError(f"run {run.config.name} has not been evaluated yet, so there is nothing to report")
    common = max(set.intersection(*(set(run.records.rounds("scores")) for run in runs)))
    results = {name: _query_runs(runs, name, None if name == "summaries" else common) for name in _QUERIES}
    summaries = {n: [r for r in results["summaries"] if r["run"] == n] for n in names}
    views = []
    for done, run in enumerate(runs, start=1):
        if tokens and run.records.rounds("verdicts"):
            rounds = _evenly_spaced(run.records.rounds("verdicts"))
            views.append(build_token_view(run, rounds, max_rollouts=15, per_round=1, policy=policy))
        progress(done, len(runs))
    lengths = {run.config.name: run.records.rounds("scores")[-1] for run in runs}
    curves = training_curves(runs, summaries)
    if len(set(lengths.values())) > 1:
        curves["common"] = common
    steering = steering_curves(names, results["direction_by_position"]) if results["direction_by_position"] else None
    data: dict[str, Any] = {"training-curves": curves}
    data |= {"steering-curves": steering} if steering else {}
    data |= {"token-data": views} if views else {}
    return render(
        "report.html.j2",
        data,
        title=f"OGLS-SD: {', '.join(names)}",
        runs=[_run_facts(run, summaries[run.config.name], common, results["health"]) for run in runs],
        common=common,
        lengths=", ".join(f"{n}: {last} rounds" for n, last in lengths.items()) if "common" in curves else "",
        differing=_differing_settings(runs),
        comparison=_comparison(runs, common),
        costs=results["stage_costs"],
        cost_bars=_cost_bars(results["stage_costs"]),
        learned=results["learned_and_forgotten"],
        problem_bars=_problem_bars(results["learned_and_forgotten"]),
        steering=bool(steering),
        class_bars=_class_bars(results["classes"]),
        steered=[r for r in results["most_steered_tokens"] if r["mean_kl"]],
        mistakes=[r for r in results["first_mistakes"] if r["with_mistake"]],
        rounds={run.config.name: [round_cells(row) for row in read_rounds(run.records)] for run in runs},
        headings=HEADINGS,
        legend=LEGEND,
        rollouts=[_rollout_list(view) for view in views],
        tokens=bool(views),
    )


def write_report(run: Run, progress: Progress = no_progress) -> str:
    """Write the report of a run into its folder, unless it is up to date. Returns its path."""
    tokens = run.config.tracking.report == "tokens"
    manifests = [m.digest for t in ("trajectories", "targets", "scores", "health") for m in run.records.manifests(t)]
    expected = fingerprint(code_version()["version"], tokens, manifests)
    if (run.records.read_json(_FINGERPRINT_FILE) or {}).get("fingerprint") != expected or read_report(run) is None:
        page = render_report([run], tokens, progress=progress)
        run.records.storage.write_bytes(f"{run.config.name}/{REPORT}", page.encode())
        run.records.write_json(_FINGERPRINT_FILE, {"fingerprint": expected})
    return run.records.url(REPORT)


def read_report(run: Run) -> str | None:
    """Return the report that `write_report` wrote, or None if the run has no report."""
    content = run.records.storage.read_bytes(f"{run.config.name}/{REPORT}")
    return content.decode() if content else None


_KL_BY_CLASS = """
SELECT run, token_class, sum(kl * tokens) / sum(tokens) AS kl FROM main.style
WHERE signal = 'target' GROUP BY run, token_class ORDER BY run, token_class
"""


_QUERIES = {
    "summaries": "SELECT * FROM summaries WHERE place = 0 ORDER BY run, round",
    "classes": _KL_BY_CLASS,
    **{
        name: named_queries()[name]
        for name in (
            *("stage_costs", "learned_and_forgotten", "direction_by_position", "most_steered_tokens", "health"),
            "first_mistakes",
        )
    },
}


def _query_runs(runs: Sequence[Run], name: str, last: int | None) -> list[dict[str, Any]]:
    """Return the rows of one query of the report up to round `last`, in the order of the runs."""
    return [row for run in runs for row in run_query(run.store, _QUERIES[name], run.config.name, last).to_pylist()]


def _run_facts(
    run: Run, summaries: Sequence[Mapping[str, Any]], common: int, health_rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what the report says of one run; `last` is its summary of round `common`."""
    info = run.records.read_info() or {}
    health = run.records.newest_manifest("health")
    config = run.config
    return {
        "name": config.name,
        "method": config.method,
        "model": config.model.path,
        "created": info["created"][:19].replace("T", " "),
        "version": info["version"],
        "revision": info.get("revision"),
        "seed": config.seed,
        "first": summaries[0],
        "last": next(s for s in summaries if s["round"] == common),
        "trained": len(run.records.rounds("updates")),
        "health": health_in_words(
            [r for r in health_rows if r["run"] == config.name],
            len([n for n in run.records.rounds("health") if n <= common]),
        ),
        "notice": health.metrics["notice"] if health else "",
        "toml": redact_credentials(to_toml(config)),
    }


def _differing_settings(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Return the settings in which the runs differ, with the value of each run."""
    flat = [dict(flatten(run.config.model_dump(mode="json", exclude={"name", "root"}))) for run in runs]
    keys = dict.fromkeys(k for f in flat for k in f)
    return [(k, [f.get(k, "(not set)") for f in flat]) for k in keys if len({repr(f.get(k)) for f in flat}) > 1]


def _comparison(runs: Sequence[Run], common: int) -> list[dict[str, Any]]:
    """Return the difference in accuracy of each run to the first run, after round `common` of both.

    Pairs runs by problem; the interval is a 95% bootstrap interval over problems.
    """
    rows = []
    first = _accuracy_by_problem(runs[0], common)
    for run in runs[1:]:
        accuracy = _accuracy_by_problem(run, common)
        shared = sorted(set(first) & set(accuracy))
        if not shared:
            continue
        difference = np.array([accuracy[p] - first[p] for p in shared])
        low, high = bootstrap_interval(difference, _RESAMPLES, derive_seed(0, "report", run.config.name))
        rows.append({"run": run.config.name, "problems": len(shared), "difference": float(difference.mean())})
        rows[-1] |= {"low": low, "high": high}
    return rows


def _accuracy_by_problem(run: Run, round_: int) -> dict[tuple[str, str], float]:
    """Return the accuracy of each benchmark problem in the evaluation of a round.

    The key is (text, answer), which is the same in every run.
    """
    sql = (
        "SELECT problem, answer, avg((verdict = 'correct')::INT) AS accuracy "
        "FROM (SELECT benchmark, problem_id, verdict FROM scores "
        f"WHERE round = {round_} AND NOT greedy AND benchmark = (SELECT min_by(benchmark, place) FROM summaries)) "
        "JOIN (SELECT problem_id, split AS benchmark, problem, answer FROM problems) USING (benchmark, problem_id) "
        "GROUP BY problem, answer"
    )
    rows = run_query(run.store, sql, run.config.name).to_pylist()
    return {(r["problem"], r["answer"]): r["accuracy"] for r in rows}


def _rollout_list(view: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rollouts of a run by round, each with its address in the token view."""
    rows = [
        {
            **{n: r[n] for n in ("round", "problem_id", "sample", "verdict", "tags")},
            "start": "".join(r["text"])[:160],
            "place": f"{view['run']}/r{r['round']:03d}/{r['problem_id']}/{r['sample']}",
        }
        for r in view["rollouts"]
    ]
    return {"run": view["run"], "rows": sorted(rows, key=lambda r: (r["round"], r["problem_id"], r["sample"]))}


def _cost_bars(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one bar per run: the wall time of its stages, longest first; a stage has one colour in all bars."""
    stages = list(dict.fromkeys(r["stage"] for r in sorted(rows, key=lambda r: -r["seconds"])))
    colours = {stage: index % 7 for index, stage in enumerate(stages)}
    return _bars(
        rows, lambda r: (r["stage"], colours[r["stage"]], r["seconds"], f"{r['seconds']:.1f} s ({r['share']:.0%})")
    )


def _problem_bars(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one bar per run: its known, learned, forgotten and unsolved benchmark problems."""
    counts = Counter((r["run"], r["state"]) for r in rows)
    states = {"known": 2, "learned": 0, "forgotten": 1, "unsolved": 7}  # state: colour
    counted = [{"run": run, "state": s} for run in dict.fromkeys(r["run"] for r in rows) for s in states]
    return _bars(counted, lambda r: (r["state"], states[r["state"]], n := counts[r["run"], r["state"]], str(n)))


def _class_bars(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one bar per run: the mean KL(target || base) of each class of tokens."""
    classes = {name: index % 7 for index, name in enumerate(dict.fromkeys(r["token_class"] for r in rows))}
    return _bars(
        [r for r in rows if r["kl"] is not None],
        lambda r: (r["token_class"], classes[r["token_class"]], r["kl"], f"{r['kl']:.4f}"),
    )


def _bars(
    rows: Sequence[Mapping[str, Any]], part: Callable[[Mapping[str, Any]], tuple[str, int, float, str]]
) -> list[dict[str, Any]]:
    """Return bars for the template, one per run; `part` gives name, colour, value and text of a row."""
    names = ("name", "colour", "value", "text")
    return [
        {"run": run, "parts": [dict(zip(names, part(r), strict=True)) for r in rows if r["run"] == run]}
        for run in dict.fromkeys(r["run"] for r in rows)
    ]


def _evenly_spaced(rounds: Sequence[int]) -> list[int]:
    """Return at most _MAX_ROUNDS rounds, including the first and the last."""
    if len(rounds) <= _MAX_ROUNDS:
        return list(rounds)
    return sorted({rounds[round(i * (len(rounds) - 1) / (_MAX_ROUNDS - 1))] for i in range(_MAX_ROUNDS)})
