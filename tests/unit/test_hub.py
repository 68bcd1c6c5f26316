"""Without a connection nothing waits for the hub."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
from huggingface_hub import constants

from ogls import hub


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without HF_HUB_OFFLINE, with nothing remembered and no proxy."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setattr(hub, "getproxies", dict)
    hub._go_offline_if_unreachable.cache_clear()


def test_an_unreachable_hub_switches_to_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        hub.prepare_hub("pyproject.toml")  # a path
        assert not constants.HF_HUB_OFFLINE
        hub.prepare_hub("owner/model")
        assert constants.HF_HUB_OFFLINE


def test_a_hub_that_answers_and_a_proxy_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        hub.prepare_hub("owner/model")
        assert not constants.HF_HUB_OFFLINE
    hub._go_offline_if_unreachable.cache_clear()
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy:3128"})
    hub.prepare_hub("owner/model")
    assert not constants.HF_HUB_OFFLINE


def test_a_model_of_the_hub_fails_at_once_without_a_connection() -> None:
    """In a process of its own, with a hub at which nothing listens; its libraries would retry for half a minute."""
    code = (
        "import os\nos.environ.pop('HF_HUB_OFFLINE', None)\nos.environ['HF_ENDPOINT'] = 'http://127.0.0.1:9'\n"
        "from ogls.config import ModelConfig\nfrom ogls.models.load import load_tokenizer\n"
        "load_tokenizer(ModelConfig(path='owner/model'))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "cannot load the model owner/model" in result.stderr
    assert "Retrying" not in result.stderr
