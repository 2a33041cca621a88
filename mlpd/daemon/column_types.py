"""Column types: a column keeps the type that its stored events have; history stays readable.

The log is never rewritten.  A join reads a column of all its source's events as one type, so new
definitions may not give a column another one, also if it was away for a while: by then the running
definitions have forgotten it, the events have not.  A column that no event has may change.
"""

from collections.abc import Collection, Iterator, Mapping

from mlpd.core.columns import DType
from mlpd.core.errors import DefinitionError
from mlpd.core.specs import SourceSpec
from mlpd.storage.frames import schema_of
from mlpd.storage.log import RecordKind, compacted_through, read_records
from mlpd.storage.segments import load_manifests
from mlpd.storage.transactions import Snapshot, WriteTransaction

Sources = Mapping[str, SourceSpec]
_EVENTS = frozenset({RecordKind.EVENTS})


def check_column_types(
    seen: Snapshot | WriteTransaction, old: Sources, new: Sources, *, after: int = 0
) -> None:
    """Raise DefinitionError(code="column_type") if events hold a column of `new` as another type.

    Only columns that `old`, which runs, hasn't as they are in `new` are looked up: none costs
    nothing; else 15 us per record of the log's tail.  `after`: look at the events after this
    sequence alone.
    """
    changed = _changed_columns(old, new)
    for source, schema in _stored_schemas(seen, changed.keys(), after) if changed else ():
        wanted = changed[source]
        for column, dtype in schema:
            if wanted.get(column, dtype) is not dtype:
                raise DefinitionError(
                    f"source {source!r}: column {column!r} is {dtype} in its events "
                    f"and can't become {wanted[column]}",
                    code="column_type",
                    hint="Give the new column another name: events keep their columns for ever, "
                    "also those that the definitions dropped.",
                )


def _changed_columns(old: Sources, new: Sources) -> dict[str, dict[str, DType]]:
    changed: dict[str, dict[str, DType]] = {}
    for name, source in new.items():
        before = old[name].schema if name in old else {}
        columns = {c: dtype for c, dtype in source.schema.items() if before.get(c) is not dtype}
        if columns:
            changed[name] = columns
    return changed


def _stored_schemas(
    seen: Snapshot | WriteTransaction, sources: Collection[str], after: int
) -> Iterator[tuple[str, tuple[tuple[str, DType], ...]]]:
    """Yield (source, columns) of what is stored of `sources`, each once or more often."""
    if not after:
        for manifest in load_manifests(seen):
            for segment in manifest.segments:
                if segment.kind is RecordKind.EVENTS and segment.source in sources:
                    yield segment.source, tuple(segment.columns.items())
    first = max(after, compacted_through(seen)) + 1
    for record in read_records(seen, first, kinds=_EVENTS):
        if record.source in sources:
            yield record.source, schema_of(record.columns())
