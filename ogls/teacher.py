"""The teacher pass: which contexts score which rollouts, and their averaged final hidden states.

A context is a prompt that holds one exemplar. Each is prefilled once and every rollout that it scores is run
as a continuation of that cache: G prefills and G (G - 1) short continuations for a group, in place of
G (G - 1) full sequences. No head is applied here. It is linear, so the head of the mean state over a pool is
the mean of the pool's logits (DESIGN, "The head is linear"), and [T, D] stands for [T, V].
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ogls.config import Pool, RunConfig
from ogls.errors import ModelError
from ogls.head import nll
from ogls.policy import Policy
from ogls.prompts import Prompter
from ogls.records import Key, Problem, Rollout

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

_HEAD_TOKENS = 1024  # tokens whose full-vocabulary logits are alive at once
REFERENCE = -1  # the "sample" of a reference solution among exemplars


@dataclass(frozen=True)
class Context:
    """A prompt that scores rollouts; `weights` says whose logits are wanted."""

    weights: Literal["teacher", "policy"]
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True)
class Scored:
    """One rollout and pool: contexts with their shares of the mean, and the samples that they stand for."""

    key: Key
    pool: Pool
    token_ids: tuple[int, ...]
    shares: tuple[tuple[Context, float], ...]
    exemplars: tuple[int, ...]


@dataclass
class Plan:
    """What the teacher pass has to do for some groups."""

    scored: list[Scored] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    cut: int = 0

    def extend(self, other: Plan) -> None:
        self.scored += other.scored
        self.left_out += other.left_out
        self.cut += other.cut


class Planner:
    """Chooses exemplars. The choice depends on the texts of a group, not on the order of its rollouts."""

    def __init__(self, config: RunConfig, prompter: Prompter, context: int):
        self.config, self.prompter, self.context = config, prompter, context
        self.required = set(config.steer.resolved().pools())

    def group(self, problem: Problem, rollouts: Sequence[Rollout]) -> Plan:
        """Plan one group: every rollout to be trained, and a reason for each that is left out."""
        plan = Plan()
        by_outcome = {o: self._ordered([r for r in rollouts if r.outcome == o]) for o in ("correct", "failed")}
        mixed = all(by_outcome.values())
        contexts = _Contexts(self, problem)
        for rollout in rollouts:
            reason = self._not_trained(rollout, mixed)
            pools = None if reason else self._pools(rollout, problem, by_outcome)
            missing = [] if pools is None else sorted(p for p in self.required if not pools.get(p))
            if reason or missing:
                plan.left_out[reason or f"no_{missing[0]}_exemplar"] += 1
                continue
            tokens = rollout.token_ids[: self.config.train.tokens]
            for pool, exemplars in (pools or {}).items():
                if exemplars or pool == "base":
                    plan.scored.append(contexts.scored(rollout.key, pool, tokens, exemplars))
        plan.cut = contexts.cut
        return plan

    def _not_trained(self, rollout: Rollout, mixed: bool) -> str:
        chosen = self.config.train.rollouts
        if rollout.outcome == "undecided":
            return "undecided"
        if chosen == "incorrect" and rollout.outcome == "correct":
            return "already_correct"
        if chosen == "correct" and rollout.outcome == "failed":
            return "failed"
        return "group_not_mixed" if chosen == "mixed_groups" and not mixed else ""

    def _pools(
        self, rollout: Rollout, problem: Problem, by_outcome: dict[str, list[Rollout]]
    ) -> dict[Pool, list[Rollout | None]]:
        """Exemplars a pool; None among them is the reference. `base` has a placeholder of its own."""
        most = self.config.teacher.max_exemplars
        reference: list[Rollout | None] = [None] if problem.solution else []
        pools: dict[Pool, list[Rollout | None]] = {}
        for pool in self.config.pools():
            if pool == "base":
                pools[pool] = [None]
            elif pool == "reference":
                pools[pool] = list(reference)
            else:
                outcome = "correct" if pool == "correct" else "failed"
                others: list[Rollout | None] = [r for r in by_outcome[outcome] if r.sample != rollout.sample]
                told = reference if pool == "correct" and self.config.teacher.reference_exemplar else []
                pools[pool] = [*told, *others][:most]
        if self.config.teacher.empty_pool == "reference" and pools.get("correct") == []:
            pools["correct"] = list(reference)
        alone = rollout.outcome == "correct" and pools.get("incorrect") == []
        if alone and self.config.teacher.unanimous == "anchor":
            pools["incorrect"] = pools.get("correct", [])  # the same contexts: the direction is exactly 0
        return pools

    def _ordered(self, rollouts: list[Rollout]) -> list[Rollout]:
        """Shuffled by content: permuting the rollouts of a group changes nothing."""
        seed = str(self.config.seed).encode()
        return sorted(rollouts, key=lambda r: hashlib.blake2b(repr(r.token_ids).encode(), key=seed[:64]).digest())


class _Contexts:
    """The contexts of one problem, each rendered once."""

    def __init__(self, planner: Planner, problem: Problem):
        self.planner, self.problem = planner, problem
        self.rendered: dict[tuple[Pool, tuple[int, ...]], Context] = {}
        self.cut = 0

    def scored(self, key: Key, pool: Pool, tokens: tuple[int, ...], exemplars: list[Rollout | None]) -> Scored:
        contexts = [self.context(pool, e) for e in exemplars]
        counts = Counter(contexts)
        shares = tuple((c, counts[c] / len(contexts)) for c in sorted(counts, key=lambda c: c.prompt_ids))
        samples = () if pool == "base" else tuple(REFERENCE if e is None else e.sample for e in exemplars)
        return Scored(key, pool, tokens, shares, samples)

    def context(self, pool: Pool, exemplar: Rollout | None) -> Context:
        config, prompter = self.planner.config, self.planner.prompter
        if pool == "base":
            same = config.teacher.weights == "live"  # then teacher and policy are one: run them together
            whose: Literal["teacher", "policy"] = "teacher" if same else config.teacher.anchor
            return Context(whose, tuple(prompter.student(self.problem.problem)))
        tokens = exemplar.token_ids if exemplar else self._solution()
        if (pool, tokens) not in self.rendered:
            text = self._text(tokens, pool == "reference")
            ids = prompter.teacher(self.problem.problem, text, reference=pool == "reference")
            self.rendered[pool, tokens] = Context("teacher", tuple(ids))
        return self.rendered[pool, tokens]

    def _solution(self) -> tuple[int, ...]:
        return tuple(self.planner.prompter.tokenizer(self.problem.solution, add_special_tokens=False)["input_ids"])

    def _text(self, tokens: tuple[int, ...], reference: bool) -> str:
        """The exemplar as text, cut to what the setting and the model's context leave room for."""
        planner, config = self.planner, self.planner.config
        frame = len(planner.prompter.teacher(self.problem.problem, "", reference=reference))
        continuation = min(config.train.tokens, config.rollout.max_tokens)
        room = planner.context - frame - continuation
        if room < 1:
            raise ModelError(
                f"problem {self.problem.problem_id}: {frame} tokens of prompt and {continuation} of rollout leave no "
                f"room for an exemplar in a context of {planner.context}; lower train.tokens"
            )
        most = min(config.teacher.exemplar_tokens, room)
        self.cut += len(tokens) > most
        text: str = planner.prompter.tokenizer.decode(tokens[:most], skip_special_tokens=True)
        return text


def score(
    policy: Policy, scored: Sequence[Scored], batch_tokens: int, progress: Callable[[int, int], None] = lambda *_: None
) -> dict[tuple[Key, Pool], Float[Tensor, "T D"]]:
    """Averaged final hidden states (fp32, on the CPU) with the weights that the policy has in use.

    State t of a rollout is the one whose logits predict its token t.
    """

    wanted: dict[tuple[int, ...], dict[tuple[int, ...], list[tuple[tuple[Key, Pool], float]]]] = {}
    for item in scored:  # equal contexts and equal rollouts are run once
        for context, share in item.shares:
            rows = wanted.setdefault(context.prompt_ids, {}).setdefault(item.token_ids, [])
            rows.append(((item.key, item.pool), share))
    means: dict[tuple[Key, Pool], Tensor] = {}
    done, total = 0, sum(len(rows) for rows in wanted.values())
    for batch in _batches(list(wanted), [max(map(len, wanted[c])) for c in wanted], batch_tokens):
        pairs = [(i, tokens) for i, context in enumerate(batch) for tokens in wanted[context]]
        for (i, tokens), states in zip(pairs, _fitting(policy, batch, pairs, batch_tokens), strict=True):
            for slot, share in wanted[batch[i]][tokens]:
                part = states * share
                means[slot] = means[slot] + part if slot in means else part
        done += len(pairs)
        progress(done, total)
    return means


def _fitting(
    policy: Policy, prefixes: Sequence[Sequence[int]], pairs: Sequence[tuple[int, Sequence[int]]], batch_tokens: int
) -> list[Float[Tensor, "T D"]]:
    """`continuations`, in fp32 on the CPU; where memory does not suffice, in halves, down to one of each.

    Raises ModelError where a single prefix with a single continuation does not fit.
    """
    import torch

    try:
        with torch.inference_mode():
            return [states.float().cpu() for states in continuations(policy, prefixes, pairs, batch_tokens)]
    except torch.OutOfMemoryError:
        pass  # outside the handler, so that what it holds is let go of
    if policy.device.type == "cuda":
        torch.cuda.empty_cache()
    if len(pairs) == 1:
        size = len(prefixes[pairs[0][0]]) + len(pairs[0][1])
        raise ModelError(f"no memory for one sequence of {size} tokens: lower teacher.exemplar_tokens or train.tokens")
    half = len(pairs) // 2
    return [
        states
        for part in (pairs[:half], pairs[half:])
        for states in _fitting(policy, *_only_used(prefixes, part), batch_tokens)
    ]


def _only_used(
    prefixes: Sequence[Sequence[int]], pairs: Sequence[tuple[int, Sequence[int]]]
) -> tuple[list[Sequence[int]], list[tuple[int, Sequence[int]]]]:
    """The prefixes that some pairs name, and the pairs as these are counted."""
    used = list(dict.fromkeys(i for i, _ in pairs))
    return [prefixes[i] for i in used], [(used.index(i), tokens) for i, tokens in pairs]


def continuations(
    policy: Policy, prefixes: Sequence[Sequence[int]], pairs: Sequence[tuple[int, Sequence[int]]], batch_tokens: int
) -> Iterable[Float[Tensor, "T D"]]:
    """For each (prefix index, tokens) the states that predict the tokens; every prefix is prefilled once."""
    import torch
    from transformers import DynamicCache

    lengths = torch.tensor([len(p) for p in prefixes], device=policy.device)
    ids, mask = _right_pad(prefixes, policy.device)
    out = policy.hidden(ids, mask, past_key_values=DynamicCache(), use_cache=True)
    first = out.last_hidden_state[torch.arange(len(prefixes), device=policy.device), lengths - 1]
    longest = max(len(tokens) for _, tokens in pairs)
    step = max(1, batch_tokens // (ids.shape[1] + longest))
    for start in range(0, len(pairs), step):
        part = pairs[start : start + step]
        index = torch.tensor([i for i, _ in part], device=policy.device)
        tokens, token_mask = _right_pad([t[:-1] for _, t in part], policy.device)
        states = None
        if tokens.shape[1]:
            cache = DynamicCache()
            for layer, kept in enumerate(out.past_key_values.layers):
                cache.update(kept.keys[index], kept.values[index], layer)
            position = lengths[index, None] + torch.arange(tokens.shape[1], device=policy.device)
            states = policy.hidden(
                tokens,
                torch.cat([mask[index], token_mask], 1),
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        for row, (i, sequence) in enumerate(part):
            rest = [states[row, : len(sequence) - 1]] if states is not None else []
            yield torch.cat([first[i][None], *rest])


def logprobs(
    policy: Policy, prompts: Sequence[tuple[int, ...]], rollouts: Sequence[tuple[int, ...]], batch_tokens: int
) -> list[float]:
    """Log-probability (nats) of each rollout given its prompt, with the weights in use; equal prompts run once."""
    import torch

    places: dict[tuple[int, ...], list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(place)
    longest = [max(len(rollouts[i]) for i in places[p]) for p in places]
    found = [0.0] * len(prompts)
    for batch in _batches(list(places), longest, batch_tokens):
        pairs = [(n, i) for n, prompt in enumerate(batch) for i in places[prompt]]
        with torch.inference_mode():
            all_states = continuations(policy, batch, [(n, rollouts[i]) for n, i in pairs], batch_tokens)
            for (_, i), states in zip(pairs, all_states, strict=True):
                ids = torch.tensor(rollouts[i], device=states.device)
                for part, part_ids in zip(states.split(_HEAD_TOKENS), ids.split(_HEAD_TOKENS), strict=True):
                    found[i] -= float(nll(part, policy.head, part_ids).sum())
    return found


def _batches(contexts: list[tuple[int, ...]], longest: list[int], batch_tokens: int) -> Iterable[list[tuple[int, ...]]]:
    """Contexts of like length together, as many as a padded prefill of `batch_tokens` holds."""
    order = sorted(range(len(contexts)), key=lambda i: (len(contexts[i]), longest[i], contexts[i]))
    batch: list[tuple[int, ...]] = []
    for i in order:
        if batch and (len(batch) + 1) * len(contexts[i]) > batch_tokens:
            yield batch
            batch = []
        batch.append(contexts[i])
    if batch:
        yield batch


def _right_pad(rows: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([list(r) + [0] * (width - len(r)) for r in rows], dtype=torch.long, device=device)
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], dtype=torch.long, device=device)
    return ids.reshape(len(rows), width), mask.reshape(len(rows), width)
