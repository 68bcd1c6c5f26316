"""The token view of a run: selected rollouts with the numbers of every model for their tokens.

It reads finished stages, and runs the models again over a few rollouts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ogls.analysis import token_numbers as tokenview
from ogls.analysis.render import embed_json, render
from ogls.analysis.select_rollouts import RolloutSelector, SelectedRollout
from ogls.distillation import exemplars, teacher
from ogls.errors import StoreError, UserError
from ogls.models.load import load_head, load_tokenizer
from ogls.models.policy import Policy
from ogls.progress import Progress, no_progress
from ogls.records import Key
from ogls.stages import columns
from ogls.stages.groups import read_groups
from ogls.stages.run import Run
from ogls.store import run_query

if TYPE_CHECKING:
    from torch import Tensor


def build_token_view(
    run: Run,
    rounds: Sequence[int] = (),
    problem: str = "",
    sample: int | None = None,
    show: str = "all",
    most: int = 12,
    each: int = 0,
    policy: bool = True,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """The data of the token view: the rollouts chosen (`choose`), with the numbers of `tokenview.show` for each.

    `each` adds that many correct and failed rollouts of every round.

    Without `policy` no model runs but the head: the student's own distribution is then shown only where it is the
    base pool, and nothing is posed again. Raises UserError if nothing matches, naming what exists.
    """
    sampled = run.records.rounds("verdicts")
    if not sampled:
        raise UserError(f"run {run.config.name} has no verified rollouts yet")
    if unknown := sorted(set(rounds) - set(sampled)):
        there = f"it has those of {_span(sampled)}"
        raise UserError(f"run {run.config.name} has no verified rollouts in round {unknown[0]}; {there}")
    viewer = _Viewer(run, policy)
    chosen = RolloutSelector(run, viewer.posed, viewer.policy).choose(
        list(rounds) or sampled, problem, sample, show, most, each
    )
    if not chosen:
        what = f"problem {problem}" if problem else f"{show} rollouts"
        raise UserError(f"no {what} in round {_span(list(rounds) or sampled)} of run {run.config.name}")
    shown = []
    for round_ in sorted({c.place[0] for c in chosen}):
        mine = [c for c in chosen if c.place[0] == round_]
        shown += viewer.round(round_, mine)
        progress(len(shown), len(chosen))
    order = {c.place: n for n, c in enumerate(chosen)}
    shown.sort(key=lambda r: order[r["round"], r["problem_id"], r["sample"]])
    return {
        "run": run.config.name,
        "method": run.config.method,
        "model": run.config.model.path,
        "points": [vars(p) | {"weights": dict(p.weights)} for p in viewer.points],
        "base": "base" if run.config.has_teacher else "student",
        "vocabulary": viewer.vocabulary(shown),
        "rollouts": shown,
    }


def render_token_view(data: dict[str, Any]) -> str:
    """The token view of one run as a separate page."""
    about = f"Method {data['method']}, model {data['model']}. Exact to 1e-4 nats at every recipe and strength."
    return render("view.html.j2", title=f"{data['run']}: tokens", about=about, tokens=embed_json([data]))


class _Viewer:
    """The models of a run, loaded once and only if they are needed."""

    def __init__(self, run: Run, policy: bool):
        self.run = run
        self.policy = run.load_policy() if policy else None
        if self.policy:
            self.head, self.tokenizer, self.device = self.policy.head.float(), self.policy.tokenizer, self.policy.device
        else:
            self.head, self.tokenizer = load_head(run.config.model), load_tokenizer(run.config.model)
            self.device = self.head.device
        pools = set(run.config.pools()) if run.config.has_teacher else set()
        self.points = tokenview.shown_recipes(run.config.steer, pools, trained=policy)
        self.posed = {p.problem_id: p for p in run.problems("train")}

    def round(self, round_: int, chosen: Sequence[SelectedRollout]) -> list[dict[str, Any]]:
        """The data of the selected rollouts of one round."""
        run = self.run
        groups = read_groups(run, round_)
        by_key = {r.key: r for group in groups.values() for r in group}
        verdicts = {(v["problem_id"], v["sample"]): v for v in run.records.read("verdicts", round_).to_pylist()}
        keys = [c.place[1:] for c in chosen]
        states, note = self._cached(round_, set(keys))
        for name, adapter in self._students(round_):
            lacking = [by_key[k] for k in keys if name not in states.get(k, {})]
            for key, found in self._states(adapter, lacking).items():
                states.setdefault(key, {})[name] = found
        read = self._contexts(round_)
        shown = []
        for choice in chosen:
            key = choice.place[1:]
            rollout, verdict = by_key[key], verdicts[key]
            problem = self.posed[key[0]]
            shown.append(
                {
                    "round": round_,
                    "problem_id": key[0],
                    "sample": key[1],
                    "tags": sorted(choice.tags),
                    "problem": problem.problem,
                    "expected": problem.answer,
                    "solution": problem.solution,
                    **{n: verdict[n] for n in ("verdict", "outcome", "answer")},
                    "text": tokenview.token_texts(self.tokenizer, rollout.token_ids),
                    "exemplars": [self._exemplar(groups[key[0]], *pair) for pair in read.get(key, [])],
                    "later": choice.later,
                    "note": note if rollout.outcome != "undecided" else "undecided: no teacher scored it",
                    "numbers": self._numbers(rollout.token_ids, states.get(key, {})),
                }
            )
        return shown

    def _numbers(self, token_ids: Sequence[int], states: dict[str, Tensor]) -> dict[str, Any] | None:
        import torch

        if "base" not in states and "student" in states:
            states = {**states, "base": states["student"]}
        if "base" not in states:
            return None
        length = min(len(s) for s in states.values())
        here = {d: s[:length].to(self.device) for d, s in states.items()}
        ids = torch.tensor(token_ids[:length], device=self.device)
        return vars(
            tokenview.compute_token_numbers(here, ids, self.points, self.head, self.run.config.steer.batch_tokens)
        )

    def _cached(self, round_: int, keys: set[Key]) -> tuple[dict[Key, dict[str, Tensor]], str]:
        """The cached states of some rollouts by pool, and the note for rollouts without states."""
        if not self.run.config.has_teacher:
            return {}, "this method has no teacher; only the change by training is shown"
        found: dict[Key, dict[str, Tensor]] = {}
        try:
            entries = self.run.records.list_shards("teacher_states", round_)
        except StoreError as error:
            return {}, str(error)
        for entry in entries:
            for key, pools in columns.unpack_states(self.run.records.read_shard(entry)).items():
                if key in keys:
                    found[key] = {str(p): s.float() for p, s in pools.items()}
                    if self.run.config.teacher.anchor == "policy":  # then the base pool has the states of the student
                        found[key]["student"] = found[key]["base"]
        return found, "not scored: train.rollouts excludes it, or a pool has no exemplar"

    def _students(self, round_: int) -> Iterable[tuple[str, Any]]:
        """The policies to run over the rollouts: the one that sampled them, and the one that the round trained."""
        if not self.policy:
            return []
        students = [("student", self.run.load_adapter(self.run.start_point(round_).round))]
        if self.run.records.manifest("updates", round_):
            students.append(("trained", self.run.load_adapter(round_)))
        return students

    def _states(self, adapter: Any, rollouts: Sequence[Any]) -> dict[Key, Tensor]:
        policy: Policy = self.policy  # type: ignore[assignment]
        if not rollouts:
            return {}
        policy.use_adapter(adapter)
        most = self.run.config.train.tokens
        wanted = [
            exemplars.ScoredRollout(
                r.key, "base", r.token_ids[:most], ((exemplars.Context("policy", r.prompt_ids), 1.0),), ()
            )
            for r in rollouts
        ]
        scored = teacher.score_rollouts(policy, wanted, self.run.config.teacher.batch_tokens)
        return {key: states for (key, _), states in scored.items()}

    def _contexts(self, round_: int) -> dict[Key, list[tuple[str, list[int]]]]:
        """The exemplars that the teacher read for each rollout, by pool."""
        if not self.run.config.has_teacher:
            return {}
        sql = f"SELECT problem_id, sample, pool, exemplars FROM contexts WHERE round = {round_} AND pool <> 'base'"
        found: dict[Key, list[tuple[str, list[int]]]] = {}
        for row in run_query(self.run.store, sql, self.run.config.name).to_pylist():
            found.setdefault((row["problem_id"], row["sample"]), []).append((row["pool"], row["exemplars"]))
        return found

    def _exemplar(self, group: Sequence[Any], pool: str, samples: list[int]) -> dict[str, Any]:
        solution = self.posed[group[0].problem_id].solution or ""
        texts = {r.sample: r.text for r in group} | {exemplars.REFERENCE: solution}
        named = [{"sample": s, "text": texts.get(s, "")} for s in samples]
        return {"pool": pool, "texts": named}

    def vocabulary(self, shown: Sequence[dict[str, Any]]) -> dict[int, str]:
        """The text of every token id that the page can show."""
        used = {i for r in shown if r["numbers"] for ids in r["numbers"]["ids"] for i in ids}
        return {i: self.tokenizer.decode([i], skip_special_tokens=False) for i in sorted(used)}


def _span(rounds: Sequence[int]) -> str:
    return str(rounds[0]) if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
