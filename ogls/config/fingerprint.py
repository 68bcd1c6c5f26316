"""Fingerprints of configuration parts, and the differences between two configurations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from ogls.config.run import RunConfig


def canonical_json(*parts: Any) -> str:
    """Return deterministic JSON of configuration parts, without the settings that affect no result."""
    return json.dumps([_identity(p) for p in parts], sort_keys=True, separators=(",", ":"))


def fingerprint(*parts: Any) -> str:
    """Return the first 32 hex digits of the SHA-256 of the parts' canonical JSON.

    Parts are sections, strings, numbers, mappings, lists and tuples.
    """
    return hashlib.sha256(canonical_json(*parts).encode()).hexdigest()[:32]


def _identity(value: Any) -> Any:
    """Convert a part to JSON types, without the fields that affect no result."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {
            name: _identity(getattr(value, name)) for name in fields if _is_identity(fields[name], getattr(value, name))
        }
    if isinstance(value, Mapping):
        return {str(k): _identity(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_identity(v) for v in value]
    return value


def _is_identity(field: Any, value: Any) -> bool:
    """Whether a field affects results and so belongs in the fingerprint (see `ogls.config.section`)."""
    extra = field.json_schema_extra or {}
    return not (extra.get("operational") or (extra.get("later") and value == field.default))


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `(dotted key, leaf)` pairs of a nested mapping."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def differences(old: Mapping[str, Any], new: RunConfig) -> list[str]:
    """Return a line `key: old -> new` for each result-affecting setting that differs.

    `old` is a configuration's canonical form, as `canonical_json` writes it.
    """
    before, after = dict(flatten(old)), dict(flatten(_identity(new)))
    keys = [k for k in {**before, **after} if before.get(k) != after.get(k)]
    return [f"{k}: {before.get(k, '(not set)')!r} -> {after.get(k, '(not set)')!r}" for k in keys]
