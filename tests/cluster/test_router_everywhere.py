"""What members have of their own is answered over all of them as one daemon would answer it."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import polars as pl
import pytest

from mlpd.client import Client
from mlpd.cluster.router import alerting, erasures, watched
from mlpd.cluster.router import app as router_app
from mlpd.cluster.router.event_pages import Place, place_of
from mlpd.cluster.router.logs import merge_pages
from mlpd.cluster.router.watched import merge_freshness
from mlpd.core.columns import DType
from mlpd.core.errors import ConflictError, MlpdError
from mlpd.core.hashing import canonical_json, sha256_digest
from mlpd.daemon.offline import count_gathered, read_gathered, scan_gathered
from mlpd.monitoring.freshness import Freshness
from mlpd.monitoring.metrics import Registry

pytestmark = pytest.mark.timeout(300)  # the first test starts four daemons and trains


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard of a crowded machine isn't missing."""
    for module in (alerting, erasures, watched):
        monkeypatch.setattr(module, "LIST_S", 60.0)


ARMS = [{"name": "a", "model": "person@1"}, {"name": "b", "model": "person@1"}]
SPENT = {
    "unit": "user",
    "arms": {"a": 1.0, "b": 1.0},
    "metrics": [
        {"name": "spent", "kind": "mean"},
        {"name": "rate", "kind": "ratio"},
    ],
    "planned_units": 400,
}


def outcomes_of(users: list[str], seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {
            "unit": user,
            "id": f"order-{number}",
            "values": {"spent": rng.gauss(10, 3), "rate": [float(rng.randrange(3)), 4.0]},
        }
        for user in users
        for number in range(2)
    ]


def test_outcomes_by_unit_are_taken_as_by_one_daemon(
    trio: Any, routed: Any, cluster_module: Any
) -> None:
    users = [f"o{i}" for i in range(300)]
    sent = outcomes_of(users, 1)
    wrong = [
        {"unit": "never", "id": "1", "values": {"spent": 1.0}},
        {"unit": "o1", "id": "1", "values": {"none": 1.0}},
        {"unit": "o1", "values": {}},
        {"unit": 7, "id": "1", "values": {"spent": 1.0}},
        {"unit": "o1", "id": "1", "values": {"spent": "much"}},
    ]
    mixed = [*sent, *wrong]
    random.Random(2).shuffle(mixed)
    answers: list[Any] = []
    for url in (trio.single.url, routed.url):
        with Client(url) as client:
            client.experiments.put("spent", SPENT)
            client.routes.put("spent", {"service": "person", "arms": ARMS, "experiment": "spent"})
            cluster_module.catch_up(trio.shards)
            rows = [{"user": user, "age": 1.0} for user in users]
            assert not [p for p in client.predict("spent", rows)["predictions"] if "error" in p]
            send = client.experiments.send_outcomes
            found = [send("spent", mixed), send("spent", outcomes_of(users, 3)), send("spent", [])]
            result = client.experiments.get("spent")["result"]
            for phase in result["phases"]:
                del phase["started_us"]
            answers.append((found, result))
            for what, how in (("none", sent), ("spent", sent * 20)):
                with pytest.raises(MlpdError) as refused:
                    send(what, how)
                answers[-1][0].append((refused.value.status, refused.value.code))
    assert answers[0] == answers[1]
    (mixed_answer, again, *_), result = answers[0]
    assert (mixed_answer["accepted"], len(mixed_answer["rejected"])) == (len(sent), len(wrong))
    assert (again["accepted"], again["replaced"]) == (len(sent), len(sent))
    assert result["comparisons"][0]["difference"] is not None


def test_outcomes_that_a_silent_member_may_wait_for_are_named(
    trio: Any, cluster_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = cluster_module
    users = [f"o{i}" for i in range(40)]
    outcomes = outcomes_of(users, 4)
    owners = [trio.shard_map.owner(m.slots_of_row({"user": o["unit"]})[0]).name for o in outcomes]
    with m.serve_router([edge.url for edge in trio.shards]) as edge, Client(edge.url) as client:
        client.experiments.put("lost", SPENT)
        client.routes.put("lost", {"service": "person", "arms": ARMS, "experiment": "lost"})
        m.catch_up(trio.shards)
        found = client.predict("lost", [{"user": user, "age": 1.0} for user in users])
        assert not [p for p in found["predictions"] if "error" in p]
    with without_c(trio, m, monkeypatch) as edge, Client(edge.url) as client:
        with pytest.raises(MlpdError) as lost:
            client.experiments.send_outcomes("lost", outcomes)
        lost_rows = [row for row, owner in enumerate(owners) if owner == "c"]
        assert 0 < len(lost_rows) < len(outcomes)
        assert lost.value.details["failed_rows"] == lost_rows
        assert (lost.value.status, lost.value.details["shard"]) == (503, "c")
        known = [o for o, owner in zip(outcomes, owners, strict=True) if owner != "c"]
        found = client.experiments.send_outcomes("lost", known)
        assert (found["accepted"], found["replaced"]) == (len(known), len(known))


@contextmanager
def without_c(trio: Any, m: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Run a router that can't reach shard c."""
    monkeypatch.setattr(router_app, "REFRESH_S", 3600.0)  # the members would tell of the real one
    with m.serve_router([edge.url for edge in trio.shards]) as edge:
        guide = edge.daemon.members.guide
        *others, last = guide.topology.shard_map.shards
        gone = replace(last, url="http://127.0.0.1:9")
        lacking = replace(guide.topology.shard_map, shards=(*others, gone))
        guide.topology = replace(guide.topology, shard_map=lacking)
        yield edge


def test_an_entity_is_erased_from_all_members_under_one_receipt(
    tmp_path: Any, transform_cache: Any, cluster_module: Any
) -> None:
    m = cluster_module
    columns = m.sale_columns(300)
    told: list[Any] = []
    with m.serve_all(tmp_path, 3, transform_cache) as (single, *pair):
        m.give_map(pair)
        with m.serve_router([edge.url for edge in pair]) as edge:
            for url in (single.url, edge.url):
                with Client(url) as client:
                    client.apply(m.DOCUMENT)
                    client.events.send("sales", columns)
                    receipt = client.erase("user", [{"user": "u1"}, {"user": "u2"}])
                    assert client.erasure(receipt["id"])["receipt"] == receipt
                    read = client.read_features("both", entities=ASKED, at=m.AT_US)
                    told.append((receipt, read["columns"], read["statuses"]))
            (want, *features), (found, *others) = told
            assert features == others
            for name in ("entity", "keys", "online_rows", "tile_rows", "views_rebuilt", "caveats"):
                assert found[name] == want[name], name
            assert [part["shard"] for part in found["parts"]] == ["a", "b"]
            stored = [edge.daemon.ingest.rows_by_source["sales"] for edge in pair]
            left = [part["sources"].get("sales", {"rows": 0})["rows"] for part in found["parts"]]
            assert (
                found["sources"]["sales"]["rows"] == sum(left) >= want["sources"]["sales"]["rows"]
            )
            assert all(rows < held for rows, held in zip(left, stored, strict=True))
            pages = []  # all of it lies in segments now
            for url in (single.url, edge.url):
                with Client(url) as client:
                    kept = client.events.page_frame("sales").drop("__sequence", "known_at")
                    pages.append(sorted(kept.rows(), key=str))
            assert pages[0] == pages[1] != []
            digest = found.pop("digest")
            assert digest == sha256_digest(canonical_json(found))
            with Client(edge.url) as client:
                listed = client.erasures()
                assert [r["shard"] for r in listed["receipts"]] in (["a", "b"], ["b", "a"])
                assert {r["id"] for r in listed["receipts"]} == {found["id"]}
                assert (listed["open"], listed["missing"]) == ([], [])
                with pytest.raises(MlpdError) as unknown:
                    client.erasure("0" * 32)
                assert (unknown.value.status, unknown.value.code) == (404, "unknown_erasure")
                with pytest.raises(MlpdError) as wrong:
                    client.erase("user", [{"name": "a"}])
                assert wrong.value.code == "wrong_entity_key"
            order = {"entity": "user", "keys": [{"user": "u1"}], "id": found["id"]}
            for to in (edge, pair[0]):
                status, answer, _ = to.call("POST", "/v1/erase", order)
                assert (status, answer["error"]["code"]) == (409, "known_erasure")
            status, answer, _ = edge.call("POST", "/v1/erase", {**order, "id": "x"})
            assert (status, answer["error"]["code"]) == (400, "wrong_order_id")


ASKED = [{"user": f"u{i % 40}", "shop": i % 12} for i in range(60)]


def test_a_silence_is_one_on_all_members_and_alerts_are_shown_by_shard(
    trio: Any, routed: Any, cluster_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(routed.url) as client:
        made = client.alerts.silence({"model": "nobody"}, lasts="1h", why="a test")
        (shown,) = client.alerts.list()["silences"]
        assert shown == {**made, "shards": ["a", "b", "c"]}
        for edge in trio.shards:
            with Client(edge.url) as member:
                (held,) = member.alerts.list()["silences"]
                assert (held["id"], held["by"], held["why"]) == (made["id"], made["by"], "a test")
        again = {"matchers": {"model": "nobody"}, "lasts": "1h", "id": made["id"]}
        assert routed.call("POST", "/v1/alerts/silences", again)[:2] == (200, made)
        other = {**again, "matchers": {"model": "other"}}
        status, answer, _ = routed.call("POST", "/v1/alerts/silences", other)
        assert (status, answer["error"]["code"]) == (409, "known_silence")
        status, answer, _ = routed.call("POST", "/v1/alerts/silences", {**again, "id": "7"})
        assert (status, answer["error"]["code"]) == (400, "wrong_silence_id")
        tested = client.alerts.test()
        assert {sink["shard"] for sink in tested["sinks"]} == {"a", "b", "c"}
        with without_c(trio, cluster_module, monkeypatch) as edge, Client(edge.url) as lacking:
            listed = lacking.alerts.list()
            assert [gone["shard"] for gone in listed["missing"]] == ["c"]
            assert listed["silences"][0]["shards"] == ["a", "b"]
            with pytest.raises(MlpdError) as part:
                lacking.alerts.silence({"model": "nobody"}, lasts="1h")
            assert (part.value.status, part.value.code) == (503, "part_missing")
            assert part.value.details["done"] == ["a", "b"]
            lacking_id = part.value.details["silence"]
            assert lacking.quality()["missing"][0]["shard"] == "c"
            with pytest.raises(MlpdError) as sums:
                lacking.freshness()
            assert (sums.value.code, sums.value.details["shard"]) == ("part_missing", "c")
        assert client.alerts.unsilence(made["id"])["id"] == made["id"]
        assert client.alerts.unsilence(lacking_id)["id"] == lacking_id
        assert client.alerts.list()["silences"] == []
        with pytest.raises(MlpdError) as unknown:
            client.alerts.unsilence(made["id"])
        assert unknown.value.code == "unknown_silence"


def test_marks_of_sources_quality_and_collection_add_up(
    tmp_path: Any, transform_cache: Any, cluster_module: Any
) -> None:
    m = cluster_module
    bad = [{"event_time": "x", "user": "u1"}, {"event_time": 1, "user": "u2", "amount": "much"}]
    seen: list[Any] = []
    with m.serve_all(tmp_path, 3, transform_cache) as (single, *pair):
        m.give_map(pair)
        with m.serve_router([edge.url for edge in pair]) as edge:
            for url in (single.url, edge.url):
                with Client(url) as client:
                    client.apply(m.DOCUMENT)
                    client.events.send("sales", m.sale_columns(200))
                    client.events.send("sales", bad)
                    seen.append((client.freshness(), client.quality(), client.models.collect()))
    (fresh, quality, collected), (fresh_over, quality_over, collected_over) = seen
    assert collected_over == collected
    assert fresh_over.keys() == fresh.keys()
    assert fresh_over["sources"]["sales"]["watermark"] == fresh["sources"]["sales"]["watermark"]
    (sales,) = [s for s in quality["sources"] if s["source"] == "sales"]
    (over,) = [s for s in quality_over["sources"] if s["source"] == "sales"]
    assert over["rows_by_code"] == sales["rows_by_code"] != {}
    assert over["rejected"] == sales["rejected"] == 2
    assert over["rows"] >= sales["rows"]
    assert {sample["code"] for sample in over["samples"]} == {s["code"] for s in sales["samples"]}


def test_ages_at_serving_and_marks_add_up_to_those_of_one_daemon() -> None:
    rng = np.random.default_rng(3)
    ages_s = np.where(rng.random(500) < 0.1, np.nan, rng.exponential(3000.0, 500))
    where = rng.integers(0, 3, 500)
    marks = [
        {"watermark": "2026-01-01T00:00:01Z", "behind_s": 9.0, "lag_s": 3.0},
        {"watermark": "2026-01-01T00:00:08Z", "behind_s": 2.0, "lag_s": 1.0},
        NO_MARK,
        NO_MARK,
    ]
    parts = [report_of(ages_s[where == part], mark) for part, mark in enumerate(marks)]
    best = {**marks[1], "lag_s": 3.0}
    want, found = report_of(ages_s, best), merge_freshness(parts)
    for report in (want, found):
        report["views"]["profile"]["age_mean_s"] = f"{report['views']['profile']['age_mean_s']:.9}"
        report["views"]["profile"]["ages"] = [*report["views"]["profile"]["ages"]]
    assert found == want
    nothing = merge_freshness([report_of(ages_s[:0], NO_MARK)] * 2)["views"]["profile"]
    assert nothing == {**report_of(ages_s[:0], NO_MARK)["views"]["profile"], "ages": [0] * 14}


NO_MARK = {"watermark": None, "behind_s": None, "lag_s": None}


def report_of(ages_s: Any, mark: dict[str, Any]) -> dict[str, Any]:
    """What a daemon reports that served rows of such ages."""
    view = Freshness(Registry()).view("profile", ttl_s=5000.0, slo_s=1000.0)
    view.observe_many(ages_s)
    known = {"kind": "latest", "source": "sales", **mark, **asdict(view.report())}
    return {"views": {"profile": known}, "sources": {"sales": mark}, "age_bounds_s": [1.0]}


def test_joins_over_all_shards_are_those_of_one_daemon_bit_for_bit(
    trio: Any, routed: Any, cluster_module: Any
) -> None:
    m = cluster_module
    hour_us = 3_600_000_000
    spine = [
        {"user": f"u{i % 42}", "shop": i % 13, "event_time": m.START_US + i * hour_us}
        for i in range(90)
    ]
    spine += [{**spine[7], "user": None}, {**spine[8], "shop": None}, spine[9]]
    random.Random(3).shuffle(spine)
    frame = pl.DataFrame(spine).with_columns(
        pl.from_epoch("event_time", "us").dt.replace_time_zone("UTC")
    )
    features = ["per_sale", "profile.amount", "spend.amount_mean_1d"]
    asks: list[tuple[str, Any]] = [
        (routed.url, lambda c: c.history(features=features, spine=spine, statuses=True)),
        (
            trio.shards[1].url,
            lambda c: c.history("both", spine=frame, mode="as_corrected", closed="left"),
        ),
    ]
    with Client(trio.single.url) as single:
        for url, act in asks:
            with Client(url) as other:
                want, found = act(single), act(other)
            assert found.equals(want)
            assert want.height == len(spine)
            assert want.select(pl.all().drop_nulls().len() > 20).row(0) == (True,) * want.width
    for edge in trio.shards:
        assert not [*edge.daemon.paths.joins.glob("*")]


def test_events_of_several_shards_read_in_parts_keep_their_order(tmp_path: Any) -> None:
    rng, paths = np.random.default_rng(4), []
    for shard in range(3):
        n = int(rng.integers(0, 50)) * shard
        frame = pl.DataFrame(
            {
                "__event_time": rng.integers(0, 9, n),
                "__known_time": rng.integers(0, 9, n),
                "__sequence": rng.permutation(n) + 1,
                "amount": rng.normal(size=n),
                "__deleted": [None] * n,
            },
            schema_overrides={"__deleted": pl.Boolean},
        )
        paths.append(str(tmp_path / f"{shard}.parquet"))
        frame.write_parquet(paths[-1])
    columns = {"amount": DType.FLOAT64, "__deleted": DType.BOOL}
    whole = scan_gathered(paths, columns).collect()
    parts = [*read_gathered(paths, columns, 7)]
    assert max(map(len, parts)) == 7
    ordered = pl.concat(parts).sort("__known_time", "__event_time", "__sequence")
    assert ordered.drop("__sequence").equals(whole.drop("__sequence"))
    assert count_gathered(paths) == len(whole) > 0


def test_summaries_of_features_are_those_of_one_daemon_bit_for_bit(trio: Any, routed: Any) -> None:
    asks: list[tuple[str, Any]] = [
        (routed.url, lambda c: c.feature_stats("both")),
        (trio.shards[2].url, lambda c: c.feature_stats("profile", entities=17)),
    ]
    with Client(trio.single.url) as single:
        for url, act in asks:
            with Client(url) as other:
                want, found = act(single), act(other)
            for view in (*want["views"], *found["views"]):
                ages_s = view.pop("ages_s")
                assert (view["view"] == "takings") == (ages_s == {})
            del want["at"], found["at"]
            assert found == want
    (profile,) = want["views"]
    assert (profile["entities"], profile["complete"]) == (17, False)
    (amount,) = profile["features"]
    assert amount["present"] == 17
    with Client(routed.url) as client:
        for asked, code in (
            ({"name": "nothing"}, "unknown_view"),
            ({"name": "profile", "entities": 100_001}, "wrong_limit"),
        ):
            with pytest.raises(MlpdError) as refused:
                client.feature_stats(**asked)
            assert refused.value.code == code


def test_the_prediction_log_comes_page_by_page_in_the_order_of_time(
    trio: Any, routed: Any, cluster_module: Any
) -> None:
    rows = [{"user": f"u{i % 40}", "age": i / 9} for i in range(60)]
    with Client(routed.url) as client:
        client.routes.put("paged", {"service": "person", "arms": [{"model": "person@1"}]})
        cluster_module.catch_up(trio.shards)
        served: dict[str, Any] = {}
        for start in range(0, len(rows), 10):
            part = rows[start : start + 10]
            found = client.predict("paged", part, include=["vector"])["predictions"]
            served |= {row["prediction_id"]: row["vector"] for row in found}
        labels = [{"prediction_id": name, "label": 1} for name in [*served][:40]]
        assert client.feedback(labels)["joined"] == 40
        status, first, _ = routed.call("GET", "/v1/predictions?route=paged&limit=40")
        assert (status, first["columns"]["position"][-1]) == (200, first["position"])
        pages, after = [], first["position"]
        while len(first["columns"]["score"]) + sum(map(len, pages)) < len(rows):
            page = client.predictions(route="paged", limit=40, after=after)
            assert len(page)
            pages.append(page)
            after = page["position"][-1].hex()
        frame = pl.concat(pages)
        assert all(len(page) <= 40 + 31 for page in (first["columns"]["score"], *pages))
        ids = first["columns"]["prediction_id"], frame["prediction_id"].to_list()
        vectors = dict(zip(ids[0], first["columns"]["vector"], strict=True))
        vectors |= dict(frame.select("prediction_id", "vector").iter_rows())
        assert (len(ids[0]) + len(ids[1]), vectors.keys()) == (len(served), served.keys())
        assert all(np.array_equal(vectors[i], served[i], equal_nan=True) for i in served)
        times_us = frame["served_time"].to_physical().to_list()
        times_us = [*first["columns"]["served_time"], *times_us]
        assert times_us == sorted(times_us)
        assert sum(label is not None for label in first["columns"]["label"]) > 0
        for query in ("limit=0", "limit=100001", "after=7"):
            status, answer, _ = routed.call("GET", f"/v1/predictions?{query}")
            assert (status, answer["error"]["code"]) == (400, "invalid_page")


def test_pages_of_several_shards_end_where_one_may_have_more() -> None:
    rng = random.Random(8)
    for _ in range(30):
        lists = [sorted(rng.randbytes(1) for _ in range(rng.randrange(60))) for _ in range(4)]
        left, found = [*lists], []
        while True:
            # A shard's page has its first rows, and those of the last one's position.
            asked = [[p for p in part if p <= part[:3][-1]] for part in left]
            frames = [
                pl.DataFrame({"position": part}, schema={"position": pl.Binary()}) for part in asked
            ]
            page = merge_pages(frames, 3, 8)["position"].to_list()
            if not page:
                break
            found += page
            left = [[p for p in part if p > page[-1]] for part in lists]
        assert found == sorted(p for part in lists for p in part)


def test_pages_of_events_have_each_event_once_whatever_shards_it_concerns(
    trio: Any, routed: Any, cluster_module: Any
) -> None:
    m, own = cluster_module, ["event_time", "known_at", "user", "shop", "amount", "__deleted"]
    start_us = m.START_US + 100 * 60_000_000
    with Client(trio.single.url) as single, Client(routed.url) as client:
        want = single.events.page("sales", limit=10_000)["columns"]
        rows: list[Any] = []
        page = client.events.page("sales", limit=90)
        through, numbers = page["through"], []
        while True:
            rows += zip(*(page["columns"][name] for name in own), strict=True)
            numbers += page["columns"]["__sequence"]
            assert len(page["columns"]["user"]) <= 90
            assert page["through"] == through
            if page["sequence"] == through:
                break
            after = page["sequence"]
            page = client.events.page("sales", limit=90, after=after, through=through)
        assert sorted(rows, key=str) == sorted(zip(*(want[n] for n in own), strict=True), key=str)
        assert numbers == sorted(set(numbers))
        assert client.events.page("sales", after=through)["columns"]["user"] == []
        frame = client.events.page_frame("sales", limit=690, start=start_us)
        assert len(frame) == 690
        after = frame["__sequence"][-1]
        more = client.events.page_frame("sales", limit=690, start=start_us, after=after)
        assert len(more) == 10
        found = pl.concat([frame, more])
        assert found["__sequence"].to_list() == [*dict.fromkeys(found["__sequence"])]
        whole = single.events.page_frame("sales", start=start_us)
        assert sorted(found.select(own).rows(), key=str) == sorted(
            whole.select(own).rows(), key=str
        )
        assert set(found["__sequence"]) <= set(numbers)
        for asked, code in (({"after": 1}, "epoch_moved"), ({"limit": 0}, "invalid_page")):
            with pytest.raises(MlpdError) as refused:
                client.events.page("sales", **asked)
            assert refused.value.code == code
        with pytest.raises(MlpdError) as unknown:
            client.events.page("nothing")
        assert unknown.value.code == "unknown_source"


def test_numbers_of_a_router_ascend_and_tell_their_place_by_one_map_alone() -> None:
    places = [Place(shard, sequence) for shard in (0, 1, 999) for sequence in (0, 1, (1 << 40) - 1)]
    for epoch in (0, 1, 4095, 4096, 10**6):
        numbers = [place.number(epoch) for place in places]
        assert numbers == sorted(numbers)
        assert 0 <= numbers[0] < numbers[-1] < 1 << 62
        assert [place_of(number, epoch, 1000) for number in numbers] == places
        for number in (*numbers, -1, 1 << 70):
            with pytest.raises(ConflictError, match="another map"):
                place_of(number, epoch + 1, 1000)
    with pytest.raises(ConflictError, match="another map"):
        place_of(Place(2, 0).number(1), 1, 2)
