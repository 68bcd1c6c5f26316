"""The server engine where no server, another model, or a refusal is at the other end."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from conftest import small_config

from ogls.config import RunConfig
from ogls.errors import EngineUnavailable, ModelError
from ogls.samplers import server as module
from ogls.samplers.choose import create_sampler
from tasks.stages import may_succeed_on_retry


class Stand(BaseHTTPRequestHandler):
    """Answers with what `answers` has for a path: (status, body)."""

    answers: dict[str, tuple[int, object]]

    def do_GET(self) -> None:
        status, body = self.answers.get(self.path, (404, {}))
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stand() -> Iterator[HTTPServer]:
    http = HTTPServer(("127.0.0.1", 0), Stand)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield http
    http.shutdown()


def config(port: int, *overrides: str) -> RunConfig:
    url = f"rollout.server.url=http://127.0.0.1:{port}"
    return small_config("x", "rollout.engine=server", url, *overrides)


def test_another_model_is_said(stand: HTTPServer) -> None:
    Stand.answers = {"/v1/models": (200, {"data": [{"id": "other/model", "root": "other/model"}]})}
    with pytest.raises(ModelError, match="serves other/model, not data/tiny/model"):
        create_sampler("server", None, config(stand.server_port))


def test_a_refusal_is_said_and_not_tried_again(stand: HTTPServer) -> None:
    Stand.answers = {"/v1/models": (401, {"error": "no key"})}
    with pytest.raises(ModelError, match=r"refuses /v1/models: 401: .*no key"):
        create_sampler("server", None, config(stand.server_port))


def test_no_answer_is_worth_a_retry(stand: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WAIT_SECONDS", 0.01)
    Stand.answers = {"/v1/models": (503, {})}
    with pytest.raises(
        EngineUnavailable, match=r"does not answer /v1/models \(503.*start it, then give the same command"
    ):
        create_sampler("server", None, config(stand.server_port))
    with pytest.raises(EngineUnavailable, match="ConnectError"):
        create_sampler("server", None, config(9))

    class Failed:
        def result(self) -> None:
            raise EngineUnavailable("away")

    assert may_succeed_on_retry(None, type("Run", (), {"name": "sample"}), Failed())


def test_it_swaps_adapters_only() -> None:
    with pytest.raises(ModelError, match="swaps LoRA adapters"):
        create_sampler("server", None, config(9, "adapter.kind=full"))
