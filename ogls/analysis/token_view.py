"""The token view of a run: selected rollouts with the numbers of every model for their tokens.

Reads complete stages, and runs the models again on a few rollouts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ogls.analysis.render import embed_json, render
from ogls.analysis.select_rollouts import RolloutSelector, SelectedRollout
from ogls.analysis.token_numbers import compute_token_numbers, shown_recipes, token_texts
from ogls.distillation import exemplars, teacher
from ogls.errors import StoreError, UserError
from ogls.models.load import load_tokenizer
from ogls.models.policy import Policy
from ogls.progress import Progress, no_progress
from ogls.records import Key
from ogls.stages.groups import read_groups, read_states
from ogls.stages.heads import load_heads
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
    max_rollouts: int = 12,
    per_round: int = 0,
    policy: bool = True,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Return the data of the token view: selected rollouts, each with the numbers of `compute_token_numbers`.

    Selects the rollouts of `problem` (and `sample`), or about `max_rollouts` rollouts of the kinds in `show` from
    `rounds` (default: all rounds). `per_round` adds up to that number of correct and of failed rollouts from every
    round. Without `policy`, only the head of the model runs: the distribution of the student is shown only where it is
    the base pool, and failed problems are not sampled again. Raises UserError if no rollout matches.
    """
    sampled = run.records.rounds("verdicts")
    if not sampled:
        raise UserError(f"run {run.config.name} has no verified rollouts yet")
    if unknown := sorted(set(rounds) - set(sampled)):
        verified = _format_rounds(sampled)
        raise UserError(
            f"run {run.config.name} has no verified rollouts in round {unknown[0]}; verified rounds: {verified}"
        )
    viewer = _Viewer(run, policy)
    selected = RolloutSelector(run, viewer.problems_by_id, viewer.policy).select(
        list(rounds) or sampled, problem, sample, show, max_rollouts, per_round
    )
    if not selected:
        what = f"rollouts of problem {problem}" if problem else f"{show} rollouts"
        searched = _format_rounds(list(rounds) or sampled)
        raise UserError(f"no {what} in round {searched} of run {run.config.name}")
    shown: list[dict[str, Any]] = []
    for round_ in sorted({rollout.id[0] for rollout in selected}):
        shown += viewer.round_data(round_, [rollout for rollout in selected if rollout.id[0] == round_])
        progress(len(shown), len(selected))
    order = {rollout.id: index for index, rollout in enumerate(selected)}
    shown.sort(key=lambda r: order[r["round"], r["problem_id"], r["sample"]])
    return {
        "run": run.config.name,
        "method": run.config.method,
        "model": run.config.model.path,
        "points": [vars(r) | {"weights": dict(r.weights)} for r in viewer.recipes],
        "base": "base" if run.config.has_teacher else "student",
        "mistake_nats": run.config.train.mistake_nats,
        "until": run.config.train.until,
        "projected": run.config.steer.project != "none",
        "vocabulary": viewer.vocabulary(shown),
        "rollouts": shown,
    }


def render_token_view(data: dict[str, Any]) -> str:
    """Return the token view of one run as a separate HTML page."""
    about = f"Method {data['method']}, model {data['model']}. All numbers are exact to 1e-4 nats."
    if data["projected"]:
        about += " The run distils the projection of the target (steer.project); the page shows the whole target."
    return render("view.html.j2", title=f"{data['run']}: tokens", about=about, tokens=embed_json([data]))


class _Viewer:
    """Computes the data of rollouts with the models of a run, which it loads once."""

    def __init__(self, run: Run, policy: bool):
        self.run = run
        self.policy = run.load_policy() if policy else None
        if self.policy:
            self.heads = load_heads(run.config, self.policy.head.float())
            self.tokenizer = self.policy.tokenizer
        else:
            self.heads, self.tokenizer = load_heads(run.config), load_tokenizer(run.config.model)
        pools = set(run.config.pools()) if run.config.has_teacher else set()
        self.recipes = shown_recipes(run.config.steer, pools, trained=policy)
        self.problems_by_id = {p.problem_id: p for p in run.problems("train")}

    def round_data(self, round_: int, selected: Sequence[SelectedRollout]) -> list[dict[str, Any]]:
        """Return the data of the selected rollouts of one round."""
        run = self.run
        groups = read_groups(run, round_)
        by_key = {r.key: r for group in groups.values() for r in group}
        verdicts = {(v["problem_id"], v["sample"]): v for v in run.records.read("verdicts", round_).to_pylist()}
        keys = [rollout.id[1:] for rollout in selected]
        states, note = self._cached_states(round_, set(keys))
        for name, adapter in self._policies(round_):
            missing = [by_key[k] for k in keys if name not in states.get(k, {})]
            for key, computed in self._compute_states(adapter, missing).items():
                states.setdefault(key, {})[name] = computed
        exemplars_of = self._exemplars(round_)
        rows = []
        for choice in selected:
            key = choice.id[1:]
            rollout, verdict = by_key[key], verdicts[key]
            problem = self.problems_by_id[key[0]]
            rows.append(
                {
                    "round": round_,
                    "problem_id": key[0],
                    "sample": key[1],
                    "tags": sorted(choice.tags),
                    "problem": problem.problem,
                    "expected": problem.answer,
                    "solution": problem.solution,
                    **{n: verdict[n] for n in ("verdict", "outcome", "answer")},
                    "text": token_texts(self.tokenizer, rollout.token_ids),
                    "exemplars": [self._pool_texts(groups[key[0]], *pair) for pair in exemplars_of.get(key, [])],
                    "later": choice.later,
                    "note": note if rollout.outcome != "undecided" else "not scored: the verdict is undecided",
                    "numbers": self._numbers(rollout.token_ids, states.get(key, {})),
                }
            )
        return rows

    def _numbers(self, token_ids: Sequence[int], states: dict[str, Tensor]) -> dict[str, Any] | None:
        import torch

        if "base" not in states and "student" in states:
            states = {**states, "base": states["student"]}
        if "base" not in states:
            return None
        length = min(len(s) for s in states.values())
        cut = self.heads.place({d: s[:length] for d, s in states.items()})
        head, limit = self.heads.matrix, self.run.config.steer.batch_tokens
        ids = torch.tensor(token_ids[:length], device=head.device)
        return vars(compute_token_numbers(cut, ids, self.recipes, head, limit))

    def _cached_states(self, round_: int, keys: set[Key]) -> tuple[dict[Key, dict[str, Tensor]], str]:
        """Return the cached states of some rollouts by pool, and the note for rollouts without states."""
        if not self.run.config.has_teacher:
            return {}, "this method has no teacher; only the effect of training is shown"
        states: dict[Key, dict[str, Tensor]] = {}
        try:
            self.run.records.list_shards("teacher_states", round_)
        except StoreError as error:
            return {}, str(error)
        for key, pools in read_states(self.run, round_, keys):
            states[key] = {str(p): s.float() for p, s in pools.items()}
            if self.run.config.teacher.anchor == "policy":  # the base pool has the states of the student
                states[key]["student"] = states[key]["base"]
        return states, "not scored: train.rollouts excludes it, or a pool has no exemplar"

    def _policies(self, round_: int) -> Iterable[tuple[str, Any]]:
        """Return name and adapter of the policies to run: the policy that sampled, and the policy after training."""
        if not self.policy:
            return []
        policies = [("student", self.run.load_adapter(self.run.start_point(round_).round))]
        if self.run.records.manifest("updates", round_):
            policies.append(("trained", self.run.load_adapter(round_)))
        return policies

    def _compute_states(self, adapter: Any, rollouts: Sequence[Any]) -> dict[Key, Tensor]:
        """Return the final hidden states [T, D] of the policy with an adapter, at most train.tokens per rollout."""
        policy: Policy = self.policy  # type: ignore[assignment]
        if not rollouts:
            return {}
        policy.use_adapter(adapter)
        max_tokens = self.run.config.train.tokens
        requests = [
            exemplars.ScoredRollout(
                r.key, "base", r.token_ids[:max_tokens], ((exemplars.Context("live", r.prompt_ids), 1.0),), ()
            )
            for r in rollouts
        ]
        scored = teacher.score_rollouts(policy, requests, self.run.config.teacher.batch_tokens)
        return {key: states for (key, _), states in scored.items()}

    def _exemplars(self, round_: int) -> dict[Key, list[tuple[str, list[int]]]]:
        """Return pool and sample numbers of the exemplars that the teacher read for each rollout."""
        if not self.run.config.has_teacher:
            return {}
        sql = f"SELECT problem_id, sample, pool, exemplars FROM contexts WHERE round = {round_} AND len(exemplars) > 0"
        by_key: dict[Key, list[tuple[str, list[int]]]] = {}
        for row in run_query(self.run.store, sql, self.run.config.name).to_pylist():
            by_key.setdefault((row["problem_id"], row["sample"]), []).append((row["pool"], row["exemplars"]))
        return by_key

    def _pool_texts(self, group: Sequence[Any], pool: str, samples: list[int]) -> dict[str, Any]:
        problem = self.problems_by_id[group[0].problem_id]
        column = problem.columns.get(self.run.config.declared_pools()[pool].reads, "")
        texts = {r.sample: r.text for r in group}
        texts |= {exemplars.REFERENCE: problem.solution or "", exemplars.COLUMN: column}
        return {"pool": pool, "texts": [{"sample": s, "text": texts.get(s, "")} for s in samples]}

    def vocabulary(self, shown: Sequence[dict[str, Any]]) -> dict[int, str]:
        """Return the text of every token id that the page can show."""
        used = {i for r in shown if r["numbers"] for ids in r["numbers"]["ids"] for i in ids}
        return {i: self.tokenizer.decode([i], skip_special_tokens=False) for i in sorted(used)}


def _format_rounds(rounds: Sequence[int]) -> str:
    return str(rounds[0]) if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
