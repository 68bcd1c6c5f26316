"""The token view of a run: selected rollouts with the numbers of every model for their tokens.

Reads complete stages, and runs the models again on a few rollouts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ogls.analysis.render import render
from ogls.analysis.rollout_groups import GroupReader
from ogls.analysis.rollout_search import read_history
from ogls.analysis.select_rollouts import RolloutSelector, SelectedRollout
from ogls.analysis.token_numbers import compute_token_numbers, shown_recipes, token_texts
from ogls.distillation import exemplars, teacher
from ogls.errors import StoreError, UserError
from ogls.models.load import load_tokenizer
from ogls.models.policy import Policy
from ogls.progress import Progress, no_progress
from ogls.records import Key
from ogls.stages.groups import read_states
from ogls.stages.heads import load_heads
from ogls.stages.run import Run
from ogls.store import run_query

if TYPE_CHECKING:
    from torch import Tensor

MAX_TOKENS = 120_000  # tokens of all rollouts that a page can hold (about 1.6 MB); larger runs: `ogls view --serve`


def build_token_view(run: Run, *arguments: Any, policy: bool = True, **named: Any) -> dict[str, Any]:
    """Return the data of the token view of a run (`TokenViewer.page_data` with these arguments)."""
    return TokenViewer(run, policy).page_data(*arguments, **named)


def render_token_view(data: dict[str, Any]) -> str:
    """Return the token view of one run as a separate HTML page; `data["served"]`: the page asks its server for more."""
    about = f"Method {data['method']}, model {data['model']}. All numbers are exact to 1e-4 nats."
    if data["projected"]:
        about += " The run distils the projection of the target (steer.project); the page shows the whole target."
    title, served = f"{data['run']}: tokens", bool(data.get("served"))
    return render("view.html.j2", {"token-data": [data]}, served, title=title, about=about)


class TokenViewer:
    """Computes the data of rollouts with the models of a run, which it loads once.

    Without `policy`, only the head of the model runs: the distribution of the student is shown only where it is the
    base pool, and failed problems are not sampled again. Raises UserError if no rollout of the run is verified.
    """

    def __init__(self, run: Run, policy: bool):
        if not run.records.rounds("verdicts"):
            raise UserError(f"run {run.config.name} has no verified rollouts yet")
        self.run = run
        self.policy = run.load_policy() if policy else None
        if self.policy:
            self.heads = load_heads(run.config, self.policy.head)
            self.tokenizer = self.policy.tokenizer
        else:
            self.heads, self.tokenizer = load_heads(run.config), load_tokenizer(run.config.model)
        pools = set(run.config.pools()) if run.config.has_teacher else set()
        self.recipes = shown_recipes(run.config.steer, pools, trained=policy)
        self.problems_by_id = {p.problem_id: p for p in run.problems("train")}
        self.groups = GroupReader(run, self.tokenizer, self.problems_by_id)

    def page_data(
        self,
        rounds: Sequence[int] = (),
        problem: str = "",
        sample: int | None = None,
        show: str = "all",
        max_rollouts: int = 12,
        per_round: int = 0,
        progress: Progress = no_progress,
        whole: bool = False,
    ) -> dict[str, Any]:
        """Return the data of a page: selected rollouts, each with the numbers of `compute_token_numbers`, and groups.

        Selects the rollouts of `problem` (and `sample`), or about `max_rollouts` rollouts of the kinds in `show` from
        `rounds` (default: all rounds). `per_round` adds up to that number of correct and of failed rollouts from every
        round. The groups are those of the selected rollouts, up to MAX_TOKENS tokens; with `whole`, all groups of the
        run if they have no more. Raises UserError if no rollout matches.
        """
        run, sampled = self.run, self.run.records.rounds("verdicts")
        if unknown := sorted(set(rounds) - set(sampled)):
            raise UserError(
                f"run {run.config.name} has no verified rollouts in round {unknown[0]}; verified rounds: "
                f"{_format_rounds(sampled)}"
            )
        selected = RolloutSelector(run, self.problems_by_id, self.policy).select(
            list(rounds) or sampled, problem, sample, show, max_rollouts, per_round
        )
        if not selected:
            what = f"rollouts of problem {problem}" if problem else f"{show} rollouts"
            searched = _format_rounds(list(rounds) or sampled)
            raise UserError(f"no {what} in round {searched} of run {run.config.name}")
        shown: list[dict[str, Any]] = []
        for round_ in sorted({rollout.id[0] for rollout in selected}):
            shown += self.round_data(round_, [rollout for rollout in selected if rollout.id[0] == round_])
            progress(len(shown), len(selected))
        order = {rollout.id: index for index, rollout in enumerate(selected)}
        shown.sort(key=lambda r: order[r["round"], r["problem_id"], r["sample"]])
        total, tokens = self.groups.count()
        complete = whole and tokens <= MAX_TOKENS
        shown_groups = self.groups.within((rollout.id[:2] for rollout in selected), MAX_TOKENS)
        groups = self.groups.read(self.groups.ids() if complete else shown_groups)
        return {
            "run": run.config.name,
            "method": run.config.method,
            "model": run.config.model.path,
            "points": [vars(r) | {"weights": dict(r.weights)} for r in self.recipes],
            "base": "base" if run.config.has_teacher else "student",
            "mistake_nats": run.config.train.mistake_nats,
            "until": run.config.train.until,
            "projected": run.config.steer.project != "none",
            "vocabulary": self.vocabulary(shown),
            "rollouts": shown,
            "groups": groups,
            "problems": self.groups.problems({r["problem_id"] for r in (*groups, *shown)}),
            "history": read_history(run),
            "total": total,
            "complete": complete,
            "sampled": sampled,
        }

    def read_group(self, round_: int, problem: str) -> dict[str, Any]:
        """Return the group of a problem in a round. Raises UserError if there is none."""
        verified = round_ in self.run.records.rounds("verdicts")
        if not (groups := self.groups.read([(round_, problem)]) if verified else []):
            raise UserError(f"run {self.run.config.name} has no rollouts of problem {problem} in round {round_}")
        return groups[0]

    def one(self, round_: int, problem: str, sample: int) -> dict[str, Any]:
        """Return the data of one rollout, and the texts of the token ids in it. Raises UserError if there is none."""
        if all(r["sample"] != sample for r in self.read_group(round_, problem)["rollouts"]):
            raise UserError(f"problem {problem} has no sample {sample} in round {round_}")
        (shown,) = self.round_data(round_, [SelectedRollout((round_, problem, sample))])
        return {"rollout": shown, "vocabulary": self.vocabulary([shown])}

    def round_data(self, round_: int, selected: Sequence[SelectedRollout]) -> list[dict[str, Any]]:
        """Return the data of the selected rollouts of one round."""
        run = self.run
        groups = self.groups.of_round(round_)
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
            rows.append(
                {
                    "round": round_,
                    "problem_id": key[0],
                    "sample": key[1],
                    "tags": sorted(choice.tags),
                    **{n: verdict[n] for n in ("verdict", "outcome", "answer")},
                    "text": token_texts(self.tokenizer, rollout.token_ids),
                    "exemplars": [self._pool_texts(groups[key[0]], *pair) for pair in exemplars_of.get(key, [])],
                    "later": choice.later,
                    "note": note or self.groups.reasons(groups[key[0]]).get(key, ""),
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
        """Return the cached states of some rollouts by pool, and why the round has none, if it has none."""
        if not self.run.config.has_teacher:
            return {}, ""
        states: dict[Key, dict[str, Tensor]] = {}
        try:
            self.run.records.list_shards("teacher_states", round_)
        except StoreError as error:
            return {}, str(error)
        for key, pools in read_states(self.run, round_, keys):
            states[key] = {str(p): s.float() for p, s in pools.items()}
            if self.run.config.teacher.anchor == "policy":  # the base pool has the states of the student
                states[key]["student"] = states[key]["base"]
        return states, ""

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
