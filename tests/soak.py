"""Soak test, run by hand: `make soak`, or `python tests/soak.py FOLDER [ROUNDS [SEED]]` with a new folder.

Trains the tiny world with real services and injects a random fault every minute. The final adapter must equal that of
a run without faults; memory and open files over time are written to FOLDER/soak.json. Faults: SIGKILL of the training,
the Prefect server or MLflow; a flipped bit in a finished shard or a truncated manifest, each with a SIGKILL of the
training, because a running training does not read its finished stages again.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

import psutil
from conftest import carry_out, small_config
from services_fixture import ServiceStack, kill_service

from ogls.config import RunConfig
from ogls.stages.run import Run

_FAULT_SECONDS, _POLL_SECONDS = 60.0, 5.0


def flip_bit(root: Path, rng: random.Random) -> str:
    """Flip a random bit of a random shard. Returns the path of the shard."""
    shard = rng.choice(sorted(root.glob("tiny/*/round=*/*.parquet")))
    content = bytearray(shard.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    shard.write_bytes(content)
    return "/".join(shard.parts[-3:])


def truncate_manifest(root: Path, rng: random.Random) -> str:
    """Remove the last 40 bytes of a random manifest. Returns its path."""
    manifest = rng.choice(sorted(root.glob("tiny/*/round=*/manifest.json")))
    manifest.write_bytes(manifest.read_bytes()[:-40])
    return "/".join(manifest.parts[-3:])


def soak(folder: Path, config: RunConfig, minutes: float, seed: int) -> dict[str, object]:
    """Train with faults until the run is done; restart the training whenever it ends early.

    Returns the injected faults, the number of starts, the states of the flow runs, and samples of (seconds, trained
    rounds, memory in MiB, open files) of the training. Raises AssertionError after `minutes`.
    """
    rng, services = random.Random(seed), ServiceStack(folder / "services")
    services.folder.mkdir(parents=True)
    services.up()
    faults: dict[str, int] = {}
    samples: list[tuple[float, int, float, int]] = []
    started = last_fault = time.monotonic()
    process = services.start_training(config, log=folder / "train.log")
    starts = 1
    while True:
        exit_code = process.poll()
        if exit_code == 0:
            break
        if exit_code is not None:
            process, starts = services.start_training(config, log=folder / "train.log"), starts + 1
        now = time.monotonic()
        assert now - started < minutes * 60, "the soak did not end in time"
        if now - last_fault > _FAULT_SECONDS:
            last_fault = now
            fault = rng.choice(("training", "prefect", "mlflow", "bit flipped", "manifest cut"))
            path = ""
            if fault in ("prefect", "mlflow"):
                kill_service(services, fault)
                services.up()
            else:
                process.kill()
                process.wait()
                path = flip_bit(Path(config.root), rng) if fault == "bit flipped" else path
                path = truncate_manifest(Path(config.root), rng) if fault == "manifest cut" else path
            faults[fault] = faults.get(fault, 0) + 1
            print(f"{now - started:6.0f} s  {fault} {path}", flush=True)
        if process.poll() is None:
            try:
                training = psutil.Process(process.pid)
                rounds = len(list(Path(config.root).glob("tiny/updates/round=*/manifest.json")))
                samples.append((now - started, rounds, training.memory_info().rss / 2**20, training.num_fds()))
            except psutil.Error:
                pass
        time.sleep(_POLL_SECONDS)
    states = sorted(services.flow_run_states("train tiny"))
    services.ogls("down")
    state_counts = {state: states.count(state) for state in set(states)}
    return {
        "seconds": time.monotonic() - started,
        "starts": starts,
        "faults": faults,
        "states": state_counts,
        "watched": samples,
    }


if __name__ == "__main__":
    folder, rounds = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 200
    overrides = (f"rounds={rounds}", "evaluate.every=10", "execution.retry_seconds=0.5")
    undisturbed = carry_out(small_config(folder / "plain", *overrides))
    print("the run without faults is done", flush=True)
    config = small_config(folder / "soaked", *overrides)
    result = soak(folder, config, minutes=60, seed=int(sys.argv[3]) if len(sys.argv) > 3 else 0)
    equal = Run(config).policy_hash(rounds) == undisturbed.policy_hash(rounds)
    (folder / "soak.json").write_text(json.dumps(result))
    print({k: v for k, v in result.items() if k != "watched"})
    print("the adapters are equal" if equal else "THE ADAPTERS DIFFER")
    sys.exit(0 if equal else 1)
