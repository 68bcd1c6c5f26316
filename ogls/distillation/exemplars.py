"""Selecting the contexts that score each rollout. A context is a teacher prompt with one exemplar.

The pools of a rollout are the correct and the failed rollouts of its group without the rollout itself, the reference
solution, and `base`, the prompt without an exemplar. The mean over a pool is a weighted mean over contexts; equal
contexts are merged and their weights added.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ogls.config import Pool, RunConfig
from ogls.errors import ModelError
from ogls.problems.prompts import Prompter
from ogls.records import Key, Problem, Rollout

REFERENCE = -1  # the sample number of the reference solution among exemplars
Exemplar = Rollout | Literal["solution", "none"]  # "none": the prompt without an exemplar


@dataclass(frozen=True)
class Context:
    """A prompt that scores rollouts; `weights` selects the weights that run it: the teacher's or the policy's."""

    weights: Literal["teacher", "policy"]
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True)
class ScoredRollout:
    """One rollout and pool: the tokens to score, and the contexts to average over."""

    key: Key
    pool: Pool
    token_ids: tuple[int, ...]  # the first train.tokens tokens of the rollout
    shares: tuple[tuple[Context, float], ...]  # contexts with their weights in the mean; the weights sum to 1
    exemplars: tuple[int, ...]  # sample numbers of the exemplars, or REFERENCE


@dataclass
class TeacherPlan:
    """The work of the teacher pass for one or more groups."""

    scored: list[ScoredRollout] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # rollouts that are not scored, by reason
    cut: int = 0  # truncated exemplars

    def extend(self, other: TeacherPlan) -> None:
        """Add the work of another plan to this one."""
        self.scored += other.scored
        self.left_out += other.left_out
        self.cut += other.cut


class ContextPlanner:
    """Selects exemplars for the rollouts of a group; `context` is the context length of the model in tokens.

    The selection depends on the content of a group and not on the order of its rollouts.
    """

    def __init__(self, config: RunConfig, prompter: Prompter, context: int):
        self.config, self.prompter, self.context = config, prompter, context
        self.required = set(config.steer.to_recipe().pools())

    def group(self, problem: Problem, rollouts: Sequence[Rollout]) -> TeacherPlan:
        """Plan one group: every rollout to score, and a reason for each rollout that is left out.

        Raises ModelError if the context of the model has no room for an exemplar.
        """
        plan = TeacherPlan()
        by_outcome = {o: self._ordered([r for r in rollouts if r.outcome == o]) for o in ("correct", "failed")}
        mixed = all(by_outcome.values())
        contexts = _Contexts(self, problem)
        for rollout in rollouts:
            reason = self._exclusion_reason(rollout, mixed)
            pools = None if reason else self._pools(rollout, problem, by_outcome)
            missing = [] if pools is None else sorted(p for p in self.required if not pools.get(p))
            if reason or missing:
                plan.left_out[reason or f"no_{missing[0]}_exemplar"] += 1
                continue
            tokens = rollout.token_ids[: self.config.train.tokens]
            for pool, exemplars in (pools or {}).items():
                if exemplars:
                    plan.scored.append(contexts.scored(rollout.key, pool, tokens, exemplars))
        plan.cut = contexts.cut
        return plan

    def _exclusion_reason(self, rollout: Rollout, mixed: bool) -> str:
        """Why train.rollouts excludes a rollout; empty if it is trained on."""
        selection = self.config.train.rollouts
        if rollout.outcome == "undecided":
            return "undecided"
        if selection == "incorrect" and rollout.outcome == "correct":
            return "already_correct"
        if selection == "correct" and rollout.outcome == "failed":
            return "failed"
        return "group_not_mixed" if selection == "mixed_groups" and not mixed else ""

    def _pools(
        self, rollout: Rollout, problem: Problem, by_outcome: dict[str, list[Rollout]]
    ) -> dict[Pool, list[Exemplar]]:
        """The exemplars of each pool of a rollout.

        Another rollout with the same tokens is a sample of its own, and may be an exemplar.
        """
        max_exemplars = self.config.teacher.max_exemplars
        reference: list[Exemplar] = ["solution"] if problem.solution else []
        pools: dict[Pool, list[Exemplar]] = {}
        for pool in self.config.pools():
            if pool == "base":
                pools[pool] = ["none"]
            elif pool == "reference":
                pools[pool] = list(reference)
            else:
                outcome = "correct" if pool == "correct" else "failed"
                others: list[Exemplar] = [r for r in by_outcome[outcome] if r.sample != rollout.sample]
                first = reference if pool == "correct" and self.config.teacher.reference_exemplar else []
                pools[pool] = [*first, *others][:max_exemplars]
        if self.config.teacher.empty_pool == "reference" and pools.get("correct") == []:
            pools["correct"] = list(reference)
        none_failed = rollout.outcome == "correct" and pools.get("incorrect") == []
        if none_failed and self.config.teacher.unanimous == "anchor":
            pools |= self._without_direction(pools)
        return pools

    def _without_direction(self, pools: dict[Pool, list[Exemplar]]) -> dict[Pool, list[Exemplar]]:
        """Pools with which the correct and the incorrect pool add nothing to the base pool.

        Equal pools cancel if their weights do, as in ogls-sd. With other weights, as in contrastive, both are the base
        pool, which then has the weight of all three.
        """
        recipe = self.config.steer.to_recipe()
        if recipe.correct + recipe.incorrect == 0:
            return {"incorrect": pools.get("correct", [])}
        return {"correct": pools["base"], "incorrect": pools["base"]}

    def _ordered(self, rollouts: list[Rollout]) -> list[Rollout]:
        """The rollouts in a pseudo-random order of their content, which does not depend on the input order."""
        seed = str(self.config.seed).encode()
        return sorted(rollouts, key=lambda r: hashlib.blake2b(repr(r.token_ids).encode(), key=seed[:64]).digest())


class _Contexts:
    """The contexts of one problem; each is rendered once. `cut` counts truncated exemplars."""

    def __init__(self, planner: ContextPlanner, problem: Problem):
        self.planner, self.problem = planner, problem
        self.rendered: dict[tuple[Pool, tuple[int, ...]], Context] = {}
        self.cut = 0

    def scored(self, key: Key, pool: Pool, tokens: tuple[int, ...], exemplars: list[Exemplar]) -> ScoredRollout:
        contexts = [self.context(pool, e) for e in exemplars]
        counts = Counter(contexts)
        shares = tuple((c, counts[c] / len(contexts)) for c in sorted(counts, key=lambda c: c.prompt_ids))
        read = [e for e in exemplars if e != "none"]
        samples = tuple(e.sample if isinstance(e, Rollout) else REFERENCE for e in read)
        return ScoredRollout(key, pool, tokens, shares, samples)

    def context(self, pool: Pool, exemplar: Exemplar) -> Context:
        config, prompter = self.planner.config, self.planner.prompter
        if exemplar == "none":
            # Live: teacher and policy have the same weights, so one pass runs both.
            same = config.teacher.weights == "live"
            weights: Literal["teacher", "policy"] = "teacher" if same else config.teacher.anchor
            return Context(weights, tuple(prompter.student(self.problem.problem)))
        tokens = exemplar.token_ids if isinstance(exemplar, Rollout) else self._solution()
        if (pool, tokens) not in self.rendered:
            text = self._text(tokens, pool == "reference")
            ids = prompter.teacher(self.problem.problem, text, reference=pool == "reference")
            self.rendered[pool, tokens] = Context("teacher", tuple(ids))
        return self.rendered[pool, tokens]

    def _solution(self) -> tuple[int, ...]:
        return tuple(self.planner.prompter.tokenizer(self.problem.solution, add_special_tokens=False)["input_ids"])

    def _text(self, tokens: tuple[int, ...], reference: bool) -> str:
        """The exemplar as text, truncated to teacher.exemplar_tokens and to the room in the model's context.

        Raises ModelError if there is no room.
        """
        planner, config = self.planner, self.planner.config
        frame = len(planner.prompter.teacher(self.problem.problem, "", reference=reference))
        continuation = min(config.train.tokens, config.rollout.max_tokens)
        room = planner.context - frame - continuation
        if room < 1:
            raise ModelError(
                f"problem {self.problem.problem_id}: {frame} tokens of prompt and {continuation} of rollout leave no "
                f"room for an exemplar in a context of {planner.context} tokens; in a new run, lower train.tokens"
            )
        limit = min(config.teacher.exemplar_tokens, room)
        self.cut += len(tokens) > limit
        text: str = planner.prompter.tokenizer.decode(tokens[:limit], skip_special_tokens=True)
        return text
