"""The stage `teach`: run the teacher and cache its averaged hidden states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, TypeVar

import pyarrow as pa

from ogls.config import RunConfig
from ogls.distillation import exemplars, teacher
from ogls.execution.work import OneByOne, ShardOutput
from ogls.models.adapter import Adapter
from ogls.models.load import load_context_length, load_tokenizer
from ogls.models.policy import Policy
from ogls.planning.memory import STATES_IN_MEMORY
from ogls.progress import Progress, no_progress
from ogls.records import CONTEXTS, TEACHER_STATES, StageResult
from ogls.records.schema import to_arrow
from ogls.stages import columns
from ogls.stages.fingerprints import policy_inputs
from ogls.stages.groups import read_groups
from ogls.stages.run import Run
from ogls.stages.shards import carry_out_shards, divide
from ogls.store.writer import StageWriter

T = TypeVar("T")
_ROW_GROUP = 2**23  # bytes of 16-bit states per row group


def teach(run: Run, round_: int, progress: Progress = no_progress) -> StageResult:
    """Cache the hidden states of the teacher for every rollout to train on and every pool, averaged over exemplars."""
    config = run.config
    start = run.start_point(round_).round
    inputs = {
        **policy_inputs(run),
        "teacher": run.identity.teacher,
        "pools": config.pools(),
        "required": config.steer.to_recipe().pools(),
        **({"sources": config.steer.sources} if config.steer.sources else {}),
        "chosen": (config.train.rollouts, config.train.tokens),
        "trajectories": run.digest("trajectories", round_),
        "verdicts": run.digest("verdicts", round_),
        "policy": run.policy_hash(start),
        "before": run.digest("updates", start) if config.has_ema and start else None,
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        planner = context_planner(run)
        problems = {p.problem_id: p for p in run.problems("train")}
        plans = [planner.group(problems[name], group) for name, group in read_groups(run, round_).items()]
        size = config.teacher.shard_groups
        carry_out_shards(run, TeachWork, writer, divide([p.scored for p in plans], size), size, progress)
        scored = [s for plan in plans for s in plan.scored]
        contexts = [{**_scored_key(s), "exemplars": list(s.exemplars)} for s in scored]
        writer.write_extra(CONTEXTS, to_arrow(CONTEXTS, contexts))
        left_out: Counter[str] = sum((p.left_out for p in plans), Counter())
        kept = len({s.key for s in scored})
        cut = sum(p.cut for p in plans)
        truncated = f"{cut} exemplars were truncated (teacher.exemplar_tokens, or the context of the model)"
        unmatched = sum(p.unmatched for p in plans)
        whole = f"teacher.exemplar_pattern matches nothing in {unmatched} exemplars, which are shown whole"
        notice = "; ".join([*([truncated] if cut else []), *([whole] if unmatched else []), *_unweighted(config)])
        return {
            "rollouts": kept,
            "left_out": dict(left_out),
            "exemplars_cut": cut,
            "exemplars_unmatched": unmatched,
            "notice": notice,
        }

    return run.carry_out("teacher_states", round_, inputs, work)


def context_planner(run: Run) -> exemplars.ContextPlanner:
    """The planner of a run, with the chat template of every model that computes pools. Loads no weights."""
    models = {"": run.config.model, **run.config.other_models()}
    prompters = {path: run.prompter(load_tokenizer(model)) for path, model in models.items()}
    context = min(load_context_length(model) for model in models.values())
    return exemplars.ContextPlanner(run.config, prompters.pop(""), context, prompters)


def _split(items: Sequence[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Consecutive items, in parts of at most `limit` together (or of one item)."""
    part: list[T] = []
    for item in items:
        if part and sum(map(size, part)) + size(item) > limit:
            yield part
            part = []
        part.append(item)
    if part:
        yield part


class TeachWork(OneByOne):
    """Runs the teacher: the run's model with any of its weights, and other models."""

    def __init__(self, run: Run, round_: int):
        self.run, self.start = run, run.start_point(round_).round
        self.policy = run.load_policy()
        self.others = {path: run.load_other(path) for path in run.config.other_models()}
        self.width = max(p.head.shape[1] for p in (self.policy, *self.others.values()))
        self.weights = ""

    def compute(self, items: Sequence[Sequence[exemplars.ScoredRollout]], progress: Progress) -> ShardOutput:
        """Rows of the table teacher_states for the plans of some groups; a few rollouts at a time."""
        return ShardOutput(self._row_groups(items), {"tokens": sum(len(s.token_ids) for group in items for s in group)})

    def _row_groups(self, groups: Sequence[Sequence[exemplars.ScoredRollout]]) -> Iterator[pa.Table]:
        """Run the teacher on as many groups as fit into `STATES_IN_MEMORY` at once, and yield their rows.

        A table has the rows of a few rollouts (`_ROW_GROUP`), so that readers of one rollout need not read the others.
        """
        settings, width = self.run.config.teacher, self.width
        for part in _split(groups, lambda group: 4 * width * sum(len(s.token_ids) for s in group), STATES_IN_MEMORY):
            scored = [s for group in part for s in group]
            states: dict[Any, Any] = {}
            for weights in dict.fromkeys(s.shares[0][0].weights for s in scored):
                chosen = [s for s in scored if s.shares[0][0].weights == weights]
                states |= teacher.score_rollouts(self._use(weights), chosen, settings.batch_tokens)
            rollouts = [list(rows) for _, rows in groupby(scored, key=lambda s: s.key)]
            for together in _split(rollouts, lambda rows: 2 * width * sum(len(s.token_ids) for s in rows), _ROW_GROUP):
                rows = [
                    {
                        **_scored_key(s),
                        "exemplars": list(s.exemplars),
                        **columns.pack_states(states.pop((s.key, s.pool)), settings.state_dtype),
                    }
                    for rollout in together
                    for s in rollout
                ]
                yield to_arrow(TEACHER_STATES, rows)

    def close(self) -> None:
        """Release the memory of kept models; others are freed with this object."""
        self.run.release_memory()

    def _use(self, weights: str) -> Policy:
        """The model with weights that a context names: frozen, live or ema, or another model by its path."""
        if weights in self.others:
            return self.others[weights]
        if weights != self.weights:
            self.policy.use_adapter(teacher_adapter(self.run, self.start, weights))
            self.weights = weights
        return self.policy


def _unweighted(config: RunConfig) -> list[str]:
    """What to say about declared pools that no recipe weighs."""
    weighted = {pool for recipe in config.steer.recipes() for pool in recipe.pools()}
    names = [p.name for p in config.teacher.pools if not isinstance(p, str) and p.name not in weighted]
    return [f"no recipe weighs {', '.join(names)}: measured, not distilled"] if names else []


def teacher_adapter(run: Run, start: int, kind: str = "") -> Adapter | None:
    """The adapter of a teacher in a round that starts from the policy of round `start`; None for the base model.

    `kind` is frozen, live or ema; by default teacher.weights. A live teacher and an average begin with `adapter.start`.
    """
    kind = kind or run.config.teacher.weights
    if kind == "frozen":
        return None
    if kind == "live" or not start:
        return run.load_adapter(start)
    return Adapter.from_bytes(run.read_attachment(start, "ema.safetensors"))


def _scored_key(scored: exemplars.ScoredRollout) -> dict[str, Any]:
    return {"problem_id": scored.key[0], "sample": scored.key[1], "pool": scored.pool}
