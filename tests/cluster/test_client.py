"""Both clients on three real daemons: what one daemon would answer, in the order of the rows."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest

from mlpd.client import AsyncClient, Client
from mlpd.core.errors import MisdirectedError, MlpdError, NotFoundError, UnavailableError

pytestmark = pytest.mark.timeout(300)  # the first test starts four daemons and trains

Act = Callable[[Any], Any]


def in_sync(urls: Any, act: Act) -> Any:
    with Client(urls) as client:
        return act(client)


def in_async(urls: Any, act: Act) -> Any:
    async def run() -> Any:
        async with AsyncClient(urls) as client:
            return await act(client)

    return asyncio.run(run())


KINDS = pytest.mark.parametrize("through", [in_sync, in_async], ids=["sync", "async"])


def urls_of(trio: Any) -> list[str]:
    return [edge.url for edge in trio.shards]


def people(seed: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"user": f"u{i % 45}", "age": i / 3} for i in range(90)]
    rows += [{"user": None, "age": 1.0}] * 3
    random.Random(seed).shuffle(rows)
    return rows


@KINDS
def test_features_are_those_of_one_daemon_bit_for_bit(
    trio: Any, cluster_module: Any, through: Any
) -> None:
    m = cluster_module
    shops = [{"shop": shop} for shop in [*m.SHOPS, None, *m.SHOPS[::-1], 99]]
    asks: list[Act] = [
        lambda c: c.read_features("person", entities=people(1), at=m.AT_US),
        lambda c: c.read_features("place", entities=shops, at=m.AT_US),
        lambda c: c.read_features(
            features=["per_sale", "takings.count_1d"], entities=shops, at=m.AT_US
        ),
        lambda c: c.read_features(
            "person", entities={"user": ["u1", "u2"], "age": np.ones(2)}, at=m.AT_US
        ),
    ]
    for act in asks:
        want, found = in_sync(trio.single.url, act), through(urls_of(trio), act)
        for part in ("columns", "statuses", "event_times"):
            assert pl.DataFrame(found[part]).equals(pl.DataFrame(want[part]))
        assert "errors" not in found
        assert set(found["sequence"]) <= set("abc")


@KINDS
def test_predictions_are_those_of_one_daemon_and_take_their_labels(
    trio: Any, cluster_module: Any, through: Any
) -> None:
    rows = people(2)
    act: Act = lambda c: c.predict("person", rows, at=cluster_module.AT_US, include=["vector"])  # noqa: E731
    want = in_sync(trio.single.url, act)["predictions"]
    answer = through(urls_of(trio), act)
    found = answer["predictions"]
    for part in ("score", "vector"):
        values = [[p[part] for p in predictions] for predictions in (found, want)]
        assert np.array(values[0]).tobytes() == np.array(values[1]).tobytes()
    assert set(answer["sequence"]) == set("abc")
    labels = [{"prediction_id": p["prediction_id"], "label": 1} for p in found]
    done = through(urls_of(trio), lambda c: c.feedback([*labels, {"prediction_id": "no"}]))
    assert (done["accepted"], done["joined"], done["orphans"]) == (len(rows), len(rows), 0)
    assert [row["index"] for row in done["rejected"]] == [len(rows)]


@KINDS
def test_a_client_of_one_member_learns_of_the_others(trio: Any, through: Any) -> None:
    found = through(trio.shards[1].url, lambda c: c.read_features("person", entities=people(3)))
    assert set(found["sequence"]) == set("abc")
    assert "errors" not in found


@KINDS
def test_what_no_shard_knows_is_not_found(trio: Any, through: Any) -> None:
    for act in (
        lambda c: c.read_features("nothing", entities=[{"user": "u1"}]),
        lambda c: c.predict("nothing", [{"user": "u1"}]),
        lambda c: c.events.send("nothing", [{"event_time": 1}]),
    ):
        with pytest.raises(NotFoundError):
            through(urls_of(trio), act)


def test_everything_else_goes_to_the_first_and_members_are_named(trio: Any) -> None:
    with Client(urls_of(trio)) as client:
        assert client.cluster.map()["shard"] == "a"
        members = client.members()
        assert [found.cluster.map()["shard"] for found in members.values()] == [*"abc"]
        for member in members.values():  # each talks to its own daemon alone
            with pytest.raises(MisdirectedError):
                member.send(read_request())
    with Client(trio.single.url) as client, pytest.raises(MlpdError) as refused:
        client.members()
    assert refused.value.code == "no_cluster"


def read_request() -> Any:
    from mlpd.client.requests import call  # noqa: PLC0415 - here alone

    fields = {"service": "person", "entities": people(4)}
    return call("POST", "v1", "features", "read", fields=fields)


def rows_of(columns: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def test_events_of_all_forms_are_stored_as_on_one_daemon(three: Any, cluster_module: Any) -> None:
    m = cluster_module
    made, urls = m.give_map(three), [edge.url for edge in three]
    columns = m.sale_columns(240)
    parts = [{name: values[i::4] for name, values in columns.items()} for i in range(4)]
    frame = pl.DataFrame(parts[1]).with_columns(
        pl.from_epoch("event_time", "us").dt.replace_time_zone("UTC")
    )
    rows = rows_of(parts[2])
    numpy = {k: np.array(v) if k in ("amount", "bought") else v for k, v in parts[3].items()}
    with Client(urls) as client:
        for member in client.members().values():
            member.apply(m.DOCUMENT)
        answers = [
            client.events.send("sales", parts[0]),
            client.events.send("sales", frame),
            client.events.send("sales", rows),
            client.events.send_many({"sales": numpy, "notes": [{"event_time": 1, "text": "a"}]}),
        ]
        assert [answer["accepted"] for answer in answers] == [60, 60, 60, 61]
        again = client.events.send("sales", rows, idempotency_key="k")
        assert client.events.send("sales", rows, idempotency_key="k")["replayed"]
        assert again["accepted"] == 60
        bad = [{"event_time": "x", "user": "u1", "shop": 1}, rows[0], {"event_time": 1, "user": 5}]
        refused = client.events.send("sales", bad)
        assert (refused["accepted"], [r["index"] for r in refused["rejected"]]) == (1, [0, 2])
        sequence = answers[-1]["sequence"]
        found = client.read_features(
            "place", entities=[{"shop": 3}], at=m.AT_US, min_sequence=sequence
        )
        assert found["statuses"]["takings.count_1d"] == [0]
    stored = [*rows, *rows, rows[0], *(row for i in (0, 1, 3) for row in rows_of(parts[i]))]
    for shard, edge in zip(made.shards, three, strict=True):
        want = sum(shard in map(made.owner, m.slots_of_row(row)) for row in stored)
        assert edge.daemon.ingest.rows_by_source["sales"] == want


def test_a_shard_that_is_down_costs_its_rows_and_no_write_is_silent(
    tmp_path: Any, transform_cache: Any, cluster_module: Any
) -> None:
    m = cluster_module
    with m.serve_all(tmp_path / "up", 2, transform_cache) as up:
        with m.serve_all(tmp_path / "down", 1, transform_cache) as down:
            running = [*up, *down]
            made = m.give_map(running)
            urls = [edge.url for edge in running]
            with Client(urls) as client:
                for member in client.members().values():
                    member.apply(m.DOCUMENT)
                client.events.send("sales", m.sale_columns(60))
        lost = [
            i for i in range(40) if made.owner(m.slots_of_row({"user": f"u{i}"})[0]).name == "c"
        ]
        with Client(urls, timeout_s=10) as client:
            rows = [{"user": f"u{i}", "age": 1.0} for i in range(40)]
            found = client.read_features("person", entities=rows)
            assert [error["index"] for error in found["errors"]] == lost
            sales = [{"event_time": 1, "user": f"u{i}"} for i in range(40)]
            with pytest.raises(UnavailableError) as failed:
                client.events.send("sales", sales)
            assert failed.value.details["failed_rows"] == lost
