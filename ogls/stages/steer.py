"""The stage `steer`: compute targets from cached states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ogls.config import Pool, Recipe, RunConfig
from ogls.distillation.steering import steer_tokens
from ogls.distillation.style import classify, substance_only
from ogls.execution.work import OneByOne, ShardOutput
from ogls.models.load import load_tokenizer
from ogls.planning.memory import STEER_SHARD_STATES
from ogls.progress import Progress, no_progress
from ogls.records import STEERED, Key, StageResult
from ogls.records.schema import to_arrow
from ogls.stages import columns
from ogls.stages.groups import read_groups
from ogls.stages.heads import load_heads
from ogls.stages.run import Run
from ogls.stages.shards import carry_out_shards, divide_files
from ogls.store.manifest import FileEntry
from ogls.store.writer import StageWriter

if TYPE_CHECKING:
    from torch import Tensor

_STEER_ROLLOUTS = 64  # rollouts that are steered together


def steer(run: Run, round_: int, progress: Progress = no_progress) -> StageResult:
    """Compute targets from cached states. Loads only the head of the model."""
    config = run.config
    inputs = {
        "recipe": config.steer.to_recipe(),
        **({"sources": config.steer.sources} if config.steer.sources else {}),
        **({"project": config.style.model_dump(mode="json")["classes"]} if config.steer.project != "none" else {}),
        **({"mistake_nats": config.train.mistake_nats} if config.train.mistake_nats != 1.0 else {}),
        "temperature": config.steer.temperature,
        "support": config.steer.support,
        "model": run.identity.model,
        "teacher_states": run.digest("teacher_states", round_),
        "trajectories": run.digest("trajectories", round_),
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        entries = run.records.list_shards("teacher_states", round_)
        # Small shards of states are combined, because readers of targets open every file.
        shards = divide_files(entries, STEER_SHARD_STATES, lambda entry: int(entry.metrics["tokens"]))
        carry_out_shards(run, SteerWork, writer, shards, len(entries), progress)
        written = [run.records.read_shard(e, list(columns.STEERED_COLUMNS)) for _, e in sorted(writer.finished.items())]
        trajectories = run.records.read("trajectories", round_, ["problem_id", "sample", "n_tokens", "finish_reason"])
        stops = columns.stop_positions(trajectories)
        steered = columns.steered_rows(columns.concat_targets(written), stops, config.train.mistake_nats)
        writer.write_extra(STEERED, to_arrow(STEERED, steered))
        rows = sum(entry.rows for entry in writer.finished.values())
        total = writer.summed_metrics()
        return {
            "kl": total.get("kl_sum", 0.0) / max(rows, 1),
            "direction_norm": total.get("direction_sum", 0.0) / max(rows, 1),
        }

    return run.carry_out("targets", round_, inputs, work)


class SteerWork(OneByOne):
    """Computes the targets of the states in some files. Loads only the heads of the models."""

    def __init__(self, run: Run, round_: int):
        self.run, config = run, run.config
        self.heads, self.tokenizer = load_heads(config), load_tokenizer(config.model)
        self.recipes = run.recipes()
        self.classes = projection_classes(config, self.tokenizer, self.heads.matrix)
        self.rollouts = {r.key: r for group in read_groups(run, round_).values() for r in group}

    def compute(self, items: Sequence[FileEntry], progress: Progress) -> ShardOutput:
        """Rows of the table targets for files of teacher_states."""
        import torch

        steer, heads, recipes = self.run.config.steer, self.heads, self.recipes
        limits = steer.support, steer.batch_tokens, steer.temperature
        tables, sums = [], {"kl_sum": 0.0, "direction_sum": 0.0}
        for cached in (columns.unpack_states(self.run.records.read_shard(entry)) for entry in items):
            for keys in _same_work(cached, recipes):
                tokens = [torch.tensor(self.rollouts[k].token_ids[: len(cached[k]["base"])]) for k in keys]
                pools = heads.place({p: torch.cat([cached[k][p] for k in keys]) for p in cached[keys[0]]})
                ids, recipe = torch.cat(tokens).to(heads.matrix.device), recipes[keys[0][0]]
                target = steer_tokens(pools, ids, recipe, heads.matrix, *limits, self.classes)
                tables.append(columns.target_rows(keys, tokens, target, self.tokenizer))
                sums["kl_sum"] += target.kl.sum().item()
                sums["direction_sum"] += target.direction_norm.sum().item()
        return ShardOutput(columns.concat_targets(tables), sums)

    def close(self) -> None:
        """Does nothing: the heads are freed with this object."""


def projection_classes(config: RunConfig, tokenizer: Any, head: Tensor) -> Tensor | None:
    """The class of every token id [V], int64, on the device of the head; None if targets are not projected."""
    if config.steer.project == "none":
        return None
    classes = config.style.classes
    return substance_only(classify(tokenizer, len(head), classes), classes).to(head.device)


def _same_work(cached: Mapping[Key, Mapping[Pool, Any]], recipes: Mapping[str, Recipe]) -> Iterator[list[Key]]:
    """Batches of rollouts that have the same pools and the same recipe."""
    by_work: dict[tuple[Any, ...], list[Key]] = {}
    for key, pools in cached.items():
        by_work.setdefault((*pools, *recipes[key[0]].weights().items()), []).append(key)
    for keys in by_work.values():
        yield from (keys[i : i + _STEER_ROLLOUTS] for i in range(0, len(keys), _STEER_ROLLOUTS))
