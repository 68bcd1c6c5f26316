"""Removing credentials from text that is logged or stored."""

from __future__ import annotations

import re


def redact_credentials(text: str) -> str:
    """The text with user names, passwords and query strings taken out of the addresses in it."""
    return re.sub(r"(://[^\s?\"']*)\?[^\s\"']*", r"\1", re.sub(r"://[^/@\s\"']*@", "://", text))
