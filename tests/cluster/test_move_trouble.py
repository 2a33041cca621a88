"""Moves that meet trouble: cancelled too late, steps with rubbish, drivers that end at the end."""

import functools
import json
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from mlpd.cli.main import main
from mlpd.client import Client
from mlpd.client.operations import Cluster
from mlpd.cluster import moving
from mlpd.cluster.members import connections
from mlpd.cluster.moving import pending
from mlpd.core.errors import ConflictError, MlpdError
from mlpd.core.shards import ShardMap
from mlpd.core.time import system_clock
from mlpd.daemon import moved_events, moved_rows, moves_child
from mlpd.daemon.moved_predictions import Served
from mlpd.daemon.predictions import Label
from mlpd.storage.tables import Table
from tests.cluster import moving as t

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def made(three: Any, cluster_module: Any) -> ShardMap:
    """A cluster of three with sales."""
    found: ShardMap = cluster_module.give_map(three)
    for edge in three:
        with Client(edge.url) as client:
            client.apply(t.DOCUMENT)
    return found


def fill(three: Any, rows: int) -> None:
    now_us = system_clock()
    with Client([edge.url for edge in three]) as client:
        events = [
            {"at": now_us, "n": 1, "user": t.USERS[i % 30], "shop": t.SHOPS[i % 29]}
            for i in range(rows)
        ]
        client.events.send("sales", events)


def test_a_cancellation_that_comes_too_late_lets_the_move_be_finished(
    three: Any, made: ShardMap
) -> None:
    """The arbiter takes the new map after the source noted `cancelling`, before it is fenced."""
    slots = made.slots_of("b")[:100]

    def cancel_at_the_source(step: str) -> None:
        if step == "before put_map put_map" and t.map_at(three[0].url) == made:
            with Client(three[1].url) as client:
                client.cluster.leave("cancel", client.cluster.moves()["leaving"]["move"])

    newest, moved = t.move(made, slots, "c", cancel_at_the_source)
    assert len(moved) == 1
    assert {t.map_at(edge.url).owner(slots[0]).name for edge in three} == {"c"}
    with connections("test") as connect:
        assert not list(pending(newest, connect))


def served(key: bytes) -> bytes:
    """A chunk with the label of one prediction."""
    chunk = Served(b"", b"t", [(key, None, Label(1.0, 1).encode())])
    return chunk.encode()


def test_steps_with_rubbish_are_refused_and_the_move_goes_on(three: Any, made: ShardMap) -> None:
    def hook(step: str) -> None:
        if step == "after arrive begin":
            raise t.Ended

    with pytest.raises(t.Ended):
        t.move(made, range(100), "b", hook)
    with Client(three[0].url) as source, Client(three[1].url) as target:
        move = source.cluster.moves()["leaving"]["move"]
        seal = functools.partial(target.cluster.arrive, "seal", move)
        for call, code in (
            (lambda: source.cluster.history(move, -1), "invalid_sequence"),
            (lambda: source.cluster.history(move, 2**63), "invalid_sequence"),
            (lambda: source.cluster.predictions(move, "no hex"), "invalid_position"),
            (lambda: source.cluster.predictions(move, "70" + 16 * "00"), "invalid_position"),
            (lambda: source.cluster.predictions(move, "62" + 26 * "00"), "invalid_position"),
            (lambda: target.cluster.take(move, b"rubbish"), "damaged_chunk"),
            (lambda: target.cluster.take(move, served(b"\xff\xff" + bytes(14))), "damaged_chunk"),
            (lambda: target.cluster.take(move, served(bytes(16))[:-1] + b"?"), "damaged_chunk"),
            (lambda: seal(through=-1), "invalid_sequence"),
            (lambda: seal(through=0, horizons={"sales": "soon"}), "invalid_time"),
            (lambda: seal(through=0, horizons={"s" * 600: 1}), "invalid_name"),
        ):
            with pytest.raises(MlpdError) as raised:
                call()
            assert (raised.value.code, bool(raised.value.hint)) == (code, True)
        assert target.cluster.moves()["arriving"]["state"] == "importing"
    newest, _ = t.move(made, range(100), "b")
    assert newest.owner(50).name == "b"


def test_a_move_whose_map_is_out_is_finished_by_the_next_command(
    three: Any, made: ShardMap
) -> None:
    """The slots are the target's by then: no command names them any more."""
    mlpd = CliRunner(env={"COLUMNS": "200", "MLPD_URL": three[0].url})
    for step, words in (
        ("before put_map put_map", ("move", "0-99", "--to", "b")),
        ("after arrive finish", ("move", "0-150", "--to", "b")),
        ("before leave finish", ("move", "7000", "--to", "b")),
    ):
        made = t.map_at(three[0].url)

        def hook(said: str, step: str = step, epoch: int = made.epoch) -> None:
            if said == step and t.map_at(three[0].url).epoch > epoch:
                raise t.Ended

        slots = made.slots_of("a")[:100]
        with pytest.raises(t.Ended):
            t.move(made, slots, "b", hook)
        status = json.loads(mlpd.invoke(main, ["shard", "status", "--json"]).output)
        assert [one["state"] for one in status["moves"]] == ["leaving"]
        done = mlpd.invoke(main, ["shard", *words, "--yes"])
        assert done.exit_code == 0, done.output
        status = json.loads(mlpd.invoke(main, ["shard", "status", "--json"]).output)
        assert not status["moves"]
        assert {t.map_at(edge.url).owner(slots[0]).name for edge in three} == {"b"}


def test_a_target_whose_clock_is_behind_waits_for_it(
    three: Any, made: ShardMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = three[1].daemon.environment.times
    monkeypatch.setattr(times, "_clock", lambda: system_clock() - 300_000)
    fill(three, 40)
    newest, moved = t.move(made, made.slots_of("a"), "b")
    assert newest.slots_of("a") == []
    assert sum(one.events for one in moved) > 0
    monkeypatch.setattr(times, "_clock", lambda: system_clock() - 100_000_000)
    monkeypatch.setattr(moving, "SKEW_S", 0.1)
    fill(three, 40)
    with pytest.raises(ConflictError) as raised:
        t.move(newest, newest.slots_of("c"), "b")
    assert raised.value.code == "clocks_differ"


def test_slots_with_few_rows_in_a_long_history_pause_for_its_end_alone(
    three: Any, made: ShardMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moved_events, "TAIL_RECORDS", 3)
    for _ in range(20):
        fill(three, 30)
    steps: list[str] = []
    slots = made.slots_of("a")[:1]  # none of the keys is there
    t.move(made, slots, "b", steps.append)
    pause = steps.index("before leave pause")
    assert steps[:pause].count("after history history") > 5
    assert steps[pause:].count("after history history") <= 1


def test_scattered_slots_go_in_few_writes(
    three: Any, made: ShardMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each second slot is a run of its own; a write for each would take minutes."""
    monkeypatch.setattr(moved_rows, "REMOVED_ROWS", 3)
    fill(three, 40)
    slots = made.slots_of("a")
    writers = [edge.daemon.writer.stats for edge in three]
    before = [stats.groups for stats in writers]
    newest, moved = t.move(made, slots[::2], "b")
    assert all(stats.groups - was < 500 for stats, was in zip(writers, before, strict=True))
    assert newest.slots_of("a") == slots[1::2]
    assert sum(one.events for one in moved) > 0
    with three[0].daemon.environment.snapshot() as snapshot:
        here = {key[0] << 8 | key[1] for key, _ in snapshot.scan(Table.ONLINE)}
    assert here
    assert here <= set(slots[1::2])


def test_chunks_of_large_events_stay_small(
    three: Any, made: ShardMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record may have 30 MB, and a segment many: more than a daemon takes at once."""
    monkeypatch.setattr(moved_events, "CHUNK_BYTES", 2_000)
    fill(three, 1_000)
    sizes: list[int] = []
    real = Cluster.history

    def history(self: Any, move: str, after: int) -> Any:
        answer = real(self, move, after)
        sizes.append(len(answer["chunk"]))
        return answer

    monkeypatch.setattr(Cluster, "history", history)
    t.move(made, made.slots_of("a"), "b")
    assert sum(sizes) > 10_000
    assert max(sizes) < 5_000


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=60),
    st.lists(st.integers(1, 4), min_size=4, max_size=4),
)
def test_rows_of_files_come_in_the_order_of_the_log(
    runs: list[tuple[int, int]], at_once: list[int]
) -> None:
    of = np.repeat([number for number, _ in runs], [length for _, length in runs])
    files = [(np.flatnonzero(of == number), most) for number, most in enumerate(at_once)]
    found = list(moves_child._in_order(files))
    assert all(len(rows) <= at_once[number] for number, rows in found)
    sequences = [files[number][0][row] for number, rows in found for row in rows]
    assert sequences == list(range(len(of)))
