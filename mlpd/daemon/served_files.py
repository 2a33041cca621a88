"""Files of the prediction log: which served rows have their vector and request in which file.

A file holds a range of SERVED, in its order.  Its row in META, under `served/` and its number, is
the switch: from then on vectors and requests of these rows are read from the file, and leave LMDB
at leisure.  Bytes and steps: docs/formats/predictions.md.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlpd.core.errors import ConflictError, InternalError
from mlpd.storage.files import fsync_dir
from mlpd.storage.tables import Table, from_u64be, u64be
from mlpd.storage.transactions import Snapshot, WriteTransaction

FORMAT = 1
TEMPORARY = "_tmp"
_PREFIX, _END = b"served/", b"served0"
_THROUGH = b"served-through"


@dataclass(frozen=True, slots=True)
class ServedFile:
    """One Parquet file.  `after` (exclusive) and `through`: keys of SERVED in hex, its range.

    `first_us`, `last_us`: arrival of its rows.  `moved`: whether LMDB is rid of their vectors.
    `revision` counts how often it was written anew.
    """

    number: int
    path: str
    """Relative to the predictions directory."""
    after: str
    through: str
    rows: int
    size_bytes: int
    digest: str
    first_us: int
    last_us: int
    moved: bool = False
    revision: int = 0

    def encode(self) -> bytes:
        """Return the JSON that `decode` reads."""
        return json.dumps({"format": FORMAT, **asdict(self)}).encode()

    @classmethod
    def decode(cls, data: bytes) -> "ServedFile":
        """Return the file; InternalError(code="served_file_corrupt") for anything else."""
        try:
            fields: dict[str, Any] = json.loads(data)
            if fields.pop("format") != FORMAT:
                raise ValueError("unknown format")  # noqa: TRY301 - one place tells what is wrong
            return cls(**fields)
        except (ValueError, KeyError, TypeError) as error:
            raise InternalError(
                f"the row of a file of predictions is damaged: {error!r}",
                code="served_file_corrupt",
                hint="Restore a backup.",
            ) from error


def load_files(reader: Snapshot | WriteTransaction) -> list[ServedFile]:
    """Return all files in their order; about 10 us each."""
    return [ServedFile.decode(value) for _, value in reader.scan(Table.META, _PREFIX, _END)]


def served_through(reader: Snapshot | WriteTransaction) -> bytes:
    """Return the last key of SERVED that files hold, empty before the first."""
    return reader.get(Table.META, _THROUGH) or b""


def next_number(reader: Snapshot | WriteTransaction) -> int:
    """Return the number of the next file."""
    last = next(iter(reader.scan(Table.META, _PREFIX, _END, reverse=True)), None)
    return 1 if last is None else from_u64be(last[0].removeprefix(_PREFIX)) + 1


def store_file(txn: WriteTransaction, file: ServedFile) -> None:
    """Make a durable file the place of its rows; ConflictError unless it goes on where they end."""
    if served_through(txn).hex() != file.after or next_number(txn) != file.number:
        raise ConflictError(
            f"the file of predictions {file.path} does not go on where the last one ends",
            code="export_overtaken",
            hint="Nothing is lost; the next run goes on.",
        )
    put_file(txn, file)
    txn.put(Table.META, _THROUGH, bytes.fromhex(file.through))


def put_file(txn: WriteTransaction, file: ServedFile) -> None:
    """Replace what is known of a file."""
    txn.put(Table.META, _PREFIX + u64be(file.number), file.encode())


def delete_files(txn: WriteTransaction, files: Iterable[ServedFile]) -> None:
    """Forget files; their rows are gone then."""
    for file in files:
        txn.delete(Table.META, _PREFIX + u64be(file.number))


def remove_paths(directory: Path, paths: Iterable[str]) -> None:
    """Remove files that nothing names any more, durably; some may be gone already."""
    for path in paths:
        (directory / path).unlink(missing_ok=True)
        if (directory / path).parent.is_dir():
            fsync_dir((directory / path).parent)


def find_unnamed(files: Iterable[ServedFile], directory: Path) -> list[Path]:
    """Return what a killed export, or a removal, has left below `directory`."""
    named = {directory / file.path for file in files}
    return sorted(p for p in directory.rglob("*") if p.is_file() and p not in named)
