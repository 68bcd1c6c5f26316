"""Seeds derived from a run's seed: the same (run seed, purpose, round, problem, sample) gives the same seed."""

from __future__ import annotations

import hashlib


def derive_seed(run_seed: int, *names: str | int) -> int:
    """Derive a seed in [0, 2**63) from the seed of the run and `names`. Equal arguments give equal seeds."""
    text = "\x1f".join([str(run_seed), *(f"{type(n).__name__}:{n}" for n in names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
