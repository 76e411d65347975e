"""What the sections of a spec have in common: strictness, and fields that carry their meaning and their reason."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Frozen, strictly typed, and without room for a key that nobody knows."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def field(default: Any, what: str, why: str, **limits: Any) -> Any:
    """A field with its meaning (`description`) and the reason for its default (`why`)."""
    return Field(default, description=what, json_schema_extra={"why": why}, **limits)
