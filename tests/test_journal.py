"""Journals: written while they are read, cut short by kills, and patient with a storage that fails."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator

import pytest

from launcher import journal
from launcher.errors import SiteError
from launcher.journal import Journal, Lines, open_journal
from launcher.storage import Appender, LocalStore, Store, open_store


@pytest.fixture
def store(place: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    # Nothing is to depend on how often the background thread happens to write.
    monkeypatch.setattr(journal, "REMOTE_SECONDS", 3600.0)
    return open_store(place)


def put(store: Store, data: bytes) -> None:
    out = store.append("log")
    out.write(data)
    out.close()


def test_events_are_read_as_they_come(store: Store) -> None:
    lines = Lines(store, "events.jsonl")
    assert list(lines.events()) == []
    for number in range(3):
        out = Journal(store, "events.jsonl")
        out.write("step", number=number, text="ünï\n[/]")
        out.close()
        (event,) = lines.events()
        assert (event["event"], event["number"], event["text"]) == ("step", number, "ünï\n[/]")
        assert event["time"] > 1.7e9
    assert list(lines.events()) == []
    assert [event["number"] for event in Lines(store, "events.jsonl").events()] == [0, 1, 2]


def test_a_line_is_given_only_when_it_is_whole(store: Store) -> None:
    lines, journal = Lines(store, "log"), store.append("log")
    for data, expected in ((b"one\ntw", ["one"]), (b"", []), (b"o", []), (b"\n\nfour\nfi", ["two", "", "four"])):
        journal.write(data)
        journal.flush()
        assert list(lines.new()) == expected
    journal.close()


def test_a_letter_cut_in_two_is_whole_in_the_end(store: Store) -> None:
    lines, journal = Lines(store, "log"), store.append("log")
    flower = "花\n".encode()
    for data, expected in ((flower[:2], []), (flower[2:], ["花"]), (b"\xff\xfe\n", ["\ufffd\ufffd"])):
        journal.write(data)
        journal.flush()
        assert list(lines.new()) == expected
    journal.close()


def test_an_event_torn_by_a_kill_is_skipped_and_the_next_attempt_goes_on(store: Store) -> None:
    put(store, b'{"event":"step","n":1}\n{"event":"st')
    lines = Lines(store, "log")
    assert [event["n"] for event in lines.events()] == [1]
    put(store, b'{"event":"step","n":2}\n')
    assert [event["n"] for event in lines.events()] == [2]


def test_a_journal_longer_than_a_segment_is_read_whole(store: Store) -> None:
    out = Journal(store, "events.jsonl")
    lines, seen = Lines(store, "events.jsonl"), []
    for number in range(40):
        out.write("step", now=True, number=number, filler="x" * 5000)
        seen += [event["number"] for event in lines.events()]
    out.close()
    seen += [event["number"] for event in lines.events()]
    assert seen == list(range(40))


def test_lines_wait_for_their_turn_unless_they_are_urgent(tmp_path: object) -> None:
    store = LocalStore(tmp_path)  # type: ignore[arg-type]
    lines = Lines(store, "events.jsonl")
    out = Journal(store, "events.jsonl", every=3600.0)
    out.write("first", now=True)
    out.write("waits")
    assert [event["event"] for event in lines.events()] == ["first"]
    out.write("urgent", now=True)
    assert [event["event"] for event in lines.events()] == ["waits", "urgent"]
    out.write("last")
    out.close()
    assert [event["event"] for event in lines.events()] == ["last"]


class Moody:
    """A storage that fails as long as it is told to. Only the appending side is asked for."""

    uri = "moody"

    def __init__(self, moods: Iterator[bool]) -> None:
        self.moods = moods
        self.data = b""

    def append(self, _key: str) -> Appender:
        return self

    def write(self, data: bytes, /) -> None:
        self.pending = getattr(self, "pending", b"") + data

    def flush(self) -> None:
        if not next(self.moods):
            raise SiteError("no space left on the disk", where="moody")
        self.data, self.pending = self.data + getattr(self, "pending", b""), b""

    def close(self) -> None:
        self.flush()


def test_a_storage_that_fails_costs_no_line_and_no_exception(caplog: pytest.LogCaptureFixture) -> None:
    store = Moody(itertools.chain([True, False, False, True], itertools.repeat(True)))
    out = open_journal(store, "log")  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        for line in (b"one\n", b"two\n", b"three\n", b"four\n"):
            out.write(line)
            out.flush()
    out.close()
    assert store.data == b"one\ntwo\nthree\nfour\n"
    assert len(caplog.records) == 1


def test_a_storage_that_never_recovers_ends_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    out = open_journal(Moody(itertools.repeat(False)), "log")  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        out.write(b"lost\n")
        out.close()
    assert "the end of log is lost" in caplog.text


def test_an_event_is_one_line_of_json(tmp_path: object) -> None:
    store = LocalStore(tmp_path)  # type: ignore[arg-type]
    out = Journal(store, "events.jsonl")
    out.write("a", text="two\nlines")
    out.close()
    (line,) = store.read("events.jsonl").splitlines()
    assert set(json.loads(line)) == {"time", "event", "text"}
