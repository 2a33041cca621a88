"""Rows whose entities live on several shards, by the bits of one daemon that holds everything."""

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpd import (
    Aggregate,
    Entity,
    FeatureService,
    FeatureView,
    Job,
    Source,
    Spine,
    WindowView,
    transform,
)
from mlpd.client import AsyncClient, Client
from mlpd.core.definitions import build_document
from mlpd.core.errors import MisdirectedError, MlpdError

pytestmark = pytest.mark.timeout(300)  # the first test starts four daemons and trains

HOUR_US, DAY_US = 3_600_000_000, 86_400_000_000
DRAW = random.Random(20)
USERS, SHOPS, TAGS = [f"u{i}" for i in range(25)], [*range(9)], [b"\x00", b"\x01\xff", b"ab"]

user, shop = Entity("user"), Entity("shop", key="int64")
pair = Entity("pair", key={"user": "string", "shop": "int64"})
tag = Entity("tag", key="bytes")
sales = Source(
    "sales",
    timestamp="event_time",
    schema={
        "user": "string",
        "shop": "int64",
        "tag": "bytes",
        "amount": "float64",
        "note": "string",
        "blob": "bytes",
        "bought": "int64",
        "age": "float64",
        "shown_at": "timestamp",
    },
)


def draw_views() -> Iterator[Any]:
    """Views of random kinds, windows and aggregates, of each entity some."""
    makers = [
        lambda: Aggregate.count(name="some", filter=f"amount > {DRAW.choice([-0.5, 0, 0.5])}"),
        *(lambda f=f: getattr(Aggregate, f)("amount") for f in ("sum", "mean", "std", "last")),
        *(lambda f=f: getattr(Aggregate, f)("age") for f in ("min", "max", "var", "first")),
        lambda: Aggregate.approx_distinct("note"),
        lambda: Aggregate.topk("shop", k=3),
        lambda: Aggregate.last_n("amount", n=4),
        lambda: Aggregate.ewma("amount", half_life="6h"),
    ]
    for entity in (user, shop, pair, tag):
        columns = DRAW.sample(["amount", "note", "blob", "age", "bought"], 3)
        ttl = DRAW.choice([None, "5d"])
        yield FeatureView(f"latest_{entity.name}", entity, sales, columns, ttl=ttl)
        for i in range(2):
            windows = DRAW.sample(["1h", "6h", "3d", "20d", "45d"], 2)
            chosen = [make() for make in DRAW.sample(makers, 4)]
            closed = DRAW.choice(["left", "right"])
            name = f"window{i}_{entity.name}"
            yield WindowView(name, entity, sales, windows, chosen, closed=closed)


VIEWS = [*draw_views()]
FEATURES = [f"{view.name}.{feature}" for view in VIEWS for feature in view.feature_names()]
spend = WindowView("spend", user, sales, ["6h", "20d"], [Aggregate.mean("amount")])
takings = WindowView("takings", shop, sales, ["3d"], [Aggregate.sum("amount"), Aggregate.count()])


@transform
def worth(
    mine: "spend.amount_mean_20d",
    total: "takings.amount_sum_3d",
    age: "request.age",  # noqa: F821
) -> "float64":  # noqa: F821
    return total / (1.0 + abs(mine)) + age


mixed = FeatureService("mixed", features=[spend, takings, worth], request={"age": "float64"})
train = Job(
    *("mixed", mixed, Spine(sales, time="shown_at")),
    label="bought",
    params={"min_data_in_leaf": 5},
    num_boost_round=8,
    deploy="champion",
)
DOCUMENT = build_document(
    [user, shop, pair, tag, sales, *VIEWS, spend, takings, worth, mixed, train]
)
ROUTE = {"service": "mixed", "arms": [{"model": "mixed@champion"}]}


def sale_columns(now_us: int, n: int = 600) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    ago_us = np.where(np.arange(n) % 2, 12 * HOUR_US, 40 * DAY_US) * rng.uniform(0.001, 1, n)
    times = sorted((now_us - ago_us.astype(np.int64)).tolist())
    return {
        "event_time": times,
        "known_at": times,
        "shown_at": times,
        "user": [None if i % 41 == 0 else USERS[i * 7 % 25] for i in range(n)],
        "shop": [None if i % 37 == 0 else SHOPS[i * 5 % 9] for i in range(n)],
        "tag": [None if i % 29 == 0 else TAGS[i * 2 % 3] for i in range(n)],
        "amount": rng.normal(size=n).tolist(),
        "note": [f"n{i % 13}" for i in range(n)],
        "blob": [bytes([i % 7, 0, i % 5]) for i in range(n)],
        "bought": (rng.normal(size=n) > 0).astype(int).tolist(),
        "age": rng.normal(size=n).tolist(),
    }


@pytest.fixture(scope="module")
def clients(spread: Any) -> Iterator[Any]:
    """Of the single daemon, the router, and all shards."""
    single, shards, _, router, _ = spread
    urls = [edge.url for edge in shards]
    with Client(single.url) as one, Client(router.url) as over, Client(urls) as own:
        yield one, over, own


@pytest.fixture(scope="module")
def spread(
    tmp_path_factory: pytest.TempPathFactory, transform_cache: Any, cluster_module: Any
) -> Iterator[Any]:
    """(daemon with all, three shards, their map, a router, the moment to read at)."""
    m, now_us = cluster_module, int(time.time() * 1e6)
    with m.serve_all(tmp_path_factory.mktemp("cells"), 4, transform_cache) as (single, *shards):
        made, urls = m.give_map(shards), [edge.url for edge in shards]
        with m.serve_router(urls) as router:
            with Client(single.url) as one, Client(router.url) as over:
                for client in (one, over):
                    client.apply(DOCUMENT)
                    client.events.send("sales", sale_columns(now_us))
                run = one.runs.wait(one.runs.start("mixed")["run_id"], timeout_s=50)
                assert run["state"] == "succeeded", run["error"]
                over.models.adopt(one.models.archive("mixed", 1))
                over.models.move_alias("mixed", "champion", 1)
                for client in (one, over):
                    client.routes.put("mixed", ROUTE)
            yield single, shards, made, router, now_us + HOUR_US // 2


KEYS = {
    "user": st.none() | st.sampled_from([*USERS, "nobody"]),
    "shop": st.none() | st.sampled_from([*SHOPS, 77]),
    "tag": st.none() | st.sampled_from([*TAGS, b"none"]),
}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_features_are_those_of_one_daemon_bit_for_bit(spread: Any, clients: Any, data: Any) -> None:
    at, (one, *others) = spread[-1], clients
    features = data.draw(st.lists(st.sampled_from([*FEATURES, "worth"]), min_size=1, unique=True))
    keys = {column for f in features for column in columns_of(f)}
    row = st.fixed_dictionaries({name: KEYS[name] for name in sorted(keys)})
    rows = data.draw(st.lists(row, min_size=1, max_size=12))
    how: dict[str, Any] = {"features": features, "at": at}
    if "worth" in features:
        rows = [{**r, "age": i / 7} for i, r in enumerate(rows)]
        how["request"] = {"age": "float64"}
    how["on_stale"] = data.draw(st.sampled_from(["null", "value"]))
    want = one.read_features(entities=rows, **how)
    for client in others:
        found = client.read_features(entities=rows, **how)
        assert "errors" not in found
        for part in ("columns", "statuses", "event_times"):
            assert msgpack.packb(found[part]) == msgpack.packb(want[part]), part


def columns_of(feature: str) -> list[str]:
    if feature == "worth":
        return ["user", "shop"]
    entity = feature.partition(".")[0].rpartition("_")[2]
    return ["user", "shop"] if entity == "pair" else [entity]


ROWS = [{"user": u, "shop": s, "age": i / 3} for i, u in enumerate(USERS) for s in (*SHOPS, None)]


def test_scores_are_those_of_one_daemon_and_are_logged_once(spread: Any) -> None:
    single, shards, _, router, at = spread
    how = {"at": at, "include": ["vector"]}
    with Client(single.url) as one:
        want = one.predict("mixed", ROWS, **how)["predictions"]
    before = [edge.daemon.predictions.logged for edge in shards]
    with Client(router.url) as over:
        answer = over.predict("mixed", ROWS, **how)
        found = answer["predictions"]
        for part in ("score", "vector"):
            values = [[p[part] for p in predictions] for predictions in (found, want)]
            assert np.array(values[0]).tobytes() == np.array(values[1]).tobytes()
        labels = [{"prediction_id": p["prediction_id"], "label": 1} for p in found]
        assert over.feedback(labels)["joined"] == len(ROWS)
        nan = over.predict("mixed", ROWS[:20], min_sequence=answer["sequence"])
        assert not any("error" in p for p in nan["predictions"])
    logged = [edge.daemon.predictions.logged for edge in shards]
    assert sum(logged) - sum(before) == len(ROWS) + 20

    async def run() -> Any:
        async with AsyncClient([edge.url for edge in shards]) as client:
            return await client.predict("mixed", ROWS, **how)

    scores = [p["score"] for p in asyncio.run(run())["predictions"]]
    assert scores == [p["score"] for p in want]


def test_what_was_served_with_cells_is_recomputed_from_all_logs_it_came_from(
    spread: Any, cluster_module: Any
) -> None:
    single, shards, made, router, _ = spread
    more = {n: v[-40:] for n, v in sale_columns(int(time.time() * 1e6)).items() if n != "known_at"}
    with Client(router.url) as over, Client(single.url) as one:
        served = over.predict("mixed", ROWS[:60])
        for client in (over, one):
            client.events.send("sales", more)
        over.predict("mixed", ROWS[:60])
        assert len(served["sequence"]) > 1
    home, other, row = foreign(spread, cluster_module)
    names = {edge.url: shard.name for edge, shard in zip(shards, made.shards, strict=True)}
    keys = [{"columns": ["shop"], "values": [[row["shop"]]]}]
    with Client(other.url) as owner, Client(home.url) as reader:
        cells = owner.cluster.cells(keys, route="mixed")
        handed = {"t_us": cells["t_us"], "groups": cells["groups"]}
        told = {"right": cells["sequence"], "wrong": 1}  # as if it had seen one event
        ids = {
            name: send(
                reader,
                {"rows": [row], "cells": {**handed, "sequences": {names[other.url]: sequence}}},
                *("predict", "mixed"),
            )["predictions"][0]["prediction_id"]
            for name, sequence in told.items()
        }
        send(reader, {"rows": [row], "cells": handed}, "predict", "mixed")
        found = reader.run_consistency()
    logged = sum(edge.daemon.predictions.logged for edge in shards)
    assert found["unavailable"] == found["mismatched_rows"] == 1  # untold, and wrongly told
    assert found["rows_compared"] == logged - 1 >= 122
    assert {*found["by_feature"]} <= {"takings.amount_sum_3d", "takings.count_3d", "worth"}
    assert {example["prediction_id"] for example in found["examples"]} == {ids["wrong"]}
    assert found["examples"][0]["events"] is not None


def test_a_shard_that_is_down_costs_the_rows_that_need_it(spread: Any, cluster_module: Any) -> None:
    m, (_, shards, made, _, _) = cluster_module, spread
    gone = replace(made.shards[2], url="http://127.0.0.1:9")
    without = replace(made, shards=(*made.shards[:2], gone))
    with m.serve_router([edge.url for edge in shards]) as edge, Client(edge.url) as client:
        guide = edge.daemon.members.guide
        guide.topology = replace(guide.topology, shard_map=without)
        found = client.predict("mixed", ROWS)["predictions"]
        for row, prediction in zip(ROWS, found, strict=True):
            owners = {made.owner(slot).name for slot in m.slots_of_row(row)}
            assert ("error" in prediction) == ("c" in owners), row
        codes = {p["error"]["code"] for p in found if "error" in p}
        assert codes <= {"unreachable", "shard_down"}


def foreign(spread: Any, cluster_module: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Return a home, the owner of the row's shop, and a row of both."""
    _, shards, made, _, _ = spread
    for row in ROWS:
        if row["shop"] is not None:
            home, other = (made.owner(slot) for slot in slots(cluster_module, row))
            if home != other:
                return shards[made.index(home.name)], shards[made.index(other.name)], row
    raise AssertionError("all keys on one shard")


def slots(m: Any, row: dict[str, Any]) -> list[int]:
    found: list[int] = m.slots_of_row(row)
    return found


ASKED: dict[str, Any] = {"features": ["takings.amount_sum_3d", "latest_shop.bought"]}


def test_cells_are_asked_of_their_owner_and_read_as_handed_over(
    spread: Any, cluster_module: Any
) -> None:
    home, other, row = foreign(spread, cluster_module)
    keys = [{"columns": ["shop"], "values": [[row["shop"]]]}]
    with Client(other.url) as owner, Client(home.url) as reader:
        cells = owner.cluster.cells(keys, service="mixed")
        with pytest.raises(MisdirectedError):
            reader.cluster.cells(keys, service="mixed")
        handed = {"t_us": cells["t_us"], "groups": cells["groups"]}
        read = {"service": "mixed", "entities": [row]}
        assert home.call("POST", "/v1/features/read", read)[0] == 421
        json_cells = other.call("POST", "/v1/cluster/cells", {"service": "mixed", "keys": keys})[1]
        json_handed = {"t_us": json_cells["t_us"], "groups": json_cells["groups"]}
        status, found, _ = home.call("POST", "/v1/features/read", {**read, "cells": json_handed})
        assert status == 200
        assert found["columns"]["takings.count_3d"][0] is not None
        for wrong, code in (
            ({**handed, "t_us": handed["t_us"] + 60_000_000}, "clocks_differ"),
            ({**handed, "groups": []}, "wrong_shard"),
            ({**handed, "groups": [{**handed["groups"][0], "views": {}}]}, "other_definitions"),
            ({**handed, "t_us": "x"}, "invalid_cells"),
            ({"groups": []}, "invalid_cells"),
            ({**handed, "sequences": {"a": "1"}}, "invalid_cells"),
            ({**handed, "sequences": {"A": 1}}, "invalid_cells"),
            ({**handed, "groups": [{**handed["groups"][0], "keys": [[None]]}]}, "invalid_cells"),
            ({**handed, "groups": [{**handed["groups"][0], "keys": []}]}, "invalid_cells"),
        ):
            with pytest.raises(MlpdError) as refused:
                send(reader, {**read, "cells": wrong})
            assert refused.value.code == code
        with pytest.raises(MlpdError) as both:
            owner.cluster.cells(keys, service="mixed", route="mixed")
        assert both.value.code == "invalid_request"


def send(client: Any, fields: dict[str, Any], *where: str) -> Any:
    from mlpd.client.requests import call  # noqa: PLC0415 - here alone

    return client.send(call("POST", "v1", *(where or ("features", "read")), fields=fields))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_cells_are_an_error_or_an_answer_and_the_daemon_lives(
    spread: Any, cluster_module: Any, data: Any
) -> None:
    home, other, row = foreign(spread, cluster_module)
    keys = [{"columns": ["shop"], "values": [[row["shop"]]]}]
    features = [f for f in FEATURES if columns_of(f) == ["shop"]]
    named = {"features": [*features, "spend.amount_mean_6h"]}
    with Client(other.url) as owner, Client(home.url) as reader:
        cells = owner.cluster.cells(keys, **named)
        (group,) = cells["groups"]
        view = data.draw(st.sampled_from(sorted(group["views"])))
        part = data.draw(st.sampled_from(["values", "older"]))
        stored = group["views"][view][part]
        if not stored or stored[0] is None:
            return
        group["views"][view][part] = [data.draw(damaged(stored[0]))]
        asked = {"t_us": cells["t_us"], "groups": cells["groups"]}
        entities = [{"user": row["user"], "shop": row["shop"]}]
        try:
            send(reader, {**named, "entities": entities, "cells": asked})
        except MlpdError as error:
            assert error.status in (400, 500)
            assert error.message
        assert reader.status()["ready"]


def damaged(value: bytes) -> Any:
    """Values cut, lengthened, or with some bytes changed; also none at all."""
    places = st.lists(st.tuples(st.integers(0, len(value) - 1), st.integers(0, 255)), max_size=6)

    def change(found: list[tuple[int, int]]) -> bytes:
        changed = bytearray(value)
        for place, byte in found:
            changed[place] = byte
        return bytes(changed)

    cut = st.integers(0, len(value)).map(lambda n: value[:n])
    return places.map(change) | cut | st.binary(max_size=64).map(lambda more: value + more)
