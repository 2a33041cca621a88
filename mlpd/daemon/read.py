"""Verb read: features of entities, from one snapshot, as of one moment."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlpd.core.closure import build_closure
from mlpd.core.columns import Column, DType, height
from mlpd.core.convert import column_of
from mlpd.core.errors import (
    ConflictError,
    NotFoundError,
    TooLargeError,
    UnavailableError,
    ValidationError,
)
from mlpd.core.names import TimeUs
from mlpd.core.specs import Closure, ServiceSpec
from mlpd.core.time import SECOND_US, format_time
from mlpd.daemon.ownership import Ownership
from mlpd.daemon.part import Part
from mlpd.daemon.residents import Residents, ResidentsAt
from mlpd.daemon.state import CatalogState
from mlpd.features.assemble import FeatureFrame
from mlpd.features.catalog import Catalog
from mlpd.features.cells import Asked, Cells, collect_cells
from mlpd.features.on_stale import OnStale, apply_on_stale
from mlpd.features.online import CheckKeys, GetMany, read_online
from mlpd.features.resident import PLACES_MIN
from mlpd.storage.environment import Environment
from mlpd.storage.transactions import Snapshot

READ_ROWS_MAX = 10_000
SKEW_US_MAX = 10 * SECOND_US
"""How far the clock of a shard that hands cells over may be ahead."""


@dataclass(frozen=True, slots=True)
class ReadResult:
    """Features as served: the frame, the moment `t_us` and the last `sequence` that it saw."""

    frame: FeatureFrame
    t_us: TimeUs
    sequence: int


class Read:
    """Reads features; one instance per daemon."""

    def __init__(self, environment: Environment, state: CatalogState, ownership: Ownership) -> None:
        self._environment = environment
        self._state = state
        self._ownership = ownership
        self._residents = Residents(environment)

    def read(
        self,
        closure: Closure,
        given: Mapping[str, Column],
        *,
        at_us: TimeUs | None = None,
        min_sequence: int = 0,
        on_stale: OnStale = "null",
        cells: Cells | None = None,
    ) -> ReadResult:
        """Return the features of `closure` for every row of `given`.

        `at_us` moves the moment for replays: it must not lie before the newest known_time.
        `on_stale`: what a value older than its ttl becomes; ConflictError(code="stale_feature") for
        "error".  `min_sequence`: what the caller has seen acknowledged; a read that can't see it
        raises (wait for it with `Writer.reach`).  MisdirectedError for a key of another shard that
        is not among `cells`; ConflictError(code="clocks_differ" or "other_definitions") for cells
        that can't be read with what is here.
        ConflictError(code="definitions_changed"): an apply gave `closure` another meaning.  Runs on
        the loop: microseconds per view and entity.
        """
        return self.read_each(
            [closure],
            given,
            at_us=at_us,
            min_sequence=min_sequence,
            on_stale=on_stale,
            cells=cells,
        )[0]

    def read_each(
        self,
        closures: Iterable[Closure],
        given: Mapping[str, Column],
        *,
        at_us: TimeUs | None = None,
        min_sequence: int = 0,
        on_stale: OnStale = "null",
        cells: Cells | None = None,
    ) -> list[ReadResult]:
        """Return what `read` does for each of `closures`, all from one snapshot."""
        with self._environment.read_at() as (snapshot, t_us):
            catalog = self._state.read_catalog(snapshot)
            _check_sequence(snapshot, min_sequence)
            moment = t_us if at_us is None else _check_at(snapshot, at_us)
            part = self._ownership.part
            if cells is not None and part is not None:
                moment = _join_moments(moment, at_us, TimeUs(cells.t_us))
            how = given, snapshot.get_many, moment, on_stale, part, cells
            with self._residents.at(snapshot, part) as residents:
                frames = [_read(catalog, closure, *how, residents) for closure in closures]
            sequence = snapshot.sequence
        for frame in frames:
            apply_on_stale(frame, on_stale)
        return [ReadResult(frame, moment, sequence) for frame in frames]

    def collect(
        self,
        closures: Iterable[Closure],
        asked: Asked,
        *,
        at_us: TimeUs | None = None,
        min_sequence: int = 0,
    ) -> dict[str, Any]:
        """Return the cells that `closures` read of this shard's keys: `t_us`, sequence, groups.

        Raises as `read` does, and ValidationError for what is no key.  2 us per key and view.
        """
        with self._environment.read_at() as (snapshot, t_us):
            catalog = self._state.read_catalog(snapshot)
            _check_sequence(snapshot, min_sequence)
            moment = t_us if at_us is None else _check_at(snapshot, at_us)
            part = self._ownership.part
            check = None if part is None else part.check_keys
            layouts = [catalog.layout(closure) for closure in closures]
            groups = collect_cells(layouts, asked, snapshot.get_many, check)
            sequence = snapshot.sequence
        found = [group.to_dict() for group in groups]
        return {"t_us": moment, "sequence": sequence, "groups": found}

    def closure(self, service: str) -> Closure:
        """Return the resolved feature service, else raise NotFoundError."""
        catalog = self._state.catalog
        catalog.definitions.service(service)
        return catalog.closures[service]

    def serves(self, service: str, service_hash: str) -> bool:
        """Tell whether this version of `service` runs.  0.2 us."""
        return self._state.catalog.find_closure(service, service_hash) is not None

    def ad_hoc_closure(self, features: Sequence[str], request: Mapping[str, Any]) -> Closure:
        """Return the closure of single features, for reads outside a service."""
        fields = {name: DType.parse(t, f"request field {name!r}") for name, t in request.items()}
        definitions = self._state.catalog.definitions
        for feature in features:
            view = feature.partition(".")[0]
            if "." in feature and view not in (*definitions.views, "request"):
                raise NotFoundError(f"unknown view {view!r}", code="unknown_view")
        return build_closure(definitions, ServiceSpec("features", tuple(features), fields))


def given_columns(closure: Closure, rows: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
    """Return key columns and request fields of request rows; null is allowed, absence is not.

    Raises ValidationError(code="missing_entity_key" or "missing_request_field") naming row and
    field, `unknown_field` for anything else, or `wrong_type`.
    """
    if len(rows) > READ_ROWS_MAX:
        raise TooLargeError(
            f"{len(rows)} rows in one request; the limit is {READ_ROWS_MAX}",
            code="too_many_rows",
            hint="Send them in parts.",
        )
    needed = {**closure.key_columns, **closure.service.request}
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValidationError(f"row {index} is not an object", code="wrong_type")
        if row.keys() != needed.keys():
            raise _wrong_fields(closure, index, row)
    return {
        name: column_of(dtype, [row[name] for row in rows], f"field {name!r}")
        for name, dtype in needed.items()
    }


def _read(
    catalog: Catalog,
    closure: Closure,
    given: Mapping[str, Column],
    get_many: GetMany,
    t_us: TimeUs,
    on_stale: OnStale,
    part: Part | None,
    cells: Cells | None,
    residents: ResidentsAt,
) -> FeatureFrame:
    layout = catalog.layout(closure)
    check: CheckKeys | None = None if part is None else part.check_keys
    keep_stale, resident = on_stale == "value", None
    if cells is not None and part is not None:
        get_many, check = cells.over(layout, part.flags, get_many, part.check_keys)
    elif not keep_stale and height(given) < PLACES_MIN:
        resident = residents.of(layout)
    return read_online(
        *(catalog, closure, given, get_many, t_us),
        keep_stale=keep_stale,
        check_keys=check,
        resident=resident,
    )


def _check_sequence(snapshot: Snapshot, min_sequence: int) -> None:
    if snapshot.sequence < min_sequence:
        raise UnavailableError(
            f"sequence {min_sequence} isn't here yet; the newest is {snapshot.sequence}",
            code="sequence_not_reached",
            hint="Retry shortly, or leave min_sequence away.",
        )


def _join_moments(moment: TimeUs, at_us: TimeUs | None, cells_us: TimeUs) -> TimeUs:
    """Return the one moment of a read with cells: it must lie behind all that is in them."""
    if moment >= cells_us:
        return moment
    if at_us is None and cells_us - moment <= SKEW_US_MAX:
        return cells_us
    raise ConflictError(
        f"the cells are of {format_time(cells_us)}, and the read is as of {format_time(moment)}",
        code="clocks_differ" if at_us is None else "at_in_the_past",
        hint="Set the clocks of the members." if at_us is None else "Ask for the cells at `at`.",
    )


def _check_at(snapshot: Snapshot, at_us: TimeUs) -> TimeUs:
    """A replay's moment must see all that is known: at or after the newest known_time.

    It must also be later than the newest event, so that `event_time < t` holds for all of them.
    """
    known_us, event_us = snapshot.newest_known_us, snapshot.newest_event_us
    if at_us >= known_us and at_us > event_us:
        return at_us
    newest = known_us if at_us < known_us else event_us
    what = "known_time" if at_us < known_us else "event"
    raise ConflictError(
        f"at {format_time(at_us)} must not lie before the newest {what}, {format_time(newest)}",
        code="at_in_the_past",
        hint="Online reads serve the newest state; ask /v1/features/history for the past.",
        details={"newest_us": newest},
    )


def _wrong_fields(closure: Closure, index: int, row: Mapping[str, Any]) -> ValidationError:
    service = closure.service.name
    for kind, needed in (
        ("entity key", closure.key_columns),
        ("request field", closure.service.request),
    ):
        for name, dtype in needed.items():
            if name not in row:
                return ValidationError(
                    f"row {index} lacks the {kind} {name!r} ({dtype}) of service {service!r}",
                    code=f"missing_{kind.replace(' ', '_')}",
                    hint="Send it with every row; null is allowed and means unknown.",
                    details={"index": index},
                )
    extra = sorted(row.keys() - closure.key_columns.keys() - closure.service.request.keys())
    return ValidationError(
        f"row {index} has unknown fields {extra} for service {service!r}",
        code="unknown_field",
        hint=f"It takes {', '.join([*closure.key_columns, *closure.service.request])}.",
        details={"index": index},
    )
