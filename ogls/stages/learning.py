"""The stages that learn: teach, steer, train."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ogls import columns, exemplars, teacher
from ogls.adapter import Adapter, adapter_files
from ogls.batching import TrainItem
from ogls.config import Pool
from ogls.errors import StoreError
from ogls.manifest import FileEntry
from ogls.policy import Policy, load_head, load_tokenizer
from ogls.records import CONTEXTS, STEERED, TEACHER_STATES, UPDATES, Key, StageResult
from ogls.run import POLICY, Progress, Run, silent
from ogls.schema import to_arrow
from ogls.stages.common import groups_of, policy_inputs, probe, shards
from ogls.steering import steer as steer_tokens
from ogls.writer import StageWriter

_CLIP_WARNING = "train.pointwise_clip reverses the gradient of clipped terms: for reproduction only"
_SHARD_STATES = 2**18  # cached states (of all pools) whose targets are one shard
_STEER_ROLLOUTS = 64  # rollouts whose targets are turned into rows together


def teach(run: Run, round_: int, progress: Progress = silent) -> StageResult:
    """Cache averaged teacher states of every rollout to be trained, for every pool."""
    config = run.config
    start = run.start(round_).round
    inputs = {
        **policy_inputs(run),
        "teacher": config.teacher,
        "pools": config.pools(),
        "required": config.steer.resolved().pools(),
        "chosen": (config.train.rollouts, config.train.tokens),
        "trajectories": run.digest("trajectories", round_),
        "verdicts": run.digest("verdicts", round_),
        "policy": run.policy_hash(start),
        "before": run.digest("updates", start) if config.teacher.weights == "ema" and start else None,
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        policy = run.policy()
        weights = {"policy": run.adapter(start), "teacher": _teacher(run, start)}
        groups = groups_of(run, round_)
        posed = {p.problem_id: p for p in run.problems("train")}
        planner = exemplars.Planner(config, run.prompter(policy.tokenizer), policy.context)
        plans = {name: planner.group(posed[name], group) for name, group in groups.items()}
        for index, part in shards(list(plans), config.teacher.shard_groups, writer, progress):
            scored = [s for name in part for s in plans[name].scored]
            states: dict[Any, Any] = {}
            for whose, adapter in weights.items():
                wanted = [s for s in scored if s.shares[0][0].weights == whose]
                if wanted:
                    policy.use(adapter)
                    states |= teacher.score(policy, wanted, config.teacher.batch_tokens)
            rows = [
                {
                    **_scored_key(s),
                    "exemplars": list(s.exemplars),
                    **columns.pack_states(states[s.key, s.pool], config.teacher.state_dtype),
                }
                for s in scored
            ]
            writer.shard(index, to_arrow(TEACHER_STATES, rows), {"tokens": sum(r["tokens"] for r in rows)})
        scored = [s for plan in plans.values() for s in plan.scored]
        read = [{**_scored_key(s), "exemplars": list(s.exemplars)} for s in scored]
        writer.also(CONTEXTS, to_arrow(CONTEXTS, read))
        left_out: Counter[str] = sum((p.left_out for p in plans.values()), Counter())
        kept = len({s.key for s in scored})
        cut = sum(p.cut for p in plans.values())
        notice = f"{cut} exemplars were cut to fit (teacher.exemplar_tokens, or the model's context)" if cut else ""
        return {"rollouts": kept, "left_out": dict(left_out), "exemplars_cut": cut, "notice": notice}

    return run.stage("teacher_states", round_, inputs, work)


def steer(run: Run, round_: int, progress: Progress = silent) -> StageResult:
    """Turn cached states into targets. No model runs here but the head."""
    import torch

    config = run.config
    recipe = config.steer.resolved()
    states = run.digest("teacher_states", round_)
    trajectories = run.digest("trajectories", round_)
    inputs = {
        "recipe": recipe,
        "temperature": config.steer.temperature,
        "support": config.steer.support,
        "batch_tokens": config.steer.batch_tokens,
        "model": config.model,
        "teacher_states": states,
        "trajectories": trajectories,
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        head, tokenizer = load_head(config.model), load_tokenizer(config.model)
        rollouts = {r.key: r for group in groups_of(run, round_).values() for r in group}
        entries = run.records.shards("teacher_states", round_)
        folds = _folds(entries)
        for index, part in shards(entries, len(entries), writer, progress, by=lambda entry: folds[entry.path]):
            tables, sums = [], {"kl_sum": 0.0, "direction_sum": 0.0}
            for cached in (columns.unpack_states(run.records.read_shard(entry)) for entry in part):
                for keys in _alike(cached):
                    tokens = [torch.tensor(rollouts[k].token_ids[: len(cached[k]["base"])]) for k in keys]
                    pools = {p: torch.cat([cached[k][p] for k in keys]).to(head.device) for p in cached[keys[0]]}
                    ids = torch.cat(tokens).to(head.device)
                    limits = config.steer.support, config.steer.batch_tokens
                    target = steer_tokens(pools, ids, recipe, head, *limits, config.steer.temperature)
                    tables.append(columns.target_rows(keys, tokens, target, tokenizer))
                    sums["kl_sum"] += target.kl.sum().item()
                    sums["direction_sum"] += target.direction_norm.sum().item()
            writer.shard(index, columns.joined(tables), sums)
        told = [run.records.read_shard(e, list(columns.STEERED_FROM)) for _, e in sorted(writer.done.items())]
        ended = run.records.read("trajectories", round_, ["problem_id", "sample", "n_tokens", "finish_reason"])
        steered = columns.steered_rows(columns.joined(told), columns.stops(ended))
        writer.also(STEERED, to_arrow(STEERED, steered))
        rows = sum(entry.rows for entry in writer.done.values())
        total = writer.sums()
        return {
            "kl": total.get("kl_sum", 0.0) / max(rows, 1),
            "direction_norm": total.get("direction_sum", 0.0) / max(rows, 1),
        }

    return run.stage("targets", round_, inputs, work)


def train(run: Run, round_: int, progress: Progress = silent) -> StageResult:
    """Distil the targets into the policy; write the updates, the adapter and the optimizer's state."""
    from safetensors.torch import load, save

    from ogls.train import Trainer

    config = run.config
    full = config.has_teacher and config.train.support == "full"
    start, rate = run.start(round_)
    before = run.policy_hash(start)
    settings = config.train.model_copy(update={"learning_rate": config.train.learning_rate * rate})
    inputs = {
        **policy_inputs(run),
        "train": settings,
        "ema": config.teacher.ema_decay if config.teacher.weights == "ema" else None,
        "round": round_,
        "before": run.digest("updates", start) if start else None,
        "trajectories": run.digest("trajectories", round_),
        "verdicts": run.digest("verdicts", round_),
        "targets": run.digest("targets", round_) if config.has_teacher else None,
        "states": run.digest("teacher_states", round_) if full else None,
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        policy = run.policy(start)
        items = _train_items(run, round_, policy)
        if policy.hash != before:
            raise StoreError(f"round {round_} was sampled by {before}, but {policy.hash} would be trained")
        state = load(run.attachment(start, "optimizer.safetensors")) if start else None
        trainer = Trainer(policy, settings, state)
        rows = trainer.round(items, run.seed("train", round_), progress)
        writer.shard(0, to_arrow(UPDATES, rows))
        trained = policy.adapter()
        for name, content in adapter_files(trained, config.model, config.adapter).items():
            writer.attach(POLICY, name, content)
        writer.attach(POLICY, "optimizer.safetensors", save(trainer.state()))
        if config.teacher.weights == "ema":
            old = _teacher(run, start) or policy.initial()
            average = old.average(trained, config.teacher.ema_decay)
            writer.attach(POLICY, "ema.safetensors", save(dict(average.weights)))
        loss = sum(r["loss"] for r in rows) / len(rows) if rows else 0.0
        notice = "" if rows else f"round {round_}: nothing to train on; the adapter stays as it was"
        if config.train.pointwise_clip:
            notice = " ".join([notice, _CLIP_WARNING]).strip()
        tokens = sum(r["tokens"] for r in rows)
        posed = run.problems("train")[0]
        said = {"policy": trained.hash, "probe": probe(run, policy, posed), "notice": notice}
        return {"loss": loss, "steps": len(rows), "tokens": tokens, **said}

    return run.stage("updates", round_, inputs, work)


def _teacher(run: Run, start: int) -> Adapter | None:
    """The teacher's weights in a round that starts from the policy of round `start`; None for the base model."""
    kind = run.config.teacher.weights
    if kind == "frozen" or not start:
        return None
    if kind == "live":
        return run.adapter(start)
    return Adapter.parse(run.attachment(start, "ema.safetensors"))


def _train_items(run: Run, round_: int, policy: Policy) -> list[TrainItem]:
    """The rollouts to train on, with what the objective holds them to."""
    config, groups = run.config, groups_of(run, round_)
    if config.train.objective == "grpo":
        return columns.policy_items(groups, config.train)
    if config.train.objective == "rft":
        return columns.likelihood_items(groups)
    if config.train.objective == "sft":
        posed = {p.problem_id: p for p in run.problems("train")}
        stop = policy.tokenizer.eos_token_id
        return columns.reference_items(groups, posed, policy.tokenizer, stop, config.rollout.max_tokens)
    full = config.train.support == "full"
    entries = run.records.shards("teacher_states", round_) if full else []
    states = (run.records.read_shard(entry) for entry in entries) if full else None
    targets = run.records.read("targets", round_)
    return columns.train_items(groups, targets, states, config.steer, config.train)


def _scored_key(scored: exemplars.Scored) -> dict[str, Any]:
    return {"problem_id": scored.key[0], "sample": scored.key[1], "pool": scored.pool}


def _folds(entries: Sequence[FileEntry]) -> dict[str, int]:
    """Which shard of targets each shard of states goes into: readers open files, so small ones are laid together."""
    folds, before = {}, 0
    for entry in entries:
        folds[entry.path] = before // _SHARD_STATES
        before += int(entry.metrics["tokens"])
    return folds


def _alike(cached: Mapping[Key, Mapping[Pool, Any]]) -> Iterator[list[Key]]:
    """Some rollouts at a time that have the same pools."""
    by_pools: dict[tuple[Pool, ...], list[Key]] = {}
    for key, pools in cached.items():
        by_pools.setdefault(tuple(pools), []).append(key)
    for keys in by_pools.values():
        yield from (keys[i : i + _STEER_ROLLOUTS] for i in range(0, len(keys), _STEER_ROLLOUTS))
