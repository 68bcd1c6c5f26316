"""The token view of a run as a local web page, for runs whose rollouts are too many for one file.

The page is that of `ogls view`; search, groups and rollouts are read from the store when they are asked for, and the
policies run on a rollout when it is opened. Everything is read-only. The server answers on loopback only, and refuses
requests that name another host, so that no page of another site can read a run by rebinding its name.
"""

from __future__ import annotations

import socket
import threading
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ogls.analysis.rollout_groups import read_completions
from ogls.analysis.rollout_search import Search, search_rollouts
from ogls.analysis.token_view import TokenViewer, render_token_view
from ogls.errors import UserError

HOST = "127.0.0.1"
_MAX_ROWS = 2000  # rows of one answer of the search


def create_app(viewer: TokenViewer, data: dict[str, Any]) -> FastAPI:
    """Return the application for a viewer and the data of its page (`TokenViewer.page_data`)."""
    app = FastAPI(openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    page = render_token_view(data | {"served": True})
    one_at_a_time = threading.Lock()  # the models have one adapter at a time

    @app.exception_handler(UserError)
    def explain(request: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=400)

    @app.get("/", response_class=HTMLResponse)
    def index() -> str:
        return page

    @app.get("/api/search")
    def search(request: Request) -> dict[str, Any]:
        values = dict(request.query_params)
        limit = values.pop("limit", "100")
        if not limit.isdecimal():
            raise UserError(f"the limit of a search is a number, not {limit!r}")
        return search_rollouts(viewer.run, Search.parse(values), limit=min(int(limit), _MAX_ROWS))

    @app.get("/api/group")
    def group(round: int, problem_id: str) -> dict[str, Any]:
        with one_at_a_time:
            found = viewer.read_group(round, problem_id)
        return {"group": found, "problem": viewer.groups.problems([problem_id])[problem_id]}

    @app.get("/api/rollout")
    def rollout(round: int, problem_id: str, sample: int) -> dict[str, Any]:
        with one_at_a_time:
            return viewer.one(round, problem_id, sample)

    @app.get("/api/completions")
    def completions(split: str, round: int, problem_id: str) -> dict[str, Any]:
        with one_at_a_time:
            return read_completions(viewer.run, viewer.tokenizer, split, round, problem_id)

    return app


def bind(port: int) -> tuple[socket.socket, str]:
    """Return a socket on loopback, and its address; port 0 takes a free one. Raises UserError if the port is in use."""
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((HOST, port))
    except OSError as error:
        bound.close()
        raise UserError(f"port {port} of {HOST} is not free ({error.strerror}): choose another one, or 0") from None
    return bound, f"http://{HOST}:{bound.getsockname()[1]}/"


def serve(app: FastAPI, bound: socket.socket) -> None:
    """Answer requests until the process is interrupted."""
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[bound])
