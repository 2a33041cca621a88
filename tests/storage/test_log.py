"""The log: dense sequences, faithful rows, damage is noticed."""

import asyncio
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.columns import Columns, DType
from mlpd.core.convert import column_of
from mlpd.core.errors import InternalError, TooLargeError, ValidationError
from mlpd.storage.environment import Environment
from mlpd.storage.log import (
    RECORD_ROWS_MAX,
    LogRecord,
    RecordKind,
    append,
    decode_record,
    read_records,
    rows_of,
)
from mlpd.storage.log import _encode as encode_record
from mlpd.storage.tables import Table, u64be
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

START_US = 1_700_000_000_000_000
int64s = st.integers(-(2**63), 2**63 - 1)


def rows(*numbers: int) -> Columns:
    return {"n": column_of(DType.INT64, numbers)}


def read(environment: Environment, *bounds: int) -> list[LogRecord]:
    with environment.snapshot() as snapshot:
        return list(read_records(snapshot, *bounds))


def test_rows_come_back_with_dense_sequences(
    environment: Environment, writer: Writer, events: Any
) -> None:
    assert writer.write_blocking(events(10, 20, 30)) == (1, 3)
    assert writer.write_blocking(events(40, source="weather")) == (4, 4)
    first, second = read(environment)
    assert (first.source, first.first, first.last, first.kind) == (
        "departures",
        1,
        3,
        RecordKind.EVENTS,
    )
    assert first.columns()["n"].to_list() == [10, 20, 30]
    assert first.event_us.tolist() == [START_US + n for n in (10, 20, 30)]
    assert first.sequences().tolist() == [1, 2, 3]
    assert (second.source, second.first) == ("weather", 4)


def test_range_returns_every_record_that_it_touches(
    environment: Environment, writer: Writer, events: Any
) -> None:
    for start in (0, 10, 20):
        writer.write_blocking(events(*range(start, start + 3)))
    assert [r.first for r in read(environment, 3, 4)] == [1, 4]
    assert [r.first for r in read(environment, 4)] == [4, 7]
    assert [r.first for r in read(environment, 1, 3)] == [1]
    assert [r.first for r in read(environment, 10)] == []


def test_rows_without_known_time_get_the_arrival_of_their_group(
    environment: Environment, writer: Writer, clock: Any, events: Any
) -> None:
    writer.write_blocking(events(1, 2))
    clock.now_us -= 1_000_000
    writer.write_blocking(events(3))
    known = [r.known_us.tolist() for r in read(environment)]
    assert known == [[START_US, START_US], [START_US + 2]]


def test_head_sums_up_the_log(environment: Environment, writer: Writer, events: Any) -> None:
    writer.write_blocking(events(5, 500, 50))
    with environment.snapshot() as snapshot:
        assert snapshot.sequence == 3
        assert snapshot.newest_event_us == START_US + 500
        assert snapshot.newest_known_us == START_US


def test_supplied_known_time_must_not_lie_ahead(writer: Writer, clock: Any) -> None:
    def op(txn: Any, known_us: Any) -> Any:
        times = np.array([START_US])
        known = np.array([known_us])
        return append(
            txn,
            kind=RecordKind.EVENTS,
            source="s",
            columns=rows(1),
            event_us=times,
            known_us=known,
        )

    assert writer.write_blocking(lambda txn: op(txn, clock.now_us)) == (1, 1)
    with pytest.raises(ValidationError) as caught:
        writer.write_blocking(lambda txn: op(txn, clock.now_us + 10_000_000))
    assert caught.value.code == "known_time_ahead"


def test_feedback_does_not_move_the_newest_event(
    environment: Environment, writer: Writer, events: Any
) -> None:
    writer.write_blocking(events(1))
    writer.write_blocking(
        lambda txn: append(
            txn,
            kind=RecordKind.FEEDBACK,
            source="route",
            columns=rows(1),
            event_us=np.array([START_US * 2]),
        )
    )
    with environment.snapshot() as snapshot:
        assert (snapshot.newest_event_us, snapshot.sequence) == (START_US + 1, 2)


@pytest.mark.parametrize(
    ("event_us", "known_us", "n", "error"),
    [
        ([], None, 0, ValidationError),
        ([1, 2], [1], 2, ValidationError),
        ([1, 2], None, 3, ValidationError),
        (range(RECORD_ROWS_MAX + 1), None, 0, TooLargeError),
    ],
)
def test_wrong_shapes_are_refused(
    writer: Writer, event_us: Any, known_us: Any, n: Any, error: Any
) -> None:
    with pytest.raises(error):
        writer.write_blocking(
            lambda txn: append(
                txn,
                kind=RecordKind.EVENTS,
                source="s",
                columns=rows(*range(n)),
                event_us=np.array(event_us, np.int64),
                known_us=None if known_us is None else np.array(known_us, np.int64),
            )
        )


@given(
    kind=st.sampled_from(RecordKind),
    source=st.text(max_size=40).filter(lambda s: s.isprintable()),
    first=st.integers(1, 2**63 - 1),
    table=st.lists(
        st.tuples(int64s, int64s, st.none() | int64s, st.none() | st.text(), st.floats()),
        min_size=1,
        max_size=20,
    ),
)
def test_record_codec_round_trips(kind: Any, source: Any, first: Any, table: Any) -> None:
    event, known, numbers, texts, floats = (list(c) for c in zip(*table, strict=True))
    columns = {
        "i": column_of(DType.INT64, numbers),
        "s": column_of(DType.STRING, texts),
        "f": column_of(DType.FLOAT64, floats),
    }
    data = encode_record(kind, source, first, np.array(event + known, np.int64).tobytes(), columns)
    record = decode_record(data, first)
    assert (record.kind, record.source, record.first) == (kind, source, first)
    assert (record.event_us.tolist(), record.known_us.tolist()) == (event, known)
    decoded = record.columns()
    assert decoded["i"].to_list() == numbers
    assert decoded["s"].to_list() == texts
    assert decoded["f"].values.tobytes() == np.array(floats, np.float64).tobytes()


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(position: int, bit: int) -> None:
    times = np.array([1, 2, 3, 4]).tobytes()
    data = bytearray(encode_record(RecordKind.EVENTS, "s", 9, times, rows(7, 8)))
    data[position % len(data)] ^= 1 << bit
    with pytest.raises(InternalError) as caught:
        decode_record(bytes(data), 9)
    assert caught.value.code == "log_corrupt"


def test_record_under_a_wrong_key_is_noticed(
    environment: Environment, writer: Writer, events: Any
) -> None:
    writer.write_blocking(events(1))

    def move(txn: Any) -> None:
        value = txn.get(Table.LOG, u64be(1))
        txn.put(Table.LOG, u64be(2), value)

    writer.write_blocking(move)
    with pytest.raises(InternalError):
        read(environment)


async def test_rows_are_counted_by_source_as_they_are_committed(
    environment: Environment, writer: Writer, events: Any
) -> None:
    def refused(txn: WriteTransaction) -> None:
        events(1, 2, 3)(txn)
        raise ValidationError("no")

    good = [writer.write(events(*range(n))) for n in (1, 20, 300)]
    other = writer.write(events(7, source="arrivals"))
    outcomes = await asyncio.gather(*good, writer.write(refused), other, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes].count(ValidationError) == 1
    with environment.snapshot() as snapshot:
        assert rows_of(snapshot, "departures") == 321
        assert rows_of(snapshot, "arrivals") == 1
        assert rows_of(snapshot, "unknown") == 0
    await writer.write(events(9))
    with environment.snapshot() as snapshot:
        assert rows_of(snapshot, "departures") == 322
