"""Every check and measurement that needs a GPU, in ten minutes at most, on one card.

    python tests/gpu/measure.py OUT [--parts numerics,memory] [--device cpu --small]

It needs torch, transformers, peft, pyarrow and pydantic, and nothing that is downloaded: the model has the shape of
Qwen3-1.7B and random weights. Each part has a time limit; a part that fails is recorded and the others still run. The
tables are written after every part: OUT/gpu-checks.{md,parquet} and OUT/gpu-speed.{md,parquet}.

Exit status: 0 if every check has passed, 1 if not, 2 without a CUDA device. `--device cpu --small` runs all parts at a
small shape on the CPU, which tries the script and measures nothing.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests"), str(REPO / "tests" / "gpu")]
os.environ["HF_HUB_OFFLINE"] = "1"

PARTS = {"numerics": 90, "teacher": 80, "training": 150, "steering": 50, "sampling": 80, "memory": 70}  # seconds
WHOLE = 585  # seconds; a part that does not come back to Python ends the process then


def main() -> int:
    """Run the parts, and return the exit status."""
    arguments = parse_arguments()
    if refused := find_refusal(arguments):
        print(f"measure.py: {refused}", file=sys.stderr)
        return 2
    import torch
    from gpu_bench import QWEN, SMALL, Results, machine_facts, temporary_bench
    from transformers.utils import logging

    logging.disable_progress_bar()
    faulthandler.dump_traceback_later(WHOLE, exit=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    results = Results(arguments.out, machine_facts())
    print(", ".join(f"{name} {value}" for name, value in results.facts.items() if value), flush=True)
    with temporary_bench(arguments.device, SMALL if arguments.small else QWEN) as bench:
        for name in arguments.parts:
            run_part(name, bench, results)
            results.write()
    failed = [f"{row['part']}: {row['check']}" for row in results.checks if not row["passed"]]
    print("\n".join([*(f"FAILED {name}" for name in failed), f"{len(results.checks) - len(failed)} checks passed"]))
    return 1 if failed else 0


def find_refusal(arguments: argparse.Namespace) -> str:
    """Why nothing can be measured here; empty if it can."""
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if not arguments.small:
            return "--device cpu needs --small: the shape of Qwen3-1.7B takes hours on a CPU"
        if arguments.out.resolve() == REPO / "docs" / "measured":
            return "docs/measured has measurements of GPUs only: write the trial on the CPU elsewhere"
        return ""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch; set GPU_PYTHON to the Python that has torch with CUDA"
    if torch.cuda.is_available():
        return ""
    return f"torch {torch.__version__} of {sys.executable} sees no CUDA device; nothing is measured"


def run_part(name: str, bench: Any, results: Any) -> None:
    """Run one part within its time; an error is a check that fails."""
    import gpu_memory
    import gpu_numerics
    import gpu_speed
    from gpu_bench import free_memory, time_limit

    parts = {
        "numerics": gpu_numerics.check_numerics,
        "teacher": gpu_speed.measure_teacher,
        "training": gpu_speed.measure_training,
        "steering": gpu_speed.measure_steering,
        "sampling": gpu_speed.measure_sampling,
        "memory": gpu_memory.check_memory,
    }
    start, note = time.perf_counter(), ""
    print(f"{name} ({PARTS[name]} s at most)", flush=True)
    try:
        with time_limit(PARTS[name]):
            parts[name](bench, results)
    except Exception as error:  # recorded: the other parts still say something
        import traceback

        traceback.print_exc()
        note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    results.require(name, "ran to its end", not note, note or f"{time.perf_counter() - start:.0f} s")
    free_memory()


def parse_arguments() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description="Checks and measurements that need a GPU.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="a small shape, to try the script")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
