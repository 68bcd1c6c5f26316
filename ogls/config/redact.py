"""Removing credentials from text that is logged or stored."""

from __future__ import annotations

import re


def redact_credentials(text: str) -> str:
    """Return the text without the user names, passwords and query strings of the URLs in it."""
    return re.sub(r"(://[^\s?\"']*)\?[^\s\"']*", r"\1", re.sub(r"://[^/@\s\"']*@", "://", text))
