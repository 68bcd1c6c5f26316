"""A soak, by hand: `make soak`, or with a new folder, a number of rounds and a seed for the faults as arguments.

Rounds of the tiny world against real services, and every minute a fault at random; at the end the same adapter as an
undisturbed run, and no memory or open files gained. Faults: SIGKILL of the training, of the Prefect server, of MLflow;
a bit flipped in a finished shard or a manifest cut off, each with a SIGKILL of the training, since a living one does
not read what it has finished.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

import psutil
from conftest import carry_out, small_config
from upped import Up, kill_service

from ogls.config import RunConfig
from ogls.stages.run import Run

_MINUTE, _WATCH = 60.0, 5.0


def flip(root: Path, pick: random.Random) -> str:
    shard = pick.choice(sorted(root.glob("tiny/*/round=*/*.parquet")))
    content = bytearray(shard.read_bytes())
    content[pick.randrange(len(content))] ^= 1 << pick.randrange(8)
    shard.write_bytes(content)
    return "/".join(shard.parts[-3:])


def cut(root: Path, pick: random.Random) -> str:
    manifest = pick.choice(sorted(root.glob("tiny/*/round=*/manifest.json")))
    manifest.write_bytes(manifest.read_bytes()[:-40])
    return "/".join(manifest.parts[-3:])


def soak(folder: Path, config: RunConfig, minutes: float, seed: int) -> dict[str, object]:
    """Train under faults until the run is done; what was injected, and the training's memory and files over time."""
    pick, up = random.Random(seed), Up(folder / "services")
    up.folder.mkdir(parents=True)
    up.up()
    faults: dict[str, int] = {}
    watched: list[tuple[float, int, float, int]] = []
    began = last = time.monotonic()
    process = up.training(config, log=folder / "train.log")
    starts = 1
    while True:
        code = process.poll()
        if code == 0:
            break
        if code is not None:
            process, starts = up.training(config, log=folder / "train.log"), starts + 1
        now = time.monotonic()
        assert now - began < minutes * 60, "the soak did not end in time"
        if now - last > _MINUTE:
            last = now
            fault = pick.choice(("training", "prefect", "mlflow", "bit flipped", "manifest cut"))
            said = ""
            if fault in ("prefect", "mlflow"):
                kill_service(up, fault)
                up.up()
            else:
                process.kill()
                process.wait()
                said = flip(Path(config.root), pick) if fault == "bit flipped" else said
                said = cut(Path(config.root), pick) if fault == "manifest cut" else said
            faults[fault] = faults.get(fault, 0) + 1
            print(f"{now - began:6.0f} s  {fault} {said}", flush=True)
        if process.poll() is None:
            try:
                about = psutil.Process(process.pid)
                rounds = len(list(Path(config.root).glob("tiny/updates/round=*/manifest.json")))
                watched.append((now - began, rounds, about.memory_info().rss / 2**20, about.num_fds()))
            except psutil.Error:
                pass
        time.sleep(_WATCH)
    states = sorted(up.states("train tiny"))
    up.ogls("down")
    counted = {state: states.count(state) for state in set(states)}
    return {
        "seconds": time.monotonic() - began,
        "starts": starts,
        "faults": faults,
        "states": counted,
        "watched": watched,
    }


if __name__ == "__main__":
    folder, rounds = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 200
    common = (f"rounds={rounds}", "evaluate.every=10", "execution.retry_seconds=0.5")
    plain = carry_out(small_config(folder / "plain", *common))
    print("the undisturbed run has ended", flush=True)
    config = small_config(folder / "soaked", *common)
    told = soak(folder, config, minutes=60, seed=int(sys.argv[3]) if len(sys.argv) > 3 else 0)
    same = Run(config).policy_hash(rounds) == plain.policy_hash(rounds)
    (folder / "soak.json").write_text(json.dumps(told))
    print({k: v for k, v in told.items() if k != "watched"})
    print("the same adapter" if same else "ANOTHER ADAPTER")
    sys.exit(0 if same else 1)
