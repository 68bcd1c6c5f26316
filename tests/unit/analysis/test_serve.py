"""The server of the token view: what it answers, to whom, and what it refuses."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from starlette.testclient import TestClient

from ogls.analysis.serve import HOST, bind, create_app
from ogls.analysis.token_view import TokenViewer
from ogls.errors import UserError
from ogls.stages.run import Run


@pytest.fixture(scope="module")
def viewer(finished: Run) -> TokenViewer:
    return TokenViewer(finished, policy=True)


@pytest.fixture(scope="module")
def data(viewer: TokenViewer) -> dict[str, Any]:
    return viewer.page_data(max_rollouts=3)


@pytest.fixture(scope="module")
def client(viewer: TokenViewer, data: dict[str, Any]) -> TestClient:
    return TestClient(create_app(viewer, data), base_url=f"http://{HOST}")


def test_the_page_may_ask_its_own_server_and_nobody_else(client: TestClient) -> None:
    page = client.get("/").text
    assert "connect-src &#39;self&#39;" in page
    assert "default-src &#39;none&#39;" in page


def test_a_rollout_has_the_numbers_of_the_page(client: TestClient, data: dict[str, Any]) -> None:
    shown = data["rollouts"][0]
    key = {n: shown[n] for n in ("round", "problem_id", "sample")}
    answer = client.get("/api/rollout", params=key).json()
    assert answer["rollout"]["numbers"]["ids"] == shown["numbers"]["ids"]
    assert answer["rollout"]["numbers"]["logprobs"]["student"] == shown["numbers"]["logprobs"]["student"]
    assert set(answer["vocabulary"]) <= {str(i) for i in data["vocabulary"]}
    group = client.get("/api/group", params=key).json()
    assert group["group"] in data["groups"]
    assert group["problem"] == data["problems"][shown["problem_id"]]


def test_search_is_asked_of_the_store(client: TestClient, finished: Run) -> None:
    verdicts = [v for r in (1, 2) for v in finished.records.read("verdicts", r)["verdict"].to_pylist()]
    found = client.get("/api/search", params={"verdict": "correct", "limit": 3}).json()
    assert (found["total"], len(found["rows"])) == (verdicts.count("correct"), 3)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/api/search?sort=x", "unknown sort 'x'"),
        ("/api/search?limit=all", "the limit of a search is a number"),
        ("/api/group?round=9&problem_id=a", "no rollouts of problem a in round 9"),
        ("/api/rollout?round=1&problem_id=a&sample=0", "no rollouts of problem a in round 1"),
        ("/api/completions?split=tiny&round=1&problem_id=a", "no completions of problem a"),
    ],
)
def test_what_does_not_exist_is_an_error_with_a_reason(client: TestClient, path: str, message: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 400
    assert message in answer.json()["detail"]


def test_another_host_name_is_refused(client: TestClient) -> None:
    """A page of another site that rebinds its name to loopback would send its own name."""
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert client.post("/api/search").status_code == 405


def test_the_server_is_bound_to_loopback() -> None:
    bound, url = bind(0)
    host, port = bound.getsockname()
    try:
        assert (host, url) == ("127.0.0.1", f"http://127.0.0.1:{port}/")
        bound.listen()
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is not free"):
            bind(port)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.2", port), timeout=1)
    finally:
        bound.close()
