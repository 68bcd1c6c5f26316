r"""Splitting the shift between two next-token distributions into style and substance.

Every token of the vocabulary has a class (digits and operators, or classes given by regular expressions; all other
tokens are the rest). By the chain rule a KL divergence splits exactly:

    KL(p || q) = KL(P || Q) + sum over classes c of P(c) KL(p(. | c) || q(. | c)),    P(c) = sum over v in c of p(v)

The terms within named classes are substance: *which* digit or operator comes next. The first term (whether one comes at
all) and the term within the rest (which other token comes) are style. A teacher that has read a solution and answers at
once moves mass between classes; a teacher that corrects a fact moves it within a class.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from ogls.config import POOLS, Pool, Recipe, TokenClass
from ogls.distillation.concatenate import concatenate
from ogls.distillation.steering import centred_norm, combine_states
from ogls.models.head import head_logits

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


REST = "rest"
_BINS = 8  # position bins of the table `style`


@dataclass(frozen=True)
class Shift:
    """The shift from the base pool to a signal at T tokens: arrays [T], fp32."""

    kl: np.ndarray  # KL(signal || base), nats
    style: np.ndarray  # the part of kl between classes and within the rest, nats
    norm: np.ndarray  # L2 norm of the centred difference of the logits


def classify(tokenizer: Any, vocabulary: int, classes: Sequence[TokenClass]) -> Int[Tensor, " V"]:
    """Return the class of every token id, int64: 0 for the rest, else 1 + the index of the first matching pattern.

    A pattern is searched in the decoded text of the single token. `vocabulary` is the number of rows of the head; ids
    that the tokenizer does not have belong to the rest.
    """
    import torch

    patterns = [re.compile(c.pattern) for c in classes]
    ids = torch.zeros(vocabulary, dtype=torch.long)
    for token, text in enumerate(tokenizer.batch_decode([[i] for i in range(min(vocabulary, len(tokenizer)))])):
        ids[token] = next((n for n, pattern in enumerate(patterns, start=1) if pattern.search(text)), 0)
    return ids


def substance_only(ids: Int[Tensor, " V"], classes: Sequence[TokenClass]) -> Int[Tensor, " V"]:
    """Return the class of every token id as `classify` does, with the classes that count as style put into the rest."""
    style = [number for number, c in enumerate(classes, start=1) if c.counts == "style"]
    merged = ids.clone()
    for number in style:
        merged[ids == number] = 0
    return merged


def split_kl(
    p: Float[Tensor, "T V"], q: Float[Tensor, "T V"], classes: Int[Tensor, " V"]
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
    """Return KL(p || q) and the part of it that is style, in nats, by the equation in the docstring of this module.

    `p` and `q` are log-probs over the whole vocabulary.
    """
    import torch

    count = int(classes.max()) + 1
    member = torch.nn.functional.one_hot(classes, count).to(p.dtype)
    terms = p.exp() * (p - q)
    mass_p, mass_q = p.exp() @ member, q.exp() @ member
    between = (mass_p * (mass_p.clamp(min=1e-30) / mass_q.clamp(min=1e-30)).log()).sum(-1)
    within = terms @ member - mass_p * (mass_p.clamp(min=1e-30) / mass_q.clamp(min=1e-30)).log()
    total = terms.sum(-1)
    return total.clamp(min=0), (between + within[:, 0]).clamp(min=0)


def signal_recipes(pools: Sequence[Pool], recipe: Recipe) -> dict[str, Recipe]:
    """Return the recipe of each signal that `pools` allow: target, direction, reference, correct.

    `target` is the target of the run; `direction` is base + correct - incorrect. The shift to `reference` is the gap
    that OPSD distils: how reading the solution changes the teacher. The shift to `correct` is that of SDPO. Each pool
    that the run declares is a signal too.
    """
    recipes = {"target": recipe}
    if {"correct", "incorrect"} <= set(pools):
        recipes["direction"] = Recipe(base=1, correct=1, incorrect=-1)
    single = ("reference", "correct", *(p for p in pools if p not in POOLS))
    return recipes | {n: Recipe.model_validate({"base": 0, n: 1}) for n in single if n in pools}


def measure_shifts(
    states: Mapping[Pool, Float[Tensor, "T D"]],
    recipes: Mapping[str, Recipe],
    classes: Int[Tensor, " V"],
    head: Float[Tensor, "V D"],
    batch_tokens: int = 1024,
    temperature: float = 1.0,
) -> dict[str, Shift]:
    """Return the shift of every signal from the base pool, by the name of the signal.

    `states` and `head` may have any floating-point dtype. `temperature` applies to the signal `target`; all
    other signals use temperature 1. Logits [batch_tokens, V] of the base pool and of one signal are in memory at once.
    Raises KeyError with the name of the pool if `states` lacks a pool.
    """
    parts: dict[str, list[Shift]] = {name: [] for name in recipes}
    for start in range(0, len(states["base"]), batch_tokens):
        part_states = {pool: pool_states[start : start + batch_tokens] for pool, pool_states in states.items()}
        base = head_logits(part_states["base"], head)
        for name, recipe in recipes.items():
            combined = combine_states(part_states, recipe, temperature if name == "target" else 1.0)
            logits = head_logits(combined, head)
            kl, style = split_kl(logits.log_softmax(-1), base.log_softmax(-1), classes)
            norm = centred_norm(logits - base)
            parts[name].append(Shift(*(v.cpu().numpy() for v in (kl, style, norm))))
    return {name: concatenate(signal_parts) for name, signal_parts in parts.items()}


def style_rows(
    shifts: Mapping[str, Shift], token_class: np.ndarray, position: np.ndarray, names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table `style`: means over tokens, one row per signal, token class and position bin.

    `token_class` [T] is the class of each sampled token: 0 for the rest, else 1 + its index in `names`. `position` [T]
    is the position of each token in its rollout. Combinations without tokens have no row.
    """
    width = -(-(int(position.max()) + 1) // _BINS)
    labels = (REST, *names)
    for signal, shift in shifts.items():
        for class_index in np.unique(token_class):
            for b in np.unique(position // width):
                selected = (token_class == class_index) & (position // width == b)
                if selected.any():
                    yield {
                        "signal": signal,
                        "token_class": labels[class_index],
                        "position_from": int(b * width),
                        "position_to": int((b + 1) * width - 1),
                        "tokens": int(selected.sum()),
                        **{f.name: float(getattr(shift, f.name)[selected].mean()) for f in fields(Shift)},
                    }


def shift_metrics(shifts: Mapping[str, Shift], token_class: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Return the metrics of a round: for each signal its mean KL (nats), the style part of it (nats and share of the
    total), and the mean KL at sampled tokens of each class that occurs."""
    metrics = {}
    for signal, shift in shifts.items():
        total = float(shift.kl.sum())
        metrics[f"{signal}_kl"] = float(shift.kl.mean())
        metrics[f"{signal}_style_kl"] = float(shift.style.mean())
        metrics[f"{signal}_style_share"] = float(shift.style.sum()) / total if total > 0 else 0.0
        for class_index, name in enumerate((REST, *names)):
            if (selected := token_class == class_index).any():
                metrics[f"{signal}_kl_at_{name}"] = float(shift.kl[selected].mean())
    return metrics
