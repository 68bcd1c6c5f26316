"""Checking every node of a Ray cluster before the first shard."""

from __future__ import annotations

from collections.abc import Sequence

from ogls.errors import ConfigError, StoreError
from ogls.execution.node_check import Expected
from ogls.execution.ray_cluster import Node, reason_of
from ogls.execution.ray_worker import check_node

_CHECK_SECONDS = 600.0  # the files of a model may have to be read


def check_nodes(expected: Expected, nodes: Sequence[Node]) -> dict[str, list[str]]:
    """What prevents each node from carrying out shards of the run, by its id; an empty list if nothing does."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    check = ray.remote(check_node)
    checks = {}
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
        options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": strategy}  # so that busy nodes answer too
        checks[node.id] = check.options(**options).remote(expected)
    ray.wait([*checks.values()], num_returns=len(checks), timeout=_CHECK_SECONDS)
    found: dict[str, list[str]] = {}
    for node_id, reference in checks.items():
        try:
            found[node_id] = ray.get(reference, timeout=0.1)
        except ray.exceptions.GetTimeoutError:
            found[node_id] = [f"it did not answer within {_CHECK_SECONDS:g} s"]
        except ray.exceptions.RayError as error:
            found[node_id] = [reason_of(error)]
    return found


def require_usable(expected: Expected, nodes: Sequence[Node]) -> None:
    """Raise StoreError or ConfigError, which names every node that cannot carry out shards of the run."""
    problems = check_nodes(expected, nodes)
    unusable = [f"{node}: {'; '.join(problems[node.id])}" for node in nodes if problems[node.id]]
    if unusable:
        listed = "\n  ".join(unusable)
        message = f"{len(unusable)} of {len(nodes)} nodes of the Ray cluster cannot carry out shards of this run:\n  "
        error = StoreError if "does not see the store" in listed else ConfigError
        raise error(message + listed)
