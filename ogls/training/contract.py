"""The contract of a loss: one function of typed inputs that returns a loss per token and metrics, found by its name.

A registered loss says what it needs; the items of a round are built accordingly (`items`, `stages/train.py`), and the
trainer calls any loss in the same way. Clipping a token's divergence and weighting tokens are no part of a loss.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from ogls.config import TrainConfig

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

# targets: rollouts with a target for each token. advantages: rollouts with log-probs at sampling time and an advantage.
# correct: the tokens of correct rollouts. references: the tokens of reference solutions.
Needs = Literal["targets", "advantages", "correct", "references"]

# A metric `x` is `train/x` in MLflow, and these names are taken there.
_TAKEN = frozenset({"loss", "groups", "mixed_groups", "padding", "rate"})
_METRIC = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class LossInputs:
    """N tokens with a loss: the states of the policy, the head, and what the objective knows of the tokens.

    The fields of a target are None unless the loss needs targets, `old_logprobs` and `advantages` unless it needs
    advantages. A target is top-K log-probs and the tail mass or, without `target_ids`, logits over the whole
    vocabulary. For a loss that needs advantages, at a sampling temperature T, the states are divided by T and
    `old_logprobs` are those at T.
    """

    states: Float[Tensor, "N D"]  # each predicts its token
    head: Float[Tensor, "V D"]
    token_ids: Int[Tensor, " N"]  # the tokens of the rollout or of the reference solution, int64
    target_ids: Int[Tensor, "N K"] | None = None  # support of the target, int64; None: the whole vocabulary
    target_logprobs: Float[Tensor, "N B"] | None = None  # B = K log-probs in nats, or B = V logits without `target_ids`
    target_tail: Float[Tensor, " N"] | None = None  # probability of the target outside the support
    old_logprobs: Float[Tensor, " N"] | None = None  # log-probs (nats) of the tokens at sampling time
    advantages: Float[Tensor, " N"] | None = None  # the advantages of their rollouts
    settings: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class LossOutput:
    """The loss of every token in nats, fp32, with a gradient to the states; the caller normalises over the batch.

    A metric has a value for each token, and its mean over the tokens of a step is recorded; or it is one number, which
    counts once for each token of the call, so that it may depend on train.head_tokens. Metrics carry no gradient.
    Raises ValueError for a metric of another shape, or with a name that MLflow does not accept or that is taken.
    """

    loss: Float[Tensor, " N"]
    metrics: Mapping[str, Float[Tensor, " N"] | Float[Tensor, ""]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.metrics.items():
            if not _METRIC.fullmatch(name) or name in _TAKEN:
                raise ValueError(
                    f"metric {name!r}: a name has letters, digits and _ . -, and is none of {', '.join(sorted(_TAKEN))}"
                )
            if value.shape not in ((), self.loss.shape):
                shapes = f"{list(value.shape)}, and the loss {list(self.loss.shape)}"
                raise ValueError(f"metric {name} has the shape {shapes}: give one value per token, or one number")


LossFunction = Callable[[LossInputs], LossOutput]


@dataclass(frozen=True)
class Loss:
    """A loss by name: what it needs and its function. Calling it applies train.token_clip to a loss with targets."""

    name: str
    needs: Needs
    function: LossFunction
    by_terms: bool = False  # whether it sums terms over bins, so that train.pointwise_clip applies

    @property
    def needs_only_tokens(self) -> bool:
        """Whether all tokens of an item have this loss, in place of a token loss and a tail NLL."""
        return self.needs in ("correct", "references")

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """Return the loss [N] and the metrics of N tokens.

        Raises TypeError if the function returns no LossOutput, ValueError if its loss has another shape.
        """
        output = self.function(inputs)
        if not isinstance(output, LossOutput):
            raise TypeError(f"{self.name} returned {type(output).__name__}, expected LossOutput")
        if output.loss.shape != inputs.states.shape[:1]:
            shape, expected = list(output.loss.shape), list(inputs.states.shape[:1])
            raise ValueError(f"{self.name} returned a loss of shape {shape}, expected one value per token, {expected}")
        clip = inputs.settings.token_clip
        if not clip or self.needs != "targets":
            return output
        clipped = {"clipped_tokens": (output.loss.detach() > clip).float()}
        return replace(output, loss=output.loss.clamp(max=clip), metrics={**output.metrics, **clipped})


LOSSES: dict[str, Loss] = {}  # by the name in train.divergence or train.objective; `losses` fills it


def register(name: str, needs: Needs, by_terms: bool = False) -> Callable[[LossFunction], LossFunction]:
    """Return a decorator that registers a function as the loss `name`. Raises ValueError if the name is taken."""

    def add(function: LossFunction) -> LossFunction:
        if name in LOSSES:
            raise ValueError(f"a loss {name} is registered already")
        LOSSES[name] = Loss(name, needs, function, by_terms)
        return function

    return add
