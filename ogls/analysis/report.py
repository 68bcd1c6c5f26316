"""The report of one or several runs: one self-contained HTML file that fetches nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from ogls.analysis import report_figures as reportfigures
from ogls.analysis.render import embed_json, render
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

REPORT, _PROOF = "report.html", "report.json"  # in the run's folder
_MOST_ROUNDS = 12  # maximal number of rounds whose rollouts are shown, evenly spaced
_RESAMPLES = 2000


def render_report(
    runs: Sequence[Run], tokens: bool = True, policy: bool = True, progress: Progress = no_progress
) -> str:
    """The report as HTML. Raises UserError if a run has not been evaluated, or if a run is named twice.

    `tokens` embeds the token view of some rollouts of each run; `policy` runs the policies for it (see
    `build_token_view`).
    """
    names = [r.config.name for r in runs]
    if len(set(names)) < len(names):
        raise UserError(f"a run is named twice: {', '.join(names)}")
    for run in runs:
        if not run.records.rounds("scores"):
            raise UserError(f"run {run.config.name} has not been evaluated yet, so there is nothing to report")
    answers = {name: _asked(runs, name) for name in _QUERIES}
    summaries = {n: [r for r in answers["summaries"] if r["run"] == n] for n in names}
    shown = []
    for done, run in enumerate(runs, start=1):
        if tokens and run.records.rounds("verdicts"):
            shown.append(build_token_view(run, _spread(run.records.rounds("verdicts")), most=15, each=1, policy=policy))
        progress(done, len(runs))
    learned = answers["learned_and_forgotten"]
    return render(
        "report.html.j2",
        title=f"OGLS-SD: {', '.join(names)}",
        runs=[_about(run, summaries[run.config.name]) for run in runs],
        differing=_differing(runs),
        comparison=_comparison(runs),
        curve=reportfigures.curves(summaries),
        measures=reportfigures.measures(summaries),
        costs=answers["stage_costs"],
        costs_figure=reportfigures.costs(answers["stage_costs"]),
        learned=learned,
        learned_figure=reportfigures.learned(learned),
        steering_figure=_steering(answers),
        steered=answers["most_steered_tokens"],
        health=answers["health"],
        rounds={run.config.name: [round_cells(row) for row in read_rounds(run.records)] for run in runs},
        headings=HEADINGS,
        legend=LEGEND,
        rollouts=[_listed(view) for view in shown],
        tokens=embed_json(shown) if shown else "",
    )


def write_report(run: Run, progress: Progress = no_progress) -> str:
    """Write the report of a run into its folder, unless it is up to date. Returns its path."""
    tokens = run.config.tracking.report == "tokens"
    manifests = [m.digest for t in ("trajectories", "targets", "scores", "health") for m in run.records.manifests(t)]
    wanted = fingerprint(code_version()["version"], tokens, manifests)
    if (run.records.read_json(_PROOF) or {}).get("fingerprint") != wanted or read_report(run) is None:
        page = render_report([run], tokens, progress=progress)
        run.records.storage.write_bytes(f"{run.config.name}/{REPORT}", page.encode())
        run.records.write_json(_PROOF, {"fingerprint": wanted})
    return run.records.url(REPORT)


def read_report(run: Run) -> str | None:
    """The report that `write_report` has written; None if there is none."""
    content = run.records.storage.read_bytes(f"{run.config.name}/{REPORT}")
    return content.decode() if content else None


_CLASSES = """
SELECT run, token_class, sum(kl * tokens) / sum(tokens) AS kl FROM main.style
WHERE signal = 'target' GROUP BY run, token_class ORDER BY run, token_class
"""


_QUERIES = {
    "summaries": "SELECT * FROM summaries WHERE place = 0 ORDER BY run, round",
    "classes": _CLASSES,
    **{
        name: named_queries()[name]
        for name in ("stage_costs", "learned_and_forgotten", "direction_by_position", "most_steered_tokens", "health")
    },
}


def _asked(runs: Sequence[Run], name: str) -> list[dict[str, Any]]:
    """The rows of one query of the report, in the order of the runs."""
    return [row for run in runs for row in run_query(run.store, _QUERIES[name], run.config.name).to_pylist()]


def _steering(answers: Mapping[str, list[dict[str, Any]]]) -> Markup | None:
    if not answers["direction_by_position"]:
        return None
    return reportfigures.steering(answers["direction_by_position"], answers["classes"])


def _about(run: Run, summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    about = run.records.read_info() or {}
    health = run.records.newest_manifest("health")
    config = run.config
    return {
        "name": config.name,
        "method": config.method,
        "model": config.model.path,
        "created": about["created"][:19].replace("T", " "),
        "version": about["version"],
        "revision": about.get("revision"),
        "seed": config.seed,
        "first": summaries[0],
        "last": summaries[-1],
        "notice": health.metrics["notice"] if health else "",
        "toml": redact_credentials(to_toml(config)),
    }


def _differing(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """The settings in which the runs differ, with the value of each run."""
    flat = [dict(flatten(run.config.model_dump(mode="json", exclude={"name", "root"}))) for run in runs]
    keys = dict.fromkeys(k for f in flat for k in f)
    return [(k, [f.get(k, "(not set)") for f in flat]) for k in keys if len({repr(f.get(k)) for f in flat}) > 1]


def _comparison(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The last evaluation of every run minus that of the first run, paired by problem, with a 95% bootstrap
    interval."""
    rows = []
    first = _by_problem(runs[0])
    for run in runs[1:]:
        mine = _by_problem(run)
        shared = sorted(set(first) & set(mine))
        if not shared:
            continue
        difference = np.array([mine[p] - first[p] for p in shared])
        low, high = bootstrap_interval(difference, _RESAMPLES, derive_seed(0, "report", run.config.name))
        rows.append({"run": run.config.name, "problems": len(shared), "difference": float(difference.mean())})
        rows[-1] |= {"low": low, "high": high}
    return rows


def _by_problem(run: Run) -> dict[tuple[str, str], float]:
    """Accuracy in the last evaluation by benchmark problem, keyed by (text, answer), which is the same in every run."""
    last = run.records.rounds("scores")[-1]
    sql = (
        "SELECT problem, answer, avg((verdict = 'correct')::INT) AS accuracy "
        "FROM (SELECT benchmark, problem_id, verdict FROM scores "
        f"WHERE round = {last} AND NOT greedy AND benchmark = (SELECT min_by(benchmark, place) FROM summaries)) "
        "JOIN (SELECT problem_id, split AS benchmark, problem, answer FROM problems) USING (benchmark, problem_id) "
        "GROUP BY problem, answer"
    )
    rows = run_query(run.store, sql, run.config.name).to_pylist()
    return {(r["problem"], r["answer"]): r["accuracy"] for r in rows}


def _listed(view: Mapping[str, Any]) -> dict[str, Any]:
    """The rollouts of a run by round, with the address of each in the token view."""
    rows = [
        {
            **{n: r[n] for n in ("round", "problem_id", "sample", "verdict", "tags")},
            "start": "".join(r["text"])[:160],
            "place": f"{view['run']}/r{r['round']:03d}/{r['problem_id']}/{r['sample']}",
        }
        for r in view["rollouts"]
    ]
    return {"run": view["run"], "rows": sorted(rows, key=lambda r: (r["round"], r["problem_id"], r["sample"]))}


def _spread(rounds: Sequence[int]) -> list[int]:
    """At most _MOST_ROUNDS rounds, including the first and the last."""
    if len(rounds) <= _MOST_ROUNDS:
        return list(rounds)
    return sorted({rounds[round(i * (len(rounds) - 1) / (_MOST_ROUNDS - 1))] for i in range(_MOST_ROUNDS)})
