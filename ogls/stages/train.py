"""The stage `train`: update the policy; save the adapter and the optimizer state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ogls.config import RunConfig
from ogls.distillation.steering import combine_states
from ogls.errors import StoreError
from ogls.models.adapter import adapter_files
from ogls.models.policy import Policy
from ogls.progress import Progress, no_progress
from ogls.records import UPDATES, Key, StageResult
from ogls.records.schema import to_arrow
from ogls.stages import columns
from ogls.stages.engine import record_probe
from ogls.stages.fingerprints import policy_inputs
from ogls.stages.groups import read_groups
from ogls.stages.imported import is_imported
from ogls.stages.run import POLICY, Run
from ogls.stages.teach import teacher_adapter
from ogls.store.writer import StageWriter
from ogls.training.batching import TrainItem
from ogls.training.items import correct_rollout_items, distillation_items, policy_gradient_items, reference_items
from ogls.training.trainer import Trainer

if TYPE_CHECKING:
    from torch import Tensor


def train(run: Run, round_: int, progress: Progress = no_progress) -> StageResult:
    """Train the policy on the round; write the table updates, the adapter and the optimizer state.

    Raises StoreError if the policy is not the one that the round was sampled with. Imported rollouts are trained on
    with any policy.
    """
    from safetensors.torch import load, save

    config = run.config
    full = config.has_teacher and config.train.support == "full"
    start, rate = run.start_point(round_)
    before = run.policy_hash(start)
    settings = config.train.model_copy(update={"learning_rate": config.train.learning_rate * rate})
    inputs = {
        **policy_inputs(run),
        "train": settings,
        "temperature": config.rollout.temperature if config.train.objective == "grpo" else 1.0,
        "ema": config.teacher.ema_decay if config.teacher.weights == "ema" else None,
        "round": round_,
        "before": run.digest("updates", start) if start else None,
        "trajectories": run.digest("trajectories", round_),
        "verdicts": run.digest("verdicts", round_),
        "targets": run.digest("targets", round_) if config.has_teacher else None,
        "states": run.digest("teacher_states", round_) if full else None,
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        policy = run.load_policy(start)
        items = _train_items(run, round_, policy)
        if policy.hash != before:
            raise StoreError(f"round {round_} was sampled with {before}, but the policy to train is {policy.hash}")
        state = load(run.read_attachment(start, "optimizer.safetensors")) if start else None
        trainer = Trainer(policy, settings, state, config.rollout.temperature)
        unknown = any(i.old_logprobs is not None and not len(i.old_logprobs) for i in items)  # imported without
        if config.train.objective == "grpo" and (
            config.model.dtype != "float32" or config.rollout.temperature != 1 or unknown
        ):
            items = trainer.with_own_logprobs(items)
        rows = trainer.train_round(items, run.seed("train", round_), progress)
        writer.write_shard(0, to_arrow(UPDATES, rows))
        trained = policy.copy_adapter()
        for name, content in adapter_files(trained, config.model, config.adapter).items():
            writer.attach_file(POLICY, name, content)
        writer.attach_file(POLICY, "optimizer.safetensors", save(trainer.state()))
        if config.teacher.weights == "ema":
            previous = teacher_adapter(run, start) or policy.initial_adapter()
            average = previous.average(trained, config.teacher.ema_decay)
            writer.attach_file(POLICY, "ema.safetensors", save(dict(average.weights)))
        loss = sum(r["loss"] for r in rows) / len(rows) if rows else 0.0
        notice = "" if rows else f"round {round_}: nothing to train on; the adapter is unchanged"
        off_policy = is_imported(run, round_) and config.train.objective != "sft"
        imported = f"round {round_} is off-policy: its rollouts were imported" if off_policy else ""
        notice = "; ".join(filter(None, [notice, imported, *_warnings(config)]))
        tokens = sum(r["tokens"] for r in rows)
        probe = record_probe(run, policy, run.problems("train"), start)
        metrics = {"loss": loss, "steps": len(rows), "tokens": tokens}
        return {**metrics, "policy": trained.hash, "probe": probe, "notice": notice}

    return run.carry_out("updates", round_, inputs, work)


def _warnings(config: RunConfig) -> Iterator[str]:
    """Settings that bias the gradient."""
    if config.train.pointwise_clip:
        yield "train.pointwise_clip removes the gradient of clipped terms; use it for reproduction only"
    rollout = config.rollout
    if config.train.objective == "grpo" and (rollout.top_p < 1 or rollout.top_k or rollout.min_p):
        yield (
            "rollout.top_p, top_k and min_p cut the distribution that rollouts are sampled from, and the ratio of grpo "
            "is that of the whole distribution: its gradient is biased"
        )


def _train_items(run: Run, round_: int, policy: Policy) -> list[TrainItem]:
    """The rollouts to train on, with the targets of the objective."""
    config, groups = run.config, read_groups(run, round_)
    if config.train.objective == "grpo":
        return policy_gradient_items(groups, config.train)
    if config.train.objective == "rft":
        return correct_rollout_items(groups)
    if config.train.objective == "sft":
        problems = {p.problem_id: p for p in run.problems("train")}
        stop = policy.tokenizer.eos_token_id
        return reference_items(groups, problems, policy.tokenizer, stop, config.rollout.max_tokens)
    states = _combined_states(run, round_) if config.train.support == "full" else None
    return distillation_items(groups, run.records.read("targets", round_), states, config.train)


def _combined_states(run: Run, round_: int) -> Iterator[tuple[Key, Tensor]]:
    """Yield (key, states [T, D]) of every rollout: cached states combined by the recipe.

    The head applied to these states gives the logits of the target.
    """
    steer = run.config.steer
    for entry in run.records.list_shards("teacher_states", round_):
        for key, pools in columns.unpack_states(run.records.read_shard(entry)).items():
            yield key, combine_states(pools, steer.to_recipe(), steer.temperature)
