"""The base class of all configuration sections, and the function that declares a setting.

*Operational* settings control how a run is executed or monitored, not what it computes. They may change between the
start of a run and its resumption, and no fingerprint contains them.

*Later* settings were added after the first release. At its default, a later setting is left out of fingerprints, so
that runs started before it existed keep their fingerprints.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def setting(default: Any, description: str, *, operational: bool = False, later: bool = False, **bounds: Any) -> Any:
    """Return a pydantic field with a description; `bounds` are passed on to pydantic (`ge`, `gt`, `le`, `pattern`)."""
    extra: dict[str, Any] = {"operational": operational, "later": later}
    return Field(default, description=description, json_schema_extra=extra, **bounds)


class Section(BaseModel):
    """An immutable section of the configuration that rejects unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
