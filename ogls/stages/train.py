"""The stage `train`: update the policy; save the adapter and the optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ogls.config import Pool, RunConfig
from ogls.distillation.steering import combine_states, project_substance
from ogls.models.adapter import Adapter, adapter_files
from ogls.models.head import head_logits
from ogls.models.policy import Policy
from ogls.progress import Progress, no_progress
from ogls.records import UPDATES, Key, StageResult
from ogls.records.schema import to_arrow
from ogls.stages import columns
from ogls.stages.engine import record_probe
from ogls.stages.fingerprints import policy_inputs
from ogls.stages.groups import read_groups, state_keys
from ogls.stages.heads import load_heads
from ogls.stages.imported import is_imported
from ogls.stages.run import POLICY, Run
from ogls.stages.steer import projection_classes
from ogls.stages.teach import teacher_adapter
from ogls.stages.train_ranks import Inputs, RoundPart, keep_state, train_on_ranks
from ogls.store.manifest import OPTIMIZER, FileEntry
from ogls.store.shards import count_row_groups, read_rows
from ogls.store.writer import Checkpoint, StageWriter
from ogls.training.batching import TrainItem
from ogls.training.choose import registered_loss
from ogls.training.contract import Needs
from ogls.training.items import correct_rollout_items, distillation_items, policy_gradient_items, reference_items
from ogls.training.means import round_means

if TYPE_CHECKING:
    from torch import Tensor


def train(run: Run, round_: int, progress: Progress = no_progress) -> StageResult:
    """Train the policy on the round; write the table updates, the adapter and the optimizer state.

    Raises StoreError if the policy is not the one that the round was sampled with. Imported rollouts are trained on
    with any policy.
    """
    from safetensors.torch import save

    config = run.config
    full = config.has_teacher and config.train.support == "full"
    start, rate = run.start_point(round_)
    before = run.policy_hash(start)
    factor = {"learning_rate": config.train.learning_rate * rate}
    settings, needs = config.train.model_copy(update=factor), registered_loss(config.train).needs
    inputs = {
        **policy_inputs(run),
        "train": run.identity.train.model_copy(update=factor),
        "temperature": config.rollout.temperature if needs == "advantages" else 1.0,
        "ema": config.teacher.ema_decay if config.has_ema else None,
        "round": round_,
        "before": run.digest("updates", start) if start else None,
        "trajectories": run.digest("trajectories", round_),
        "verdicts": run.digest("verdicts", round_),
        "targets": run.digest("targets", round_) if config.has_teacher else None,
        "states": run.digest("teacher_states", round_) if full else None,
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        part = RoundPart(config, run.records.storage, round_, start, before, settings, _inputs, writer.checkpoint)
        state, policy = train_on_ranks(part, run, progress, lambda state: keep_state(writer, state))
        rows, trained = state.rows, Adapter.from_bytes(state.weights)
        policy.use_adapter(trained)
        writer.write_shard(0, to_arrow(UPDATES, rows))
        for name, content in adapter_files(trained, config.model, config.adapter).items():
            writer.attach_file(POLICY, name, content)
        writer.attach_file(POLICY, OPTIMIZER, state.optimizer)
        if config.has_ema:
            previous = teacher_adapter(run, start, "ema") or policy.initial_adapter()
            average = previous.average(trained, config.teacher.ema_decay)
            writer.attach_file(POLICY, "ema.safetensors", save(dict(average.weights)))
        loss = sum(r["loss"] for r in rows) / len(rows) if rows else 0.0
        tokens = sum(r["tokens"] for r in rows)
        probe = record_probe(run, policy, run.problems("train"), start)
        run.release_memory()
        metrics = {"loss": loss, "steps": len(rows), "tokens": tokens, "loss_metrics": round_means(rows)}
        notice = "; ".join(_notices(run, round_, rows, part.checkpoint))
        return {**metrics, "padding": state.padding, "policy": trained.hash, "probe": probe, "notice": notice}

    return run.carry_out("updates", round_, inputs, work)


def _inputs(run: Run, round_: int, policy: Policy) -> Inputs:
    """What a round trains on. Every process that trains calls this."""
    config = run.config
    full = config.has_teacher and config.train.support == "full"
    items = _ITEMS[registered_loss(config.train).needs](run, round_, policy)
    return Inputs(items, _target_logits(config, policy) if full else None)


def _notices(run: Run, round_: int, rows: Sequence[Mapping[str, Any]], checkpoint: Checkpoint | None) -> Iterator[str]:
    """What a person should know of a training."""
    if checkpoint:
        yield f"train r{round_:03d} continued after its optimizer step {checkpoint.state['step']}"
    if not rows:
        yield f"round {round_}: nothing to train on; the adapter is unchanged"
    if is_imported(run, round_) and run.config.train.objective != "sft":
        yield f"round {round_} is off-policy: its rollouts were imported"
    yield from _warnings(run.config)


def _warnings(config: RunConfig) -> Iterator[str]:
    """Settings that bias the gradient."""
    if config.train.pointwise_clip:
        yield "train.pointwise_clip removes the gradient of clipped terms; use it for reproduction only"
    rollout = config.rollout
    if registered_loss(config.train).needs == "advantages" and (rollout.top_p < 1 or rollout.top_k or rollout.min_p):
        yield (
            "rollout.top_p, top_k and min_p cut the distribution that rollouts are sampled from, and the ratio of grpo "
            "is that of the whole distribution: its gradient is biased"
        )


def _with_targets(run: Run, round_: int, policy: Policy) -> list[TrainItem]:
    """Distilled rollouts with their targets."""
    config = run.config.train
    states = _combined_states(run, round_, policy.head) if config.support == "full" else None
    ends: dict[Key, int] = {}
    if config.until == "first_mistake":
        rows = run.records.read("steered", round_, ["problem_id", "sample", "first_mistake"]).to_pylist()
        marked = [row for row in rows if row["first_mistake"] is not None]
        ends = {(row["problem_id"], row["sample"]): row["first_mistake"] + 1 for row in marked}
    return distillation_items(read_groups(run, round_), run.records.read("targets", round_), states, config, ends)


def _with_advantages(run: Run, round_: int, policy: Policy) -> list[TrainItem]:
    """Rollouts of mixed groups with their log-probs and advantages."""
    return policy_gradient_items(read_groups(run, round_), run.config.train)


def _correct(run: Run, round_: int, policy: Policy) -> list[TrainItem]:
    """The tokens of correct rollouts."""
    return correct_rollout_items(read_groups(run, round_))


def _references(run: Run, round_: int, policy: Policy) -> list[TrainItem]:
    """The tokens of the reference solutions of the round's problems."""
    problems, tokenizer = {p.problem_id: p for p in run.problems("train")}, policy.tokenizer
    max_tokens = run.config.rollout.max_tokens
    return reference_items(read_groups(run, round_), problems, tokenizer, tokenizer.eos_token_id, max_tokens)


# The items of a round, by what the loss needs.
_ITEMS: dict[Needs, Callable[[Run, int, Policy], list[TrainItem]]] = {
    "targets": _with_targets,
    "advantages": _with_advantages,
    "correct": _correct,
    "references": _references,
}


def _combined_states(run: Run, round_: int, own: Tensor) -> Iterator[tuple[Key, Tensor | Callable[[], Tensor]]]:
    """Yield (key, states [T, D]) of every rollout: cached states combined by the recipe, or a function that reads them.

    `_target_logits` maps them to the logits of the target. For a projected target the states of the base pool are
    beside them: [T, 2 D]. The states of a shard with several row groups stay in the store until they are trained on: a
    round of a large model has more of them than memory. A shard with one is small (or of an older release).
    """
    import torch

    steer, recipes = run.config.steer, run.recipes()
    heads = load_heads(run.config, own) if run.config.other_models() else None

    def combine(key: Key, pools: Mapping[Pool, Tensor]) -> Tensor:
        placed = {p: s.cpu() for p, s in heads.place(pools).items()} if heads else pools
        combined = combine_states(placed, recipes[key[0]], steer.temperature)
        return combined if steer.project == "none" else torch.cat([combined, placed["base"].float()], -1)

    def read(entry: FileEntry, rows: Sequence[int]) -> Tensor:
        ((key, pools),) = columns.unpack_states(read_rows(run.records, entry, rows)).items()
        return combine(key, pools)

    for entry, keys in state_keys(run, round_):
        if count_row_groups(run.records, entry) == 1:
            yield from (
                (key, combine(key, pools))
                for key, pools in columns.unpack_states(run.records.read_shard(entry)).items()
            )
            continue
        for key in dict.fromkeys(keys):
            yield key, partial(read, entry, [i for i, other in enumerate(keys) if other == key])


def _target_logits(config: RunConfig, policy: Policy) -> Callable[[Tensor], Tensor] | None:
    """Maps states that `_combined_states` yields to logits of the target; None if the policy's head does so."""
    if not config.other_models() and config.steer.project == "none":
        return None
    head = load_heads(config, policy.head).matrix
    classes = projection_classes(config, policy.tokenizer, head)

    def logits(states: Tensor) -> Tensor:
        if classes is None:
            return head_logits(states, head)
        target, base = (head_logits(part, head).log_softmax(-1) for part in states.chunk(2, -1))
        return project_substance(target, base, classes)

    return logits
