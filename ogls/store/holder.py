"""Who holds a run: what a lock or a claim says about its process, written and read in one place."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any


def holder_info(purpose: str) -> dict[str, Any]:
    """What is recorded about this process: `pid`, `host`, `purpose` and `since`."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "purpose": purpose,
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def parse_holder(raw: bytes) -> dict[str, Any]:
    """The recorded JSON object; empty if it cannot be read."""
    try:
        info = json.loads(raw)
    except ValueError:
        return {}
    return info if isinstance(info, dict) else {}


def describe_holder(raw: bytes) -> str:
    """One line for people: the process, its host, its purpose and since when it holds the run."""
    info = parse_holder(raw)
    try:
        return f"process {info['pid']} on {info['host']} ({info['purpose']}, since {info['since']})"
    except KeyError:
        return "another process"
