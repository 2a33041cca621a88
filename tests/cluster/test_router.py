"""A router over three real daemons: whoever asks it gets what one daemon would answer."""

import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
import tritonclient.http as triton
from prometheus_client.parser import text_string_to_metric_families

from mlpd.client import Client
from mlpd.cluster.router import app as router_app
from mlpd.cluster.router import breaker, upstream
from mlpd.cluster.router.table import WAYS
from mlpd.core.errors import ConfigurationError, MlpdError, NotFoundError
from mlpd.http.api import describe_routes
from mlpd.http.openapi import build_openapi

pytestmark = pytest.mark.timeout(300)  # the first test starts four daemons and trains


def people(seed: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"user": f"u{i % 45}", "age": i / 3} for i in range(90)]
    rows += [{"user": None, "age": 1.0}] * 3
    random.Random(seed).shuffle(rows)
    return rows


def test_every_route_of_the_daemon_has_a_way() -> None:
    table = describe_routes()
    assert WAYS.keys() == {f"{route.method} {route.path}" for route in table}
    for route in table:
        way = WAYS[f"{route.method} {route.path}"]
        if route.scope == "public":
            assert way == "own"
        if way in ("any", "own", "summed"):
            assert route.scope != "ingest"
        if route.shared and "/cluster/" not in route.path:
            assert way == "arbiter"
        if route.load == "ingest":
            assert way in ("rows", "refused")


def test_it_describes_and_documents_itself(routed: Any) -> None:
    status, document, _ = routed.call("GET", "/openapi.json")
    plain = build_openapi(describe_routes())
    assert (status, document["paths"].keys()) == (200, plain["paths"].keys())
    assert document["paths"]["/v1/routes"] == plain["paths"]["/v1/routes"]
    assert b"# How a router" in routed.call("GET", "/docs/paths/router.md")[1]
    for path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"):
        assert routed.call("GET", path)[0] == 200


def test_what_each_shard_has_of_its_own_is_refused_by_name(routed: Any) -> None:
    for call in (call for call, way in WAYS.items() if way == "refused"):
        method, _, path = call.partition(" ")
        status, answer, _ = routed.call(method, path.format_map(dict.fromkeys(NAMES, "x")), {})
        assert (status, answer["error"]["code"]) == (409, "not_routed"), call
        assert "mlpd shard list" in answer["error"]["hint"]


NAMES = ("name", "model", "feature", "source", "id", "order", "version", "alias")


def test_features_and_scores_are_those_of_one_daemon_bit_for_bit(
    trio: Any, routed: Any, cluster_module: Any
) -> None:
    m = cluster_module
    shops = [{"shop": shop} for shop in [*m.SHOPS, None, *m.SHOPS[::-1], 99]]
    asks: list[Any] = [
        lambda c: c.read_features("person", entities=people(1), at=m.AT_US),
        lambda c: c.read_features("place", entities=shops, at=m.AT_US),
        lambda c: c.read_features(
            features=["per_sale", "takings.count_1d"], entities=shops, at=m.AT_US
        ),
        lambda c: c.read_features(
            features=["request.age", "profile.amount"],
            request={"age": "float64"},
            entities=people(2),
            at=m.AT_US,
        ),
        lambda c: c.read_features("bare", entities={"age": np.arange(3.0)}, at=m.AT_US),
    ]
    with Client(trio.single.url) as single, Client(routed.url) as router:
        for act in asks:
            want, found = act(single), act(router)
            for part in ("columns", "statuses", "event_times"):
                assert pl.DataFrame(found[part]).equals(pl.DataFrame(want[part]))
            assert "errors" not in found
        rows, how = people(3), {"at": m.AT_US, "include": ["vector"]}
        want, found = single.predict("person", rows, **how), router.predict("person", rows, **how)
        for part in ("score", "vector"):
            values = [[p[part] for p in a["predictions"]] for a in (found, want)]
            assert np.array(values[0]).tobytes() == np.array(values[1]).tobytes()
        labels = [{"prediction_id": p["prediction_id"], "label": 1} for p in found["predictions"]]
        done = router.feedback([*labels, {"prediction_id": "no"}])
        assert (done["accepted"], done["joined"], done["orphans"]) == (len(rows), len(rows), 0)
        assert [row["index"] for row in done["rejected"]] == [len(rows)]
        again = router.read_features(
            "person", entities=people(1), at=m.AT_US, min_sequence=found["sequence"]
        )
        assert "errors" not in again


def test_events_through_it_are_stored_as_through_the_client(
    three: Any, cluster_module: Any
) -> None:
    m = cluster_module
    made, urls = m.give_map(three), [edge.url for edge in three]
    columns = m.sale_columns(240)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    frame = pl.DataFrame(rows[60:120]).with_columns(
        pl.from_epoch("event_time", "us").dt.replace_time_zone("UTC")
    )
    with m.serve_router(urls[1:]) as edge, Client(edge.url) as client:
        client.apply(m.DOCUMENT)
        assert [c.definitions()["version"] for c in members_of(urls)] == [1, 1, 1]
        notes = [{"event_time": 1, "text": "a"}]
        answers = [
            client.events.send("sales", {name: values[:60] for name, values in columns.items()}),
            client.events.send("sales", frame),
            client.events.send("sales", rows[120:180]),
            client.events.send_many({"sales": rows[180:], "notes": notes}),
        ]
        assert [answer["accepted"] for answer in answers] == [60, 60, 60, 61]
        first = client.events.send("sales", rows[:5], idempotency_key="k")
        assert not first["replayed"]
        assert client.events.send("sales", rows[:5], idempotency_key="k")["replayed"]
        bad = [{"event_time": "x", "user": "u1", "shop": 1}, rows[0], {"event_time": 1, "user": 5}]
        refused = client.events.send("sales", bad)
        assert (refused["accepted"], [r["index"] for r in refused["rejected"]]) == (1, [0, 2])
        status = client.status()
        assert status["sources"] == ["notes", "sales"]
        assert [s["state"] for s in status["router"]["shards"]] == ["ok"] * 3
        for body in ({"columns": {"a": [1], "b": []}}, {}, {"rows": [], "columns": {}}, [1], b"{"):
            code, answer, _ = edge.call("POST", "/v1/events/sales", body)
            assert (code, edge.call("POST", "/v1/events/none", {"rows": []})[0]) == (400, 404)
            assert answer["error"]["message"]
    stored = [*rows, *rows[:5], rows[0]]
    for shard, edge in zip(made.shards, three, strict=True):
        want = sum(shard in map(made.owner, m.slots_of_row(row)) for row in stored)
        assert edge.daemon.ingest.rows_by_source["sales"] == want


def members_of(urls: list[str]) -> Any:
    for url in urls:
        with Client(url) as client:
            yield client


def test_models_routes_and_inference_are_those_of_a_member(trio: Any, routed: Any) -> None:
    arbiter = trio.shards[0]
    for path in (
        "/v1/models", "/v1/models/person", "/v1/models/person/versions/champion", "/v1/jobs",
        "/v1/routes/person", "/v1/definitions", "/v1/runs", "/v2", "/v2/models/person",
        "/v2/models/person/versions/1/ready", "/v2/models/person/config",
    ):  # fmt: skip
        want, found = arbiter.call("GET", path), routed.call("GET", path)
        assert found[:2] == want[:2], path
        assert found[2]["content-type"] == want[2]["content-type"]
    with Client(arbiter.url) as one, Client(routed.url) as other:
        assert other.models.archive("person", 1) == one.models.archive("person", 1)
        with pytest.raises(NotFoundError):
            other.models.get("nobody")
    inputs = arbiter.call("GET", "/v2/models/person")[1]["inputs"]
    tensors = [
        {"name": i["name"], "datatype": i["datatype"], "shape": [2, *i["shape"][1:]],
         "data": [0.5] * 2 * int(np.prod(i["shape"][1:]))}
        for i in inputs
    ]  # fmt: skip
    before = routed.call("GET", "/v2/models/person/stats")[1]["model_stats"][0]
    call = ("POST", "/v2/models/person/infer", {"inputs": tensors})
    assert routed.call(*call)[:2] == arbiter.call(*call)[:2]
    after = routed.call("GET", "/v2/models/person/stats")[1]["model_stats"][0]
    assert after["inference_count"] == before["inference_count"] + 4
    assert after["inference_stats"]["success"]["count"] > 0
    assert routed.call("GET", "/v2/models/nobody")[1].keys() == {"error"}


def test_a_client_of_triton_infers_through_it_in_bytes_as_of_a_member(
    trio: Any, routed: Any
) -> None:
    found = []
    for edge in (trio.shards[0], routed):
        client = triton.InferenceServerClient(edge.host)
        try:
            assert client.is_server_ready()
            assert client.is_model_ready("person")
            inputs = []
            for spec in client.get_model_metadata("person")["inputs"]:
                values = np.linspace(-1, 1, 3 * spec["shape"][-1]).reshape(3, -1)
                tensor = triton.InferInput(spec["name"], [*values.shape], spec["datatype"])
                tensor.set_data_from_numpy(values.astype(DTYPES[spec["datatype"]]))
                inputs.append(tensor)
            answer = client.infer("person", inputs, request_compression_algorithm="gzip")
            outputs = answer.get_response()["outputs"]
            found.append([answer.as_numpy(output["name"]).tobytes() for output in outputs])
        finally:
            client.close()
    assert found[0] == found[1]


DTYPES = {"FP64": np.float64, "FP32": np.float32}

EXPERIMENT = {
    "unit": "user",
    "arms": {"a": 1.0, "b": 1.0},
    "metrics": [{"name": "bought", "kind": "mean", "better": "higher"}],
    "planned_units": 100,
}


def test_changes_are_the_arbiters_and_have_come_to_the_members_that_are_up(
    tmp_path: Any, transform_cache: Any, trio: Any, cluster_module: Any
) -> None:
    m = cluster_module
    with Client(trio.single.url) as client:
        archive = client.models.archive("person", 1)
    route = {"service": "person", "arms": [{"model": "person@champion"}]}
    with m.serve_all(tmp_path / "up", 2, transform_cache) as up:
        with m.serve_all(tmp_path / "down", 1, transform_cache) as down:
            m.give_map([*up, *down])
            urls = [edge.url for edge in (*up, *down)]
            with m.serve_router(urls[2:]) as edge, Client(edge.url) as client:
                client.apply(m.DOCUMENT)
                assert client.models.adopt(archive)["version"]["number"] == 1
                client.models.move_alias("person", "champion", 1, why="it is good")
                client.routes.put("person", route, expected=0)
                for member in members_of(urls):
                    assert member.routes.get("person")["version"] == 1
                    history = member.models.history("person")["events"]
                    assert "it is good" in str(history)
                made = client.experiments.put("ages", EXPERIMENT)
                assert made["result"]["units"] == 0
                for member in members_of(urls):
                    assert member.experiments.get("ages")["spec"] == made["spec"]
                with pytest.raises(MlpdError) as moved:
                    client.routes.put("person", route, expected=7)
                assert moved.value.status == 409
        with m.serve_router(urls[:1]) as edge, Client(edge.url) as client:
            client.routes.put("person", {**route, "fallback": 0.5}, expected=1)
            assert [c.routes.get("person")["version"] for c in members_of(urls[:2])] == [2, 2]
            rows = [{"user": f"u{i}", "age": 1.0} for i in range(40)]
            found = client.predict("person", rows)["predictions"]
            assert 0 < sum("error" in row for row in found) < 40
            assert all(row["score"] is not None for row in found if "error" not in row)


def test_one_daemon_without_a_map_is_served_as_it_is(trio: Any, cluster_module: Any) -> None:
    m = cluster_module
    with m.serve_router([trio.single.url]) as edge, Client(edge.url) as client:
        assert client.read_features("person", entities=people(1)[:2])["sequence"] > 0
        assert client.cluster.map()["map"] is None
        assert client.status()["router"]["shards"][0]["state"] == "ok"
    with pytest.raises(ConfigurationError) as none, m.serve_router([trio.single.url] * 2):
        pass
    assert none.value.code == "no_cluster"
    with (
        pytest.raises(ConfigurationError) as other,
        m.serve_router([trio.shards[0].url, trio.single.url]),
    ):
        pass
    assert other.value.code == "other_cluster"


def test_it_is_not_ready_until_a_shard_answers(cluster_module: Any) -> None:
    m = cluster_module
    with m.serve_router(["http://127.0.0.1:9"]) as edge:
        for path in ("/readyz", "/v2/health/ready", "/v1/models"):
            assert edge.call("GET", path)[0] == 503
        assert edge.call("GET", "/healthz")[0] == 200


def test_metrics_are_those_of_all_shards(trio: Any, routed: Any) -> None:
    with Client(routed.url) as client:
        client.read_features("person", entities=people(5))
    parsed = [
        {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(edge.call("GET", "/metrics")[1].decode())
            for sample in family.samples
        }
        for edge in (*trio.shards, routed)
    ]
    *shards, merged = parsed
    rows = "mlpd_ingest_rows_total", (("result", "accepted"), ("source", "sales"))
    assert merged[rows] == sum(shard[rows] for shard in shards) > 0
    count = "mlpd_http_request_duration_seconds_count", (("route", "/v1/events/{source}"),)
    assert merged[count] == sum(shard[count] for shard in shards) > 0
    for name in "abc":
        assert merged["mlpd_storage_map_bytes", (("shard", name),)] > 0
        calls = "mlpd_router_calls_total", (("outcome", "answered"), ("shard", name))
        assert merged[calls] > 0
    assert merged["mlpd_router_epoch", ()] == 1


def test_a_shard_that_hangs_costs_its_rows_no_more_than_the_deadline(
    trio: Any, cluster_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never answers: that an answer comes at all is that nobody waits for it any longer."""
    monkeypatch.setattr(router_app, "REFRESH_S", 3600.0)  # the members would tell of the real one
    monkeypatch.setattr(upstream, "LATE_S", 2.0)
    monkeypatch.setattr(breaker, "PAUSE_S", 60.0)
    m = cluster_module
    rows = [{"user": f"u{i}", "age": 1.0} for i in range(40)]
    owners = [trio.shard_map.owner(m.slots_of_row(row)[0]).name for row in rows]
    with (
        socket.create_server(("127.0.0.1", 0)) as hung,
        m.serve_router([edge.url for edge in trio.shards], read_s=2.1) as edge,
        Client(edge.url, timeout_s=40.0) as client,
    ):
        guide = edge.daemon.members.guide
        url = f"http://127.0.0.1:{hung.getsockname()[1]}"
        *others, last = guide.topology.shard_map.shards
        stuck = replace(guide.topology.shard_map, shards=(*others, replace(last, url=url)))
        guide.topology = replace(guide.topology, shard_map=stuck)
        found = client.predict("person", rows, deadline_s=1.0)["predictions"]
        codes = [row.get("error", {}).get("code") for row in found]
        assert codes == [("deadline_exceeded" if o == "c" else None) for o in owners]
        for want in ("timeout", "timeout", "timeout", "shard_down"):
            read = client.read_features("person", entities=rows)
            assert {error["code"] for error in read["errors"]} == {want}
            assert len(read["errors"]) == owners.count("c")
        assert edge.call("GET", "/metrics")[0] == 200
        assert b'mlpd_router_shard_down{shard="c"} 1.0' in edge.call("GET", "/metrics")[1]
        for bad in ("x", "-1", "0"):
            headers = {"x-deadline-ms": bad}
            body = {"service": "person", "entities": rows[:1]}
            assert edge.call("POST", "/v1/features/read", body, headers)[0] in (400, 504)


def test_routers_with_older_maps_learn_and_store_each_event_once(
    three: Any, cluster_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = cluster_module
    monkeypatch.setattr(router_app, "REFRESH_S", 3600.0)  # they learn by requests alone
    made, urls = m.give_map(three), [edge.url for edge in three]
    columns = m.sale_columns(60)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    with m.serve_router(urls) as old, m.serve_router(urls) as new:  # noqa: SIM117 - in this order
        with Client(old.url) as one, Client(new.url) as other:
            one.apply(m.DOCUMENT)
            other.events.send("sales", rows[:20])
            following = made.next(made.shards, made.owners)
            put(three[0], following, "a", 1)
            other.wait_ready()
            new.daemon.members.guide.topology = replace(
                new.daemon.members.guide.topology, shard_map=following
            )
            with pytest.raises(MlpdError) as behind:  # b and c haven't heard of it yet
                other.events.send("sales", rows[20:40], idempotency_key="k")
            assert behind.value.code == "map_behind"
            put(three[1], following, "b", 1)
            put(three[2], following, "c", 1)
            assert old.daemon.members.epoch == 1
            assert one.events.send("sales", rows[40:])["accepted"] == 20
            assert old.daemon.members.epoch == 2
            assert other.events.send("sales", rows[20:40], idempotency_key="k")["accepted"] == 20
            for client in (one, other):
                assert "errors" not in client.read_features("person", entities=people(1))
    for shard, edge in zip(made.shards, three, strict=True):
        want = sum(shard in map(made.owner, m.slots_of_row(row)) for row in rows)
        assert edge.daemon.ingest.rows_by_source["sales"] == want


def put(edge: Any, shard_map: Any, name: str, expected: int) -> None:
    with Client(edge.url) as client:
        client.cluster.put_map(shard_map.to_dict(), shard=name, expected=expected)


def test_kept_rows_are_given_again_until_this_router_changes_them(
    three: Any, cluster_module: Any
) -> None:
    m = cluster_module
    m.give_map(three)
    urls = [edge.url for edge in three]
    people = [{"user": user, "age": 1.0} for user in ("u1", "u2")]
    now = int(time.time() * 1e6)
    with m.serve_router(urls, cache_age_s=60.0) as edge, Client(edge.url) as client:
        client.apply(m.DOCUMENT)

        def read() -> list[Any]:
            found: list[Any] = client.read_features("person", entities=people)["columns"][
                "profile.amount"
            ]
            return found

        def send(to: Any, user: str, amount: float) -> None:
            to.events.send("sales", [{"event_time": now, "user": user, "amount": amount}])

        send(client, "u1", 1.0)
        assert read() == read() == [1.0, None]
        with Client(urls) as elsewhere:
            send(elsewhere, "u1", 2.0)
        assert read() == [1.0, None]  # within the age
        send(client, "u2", 5.0)
        assert read() == [1.0, 5.0]
        send(client, "u1", 3.0)
        assert read() == [3.0, 5.0]
        assert edge.daemon.cache.hits > 0
        at = client.read_features("person", entities=people, min_sequence={"a": 0})
        assert at["columns"]["profile.amount"] == [3.0, 5.0]


def test_the_command_starts_says_where_and_stops_on_sigterm(trio: Any) -> None:
    command = [sys.executable, "-m", "mlpd", "router", "--port", "0", "--shards"]
    with subprocess.Popen(
        [*command, trio.shards[1].url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.partition(" is at ")[2].split()[0]
        with Client(url) as client:
            assert client.models.get("person")["name"] == "person"
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
    both = f"{trio.single.url},{trio.shards[0].url}"
    done = subprocess.run([*command, both], check=False, capture_output=True, text=True, timeout=40)
    assert done.returncode == 2
    assert "is of no cluster" in done.stderr
