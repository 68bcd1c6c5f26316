"""Access to the Hugging Face hub. Offline, its libraries retry for 40 s before they look into the cache."""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

_SECONDS = 2.0


def prepare_hub(name: str) -> None:
    """Before `name` is loaded: if it is no local path and the hub cannot be reached, use only cached files."""
    if not Path(name).exists():
        _go_offline_if_unreachable()


@cache
def _go_offline_if_unreachable() -> None:
    """Switch the libraries of this process, and of its children, to offline mode if nothing answers at the hub."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():  # a proxy may reach it where this process cannot
        return
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=_SECONDS).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"
