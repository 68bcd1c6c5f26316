"""The server engine without a server, with a server of another model, and with a server that refuses requests."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import small_config

from ogls.config import RunConfig
from ogls.errors import EngineUnavailable, ModelError
from ogls.models.adapter import Adapter
from ogls.models.policy import Policy
from ogls.samplers import server as module
from ogls.samplers.choose import create_sampler
from ogls.stages.registry import STAGES
from ogls.stages.run import Run
from tasks.stages import may_succeed_on_retry


class FakeServer(BaseHTTPRequestHandler):
    """Responds with `responses[path]`: (status, body); 404 for other paths."""

    responses: dict[str, tuple[int, object]]

    def do_GET(self) -> None:
        status, body = self.responses.get(self.path, (404, {}))
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def fake_server() -> Iterator[HTTPServer]:
    http = HTTPServer(("127.0.0.1", 0), FakeServer)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield http
    http.shutdown()


def config(port: int, *overrides: str) -> RunConfig:
    url = f"rollout.server.url=http://127.0.0.1:{port}"
    return small_config("x", "rollout.engine=server", url, *overrides)


def test_another_model_is_refused(fake_server: HTTPServer) -> None:
    FakeServer.responses = {"/v1/models": (200, {"data": [{"id": "other/model", "root": "other/model"}]})}
    with pytest.raises(ModelError, match="serves other/model, not data/tiny/model"):
        create_sampler("server", None, config(fake_server.server_port))


def test_a_refused_request_is_not_retried(fake_server: HTTPServer) -> None:
    FakeServer.responses = {"/v1/models": (401, {"error": "no key"})}
    with pytest.raises(ModelError, match=r"refuses /v1/models: 401: .*no key"):
        create_sampler("server", None, config(fake_server.server_port))


def test_an_unreachable_server_is_worth_a_retry(fake_server: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WAIT_SECONDS", 0.01)
    FakeServer.responses = {"/v1/models": (503, {})}
    with pytest.raises(
        EngineUnavailable, match=r"does not respond to /v1/models \(503.*start it, then run the same command"
    ):
        create_sampler("server", None, config(fake_server.server_port))
    with pytest.raises(EngineUnavailable, match="ConnectError"):
        create_sampler("server", None, config(9))

    class FailedState:
        def result(self) -> None:
            raise EngineUnavailable("away")

    assert may_succeed_on_retry(None, type("Run", (), {"name": "sample"}), FailedState())


def test_the_folder_of_an_unloaded_adapter_is_removed(fake_server: HTTPServer, policy: Policy, tmp_path: Path) -> None:
    model = {"id": "data/tiny/model", "root": "data/tiny/model"}
    FakeServer.responses = {"/v1/models": (200, {"data": [model]})}
    FakeServer.responses |= {f"/v1/{action}_lora_adapter": (200, {}) for action in ("load", "unload")}
    sampler = create_sampler("server", None, config(fake_server.server_port, f"rollout.server.adapters={tmp_path}"))
    for name in ("a", "b", "c"):
        sampler.use_adapter(Adapter(policy.initial_adapter().weights, name))
        assert [p.name for p in tmp_path.iterdir()] == [f"ogls-{name}"]
    sampler.use_adapter(None)
    assert list(tmp_path.iterdir()) == []


def test_two_workers_may_load_one_adapter_at_the_same_time(
    fake_server: HTTPServer, policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, loaded = {"id": "data/tiny/model", "root": "data/tiny/model"}, {"id": "ogls-a", "parent": "data/tiny/model"}
    answers = iter([[base], [base], [base, loaded]])  # at the start, before the adapter is loaded, and afterwards
    monkeypatch.setattr(FakeServer, "do_POST", FakeServer.do_GET)
    responses = {"/v1/load_lora_adapter": (400, {"message": "ogls-a has already been loaded"})}
    monkeypatch.setattr(FakeServer, "responses", responses, raising=False)
    real = module.ServerSampler._request

    def request(self: Any, method: str, path: str, body: Any = None) -> Any:
        return {"data": next(answers)} if path == "/v1/models" else real(self, method, path, body)

    monkeypatch.setattr(module.ServerSampler, "_request", request)
    sampler = create_sampler("server", None, config(fake_server.server_port, f"rollout.server.adapters={tmp_path}"))
    sampler.use_adapter(Adapter(policy.initial_adapter().weights, "a"))
    assert sampler.hash == "a"
    assert [p.name for p in tmp_path.iterdir()] == ["ogls-a"]


def test_a_server_that_does_not_take_the_rank_is_found_before_the_first_rollout(
    fake_server: HTTPServer, tmp_path: Path
) -> None:
    model = {"id": "data/tiny/model", "root": "data/tiny/model"}
    refused = {"message": "LoRA rank 8 is greater than max_lora_rank 4"}
    FakeServer.responses = {"/v1/models": (200, {"data": [model]}), "/v1/load_lora_adapter": (400, refused)}
    run = Run(config(fake_server.server_port, f"root={tmp_path}", f"rollout.server.adapters={tmp_path}/served"))
    with pytest.raises(ModelError, match=r"refuses /v1/load_lora_adapter: 400: .*greater than max_lora_rank 4"):
        STAGES["prepare"](run, 0)


def test_full_weights_are_refused() -> None:
    with pytest.raises(ModelError, match="swaps LoRA adapters"):
        create_sampler("server", None, config(9, "adapter.kind=full"))
