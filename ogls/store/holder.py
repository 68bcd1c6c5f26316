"""The record of the process that holds a run, in a lock file or in the claim of a lease."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any


def holder_info(purpose: str) -> dict[str, Any]:
    """The record of this process: `pid`, `host`, `purpose` and `since` (local time)."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "purpose": purpose,
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def parse_object(raw: bytes) -> dict[str, Any]:
    """The parsed JSON object; an empty dict if it is not one."""
    try:
        value = json.loads(raw)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def describe_holder(raw: bytes) -> str:
    """Format a record as one line: process id, host, purpose and start time."""
    info = parse_object(raw)
    try:
        return f"process {info['pid']} on {info['host']} ({info['purpose']}, since {info['since']})"
    except KeyError:
        return "another process"
