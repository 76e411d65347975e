"""Errors survive every trip, and exit codes are what the design says."""

from __future__ import annotations

import json
import pickle

import pytest

from launcher import errors
from launcher.errors import BugError, Exit, LaunchError, closest, from_record, nearest, printable

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LaunchError)]


def test_exit_codes_are_those_of_the_design() -> None:
    assert {code.name: code.value for code in Exit} == {
        "DONE": 0, "BUG": 1, "USAGE": 2, "FAILED": 100, "NOT_FINISHED": 101, "NOT_FOUND": 102, "CANCELLED": 103,
        "NEVER_STARTED": 104, "INTERRUPTED": 130,
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_json_and_pickle(kind: type[LaunchError]) -> None:
    error = kind("it broke", where="here", hint="mend it")
    record = json.loads(json.dumps(error.to_record()))
    for copy in (from_record(record), pickle.loads(pickle.dumps(error))):
        assert type(copy) is kind
        assert (copy.what, copy.where, copy.hint) == ("it broke", "here", "mend it")
        assert (copy.family, copy.exit_code) == (error.family, error.exit_code)
    assert str(error) == "here: it broke"


@pytest.mark.parametrize("record", [{}, {"kind": "FutureError", "what": "new"}, {"kind": "KeyError"}])
def test_an_unknown_record_is_a_bug(record: dict[str, str]) -> None:
    error = from_record(record)
    assert type(error) is BugError
    assert error.exit_code is Exit.BUG


def test_each_family_says_who_acts() -> None:
    assert {kind.family for kind in KINDS} == {"user", "data", "site", "infrastructure", "bug"}
    assert all(kind.exit_code is not Exit.DONE for kind in KINDS)


def test_the_nearest_word_is_offered_only_if_it_is_near() -> None:
    assert closest("epoch", ["epochs", "seed"]) == "epochs"
    assert nearest("epoch", ["epochs", "seed"]) == "did you mean epochs?"
    assert nearest("zzz", ["epochs", "seed"]) == ""
    assert nearest("zzz", iter(())) == ""


def test_what_steers_a_terminal_is_spelled_out() -> None:
    assert printable("\x1b[31mred\x07\u202e\ud800") == r"\x1b[31mred\x07\u202e\ud800"
    assert printable("two\nlines, a\ttab, Blüten 花 👩‍🌾") == "two\nlines, a\ttab, Blüten 花 👩‍🌾"
