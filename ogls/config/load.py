"""Loading a RunConfig from a TOML file and `--set section.key=value` overrides, with errors that say what to change."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ogls.config.redact import redact_credentials
from ogls.config.run import RunConfig
from ogls.config.section import FUNCTION
from ogls.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file, apply overrides (`train.epochs=2`, values in TOML syntax) and return the validated RunConfig.

    A file may extend another one, with a path relative to its own: `extends = "tiny.toml"`. Tables are merged; other
    values are replaced. The model and the problems that a file in a project's `deployments` folder names are looked up
    in the working folder, then in that project. Raises ConfigError with the file, each invalid key and, for an unknown
    key, the closest known one.
    """
    data = _read(Path(path), ())
    folder = Path(path).resolve()
    if project := next((f.parent for f in folder.parents if f.name == "deployments"), None):
        data = _find_in_project(data, project)
    return build_config(data, overrides, origin=str(path))


def _read(path: Path, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    """Read a TOML file and merge it into the file that it extends. `extended_by` are the files that led to this one."""
    try:
        with open(path, "rb") as file:
            data = tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(
            f"no configuration file {path}; `ogls train tiny` takes a shipped one, and `ogls init` writes them all"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    base = data.pop("extends", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends is the path of another configuration file, not {base!r}")
    if path.resolve() in extended_by:
        chain = " -> ".join(p.name for p in (*extended_by, path))
        raise ConfigError(f"{path}: circular extends: {chain}")
    return _merge(_read(path.parent / base, (*extended_by, path.resolve())), data)


def _find_in_project(data: dict[str, Any], project: Path) -> dict[str, Any]:
    """Make relative paths absolute whose files are in `project` and not in the working folder."""

    def find(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: find(k, v) for k, v in value.items()}
        if isinstance(value, list):
            return [find(key, v) for v in value]
        if key in ("path", "source") and value and not Path(value).exists() and (project / value).exists():
            return str(project / value)
        return value

    return {key: find(key, value) for key, value in data.items()}


def _merge(base: dict[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `update`; tables in both are merged recursively."""
    tables = {k: _merge(base[k], v) for k, v in update.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **update, **tables}


def build_config(data: Mapping[str, Any], overrides: Sequence[str] = (), origin: str = "configuration") -> RunConfig:
    """Apply overrides to a mapping and return the validated RunConfig.

    `origin` names the source in errors. Raises ConfigError as `load_config` does.
    """
    merged = json.loads(json.dumps(data, default=str))
    for override in overrides:
        _apply(merged, override)
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        errors = error.errors()
        inner = {e["loc"][:i] for e in errors for i in range(len(e["loc"]))}
        # An invalid entry of a list also makes the list too short.
        lines = [redact_credentials(_explain(e)) for e in errors if e["type"] != "too_short" or e["loc"] not in inner]
        count = f" ({len(lines)} errors)" if len(lines) > 1 else ""
        raise ConfigError(f"{origin}{count}: " + "\n  ".join(lines)) from None


def _apply(data: dict[str, Any], override: str) -> None:
    """Set the key of a `section.key=value` override in `data`. Raises ConfigError if the override is malformed."""
    key, equals, raw = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override!r}: write section.key=value")
    try:
        value = tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw  # accept strings without quotes
    node: Any = data
    for part in parts[:-1]:
        node = node[_index(node, part, override)] if isinstance(node, list) else node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise ConfigError(f"--set {override!r}: {part} is a value, not a section")
    node[_index(node, parts[-1], override) if isinstance(node, list) else parts[-1]] = value


def _index(node: list[Any], part: str, override: str) -> int:
    """The index of an entry of an array, such as 0 in `evaluate.benchmarks.0.limit=50`."""
    if not part.isdecimal() or int(part) >= len(node):
        known = f"0 to {len(node) - 1}" if node else "none, because the array is empty"
        raise ConfigError(f"--set {override!r}: {part} is no entry of the array; entries: {known}")
    return int(part)


def _explain(error: Any) -> str:
    """Return a line `key: message` for one pydantic error."""
    location = error["loc"]
    if location[:2] == ("teacher", "pools"):  # after the index comes the form of the entry: a name, or a table
        location = (*location[:3], *location[4:])
    key = ".".join(str(p) for p in location)
    if error["type"] != "extra_forbidden":
        got = "" if isinstance(error["input"], dict | BaseModel) else f" (got {error['input']!r})"
        message = error["msg"].removeprefix("Value error, ")
        if error.get("ctx", {}).get("pattern") == FUNCTION:
            built_in = "; those built in are values of train.divergence" if key == "train.loss" else ""
            message = f"a function of your own is written module:function{built_in}"
        return f"{key}: {message}{got}" if key else message
    known = _fields_at(location[:-1])
    near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
    return f"{key}: unknown key; {hint}"


def _fields_at(location: Sequence[str | int]) -> list[str]:
    """Return the field names of the section at `location`; list indices in it are skipped."""
    schema = RunConfig.model_json_schema()
    node: Any = schema
    for part in location:
        node = node.get("items", node) if isinstance(part, int) else node.get("properties", {}).get(part, {})
        refs = [node.get("$ref"), *(o.get("$ref") for form in ("anyOf", "allOf", "oneOf") for o in node.get(form, []))]
        ref = next((r for r in refs if r), None)
        node = schema["$defs"][ref.rsplit("/", 1)[1]] if ref else node
    return list(node.get("properties", {}))


def to_toml(config: RunConfig) -> str:
    """Return the resolved configuration as TOML. `load_config` reads it back to the same values."""
    import tomli_w

    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
