"""moto's S3 server on loopback, with injected faults: SlowDown answers, server errors, connections cut in an upload."""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from pyarrow.fs import S3FileSystem
from werkzeug.serving import make_server

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "tests",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_DEFAULT_REGION": "us-east-1",
}
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class S3Server:
    """An S3 server that fails a share of the requests, chosen by a seeded generator.

    `fault_rate` is that share, `delay` the seconds that each request waits; `counts` maps each fault, and "answered",
    to its number of requests.
    """

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
        self.fault_rate, self.counts, self._random = 0.0, Counter[str](), random.Random(0)
        self.delay = 0.0
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def bucket(self, name: str) -> str:
        """Create a bucket. Returns the URL of a store in it."""
        S3FileSystem(endpoint_override=self.endpoint, allow_bucket_creation=True).create_dir(name)
        return f"s3://{name}/runs?endpoint_override={self.endpoint}"

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        time.sleep(self.delay)
        if self._random.random() >= self.fault_rate:
            self.counts["answered"] += 1
            return self._moto(environ, start)
        fault = self._random.choice(("slow down", "server error", "cut"))
        self.counts[fault] += 1
        body, length = environ["wsgi.input"], int(environ.get("CONTENT_LENGTH") or 0)
        if fault == "cut":  # in an upload: after half of the body
            body.read(length // 2)
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        body.read() if environ.get("wsgi.input_terminated") else body.read(length)
        start("503 Slow Down" if fault == "slow down" else "500 Internal Server Error", [("Content-Type", "text/xml")])
        return [_SLOW_DOWN if fault == "slow down" else b""]
