"""From a TOML file and `--set section.key=value` to a RunConfig, with errors that say what to change."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError

from ogls.config.redact import redact_credentials
from ogls.config.run import RunConfig
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
    return _merge(_read(path.parent / str(base), (*readers, path.resolve())), data)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {k: _merge(base[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **over, **both}


def build_config(data: Mapping[str, Any], overrides: Sequence[str] = (), origin: str = "configuration") -> RunConfig:
    """Validate a mapping as `load_config` does."""
    merged = json.loads(json.dumps(data, default=str))
    for override in overrides:
        _apply(merged, override)
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        lines = [redact_credentials(_explain(e)) for e in error.errors()]
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


def to_toml(config: RunConfig) -> str:
    """The resolved configuration as TOML, which `load_config` reads back to the same values."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
