"""What every part of a configuration is: a frozen model with described fields that refuses unknown keys.

Fields marked *operational* say how a run is carried out or watched, not what it computes: they may change between
the start of a run and its resumption, and no fingerprint contains them. Fields marked *later* came in a later release
than the first: at their default they are in no fingerprint either, so that runs begun before are still the same runs.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def setting(default: Any, description: str, *, operational: bool = False, later: bool = False, **bounds: Any) -> Any:
    """A described field; `bounds` are pydantic's (`ge`, `gt`, `le`, `pattern`, ...)."""
    extra: dict[str, Any] = {"operational": operational, "later": later}
    return Field(default, description=description, json_schema_extra=extra, **bounds)


class Section(BaseModel):
    """A frozen part of the configuration that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
