"""The tiny world's seed model with heads of 32 dimensions in place of 24, which vLLM's CPU attention has no kernel for.

It computes the same function. Zeros are put where rotary embedding pairs them with zeros; the base of the rotary
frequencies, and the key's norm, make up for the dimension that both are told.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def pad_heads(source: Path, out: Path, new: int = 32) -> Path:
    """Write the model of `source` with heads of `new` dimensions to a new folder `out`."""
    shutil.copytree(source, out)
    config = json.loads((source / "config.json").read_text())
    old = config["head_dim"]
    # theta'^(-2i / new) = theta^(-2i / old)
    config["rope_parameters"]["rope_theta"] **= new / old
    config["head_dim"] = new
    (out / "config.json").write_text(json.dumps(config, indent=2))
    place = torch.cat([torch.arange(old // 2), new // 2 + torch.arange(old // 2)])

    def spread(rows: torch.Tensor) -> torch.Tensor:
        """[heads * old, ...] to [heads * new, ...]."""
        heads = rows.reshape(-1, old, *rows.shape[1:])
        wide = heads.new_zeros(heads.shape[0], new, *rows.shape[1:])
        wide[:, place] = heads
        return wide.reshape(-1, *rows.shape[1:])

    weights = load_file(source / "model.safetensors")
    for name, tensor in weights.items():
        kind = name.split(".")[-2]
        if kind in ("q_proj", "k_proj", "v_proj"):
            weights[name] = spread(tensor)
        elif kind == "o_proj":
            weights[name] = spread(tensor.T.contiguous()).T.contiguous()
        elif kind in ("q_norm", "k_norm"):
            # The mean square is taken over `new` numbers, and scores are divided by sqrt(new): the two cancel for q.
            factor = 1.0 if kind == "q_norm" else math.sqrt(old / new)
            weights[name] = spread(tensor * factor)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out
