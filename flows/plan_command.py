"""The command plan: estimate memory, time and disk space before a run."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Annotated

import typer

from flows.console import OPERATE, Config, Set, err, out, show_table
from ogls.errors import UserError

if TYPE_CHECKING:
    from ogls.planning.plan import Plan

_GPU = (
    "Hardware: rtx4090, l40s, a100-40, a100-80, h100, h200 or cpu; default: cpu on a machine without an NVIDIA GPU, "
    "else h100. With --gpus or --nodes: h100."
)
_GPUS = "GPUs of each node. Without it and without --nodes, the estimate is for one device."


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(rich_help_panel=OPERATE)(plan)


def plan(
    config: Config,
    gpu: Annotated[str | None, typer.Option(help=_GPU)] = None,
    gpus: Annotated[int | None, typer.Option(help=_GPUS, min=1)] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes with as many GPUs each; training uses one.", min=1)] = None,
    length: Annotated[int | None, typer.Option(help="Mean tokens per rollout; default: max_tokens / 3.", min=1)] = None,
    set_: Set = None,
) -> None:
    """Estimate memory, time and tokens of each stage and the disk space of a round, without loading the model.

    For several GPUs: which of them each stage uses, which stage bounds the round and why, and what would shorten it.
    """
    import pyarrow as pa

    from ogls.config import load_config
    from ogls.planning.devices import Devices
    from ogls.planning.display import device_rows, plan_rows
    from ogls.planning.gpus import GPUS
    from ogls.planning.plan import estimate

    several = gpus is not None or nodes is not None
    gpu = gpu or ("h100" if several or shutil.which("nvidia-smi") else "cpu")
    if gpu not in GPUS:
        raise UserError(f"unknown machine {gpu}; known machines: {', '.join(GPUS)}")
    if several and gpu == "cpu":
        known = ", ".join(name for name in GPUS if name != "cpu")
        raise UserError(f"--gpus and --nodes count GPUs, but --gpu is cpu; known GPUs: {known}")
    estimated = estimate(load_config(config, set_ or []), GPUS[gpu], length, devices=Devices(gpus or 1, nodes or 1))
    _print_models(estimated)
    show_table(pa.Table.from_pylist((device_rows if several else plan_rows)(estimated)), "table", None)
    _print_round(estimated, several)
    for warning in estimated.warnings:
        err.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)


def _print_models(estimated: Plan) -> None:
    shape = estimated.shape
    _print(
        f"{shape.parameters / 1e6:,.1f}M parameters, {shape.trained / 1e6:,.1f}M trained; {shape.layers} layers of "
        f"{shape.hidden}, vocabulary {shape.vocabulary:,}, context {shape.context:,}"
    )
    for path, teacher in estimated.teachers.items():
        _print(
            f"teacher {path}: {teacher.parameters / 1e6:,.1f}M parameters, loaded beside the model in teach; its "
            "tokenizer must be the same (ogls doctor compares them)"
        )


def _print_round(estimated: Plan, several: bool) -> None:
    from ogls.planning.advice import describe_bottleneck, describe_growth, list_changes
    from ogls.planning.display import format_bytes, format_seconds

    disk = ", ".join(f"{name} {format_bytes(size)}" for name, size in estimated.disk.items())
    _print(f"disk space per round: {disk}")
    seconds, name = estimated.round_seconds, estimated.devices.describe(estimated.gpu.name)
    if not several:
        _print(f"a round on {name}: about {format_seconds(seconds)}")
        return
    alone = sum(stage.alone for stage in estimated.stages)
    _print(f"a round on {name}: about {format_seconds(seconds)}; {alone / seconds:.1f} times as fast as one worker")
    _print(describe_bottleneck(estimated))
    for change in list_changes(estimated):
        _print(f"  {change}")
    _print(describe_growth(estimated))


def _print(text: str) -> None:
    out.print(text, soft_wrap=True, highlight=False, markup=False)
