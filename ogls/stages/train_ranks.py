"""Training a round in this process or in several of its own, one a device. The stage alone writes the store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ogls.config import RunConfig, TrainConfig
from ogls.errors import ModelError, StoreError
from ogls.models.adapter import Adapter
from ogls.models.load import resolve_device
from ogls.models.policy import Policy
from ogls.progress import Progress
from ogls.stages.run import POLICY, Run
from ogls.store.manifest import OPTIMIZER
from ogls.store.run_store import RunStore
from ogls.store.storage import Storage
from ogls.store.writer import Checkpoint, StageWriter
from ogls.training.batching import TrainItem
from ogls.training.launch import run_ranks
from ogls.training.ranks import KINDS, Ranks, count_ranks
from ogls.training.schedule import order_steps, padding_share
from ogls.training.trainer import Trainer
from ogls.verifiers.guard import require_main_guard

if TYPE_CHECKING:
    from torch import Tensor


class Inputs(NamedTuple):
    """What a round trains on, and what maps states of full-vocabulary targets to logits (see `Trainer`)."""

    items: list[TrainItem]
    target_logits: Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class RoundPart:
    """What a process has to know to train a round, alone or as one of several. It is pickled on its way to them."""

    config: RunConfig
    storage: Storage
    round: int
    start: int  # the round whose policy is trained on
    before: str  # the hash of that policy, which the round was sampled with
    settings: TrainConfig
    read_inputs: Callable[[Run, int, Policy], Inputs]
    checkpoint: Checkpoint | None


@dataclass(frozen=True)
class TrainState:
    """How far the training of a round has come: its rows of the table updates, and two safetensors files."""

    rows: list[dict[str, Any]]
    weights: bytes
    optimizer: bytes
    padding: float = 0.0  # share of padding in the tokens of the whole round


def train_on_ranks(
    part: RoundPart, run: Run, progress: Progress, keep: Callable[[TrainState], None]
) -> tuple[TrainState, Policy]:
    """Train the round as train.parallel says. Return the state at its end, and a policy with any weights.

    `keep` receives the state every train.checkpoint_steps steps. Raises StoreError if the policy is not the one that
    the round was sampled with, and as `count_ranks` and `run_ranks`.
    """
    count = count_ranks(part.config)
    if part.config.train.parallel == "none":
        return _train(part, Ranks(), run, progress, keep)
    require_main_guard("training on several devices")

    def receive(value: tuple[int, int] | TrainState) -> None:
        if isinstance(value, TrainState):
            keep(value)
        else:
            progress(*value)

    device = resolve_device(part.config.model).type
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()  # the ranks need what earlier stages of this process have freed
    return run_ranks(partial(_train_as_rank, part), count, device, receive)[0], run.load_policy(part.start)


def keep_state(writer: StageWriter, state: TrainState) -> None:
    """Write a state as the checkpoint of its stage."""
    files = {"weights.safetensors": state.weights, OPTIMIZER: state.optimizer}
    writer.write_checkpoint(POLICY, {"step": len(state.rows), "rows": state.rows}, files)


def _train_as_rank(part: RoundPart, rank: int, size: int, report: Callable[[Any], None]) -> TrainState | None:
    """Train as one process of several. The first one reports, and returns what it has trained.

    Raises ModelError if the ranks end with different weights.
    """
    run = Run(part.config)
    run.records = RunStore(part.storage, part.config.name)
    ranks = KINDS[part.config.train.parallel](rank, size, resolve_device(part.config.model).type)
    tell = report if rank == 0 else lambda value: None
    state, _ = _train(part, ranks, run, lambda done, total: tell((done, total)), tell)
    hashes = ranks.gather(Adapter.from_bytes(state.weights).hash)
    if len(set(hashes)) > 1:
        raise ModelError(
            f"the processes of the training ended with different weights ({', '.join(hashes)}); nothing of this stage "
            "is saved. Set train.parallel = none, and report it"
        )
    return state if rank == 0 else None


def _train(
    part: RoundPart, ranks: Ranks, run: Run, progress: Progress, keep: Callable[[TrainState], None]
) -> tuple[TrainState, Policy]:
    """Train as one of `ranks`. All of them have the same state."""
    from safetensors.torch import load, save

    config, round_ = part.config, part.round
    policy = run.load_policy(part.start, ranks.model_config(config.model))
    if policy.hash != part.before:
        raise StoreError(f"round {round_} was sampled with {part.before}, but the policy to train is {policy.hash}")
    ranks.place(policy)
    items, target_logits = part.read_inputs(run, round_, policy)
    before = load(run.read_attachment(part.start, OPTIMIZER)) if part.start else None
    trainer = Trainer(policy, part.settings, before, config.rollout.temperature, target_logits, ranks)
    unknown = any(i.old_logprobs is not None and not len(i.old_logprobs) for i in items)  # imported without
    if trainer.loss.needs == "advantages" and (
        config.model.dtype != "float32" or config.rollout.temperature != 1 or unknown
    ):
        items = trainer.with_own_logprobs(items)
    finished = _restore(trainer, part.checkpoint, run) if part.checkpoint else []

    def state(rows: list[dict[str, Any]], padding: float = 0.0) -> TrainState:
        return TrainState(rows, save(trainer.weights()), save(trainer.state()), padding)

    def after_step(rows: list[dict[str, Any]]) -> None:
        every = config.train.checkpoint_steps
        if every and len(rows) % every == 0:
            keep(state(rows))

    seed = run.seed("train", round_)
    rows = trainer.train_round(items, seed, progress, finished, after_step)
    steps = [step for _, step in order_steps(items, part.settings, seed)]
    return state(rows, padding_share(steps, config.train.micro_batch_tokens, ranks.size)), policy


def _restore(trainer: Trainer, checkpoint: Checkpoint, run: Run) -> list[dict[str, Any]]:
    """Load a checkpoint, and return the rows of the steps before it."""
    from safetensors.torch import load

    files = {name: load(run.records.read_verified(entry)[0]) for name, entry in checkpoint.files.items()}
    trainer.restore(files["weights.safetensors"], files[OPTIMIZER])
    rows: list[dict[str, Any]] = checkpoint.state["rows"]
    return [{**row, "metrics": row["metrics"] and [(name, mean) for name, mean in row["metrics"]]} for row in rows]
