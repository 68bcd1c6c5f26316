r"""Style and substance: the part of a shift between two next-token distributions that changes *how* a text continues.

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

from ogls.config import Pool, Recipe, TokenClass
from ogls.distillation.concatenate import concatenate
from ogls.distillation.steering import centred_norm, combine_states

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


REST = "rest"
_BINS = 8


@dataclass(frozen=True)
class Shift:
    """The shift from one distribution to another at T tokens; in nats, `norm` in logits."""

    kl: np.ndarray
    style: np.ndarray  # the part of kl between classes or within the rest
    norm: np.ndarray  # L2 norm of the centred difference of the logits


def classify(tokenizer: Any, vocabulary: int, classes: Sequence[TokenClass]) -> Int[Tensor, " V"]:
    """Class of every token id: 0 for the rest, else 1 + the index of the first pattern that matches its text."""
    import torch

    patterns = [re.compile(c.pattern) for c in classes]
    ids = torch.zeros(vocabulary, dtype=torch.long)
    for token, text in enumerate(tokenizer.batch_decode([[i] for i in range(min(vocabulary, len(tokenizer)))])):
        ids[token] = next((n for n, pattern in enumerate(patterns, start=1) if pattern.search(text)), 0)
    return ids


def split_kl(
    p: Float[Tensor, "T V"], q: Float[Tensor, "T V"], classes: Int[Tensor, " V"]
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
    """KL(p || q) of log-probs, and the part of it that is style, in nats (the equation of this module)."""
    import torch

    count = int(classes.max()) + 1
    member = torch.nn.functional.one_hot(classes, count).to(p.dtype)
    terms = p.exp() * (p - q)
    mass, other = p.exp() @ member, q.exp() @ member
    between = (mass * (mass.clamp(min=1e-30) / other.clamp(min=1e-30)).log()).sum(-1)
    within = terms @ member - mass * (mass.clamp(min=1e-30) / other.clamp(min=1e-30)).log()
    total = terms.sum(-1)
    return total.clamp(min=0), (between + within[:, 0]).clamp(min=0)


def signal_recipes(pools: Sequence[Pool], recipe: Recipe) -> dict[str, Recipe]:
    """The signals that are compared with the base pool: the target, the direction alone, and every privileged pool.

    The shift to the reference pool is the OPSD gap: how reading the solution changes the teacher. The shift to the
    correct pool is that of SDPO.
    """
    found = {"target": recipe}
    if {"correct", "incorrect"} <= set(pools):
        found["direction"] = Recipe(base=1, correct=1, incorrect=-1)
    alone: dict[str, dict[str, float]] = {"reference": {"reference": 1}, "correct": {"correct": 1}}
    return found | {n: Recipe.model_validate({"base": 0, **w}) for n, w in alone.items() if n in pools}


def measure_shifts(
    states: Mapping[Pool, Float[Tensor, "T D"]],
    wanted: Mapping[str, Recipe],
    classes: Int[Tensor, " V"],
    head: Float[Tensor, "V D"],
    batch_tokens: int = 1024,
    temperature: float = 1.0,
) -> dict[str, Shift]:
    """The shift of every signal from the base pool; logits [batch_tokens, V] of two signals are in memory at once.

    `temperature` applies to the target; the other signals use temperature 1.
    """
    parts: dict[str, list[Shift]] = {name: [] for name in wanted}
    for start in range(0, len(states["base"]), batch_tokens):
        here = {p: s[start : start + batch_tokens] for p, s in states.items()}
        base = here["base"].float() @ head.T
        for name, recipe in wanted.items():
            logits = combine_states(here, recipe, temperature if name == "target" else 1.0) @ head.T
            kl, style = split_kl(logits.log_softmax(-1), base.log_softmax(-1), classes)
            norm = centred_norm(logits - base)
            parts[name].append(Shift(*(v.cpu().numpy() for v in (kl, style, norm))))
    return {name: concatenate(some) for name, some in parts.items()}


def style_rows(
    shifts: Mapping[str, Shift], token_class: np.ndarray, position: np.ndarray, names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Rows of the table `style`: one a signal, class of the sampled token [T] (0: the rest, then `names`) and
    position bin [T]."""
    width = -(-(int(position.max()) + 1) // _BINS)
    labels = (REST, *names)
    for signal, shift in shifts.items():
        for which in np.unique(token_class):
            for b in np.unique(position // width):
                here = (token_class == which) & (position // width == b)
                if here.any():
                    yield {
                        "signal": signal,
                        "token_class": labels[which],
                        "position_from": int(b * width),
                        "position_to": int((b + 1) * width - 1),
                        "tokens": int(here.sum()),
                        **{f.name: float(getattr(shift, f.name)[here].mean()) for f in fields(Shift)},
                    }


def shift_metrics(shifts: Mapping[str, Shift], token_class: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Metrics of a round: for each signal its KL, the share of style in it, and the KL by class of token."""
    found = {}
    for signal, shift in shifts.items():
        total = float(shift.kl.sum())
        found[f"{signal}_kl"] = float(shift.kl.mean())
        found[f"{signal}_style_kl"] = float(shift.style.mean())
        found[f"{signal}_style_share"] = float(shift.style.sum()) / total if total > 0 else 0.0
        for which, name in enumerate((REST, *names)):
            if (here := token_class == which).any():
                found[f"{signal}_kl_at_{name}"] = float(shift.kl[here].mean())
    return found
