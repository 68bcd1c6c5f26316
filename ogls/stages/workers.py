"""The workers of a run on a Ray cluster: one pool for a process and run, which outlives its stages."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ogls.config import RunConfig
from ogls.digests import known_files
from ogls.errors import ClusterUnavailable, UserError
from ogls.execution.node_check import Expected, write_token
from ogls.execution.work import FinishedShard, Job, Shard, ShardWork
from ogls.revision import code_version
from ogls.samplers.choose import resolve_engine
from ogls.stages.contents import local_paths, worker_contents
from ogls.stages.kept_models import KeptModels
from ogls.stages.run import Run
from ogls.store.storage import Storage
from ogls.store.writer import StageWriter

if TYPE_CHECKING:
    from ogls.execution.ray_pool import RayPool

_pool: RayPool | None = None


def carry_out_on_ray(
    run: Run, work: Callable[[Run, int], ShardWork], writer: StageWriter, shards: Sequence[Shard]
) -> Generator[FinishedShard]:
    """Yield each shard when a worker has written it to the store, in any order.

    After an error of the cluster, a retry of the stage connects anew.
    """
    if not shards:
        return
    try:
        pool = shared_pool(run)
        config, table = pool.expected.config, writer.table.name
        together = table in ("trajectories", "scores") and config.rollout.decodes_together(config.rollout.engine)
        job = Job(config, writer.round, table, writer.epoch, partial(_open_work, work), together)
        yield from pool.carry_out(job, shards, writer.notices.append)
    except Exception as error:
        if isinstance(error, ClusterUnavailable) or not isinstance(error, UserError):
            from ogls.execution.ray_cluster import disconnect

            end_workers()
            disconnect()
        raise


def _open_work(
    work: Callable[[Run, int], ShardWork], config: RunConfig, round_: int, kept: dict[str, Any]
) -> ShardWork:
    """Load the work of a stage in a worker, which keeps its models in `kept`."""
    return work(Run(config, kept.setdefault("models", KeptModels())), round_)


def shared_pool(run: Run) -> RayPool:
    """The pool of this process. Another run, or another configuration of it, ends the workers and starts new ones."""
    global _pool
    from ogls.execution.ray_cluster import require_ray
    from ogls.execution.ray_pool import RayPool

    require_ray()
    config = worker_config(run.config)
    if _pool and _pool.expected.config == config:
        return _pool
    end_workers()
    _pool = RayPool(expected_of(config, f"{config.name}/workers.token"))
    atexit.register(end_workers)
    return _pool


def end_workers() -> None:
    """End the workers of this process, if it has any."""
    global _pool
    ended, _pool = _pool, None
    if ended:
        ended.close()


def worker_config(config: RunConfig) -> RunConfig:
    """The configuration for workers: the root is absolute, and the engine is the one that this process chose."""
    rollout = config.rollout.model_copy(update={"engine": resolve_engine(config)})
    storage = Storage(config.root)
    return config.model_copy(update={"root": storage.url if storage.local else config.root, "rollout": rollout})


def expected_of(config: RunConfig, token_path: str) -> Expected:
    """What the nodes have to agree with. Writes a token to a path in the store."""
    return Expected(
        config=config,
        folder=os.getcwd(),
        token_path=token_path,
        token=write_token(Storage(config.root), token_path),
        code=code_version(),
        contents=worker_contents(config),
        files=known_files(local_paths(config)),
        read_contents=worker_contents,
    )
