"""Journal: every event of the registry as one line of text, so that LMDB can be rebuilt from it.

A line is `crc32 event LF`: 8 hex digits of zlib.crc32 over the event's bytes, a space, the event's
canonical JSON.  The journal follows LMDB: it is appended after the commit, and what a crash kept
from it, or tore, is written by the next `follow`.  It never forgets an event that LMDB lacks.
"""

import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from mlpd.core.errors import ConflictError
from mlpd.registry.records import Event
from mlpd.storage.files import fsync_dir


class Journal:
    """The journal file at `path`; blocking.  `follow` needs the layout's lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sequence = 0
        """Newest event that is known to stand in the file as it does in LMDB."""
        self._offset = 0

    def read(self) -> Iterator[Event]:
        """Yield all events in order; a torn last line ends them.

        A line that is damaged or out of order raises ConflictError(code="journal_damaged").
        """
        for number, line in enumerate(_whole_lines(self._read_from(0)), 1):
            event = _parse_line(line)
            if event is None or event.sequence != number:
                raise ConflictError(
                    f"the registry's journal {self.path} is damaged in line {number}",
                    code="journal_damaged",
                    hint="Restore it from a backup; where LMDB is whole, move it away and the "
                    "next start writes it anew.",
                )
            yield event

    def follow(self, events: Iterable[bytes]) -> None:
        """Make the file hold LMDB's `events`, all those after `self.sequence`, durably.

        Lines that are there already are compared, damaged ones replaced.  An event that LMDB
        lacks raises ConflictError(code="registry_behind_journal"), and nothing is written.
        """
        written = self._read_from(self._offset)
        lines = [_format_line(event) for event in events]
        position, missing = _compare(written, lines)
        rest = written[position:]
        if rest:
            self._require_known(rest, missing)
        if rest or missing:
            self._replace(self._offset + position, b"".join(missing))
        self.sequence += len(lines)
        self._offset += sum(map(len, lines))

    def _read_from(self, offset: int) -> bytes:
        if not self.path.exists():
            return b""
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read()

    def _replace(self, offset: int, data: bytes) -> None:
        created = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "r+b") as file:
            file.truncate(offset)
            file.seek(offset)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        if created:
            fsync_dir(self.path.parent)

    def _require_known(self, rest: bytes, missing: list[bytes]) -> None:
        expected = set(missing)
        for line in _whole_lines(rest):
            event = _parse_line(line)
            if event is not None and line not in expected:
                raise ConflictError(
                    f"event {event.sequence} in {self.path} is not in LMDB: its records are older "
                    "than the journal or belong to another registry",
                    code="registry_behind_journal",
                    hint="Restore the lmdb directory that belongs to this registry, or bring its "
                    "records up to date: mlpd fsck --repair.",
                )


def _compare(written: bytes, lines: list[bytes]) -> tuple[int, list[bytes]]:
    """Return how many bytes of `written` are as they should be, and the lines to come."""
    position = 0
    for index, line in enumerate(lines):
        if not written.startswith(line, position):
            return position, lines[index:]
        position += len(line)
    return position, []


def _whole_lines(data: bytes) -> Iterator[bytes]:
    return (line + b"\n" for line in data.split(b"\n")[:-1])


def _format_line(event: bytes) -> bytes:
    return b"%08x %b\n" % (zlib.crc32(event), event)


def _parse_line(line: bytes) -> Event | None:
    checksum, _, event = line.rstrip(b"\n").partition(b" ")
    return Event.decode(event) if checksum == b"%08x" % zlib.crc32(event) else None
