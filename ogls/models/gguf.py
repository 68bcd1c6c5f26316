"""Convert a GGUF file into a model folder with safetensors, tokenizer and chat template: `make real`.

    python -m ogls.models.gguf FILE FOLDER

Needs the package gguf.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from ogls.errors import ModelError


def convert(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file, dequantized to float32, to a new folder that `model.path` can name.

    Raises ModelError if the folder exists or the file cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if folder.exists():
        raise ModelError(f"{folder} exists: remove it to convert again")
    if not file.is_file():
        raise ModelError(f"no file {file}")
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"cannot read {file}: {error}") from None
    # The weights are no longer quantized; saving would ask the quantizer.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        shutil.copytree(temporary, f"{temporary}.new")
    Path(f"{temporary}.new").rename(folder)  # complete or absent


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
