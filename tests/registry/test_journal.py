"""The journal follows LMDB's events through crashes, and never forgets what LMDB lacks."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.errors import ConflictError
from mlpd.registry.journal import Journal
from mlpd.registry.records import Cause, Event, EventKind


def event(sequence: int, why: str = "") -> Event:
    return Event(
        sequence=sequence,
        time_us=1_000_000 + sequence,
        kind=EventKind.PROTECTION,
        model="clf",
        cause=Cause("tester", why),
        body={"alias": "champion", "protected": bool(sequence % 2)},
    )


EVENTS = [event(n) for n in range(1, 7)]
BYTES = [e.encode() for e in EVENTS]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def written(path: Path, count: int = 6) -> bytes:
    Journal(path).follow(BYTES[:count])
    return path.read_bytes()


def test_events_come_back_in_order(path: Path) -> None:
    journal = Journal(path)
    journal.follow(BYTES[:2])
    journal.follow([])
    journal.follow(BYTES[2:])
    assert list(journal.read()) == EVENTS
    assert journal.sequence == 6


def test_no_file_is_no_events(path: Path) -> None:
    assert list(Journal(path).read()) == []
    Journal(path).follow([])
    assert not path.exists()


def test_following_again_writes_nothing(path: Path) -> None:
    written(path)
    before = path.stat()
    Journal(path).follow(BYTES)
    after = path.stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)


def test_a_journal_cut_anywhere_is_completed(path: Path) -> None:
    whole = written(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        Journal(path).follow(BYTES)
        assert path.read_bytes() == whole


@given(st.integers(0, 5), st.binary(min_size=1, max_size=40))
def test_a_damaged_line_is_written_anew(
    tmp_path_factory: pytest.TempPathFactory, line: int, noise: bytes
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal"
    whole = written(path)
    lines = whole.splitlines(keepends=True)
    lines[line] = noise + lines[line]
    path.write_bytes(b"".join(lines))
    Journal(path).follow(BYTES)
    assert path.read_bytes() == whole


def test_events_that_lmdb_lacks_are_never_cut_off(path: Path) -> None:
    whole = written(path)
    for count in range(6):
        with pytest.raises(ConflictError) as caught:
            Journal(path).follow(BYTES[:count])
        assert caught.value.code == "registry_behind_journal"
    assert path.read_bytes() == whole


def test_another_registrys_events_are_refused(path: Path) -> None:
    whole = written(path)
    other = [event(n, "another").encode() for n in range(1, 9)]
    with pytest.raises(ConflictError) as caught:
        Journal(path).follow(other)
    assert caught.value.code == "registry_behind_journal"
    assert path.read_bytes() == whole


def test_reading_stops_at_a_torn_line_and_refuses_a_damaged_one(path: Path) -> None:
    whole = written(path)
    path.write_bytes(whole[:-3])
    assert list(Journal(path).read()) == EVENTS[:5]
    path.write_bytes(whole.replace(b'"tester"', b'"Tester"', 1))
    with pytest.raises(ConflictError) as caught:
        list(Journal(path).read())
    assert caught.value.code == "journal_damaged"
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2] + lines[3:]))
    with pytest.raises(ConflictError):
        list(Journal(path).read())


def test_a_line_is_as_documented(path: Path) -> None:
    line = written(path, 1)
    assert line == (
        b'ff2111b7 {"body":{"alias":"champion","protected":true},"cause":{"by":"tester",'
        b'"force":false,"report":null,"why":""},"kind":"protection","model":"clf","sequence":1,'
        b'"time_us":1000001}\n'
    )
