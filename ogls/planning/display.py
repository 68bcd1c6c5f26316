"""An estimate as the rows of a table, and sizes and durations as text."""

from __future__ import annotations

import math
from typing import Any

from ogls.planning.plan import Plan


def plan_rows(plan: Plan) -> list[dict[str, Any]]:
    """Return one row per stage for display, on one device."""
    return [
        {
            "stage": s.stage,
            "peak memory": format_bytes(s.memory),
            "fits": "yes" if s.memory <= plan.gpu.memory else "no",
            "tokens per round": f"{s.tokens:,.0f}",
            "time per round": format_seconds(s.seconds),
        }
        for s in plan.stages
    ]


def device_rows(plan: Plan) -> list[dict[str, Any]]:
    """Return one row per stage for display, on several devices."""
    total = max(plan.round_seconds, 1e-9)
    return [
        {
            "stage": s.stage,
            "memory per GPU": format_bytes(s.memory),
            "fits": "yes" if s.memory <= plan.gpu.memory else "no",
            "shards": "-" if s.stage in ("style", "train") else str(s.shards),
            "GPUs": f"{s.devices} of {plan.devices.total}",
            "time per round": format_seconds(s.seconds),
            "speed-up": f"{s.alone / max(s.seconds, 1e-9):.1f}",
            "share": f"{s.seconds / total:.0%}",
        }
        for s in plan.stages
    ]


def format_bytes(size: float) -> str:
    """Format a size with the unit that gives at least one before the point: 512 B, 1.4 MiB, 3.2 GiB."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(max(0, int(math.log2(size) // 10)), len(units) - 1) if size >= 1 else 0
    return f"{size / 2 ** (10 * power):.{1 if power else 0}f} {units[power]}"


def format_seconds(seconds: float) -> str:
    """Format a duration: 0.4 s, 12 s, 3.5 min, 2.1 h."""
    if seconds < 60:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
