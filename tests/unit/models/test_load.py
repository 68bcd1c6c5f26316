"""Loading the head alone: its tensor is read from the checkpoint, and equals that of the loaded model bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from randommodel import random_model, shaped

from ogls.config import ModelConfig
from ogls.errors import ModelError
from ogls.models import load


def whole_head(model: ModelConfig) -> torch.Tensor:
    return load.load_causal(model).get_output_embeddings().weight.detach()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sharded", [True, False])
def test_only_the_tensor_of_the_head_is_read(
    tied: bool, dtype: str, sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_model(tmp_path / "model", tie_word_embeddings=tied)
    model = ModelConfig(path=str(path), dtype=dtype)
    if sharded:
        load.load_causal(model).save_pretrained(path, max_shard_size="1MB")
        (path / "model.safetensors").unlink()
        assert len(list(path.glob("model-*.safetensors"))) > 1
    expected = whole_head(model)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the whole model was loaded")

    monkeypatch.setattr(load, "load_causal", refuse)
    assert torch.equal(load.load_head(model), expected)


def test_the_whole_model_is_loaded_where_the_tensor_has_another_name(tmp_path: Path) -> None:
    path = random_model(tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "own.Config"}}))
    model = ModelConfig(path=str(path))
    assert load._read_head(model) is None
    assert torch.equal(load.load_head(model), whole_head(model))


def test_a_model_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load the model"):
        load.load_head(ModelConfig(path=str(shaped(tmp_path / "model"))))
    with pytest.raises(ModelError, match="cannot load the model"):
        load.load_head(ModelConfig(path=str(tmp_path / "nothing")))
