"""The map store: the shard map that a daemon goes by, and its own name; compare-and-set by epoch.

Embedded, it is a file in the data directory.  docs/formats/shard_map.md has its bytes.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mlpd.core.errors import ConflictError, InternalError, MlpdError, StorageFullError
from mlpd.core.hashing import canonical_json
from mlpd.core.names import check_name
from mlpd.core.shards import ShardMap, check_successor, decode_map
from mlpd.storage.files import atomic_write

MAP_FILE = "cluster.json"


@dataclass(frozen=True, slots=True)
class Member:
    """A shard's own name and the map that it goes by, which has it."""

    shard: str
    shard_map: ShardMap

    def __post_init__(self) -> None:
        self.shard_map.index(self.shard)

    @property
    def flags(self) -> bytes:
        """Per slot 1 if the shard owns it, else 0."""
        return self.shard_map.flags(self.shard)

    def encode(self) -> bytes:
        """Return the bytes of the file."""
        return canonical_json({"shard": self.shard, "map": self.shard_map.to_dict()})


class MapStore(Protocol):
    """Keeps a member's map; `store` is atomic and durable, whoever else stores at once."""

    def load(self) -> Member | None:
        """Return what is stored, None if nothing ever was."""
        ...

    def store(self, member: Member, expected_epoch: int) -> None:
        """Store `member` if the stored epoch is `expected_epoch`, 0 for nothing; blocks.

        Raises ConflictError: `epoch_moved`, `other_shard`, and what `check_successor` raises.
        """
        ...


class FileMapStore:
    """The map in a file of the data directory `root`."""

    def __init__(self, root: Path) -> None:
        self._path = root / MAP_FILE
        self._lock = root / "cluster.lock"
        self._last: tuple[bytes, Member] | None = None
        """What the file held, to be decoded once; others may write it as well."""

    def load(self) -> Member | None:
        """Return what is stored; raises InternalError(code="damaged_map")."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None
        if self._last is not None and self._last[0] == data:
            return self._last[1]
        try:
            fields = json.loads(data)
            member = Member(check_name(fields["shard"], "shard"), decode_map(fields["map"]))
        except (ValueError, KeyError, TypeError, MlpdError) as error:
            raise InternalError(
                f"{self._path} is damaged: {error}",
                code="damaged_map",
                hint="Copy the map of another member, with this shard's name; without the file the "
                "daemon would answer for keys that are not its own.",
            ) from None
        self._last = data, member
        return member

    def store(self, member: Member, expected_epoch: int) -> None:
        """As `MapStore.store`; after a crash the file holds all of the old or all of the new."""
        try:
            with self._locked():
                check_next(self.load(), member, expected_epoch)
                encoded = member.encode()
                atomic_write(self._path, encoded)
                self._last = encoded, member
        except OSError as error:
            raise StorageFullError(
                f"the map can't be stored: {error.strerror or error}",
                hint="Free some space in the data directory; the old map goes on.",
            ) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def check_next(current: Member | None, new: Member, expected_epoch: int) -> None:
    """Raise what `MapStore.store` would, where `current` is stored."""
    found = 0 if current is None else current.shard_map.epoch
    if current is not None and new.shard != current.shard:
        raise ConflictError(
            f"this data directory belongs to shard {current.shard}, not {new.shard}",
            code="other_shard",
            hint="Each shard keeps its data directory; mlpd shard status shows who is where.",
            details={"shard": current.shard},
        )
    if current is not None:
        check_successor(current.shard_map, new.shard_map)
    if found != expected_epoch:
        raise ConflictError(
            f"the map is of epoch {found}, not {expected_epoch}",
            code="epoch_moved",
            hint="Fetch the newest map and make the change again.",
            details={"epoch": found},
        )
