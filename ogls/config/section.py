"""The base class of all configuration sections, and the function that declares a setting.

A setting is of one kind:

- *identity* settings decide what is computed. A run keeps their values; with other values it is another run.
- *numerics* settings change rounding, memory and speed. They may change between two stages of a run. No fingerprint
  contains them, and every manifest records the values that its stage was carried out with.
- *operational* settings control how a run is executed or monitored. They may change whenever a run is resumed, and no
  fingerprint contains them.

*Later* settings were added after the first release. At its default, a later setting is left out of fingerprints, so
that runs started before it existed keep their fingerprints.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

Kind = Literal["identity", "numerics", "operational"]
FUNCTION = r"^([A-Za-z_][\w.]*:[A-Za-z_]\w*)?$"  # pattern of a setting that names a user's function, or is empty


def setting(
    default: Any,
    description: str,
    *,
    operational: bool = False,
    numerics: bool = False,
    later: bool = False,
    **bounds: Any,
) -> Any:
    """Return a pydantic field with a description; `bounds` are passed on to pydantic (`ge`, `gt`, `le`, `pattern`).

    Without `operational` and `numerics`, the setting is part of the run's identity.
    """
    kind: Kind = "operational" if operational else "numerics" if numerics else "identity"
    extra: dict[str, Any] = {"kind": kind, "later": later}
    return Field(default, description=description, json_schema_extra=extra, **bounds)


def kind_of(field: FieldInfo) -> Kind:
    """Return the kind of a setting; a field that `setting` did not declare is part of the identity."""
    extra = field.json_schema_extra
    kind: Any = extra.get("kind", "identity") if isinstance(extra, dict) else "identity"
    return kind  # type: ignore[no-any-return]


def check_pattern(name: str, pattern: str) -> None:
    """Raise ValueError unless the regular expression of a setting is valid and has at most one group."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"{name} is not a valid regular expression: {error}") from None
    if groups > 1:
        raise ValueError(f"{name} has {groups} groups; mark one with (...), others with (?:...)")


class Section(BaseModel):
    """An immutable section of the configuration that rejects unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
