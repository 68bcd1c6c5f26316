"""From a TOML file and `--set section.key=value` to a RunConfig, with errors a person can act on."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ogls.config import RunConfig
from ogls.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file, apply overrides (`train.epochs=2`, values in TOML's spelling), validate.

    A file may begin from another, named relative to it: `extends = "tiny.toml"`; tables are merged, anything
    else is replaced. Raises ConfigError naming the file, each key at fault, and for an unknown key the nearest
    known one.
    """
    return build_config(_read(Path(path), ()), overrides, origin=str(path))


def _read(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            data = tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {path}; the shipped ones are in deployments/runs/") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    base = data.pop("extends", None)
    if base is None:
        return data
    if path.resolve() in readers:
        raise ConfigError(f"{path}: extends itself, by way of {', '.join(p.name for p in readers)}")
    return _merged(_read(path.parent / str(base), (*readers, path.resolve())), data)


def _merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {k: _merged(base[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **over, **both}


def build_config(data: Mapping[str, Any], overrides: Sequence[str] = (), origin: str = "configuration") -> RunConfig:
    """Validate a mapping as `load_config` does."""
    merged = json.loads(json.dumps(data, default=str))
    for override in overrides:
        _apply(merged, override)
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        lines = [without_secrets(_explain(e)) for e in error.errors()]
        count = f" ({len(lines)} errors)" if len(lines) > 1 else ""
        raise ConfigError(f"{origin}{count}: " + "\n  ".join(lines)) from None


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, raw = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override!r}: write section.key=value")
    try:
        value = tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw  # a bare word stands for itself
    node = data
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override!r}: {part} is a value, not a section")
    node[parts[-1]] = value


def _explain(error: Any) -> str:
    where = ".".join(str(p) for p in error["loc"])
    if error["type"] != "extra_forbidden":
        got = "" if isinstance(error["input"], dict | BaseModel) else f" (got {error['input']!r})"
        message = error["msg"].removeprefix("Value error, ")
        return f"{where}: {message}{got}" if where else message
    known = _fields_at(error["loc"][:-1])
    near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
    return f"{where}: unknown key; {hint}"


def _fields_at(location: Sequence[str | int]) -> list[str]:
    """Names of the fields of the section at `location` (list indices are passed over)."""
    schema = RunConfig.model_json_schema()
    node: Any = schema
    for part in location:
        node = node.get("items", node) if isinstance(part, int) else node.get("properties", {}).get(part, {})
        refs = [node.get("$ref"), *(o.get("$ref") for o in node.get("anyOf", []) + node.get("allOf", []))]
        ref = next((r for r in refs if r), None)
        node = schema["$defs"][ref.rsplit("/", 1)[1]] if ref else node
    return list(node.get("properties", {}))


def canonical(*parts: Any) -> str:
    """Deterministic JSON of configuration parts, without what decides no result."""
    return json.dumps([_plain(p) for p in parts], sort_keys=True, separators=(",", ":"))


def fingerprint(*parts: Any) -> str:
    """32 hex digits that name the parts (sections, strings, numbers, mappings) and nothing else."""
    return hashlib.sha256(canonical(*parts).encode()).hexdigest()[:32]


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {name: _plain(getattr(value, name)) for name in fields if _decides(fields[name], getattr(value, name))}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _decides(field: Any, value: Any) -> bool:
    """Whether a field is part of what decides results (see `section`)."""
    extra = field.json_schema_extra or {}
    return not (extra.get("operational") or (extra.get("later") and value == field.default))


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`(dotted key, leaf)` pairs of a nested mapping."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def differences(old: Mapping[str, Any], new: RunConfig) -> list[str]:
    """Lines `key: old -> new` for all that decides results and differs from a stored `canonical` form."""
    before, after = dict(flatten(old)), dict(flatten(_plain(new)))
    keys = [k for k in {**before, **after} if before.get(k) != after.get(k)]
    return [f"{k}: {before.get(k, '(not set)')!r} -> {after.get(k, '(not set)')!r}" for k in keys]


def without_secrets(text: str) -> str:
    """The text with user names, passwords and query strings taken out of the addresses in it."""
    return re.sub(r"(://[^\s?\"']*)\?[^\s\"']*", r"\1", re.sub(r"://[^/@\s\"']*@", "://", text))


def to_toml(config: RunConfig) -> str:
    """The resolved configuration as TOML, which `load_config` reads back to the same values."""
    return "\n".join(_toml_lines(config.model_dump(mode="json"), ())) + "\n"


def _toml_lines(node: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    tables = {k: v for k, v in node.items() if isinstance(v, dict)}
    arrays = {k: v for k, v in node.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
    for key, value in node.items():
        if key not in tables and key not in arrays and value is not None:
            yield f"{key} = {json.dumps(value, ensure_ascii=False)}"
    for key, value in tables.items():
        yield f"\n[{'.'.join((*path, key))}]"
        yield from _toml_lines(value, (*path, key))
    for key, items in arrays.items():
        for item in items:
            yield f"\n[[{'.'.join((*path, key))}]]"
            yield from _toml_lines(item, (*path, key))
