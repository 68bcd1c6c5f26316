"""Selecting the contexts that score each rollout. A context is a teacher prompt with one exemplar.

The default pools of a rollout are the correct and the failed rollouts of its group without the rollout itself, the
reference solution, and `base`, the prompt without an exemplar; `teacher.pools` declares others. The mean over a pool is
a weighted mean over contexts; equal contexts are merged and their weights added.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ogls.config import Pool, PoolConfig, Recipe, RunConfig
from ogls.errors import ModelError
from ogls.problems.prompts import Prompter
from ogls.records import Key, Problem, Rollout

REFERENCE, COLUMN = -1, -2  # the sample numbers of the reference solution and of a column of the problem


@dataclass(frozen=True)
class Text:
    """An exemplar that is no other rollout: a text, its number among the samples, and the feedback on it."""

    text: str
    sample: int
    feedback: str = ""


Exemplar = Rollout | Text | None  # None: the prompt without an exemplar


@dataclass(frozen=True)
class Context:
    """A prompt that scores rollouts; `weights` runs it: frozen, live or ema (of the run's model), or another model."""

    weights: str
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True)
class ScoredRollout:
    """One rollout and pool: the tokens to score, and the contexts to average over."""

    key: Key
    pool: Pool
    token_ids: tuple[int, ...]  # the first train.tokens tokens of the rollout
    shares: tuple[tuple[Context, float], ...]  # contexts with their weights in the mean; the weights sum to 1
    exemplars: tuple[int, ...]  # sample numbers of the exemplars, REFERENCE or COLUMN


@dataclass
class TeacherPlan:
    """The work of the teacher pass for one or more groups."""

    scored: list[ScoredRollout] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # rollouts that are not scored, by reason
    cut: int = 0  # truncated exemplars
    unmatched: int = 0  # exemplars in which teacher.exemplar_pattern matches nothing

    def extend(self, other: TeacherPlan) -> None:
        """Add the work of another plan to this one."""
        self.scored += other.scored
        self.left_out += other.left_out
        self.cut += other.cut
        self.unmatched += other.unmatched


class ContextPlanner:
    """Selects exemplars for the rollouts of a group; `context` is the context length of the model in tokens.

    The selection depends on the content of a group and not on the order of its rollouts. `others` has the prompter of
    every other model by its path; its chat template may differ.
    """

    def __init__(
        self, config: RunConfig, prompter: Prompter, context: int, others: Mapping[str, Prompter] | None = None
    ):
        self.config, self.prompter, self.context = config, prompter, context
        self.others = others or {}
        declared = config.declared_pools()
        self.pools = {name: declared[name] for name in config.pools()}

    def group(self, problem: Problem, rollouts: Sequence[Rollout]) -> TeacherPlan:
        """Plan one group: every rollout to score, and a reason for each rollout that is left out.

        Raises ModelError if the context of the model has no room for an exemplar.
        """
        plan = TeacherPlan()
        contexts = _Contexts(self, problem)
        chosen = self.choose(problem, rollouts)
        for rollout in rollouts:
            pools = chosen[rollout.key]
            if isinstance(pools, str):
                plan.left_out[pools] += 1
                continue
            tokens = rollout.token_ids[: self.config.train.tokens]
            for pool, exemplars in pools.items():
                if exemplars:
                    plan.scored.append(contexts.scored(rollout.key, pool, tokens, exemplars))
        plan.cut, plan.unmatched = contexts.cut, contexts.unmatched
        return plan

    def choose(self, problem: Problem, rollouts: Sequence[Rollout]) -> dict[Key, dict[Pool, list[Exemplar]] | str]:
        """Return, for each rollout of a group, its exemplars by pool, or the reason why it is left out.

        The reasons are undecided, already_correct, failed, group_not_mixed and no_POOL_exemplar.
        """
        by_outcome = {o: self._ordered([r for r in rollouts if r.outcome == o]) for o in ("correct", "failed")}
        mixed = all(by_outcome.values())
        required = set(self.config.steer.recipe_for(problem.columns.get("source")).pools())
        chosen: dict[Key, dict[Pool, list[Exemplar]] | str] = {}
        for rollout in rollouts:
            if reason := self._exclusion_reason(rollout, mixed):
                chosen[rollout.key] = reason
                continue
            pools = self._pools(rollout, problem, by_outcome)
            missing = sorted(p for p in required if not pools.get(p))
            chosen[rollout.key] = f"no_{missing[0]}_exemplar" if missing else pools
        return chosen

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
        reference: list[Exemplar] = [Text(problem.solution, REFERENCE)] if problem.solution else []
        pools: dict[Pool, list[Exemplar]] = {}
        for name, pool in self.pools.items():
            if pool.kind == "nothing":
                pools[name] = [None]
            elif pool.kind == "reference":
                pools[name] = list(reference)
            elif pool.kind == "feedback":
                pools[name] = [Text(rollout.text, rollout.sample, rollout.feedback)] if rollout.feedback else []
            elif pool.kind == "column":
                text = problem.columns.get(pool.reads, "")
                pools[name] = [Text(text, COLUMN)] if text else []
            else:
                first = reference if pool.kind == "correct" and self.config.teacher.reference_exemplar else []
                most = pool.max_exemplars or self.config.teacher.max_exemplars
                pools[name] = [*first, *self._others(rollout, pool, by_outcome)][:most]
        if self.config.teacher.empty_pool == "reference":
            pools |= {name: list(reference) for name in self._reading("correct") if not pools[name]}
        none_failed = rollout.outcome == "correct" and any(not pools[name] for name in self._reading("incorrect"))
        if none_failed and self.config.teacher.unanimous == "anchor":
            pools |= self._without_direction(pools, self.config.steer.recipe_for(problem.columns.get("source")))
        return pools

    def _reading(self, kind: str) -> list[Pool]:
        return [name for name, pool in self.pools.items() if pool.kind == kind]

    def _others(self, rollout: Rollout, pool: PoolConfig, by_outcome: dict[str, list[Rollout]]) -> list[Rollout]:
        """The rollouts that a pool may read for this rollout, in the order of `choose`: never the rollout itself."""
        outcome, opposite = ("correct", "failed") if pool.kind == "correct" else ("failed", "correct")
        others = [r for r in by_outcome[outcome] if r.sample != rollout.sample]
        if pool.choose == "shortest":
            return sorted(others, key=lambda r: len(r.token_ids))
        if pool.choose == "longest":
            return sorted(others, key=lambda r: -len(r.token_ids))
        if pool.choose == "nearest":
            rivals = [r for r in by_outcome[opposite] if r.sample != rollout.sample]
            return sorted(others, key=lambda r: -max((_shared(r, rival) for rival in rivals), default=0))
        return others

    def _without_direction(self, pools: dict[Pool, list[Exemplar]], recipe: Recipe) -> dict[Pool, list[Exemplar]]:
        """Pools with which those that read correct and failed rollouts add nothing to the base pool.

        Pools that ask the same teacher with the same words are made equal and cancel if their weights do, as in
        ogls-sd. Otherwise, as in contrastive, they are the base pool, which then has the weight of all of them.
        """
        correct = self._reading("correct")
        names = [*correct, *self._reading("incorrect")]
        teachers = {(self.pools[n].weights or self.config.teacher.weights, self.pools[n].template) for n in names}
        cancel = len(teachers) == 1 and sum(getattr(recipe, name, 0.0) for name in names) == 0
        return dict.fromkeys(names, pools[correct[0]] if cancel and correct else pools["base"])

    def _ordered(self, rollouts: list[Rollout]) -> list[Rollout]:
        """The rollouts in a pseudo-random order of their content, which does not depend on the input order."""
        seed = str(self.config.seed).encode()
        return sorted(rollouts, key=lambda r: hashlib.blake2b(repr(r.token_ids).encode(), key=seed[:64]).digest())


def matches(pattern: str, text: str) -> str:
    """The matches of a regular expression in a text, or its group in each of them, a line each."""
    return "\n".join(part for part in re.findall(pattern, text, re.MULTILINE) if part.strip())


def _shared(a: Rollout, b: Rollout) -> int:
    """The number of tokens that two rollouts share from the start."""
    pairs = zip(a.token_ids, b.token_ids, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a.token_ids), len(b.token_ids)))


class _Contexts:
    """The contexts of one problem; each is rendered once.

    `cut` counts truncated exemplars; `unmatched` counts those in which teacher.exemplar_pattern matches nothing.
    """

    def __init__(self, planner: ContextPlanner, problem: Problem):
        self.planner, self.problem = planner, problem
        self.rendered: dict[tuple[Any, ...], Context] = {}
        self.cut = 0
        self.unmatched = 0
        self.tokens: dict[int, tuple[int, ...]] = {}  # of rollouts and the reference, by sample

    def scored(self, key: Key, pool: Pool, tokens: tuple[int, ...], exemplars: list[Exemplar]) -> ScoredRollout:
        contexts = [self.context(pool, e) for e in exemplars]
        counts = Counter(contexts)
        shares = tuple((c, counts[c] / len(contexts)) for c in sorted(counts, key=lambda c: c.prompt_ids))
        samples = tuple(e.sample for e in exemplars if e is not None)
        return ScoredRollout(key, pool, tokens, shares, samples)

    def context(self, pool: Pool, exemplar: Exemplar) -> Context:
        """The prompt with an exemplar, as the model of the pool reads it."""
        declared = self.planner.pools[pool]
        tokens = () if exemplar is None else self._tokens(exemplar)
        feedback = exemplar.feedback if isinstance(exemplar, Text) else ""
        key = (pool, exemplar is None, tokens, feedback)
        if key not in self.rendered:
            prompter = self.planner.others.get(declared.model, self.planner.prompter)
            template = self._template(declared, exemplar)
            values = {"problem": self.problem.problem, "feedback": feedback}
            if exemplar is not None:
                frame = len(prompter.fill(template, exemplar="", **values))
                values["exemplar"] = self._text(tokens, frame)
            self.rendered[key] = Context(self._weights(declared, exemplar), tuple(prompter.fill(template, **values)))
        return self.rendered[key]

    def _weights(self, pool: PoolConfig, exemplar: Exemplar) -> str:
        """Who computes the pool: another model by its path, or the weights of the run's model."""
        teacher = self.planner.config.teacher
        if exemplar is None and pool.kind != "nothing":  # it stands for the base pool
            pool = self.planner.pools["base"]
        if pool.model or pool.weights:
            return pool.model or str(pool.weights)
        return "live" if pool.name == "base" and teacher.anchor == "policy" else teacher.weights

    def _template(self, pool: PoolConfig, exemplar: Exemplar) -> str:
        prompts = self.planner.config.prompts
        if exemplar is None:
            return pool.template if pool.kind == "nothing" and pool.template else prompts.student
        defaults = {"reference": prompts.reference, "feedback": prompts.feedback}
        return pool.template or defaults.get(pool.kind, prompts.exemplar)

    def _tokens(self, exemplar: Rollout | Text) -> tuple[int, ...]:
        """The tokens that are shown of an exemplar."""
        if isinstance(exemplar, Text) and (exemplar.feedback or exemplar.sample == COLUMN):
            return self._tokenize(exemplar.text)  # the feedback is on all of it; a column has the words of its owner
        if exemplar.sample not in self.tokens:
            self.tokens[exemplar.sample] = self._shown(exemplar)
        return self.tokens[exemplar.sample]

    def _shown(self, exemplar: Rollout | Text) -> tuple[int, ...]:
        """The tokens of what teacher.exemplar_pattern keeps, or of all of it."""
        pattern = self.planner.config.teacher.exemplar_pattern
        kept = matches(pattern, exemplar.text) if pattern else ""
        self.unmatched += bool(pattern) and not kept
        if isinstance(exemplar, Rollout) and not kept:
            return exemplar.token_ids
        return self._tokenize(kept or exemplar.text)

    def _tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(self.planner.prompter.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text(self, tokens: tuple[int, ...], frame: int) -> str:
        """The exemplar as text, truncated to teacher.exemplar_tokens and to the room in the model's context.

        `frame` is the number of tokens of the prompt around it. Raises ModelError if there is no room.
        """
        planner, config = self.planner, self.planner.config
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
