"""What the sections of a spec have in common: strictness, fields that carry their meaning and their reason, and the
words for what is wrong with a value."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

_PAIR = "should be two numbers, as in [0.5, 1.0]"
_WORDS = {
    "bool_type": "should be true or false",
    "missing": _PAIR,
    "too_long": _PAIR,
    "tuple_type": "should be a list, as in [a, b]",
    "dict_type": "should be `key: value` lines",
    "model_type": "should be a domain, as in {loguniform: [0.001, 0.1]} or [a, b]",
    "string_pattern_mismatch": "should be a letter, then up to 39 of a-z, 0-9 and -, the last not a -",
}
"""What pydantic calls a mistake -> what we call it, where our words are clearer."""

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Frozen, strictly typed, and without room for a key that nobody knows."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def field(default: Any, what: str, why: str, **limits: Any) -> Any:
    """A field with its meaning (`description`) and the reason for its default (`why`)."""
    return Field(default, description=what, json_schema_extra={"why": why}, **limits)


def complaint(error: Any) -> str:
    """What is wrong with a value, from one of pydantic's errors: `should be greater than 0`."""
    words = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return _WORDS.get(error["type"], words)
