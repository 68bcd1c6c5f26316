"""The loss that the settings of a run choose, and the trial of a user's loss before a run samples anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ogls.training.losses  # noqa: F401  registers the losses
from ogls.config import TrainConfig
from ogls.custom import load_function
from ogls.errors import ConfigError
from ogls.training.contract import LOSSES, Loss, LossInputs

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def registered_loss(config: TrainConfig) -> Loss:
    """Return the registered loss of the objective: for distil, the divergence. It says what the items need.

    Raises ConfigError for a divergence that train.pointwise_clip cannot clip.
    """
    loss = LOSSES[config.divergence if config.objective == "distil" else config.objective]
    if config.pointwise_clip and loss.needs == "targets" and (config.loss or not loss.by_terms):
        raise ConfigError(
            f"train.pointwise_clip: {config.loss or loss.name} has one value per token, and none per bin to clip; "
            "leave it 0, and clip in the loss"
        )
    return loss


def find_loss(config: TrainConfig) -> Loss:
    """Return the loss of the trained tokens: `train.loss` or, if that is empty, the registered loss.

    A user's loss needs what the registered loss of the objective needs. Raises ConfigError if it cannot be loaded.
    """
    registered = registered_loss(config)
    if not config.loss:
        return registered
    try:
        function = load_function(config.loss)
    except Exception as error:  # any error that importing a user's module raises
        raise ConfigError(f"train.loss: cannot load {config.loss}: {error}") from None
    if not callable(function):
        raise ConfigError(f"train.loss: {config.loss} is {function!r}, not a function")
    return Loss(config.loss, registered.needs, function)


def try_loss(config: TrainConfig, head: Float[Tensor, "V D"]) -> None:
    """Call a user's loss with random tokens of the form that the objective gives; do nothing without a user's loss.

    Raises ConfigError if it cannot be loaded or raises, if its result is not what the contract says, or if its loss is
    not finite or has no gradient.
    """
    loss = find_loss(config)
    if not config.loss:
        return
    for count in (5, 1):
        inputs = _random_inputs(loss, config, head, count)
        try:
            total = loss(inputs).loss.sum()
            if total.requires_grad:
                total.backward()
        except Exception as error:  # any error that a user's function raises
            raise ConfigError(
                f"train.loss: {config.loss} raised an exception for {count} random tokens of train.objective = "
                f"{config.objective}: {type(error).__name__}: {error}"
            ) from error
        gradient = inputs.states.grad
        fault = "is not finite" if not total.isfinite() else "has no gradient" if gradient is None else ""
        if fault or gradient is None or not gradient.isfinite().all():
            raise ConfigError(
                f"train.loss: the loss that {config.loss} returned for {count} random tokens of train.objective = "
                f"{config.objective} {fault or 'has a gradient that is not finite'}"
            )


def _random_inputs(loss: Loss, config: TrainConfig, head: Tensor, count: int) -> LossInputs:
    """Return `count` tokens with random states and, as far as the loss needs them, random targets or advantages."""
    import torch

    generator = torch.Generator().manual_seed(0)
    size, width = head.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(head.device)

    states = normal(count, width).to(head.dtype).requires_grad_()
    token_ids = torch.randint(size, (count,), generator=generator).to(head.device)
    if loss.needs == "advantages":
        return LossInputs(
            states, head, token_ids, old_logprobs=-normal(count).abs(), advantages=normal(count), settings=config
        )
    if loss.needs != "targets":
        return LossInputs(states, head, token_ids, settings=config)
    logits = normal(count, size)
    if config.support == "full":
        return LossInputs(states, head, token_ids, target_logprobs=logits, settings=config)
    top = logits.log_softmax(-1).topk(min(4, size - 1))
    tail = 1 - top.values.exp().sum(-1)
    return LossInputs(states, head, token_ids, top.indices, top.values, tail, settings=config)
