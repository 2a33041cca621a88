"""Verb outcomes: what became of units, sent by unit instead of as labels of predictions.

An outcome has an id, unique within its experiment and unit: the same id again replaces what it said
before, so sending is repeatable and what was wrong can be corrected.  Outcomes are stored in UNITS,
`slot || experiment 00 unit 00 id`, and are what the units' records are rebuilt from.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from mlpd.core.errors import MlpdError, TooLargeError, UnavailableError, ValidationError
from mlpd.core.hashing import slot_of
from mlpd.daemon.experiments import Experiments
from mlpd.daemon.live_experiment import LiveExperiment
from mlpd.daemon.ownership import Ownership
from mlpd.daemon.part import slots_moving
from mlpd.daemon.parts import Parts
from mlpd.experiments.records import UnitRecord, observe, retract
from mlpd.experiments.spec import ExperimentSpec
from mlpd.storage.environment import Environment
from mlpd.storage.moved_keys import OUTCOME
from mlpd.storage.tables import Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

OUTCOMES_MAX = 10_000
"""Outcomes of one request."""
UNIT_BYTES_MAX, ID_BYTES_MAX = 256, 100
"""A key has at most 511 bytes, of which a name takes 64 at most."""
UNKNOWN, KNOWN, STORED = 0, 1, 2
"""What a member says of an outcome: it never saw the unit, it did, it has one of this id."""
_SLICE_ROWS = 100
_SCAN_ROWS = 2_000

Values = Mapping[str, Any]
"""Values by metric, as `records.observe` takes them."""


@dataclass(frozen=True, slots=True)
class _Row:
    unit: str
    key: bytes
    values: Values


class UnitOutcomes:
    """Takes outcomes by unit; every method belongs to the loop."""

    def __init__(
        self,
        experiments: Experiments,
        environment: Environment,
        writer: Writer,
        ownership: Ownership | None = None,
        parts: Parts | None = None,
    ) -> None:
        self._experiments = experiments
        self._environment = environment
        self._writer = writer
        self._ownership = ownership
        self._ready = False
        if parts is not None:
            parts.offer("units", self._tell_known, name=str, outcomes=list)

    async def record(self, name: str, outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Store outcomes `{"unit", "id", "values": {metric: value}}`; durable on return.

        Wrong ones are refused one by one: units that were never exposed, unknown metrics, values
        that are none of their kind.  Raises NotFoundError for an unknown experiment, TooLargeError,
        and UnavailableError while units are being read again after a start.
        """
        live = self._experiments.find(name)
        if live.spec.interleaving:
            raise ValidationError(
                f"experiment {name!r} is interleaved: it counts clicks on rows, not outcomes",
                code="interleaved",
                hint="Send clicks as labels of the rows' predictions: POST /v1/feedback.",
            )
        self._check_ready()
        check_number(outcomes)
        rows, rejected = _parse(live, outcomes)
        replaced = await self._writer.write(
            lambda txn: self._put(txn, rows), size_bytes=128 * len(rows)
        )
        for number, (row, old) in enumerate(zip(rows, replaced, strict=True), start=1):
            _take(live, row.unit, old, row.values)
            if number % _SLICE_ROWS == 0:
                await asyncio.sleep(0)
        again = sum(old is not None for old in replaced)
        return {"accepted": len(rows), "replaced": again, "rejected": rejected}

    def _put(self, txn: WriteTransaction, rows: Sequence[_Row]) -> list[Values | None]:
        """Store outcomes, but not while units may be on their way: which ones isn't known here."""
        if self._ownership is not None:
            moves = self._ownership.moves
            if moves.leaving is not None and moves.leaving.state != "copying":
                raise slots_moving(None)
            self._ownership.note_changed(txn, OUTCOME, [row.key for row in rows])
        return [_put(txn, row) for row in rows]

    async def _tell_known(self, asked: Mapping[str, Any]) -> list[int]:
        """Return of each `[unit, id]` whether it can be taken here: UNKNOWN, KNOWN or STORED."""
        self._check_ready()
        outcomes = asked["outcomes"]
        check_number(outcomes)
        live, known = self._experiments.find(asked["name"]), []
        for start in range(0, len(outcomes), _SLICE_ROWS):
            part = outcomes[start : start + _SLICE_ROWS]
            keys = [_key_of(live.spec, pair) for pair in part]
            with self._environment.snapshot() as snapshot:
                stored = snapshot.get_many(Table.UNITS, keys)
            for (unit, _), value in zip(part, stored, strict=True):
                is_known = live.records.get(unit) is not None
                known.append(UNKNOWN if not is_known else KNOWN if value is None else STORED)
            await asyncio.sleep(0)
        return known

    def _check_ready(self) -> None:
        if not self._ready:
            raise UnavailableError(
                "units are being read again after the start",
                code="rebuilding",
                hint="Send the same outcomes in a moment.",
            )

    def pause(self) -> None:
        """Refuse outcomes, as after a start, until those that came are taken in."""
        self._ready = False

    async def take_in(self, keys: Sequence[bytes]) -> None:
        """Take in outcomes that came with their units, and go on."""
        for start in range(0, len(keys), _SLICE_ROWS):
            with self._environment.snapshot() as snapshot:
                part = keys[start : start + _SLICE_ROWS]
                values = snapshot.get_many(Table.UNITS, part)
            for key, value in zip(part, values, strict=True):
                if value is not None:
                    self._take_stored(key, msgpack.unpackb(value))
            await asyncio.sleep(0)
        self._ready = True

    async def rebuild(self) -> int:
        """Take in what is stored, after the predictions; returns how many.  Once, at start."""
        scan = _scan(self._environment)
        total = 0
        while (rows := await asyncio.to_thread(next, scan, None)) is not None:
            for number, (key, values) in enumerate(rows, start=1):
                total += self._take_stored(key, values)
                if number % _SLICE_ROWS == 0:
                    await asyncio.sleep(0)
        self._ready = True
        return total

    def _take_stored(self, key: bytes, values: Values) -> bool:
        name, unit, _ = split_key(key)
        try:
            live = self._experiments.find(name)
        except MlpdError:
            return False
        if unit not in live.records:  # its predictions are older than what is kept
            return False
        try:
            _take(live, unit, None, values)
        except ValidationError:  # an earlier version took what this one refuses
            return False
        return True


def check_number(outcomes: Sequence[Any]) -> None:
    """Raise TooLargeError for more outcomes than one request may have."""
    if len(outcomes) > OUTCOMES_MAX:
        raise TooLargeError(
            f"{len(outcomes)} outcomes in one request; the limit is {OUTCOMES_MAX}",
            code="too_many_rows",
            hint="Send them in parts.",
        )


def is_sound(outcome: Any) -> bool:
    """Tell whether an outcome has a unit and an id by which it can be found; else it's refused."""
    try:
        _text(outcome["unit"], "unit", UNIT_BYTES_MAX)
        _text(outcome["id"], "id", ID_BYTES_MAX)
    except (ValidationError, LookupError, TypeError):
        return False
    return True


def outcome_key(name: str, unit: str, outcome_id: str) -> bytes:
    """Return the key of an outcome in UNITS: it begins with the slot of its unit."""
    return unit_prefix(name, unit) + outcome_id.encode()


def unit_prefix(name: str, unit: str) -> bytes:
    """Return what the keys of all outcomes of a unit in an experiment begin with."""
    raw = unit.encode()
    return slot_of(raw).to_bytes(2, "big") + b"\x00".join([name.encode(), raw, b""])


def split_key(key: bytes) -> tuple[str, str, str]:
    """Return (experiment, unit, id) of a key in UNITS."""
    name, unit, outcome_id = key[2:].split(b"\x00")
    return name.decode(), unit.decode(), outcome_id.decode()


def forget_units(txn: WriteTransaction, units: Sequence[str]) -> int:
    """Remove all outcomes of units, in every experiment; returns how many."""
    removed = 0
    for unit in units:
        raw = unit.encode()
        slot = slot_of(raw)
        start, stop = slot.to_bytes(2, "big"), (slot + 1).to_bytes(2, "big")
        found = [
            key for key, _ in txn.scan(Table.UNITS, start, stop) if key.split(b"\x00")[-2] == raw
        ]
        removed += sum(txn.delete(Table.UNITS, key) for key in found)
    return removed


def _parse(
    live: LiveExperiment, outcomes: Sequence[Mapping[str, Any]]
) -> tuple[list[_Row], list[dict[str, Any]]]:
    rows, rejected = [], []
    for index, outcome in enumerate(outcomes):
        try:
            rows.append(_parse_row(live, outcome))
        except MlpdError as error:
            shape = error.to_dict()
            rejected.append({"index": index} | {k: shape[k] for k in ("code", "message", "hint")})
    return rows, rejected


def _parse_row(live: LiveExperiment, outcome: Mapping[str, Any]) -> _Row:
    spec = live.spec
    if outcome.keys() != {"unit", "id", "values"} or not isinstance(outcome["values"], dict):
        raise ValidationError(
            "an outcome is an object with unit, id and values",
            code="invalid_outcome",
            hint='Send {"unit": "N14228", "id": "order-17", "values": {"revenue": 12.5}}.',
        )
    unit = _text(outcome["unit"], "unit", UNIT_BYTES_MAX)
    outcome_id = _text(outcome["id"], "id", ID_BYTES_MAX)
    _check_metrics(spec, outcome["values"])
    record = live.records.get(unit)
    if record is None:
        raise ValidationError(
            f"unit {unit!r} was never exposed to experiment {spec.name!r}",
            code="unknown_unit",
            hint=f"Outcomes are of units that were served an arm: the values of {spec.unit!r}.",
        )
    observe(record, spec.metrics, outcome["values"])  # raises for a value that is none
    values = {name: _as_floats(value) for name, value in outcome["values"].items()}
    return _Row(unit, outcome_key(spec.name, unit, outcome_id), values)


def _key_of(spec: ExperimentSpec, pair: Any) -> bytes:
    unit, outcome_id = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)  # noqa: PLR2004
    unit, outcome_id = _text(unit, "unit", UNIT_BYTES_MAX), _text(outcome_id, "id", ID_BYTES_MAX)
    return outcome_key(spec.name, unit, outcome_id)


def _as_floats(value: Any) -> float | list[float]:
    """Return a checked value as it is stored, which has no room for any integer."""
    return [float(part) for part in value] if isinstance(value, list | tuple) else float(value)


def _check_metrics(spec: ExperimentSpec, values: Mapping[str, Any]) -> None:
    names = [metric.name for metric in spec.metrics]
    unknown = [name for name in values if name not in names]
    if unknown or not values:
        raise ValidationError(
            f"experiment {spec.name!r} has no metric {unknown[0]!r}"
            if unknown
            else "an outcome has no values",
            code="unknown_metric",
            hint=f"Its metrics: {', '.join(names)}.",
        )


def _text(value: object, what: str, bytes_max: int) -> str:
    if isinstance(value, str):
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            size = 0
        if 0 < size <= bytes_max and "\x00" not in value:
            return value
    raise ValidationError(
        f"the {what} of an outcome is {repr(value)[:60]}",
        code="invalid_outcome",
        hint=f"Send a text of 1 to {bytes_max} bytes.",
    )


def _put(txn: WriteTransaction, row: _Row) -> Values | None:
    stored = txn.get(Table.UNITS, row.key)
    txn.put(Table.UNITS, row.key, msgpack.packb(row.values))
    return None if stored is None else msgpack.unpackb(stored)


def _take(live: LiveExperiment, unit: str, old: Values | None, new: Values) -> None:
    record: UnitRecord | None = live.records.get(unit)
    if record is None:
        return
    if old is not None:
        record = retract(record, live.spec.metrics, old)
    live.change(unit, observe(record, live.spec.metrics, new))


def _scan(environment: Environment) -> Iterator[list[tuple[bytes, Values]]]:
    """Yield what is stored, in key order, one short snapshot a list."""
    start = b""
    while True:
        with environment.snapshot() as snapshot:
            rows = [
                (key, msgpack.unpackb(value))
                for (key, value), _ in zip(
                    snapshot.scan(Table.UNITS, start), range(_SCAN_ROWS), strict=False
                )
            ]
        yield rows
        if len(rows) < _SCAN_ROWS:
            return
        start = rows[-1][0] + b"\x00"
