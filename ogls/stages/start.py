"""Where a round starts, and the adapter that a run starts from."""

from __future__ import annotations

import json
from typing import NamedTuple

from ogls.config import RunConfig
from ogls.errors import ModelError
from ogls.models.adapter import WEIGHTS, Adapter, check_adapter_config
from ogls.store.storage import Storage


class StartPoint(NamedTuple):
    """Where a round starts: the round whose policy it continues, and the factor on the learning rate."""

    round: int
    rate: float


def read_start_folder(config: RunConfig) -> Adapter:
    """The adapter in the folder `adapter.start`.

    Raises ModelError if the folder has no adapter, or one that does not fit `model` or `adapter`.
    """
    folder, name = Storage(config.adapter.start), WEIGHTS[config.adapter.kind]
    if config.adapter.kind == "lora" and (adapter_config := folder.read_bytes("adapter_config.json")):
        check_adapter_config(json.loads(adapter_config), config)
    if (content := folder.read_bytes(name)) is None:
        raise ModelError(f"adapter.start: {config.adapter.start} has no file {name}")
    return Adapter.from_bytes(content)
