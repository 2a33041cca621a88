"""Segments written anew without some rows; for child processes only.

Writes files and returns manifests; what they replace stays until the daemon has stored them
(docs/formats/segments.md).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlpd.core.columns import DType
from mlpd.core.errors import StorageFullError
from mlpd.core.time import system_clock
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.frames import polars_type
from mlpd.storage.log import RecordKind
from mlpd.storage.segment_files import SegmentFiles
from mlpd.storage.segments import SEQUENCE, Manifest, Removal, Segment, load_manifests

if TYPE_CHECKING:
    import polars as pl

OnRemoved = Callable[[str, "pl.DataFrame"], None]
"""Called with the source and the rows that a new file is without."""


class Rows(Protocol):
    """Which rows go; `cause` is what the manifests give as the reason."""

    @property
    def cause(self) -> str:
        """The reason, for people."""
        ...

    def may_hold(self, segment: Segment) -> bool:
        """Tell whether a segment can have such rows."""
        ...

    def find(self, path: Path) -> "pl.DataFrame":
        """Return the sequences of such rows in a file, as its one column."""
        ...


@dataclass(frozen=True, slots=True)
class Doomed:
    """Which rows go: those of EVENTS up to `through` that have one of `keys` in `columns`.

    `cause` is what the manifests give as the reason.
    """

    columns: Mapping[str, DType]
    keys: Sequence[tuple[Any, ...]]
    through: int
    cause: str

    def may_hold(self, segment: Segment) -> bool:
        """Tell whether a segment can have such rows."""
        types = {name: segment.columns.get(name) for name in self.columns}
        is_early = segment.first_sequence <= self.through
        return segment.kind is RecordKind.EVENTS and is_early and types == dict(self.columns)

    def find(self, path: Path) -> "pl.DataFrame":
        """Return the sequences of such rows in a file."""
        import polars as pl  # noqa: PLC0415 - not in the daemon

        schema = {name: polars_type(dtype) for name, dtype in self.columns.items()}
        keys = pl.DataFrame(self.keys, schema=schema, orient="row")
        rows = pl.read_parquet(path, columns=[SEQUENCE, *schema], glob=False)
        rows = rows.filter(pl.col(SEQUENCE) <= self.through)
        return rows.join(keys, on=[*schema], how="semi").select(SEQUENCE)


@contextmanager
def rewriting(root: Path, *, hint: str) -> Iterator[tuple[Environment, DataDirectory]]:
    """Open a data directory, for reading, while its segments are written anew.

    Raises StorageFullError with the hint where files can't be written.
    """
    data = DataDirectory(root)
    with Environment.open(data.lmdb, clock=system_clock, readonly=True) as environment:
        try:
            yield environment, data
        except OSError as error:
            raise StorageFullError(
                f"segments could not be written anew: {error}", hint=hint
            ) from None


def rewrite_without(
    environment: Environment, directory: Path, doomed: Rows, on_removed: OnRemoved
) -> list[Manifest]:
    """Write the files that hold doomed rows anew, without; return the manifests that differ.

    When it returns, every new file and copy of a manifest is on disk under its name.  When it
    raises OSError, it has removed what it wrote.  Holds one file's rows at a time.
    """
    with environment.snapshot() as snapshot:
        manifests = load_manifests(snapshot)
    files = SegmentFiles(directory)
    try:
        rewritten = (_rewrite(files, directory, m, doomed, on_removed) for m in manifests)
        changed = [manifest for manifest in rewritten if manifest is not None]
        files.finish(*changed)
    except OSError:
        files.discard()
        raise
    return changed


def _rewrite(
    files: SegmentFiles, directory: Path, manifest: Manifest, doomed: Rows, on_removed: OnRemoved
) -> Manifest | None:
    revision = manifest.revision + 1
    segments: list[Segment] = []
    removed: list[Removal] = []
    for segment in manifest.segments:
        path = directory / segment.path
        gone = doomed.find(path) if doomed.may_hold(segment) else None
        if gone is None or not len(gone):
            segments.append(segment)
            continue
        kept, rows = _split(path, gone)
        on_removed(segment.source, rows)
        removed.append(_removal(doomed.cause, segment.source, rows))
        if len(kept):
            kind, source, columns = segment.kind, segment.source, segment.columns
            segments.append(files.write(kind, source, columns, kept, revision=revision))
    if not removed:
        return None
    both = manifest.removed + tuple(removed)
    return replace(manifest, segments=tuple(segments), removed=both, revision=revision)


def _split(path: Path, gone: "pl.DataFrame") -> "tuple[pl.DataFrame, pl.DataFrame]":
    import polars as pl  # noqa: PLC0415 - not in the daemon

    frame = pl.read_parquet(path, glob=False)
    is_gone = frame[SEQUENCE].is_in(gone[SEQUENCE].implode())
    return frame.filter(~is_gone), frame.filter(is_gone)


def _removal(cause: str, source: str, rows: "pl.DataFrame") -> Removal:
    first, last = rows[SEQUENCE].min(), rows[SEQUENCE].max()
    assert isinstance(first, int)
    assert isinstance(last, int)
    return Removal(cause, source, len(rows), first, last)
