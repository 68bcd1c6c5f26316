"""Fingerprints of configuration parts, and the differences between two configurations.

Only identity settings (see `ogls.config.section`) are in a fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from ogls.config.run import RunConfig
from ogls.config.section import Kind, Section, kind_of


def canonical_json(*parts: Any) -> str:
    """Return deterministic JSON of configuration parts, with their identity settings only."""
    return json.dumps([_identity(p) for p in parts], sort_keys=True, separators=(",", ":"))


def fingerprint(*parts: Any) -> str:
    """Return the first 32 hex digits of the SHA-256 of the parts' canonical JSON.

    Parts are sections, strings, numbers, mappings, lists and tuples.
    """
    return hashlib.sha256(canonical_json(*parts).encode()).hexdigest()[:32]


def _identity(value: Any) -> Any:
    """Convert a part to JSON types, without the fields that do not identify a run."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        declared = {
            name: _identity(getattr(value, name))
            for name, field in fields.items()
            if kind_of(field) == "identity" and not _is_later_default(field, getattr(value, name))
        }
        return {**declared, **(value.__pydantic_extra__ or {})}
    if isinstance(value, Mapping):
        return {str(k): _identity(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_identity(v) for v in value]
    return value


def _is_later_default(field: Any, value: Any) -> bool:
    """Whether a field was added after the first release and has its default value."""
    return bool((field.json_schema_extra or {}).get("later") and value == field.default)


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `(dotted key, leaf)` pairs of a nested mapping."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def numerics(config: RunConfig) -> dict[str, Any]:
    """Return all numerics settings of a configuration by dotted key."""
    kinds = dict(_kinds(type(config)))
    return {k: v for k, v in flatten(config.model_dump(mode="json")) if kinds.get(k) == "numerics"}


def _kinds(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Kind]]:
    """Yield `(dotted key, kind)` of each setting of a section and of the sections in it."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _kinds(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind_of(field)


def differences(old: Mapping[str, Any], new: RunConfig) -> list[str]:
    """Return a line `key: old -> new` for each identity setting that differs.

    `old` is a configuration's canonical form, as `canonical_json` writes it. Keys of it that identified a run in an
    older release, and do not any more, are ignored.
    """
    kinds = dict(_kinds(type(new)))
    before = {k: v for k, v in flatten(old) if kinds.get(k, "identity") == "identity"}
    after = dict(flatten(_identity(new)))
    keys = [k for k in {**before, **after} if before.get(k) != after.get(k)]
    return [f"{k}: {before.get(k, '(not set)')!r} -> {after.get(k, '(not set)')!r}" for k in keys]
