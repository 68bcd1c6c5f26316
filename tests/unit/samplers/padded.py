"""The seed model of the tiny world with heads of 32 dimensions: vLLM's CPU attention has no kernel for 24.

The padded model computes the same function. Zeros are inserted where the rotary embedding pairs them with zeros. The
rotary base and the norm of the keys are adjusted to the new head dimension.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def pad_heads(source: Path, out: Path, new: int = 32) -> Path:
    """Write the model in `source`, with heads of `new` dimensions, to the new folder `out`. Returns `out`."""
    shutil.copytree(source, out)
    config = json.loads((source / "config.json").read_text())
    old = config["head_dim"]
    # theta'^(-2i / new) = theta^(-2i / old)
    config["rope_parameters"]["rope_theta"] **= new / old
    config["head_dim"] = new
    (out / "config.json").write_text(json.dumps(config, indent=2))
    kept = torch.cat([torch.arange(old // 2), new // 2 + torch.arange(old // 2)])

    def pad_rows(rows: torch.Tensor) -> torch.Tensor:
        """Pad [heads * old, ...] with zeros to [heads * new, ...]."""
        heads = rows.reshape(-1, old, *rows.shape[1:])
        wide = heads.new_zeros(heads.shape[0], new, *rows.shape[1:])
        wide[:, kept] = heads
        return wide.reshape(-1, *rows.shape[1:])

    weights = load_file(source / "model.safetensors")
    for name, tensor in weights.items():
        kind = name.split(".")[-2]
        if kind in ("q_proj", "k_proj", "v_proj"):
            weights[name] = pad_rows(tensor)
        elif kind == "o_proj":
            weights[name] = pad_rows(tensor.T.contiguous()).T.contiguous()
        elif kind in ("q_norm", "k_norm"):
            # The norm averages over `new` numbers, and scores are divided by sqrt(new): for q the two effects cancel.
            factor = 1.0 if kind == "q_norm" else math.sqrt(old / new)
            weights[name] = pad_rows(tensor * factor)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out
