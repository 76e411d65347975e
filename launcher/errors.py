"""The errors a user can meet: one root, one family for each party that has to act, and the exit codes.

Every error says what happened, where (the key, the option, the object), and what to type next. It survives
the trip from a worker to the run directory and back as a plain record. Nothing here prints.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from enum import IntEnum
from typing import Any, ClassVar


class Exit(IntEnum):
    """Exit codes of `launch`; 100 and up are about the run, not about the command."""

    DONE = 0
    BUG = 1
    USAGE = 2
    FAILED = 100
    NOT_FINISHED = 101
    NOT_FOUND = 102
    CANCELLED = 103
    NEVER_STARTED = 104
    INTERRUPTED = 130


class LaunchError(Exception):
    """Root of all errors that are told to the user.

    Args:
        what: what happened, one sentence without a full stop.
        where: the key, option, object or file it happened at.
        hint: what to type or do next.
    """

    family: ClassVar[str] = "bug"
    exit_code: ClassVar[Exit] = Exit.BUG

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(what, where, hint)
        self.what = what
        self.where = where
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.what, self.where, self.hint)

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.what) if part)

    def to_record(self) -> dict[str, str]:
        """The error as JSON-able text; `from_record` is its inverse."""
        return {
            "kind": type(self).__name__,
            "family": self.family,
            "what": self.what,
            "where": self.where,
            "hint": self.hint,
        }


def _rebuild(kind: type[LaunchError], what: str, where: str, hint: str) -> LaunchError:
    return kind(what, where=where, hint=hint)


class UserError(LaunchError):
    """The command or the spec is wrong; nothing was started."""

    family = "user"
    exit_code = Exit.USAGE


class NotFoundError(LaunchError):
    """There is no run, or no pool, of that name."""

    family = "user"
    exit_code = Exit.NOT_FOUND


class NotFinishedError(LaunchError):
    """The run is still going, and what was asked needs its end."""

    family = "user"
    exit_code = Exit.NOT_FINISHED


class DataError(LaunchError):
    """The images, the labels or where they lie are wrong; a retry would fail alike."""

    family = "data"
    exit_code = Exit.FAILED


class BadImagesError(DataError):
    """More images cannot be read than the spec allows."""


class NonFiniteLossError(DataError):
    """The loss or the gradient became NaN or infinite; all ranks stopped before the step."""


class SiteError(LaunchError):
    """Credentials, bucket, disk, memory or network of the site refuse; somebody has to change them."""

    family = "site"
    exit_code = Exit.FAILED


class NeverStartedError(SiteError):
    """The site gave the run no place to start within the time it may wait."""

    exit_code = Exit.NEVER_STARTED


class InfrastructureError(LaunchError):
    """A process, node or connection was lost. The run is retried from its last checkpoint."""

    family = "infrastructure"
    exit_code = Exit.FAILED


class FencedError(LaunchError):
    """Another attempt of the run has taken over; this one must end without another word."""

    family = "infrastructure"
    exit_code = Exit.NOT_FINISHED


class BugError(LaunchError):
    """Something in raylaunch broke; the log has the traceback."""


_KINDS = {
    kind.__name__: kind
    for kind in (
        LaunchError, UserError, NotFoundError, NotFinishedError, DataError, BadImagesError, NonFiniteLossError,
        SiteError, NeverStartedError, InfrastructureError,
        FencedError, BugError,
    )
}  # fmt: skip


def from_record(record: dict[str, str]) -> LaunchError:
    """The error that `LaunchError.to_record` wrote; an unknown kind becomes a `BugError`."""
    kind = _KINDS.get(record.get("kind", ""), BugError)
    return kind(record.get("what", "unknown error"), where=record.get("where", ""), hint=record.get("hint", ""))


_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, marks that change the direction of writing, and halves of characters."""


def closest(word: str, known: Iterable[str]) -> str:
    """The known word nearest to `word`, or an empty string if none is near."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), "")


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean X?` for the known word nearest to `word`, or an empty string."""
    close = closest(word, known)
    return f"did you mean {close}?" if close else ""


def printable(text: str) -> str:
    """The text with what would steer a terminal spelled out: names of files and classes may hold any character."""
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], text)
