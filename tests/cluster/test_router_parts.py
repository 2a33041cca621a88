"""Parts of the router by themselves: the breaker, hedging, the cache, metrics of several shards."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from mlpd.client import requests as r
from mlpd.client.scatter import Topology
from mlpd.cluster.placement import first_map
from mlpd.cluster.router.breaker import FAILURES, PAUSE_MAX_S, PAUSE_S, Breaker
from mlpd.cluster.router.cache import HotKeys, Row, join_rows, split_answer
from mlpd.cluster.router.cached_reads import read_cached
from mlpd.cluster.router.exposition import merge_expositions
from mlpd.cluster.router.hedging import LEAST, Hedging
from mlpd.cluster.router.summed import merge_statistics
from mlpd.cluster.router.upstream import Until, Upstream
from mlpd.core.columns import DType
from mlpd.core.errors import DeadlineExceededError, MlpdError, UnavailableError
from mlpd.core.hashing import slot_of
from mlpd.core.keys import encode_entity
from mlpd.core.routing import Routing
from mlpd.core.shards import Shard
from mlpd.core.specs import EntitySpec

USER = EntitySpec("user", (("user", DType.STRING),))
ROUTING = Routing({"sales": (USER,)}, {"person": (USER,)}, {}, {})
TOPOLOGY = Topology(
    first_map("0f" * 16, [Shard("a", "http://a:1"), Shard("b", "http://b:1")]), ROUTING
)


def test_a_shard_that_fails_is_left_alone_and_tried_by_one() -> None:
    breaker = Breaker(lambda: 0.0)
    for _ in range(FAILURES):
        breaker.check("a", 0.0)
        breaker.failed(0.0)
    assert breaker.is_open
    now_s, pause_s = 0.0, PAUSE_S
    for _ in range(8):
        with pytest.raises(UnavailableError) as down:
            breaker.check("a", now_s + pause_s - 0.01)
        assert (down.value.code, down.value.details["shard"]) == ("shard_down", "a")
        now_s += pause_s
        breaker.check("a", now_s)  # the one that tries
        with pytest.raises(UnavailableError):
            breaker.check("a", now_s)
        breaker.failed(now_s)
        pause_s = min(PAUSE_MAX_S, 2 * pause_s)
    breaker.succeeded()
    breaker.check("a", now_s)
    assert not breaker.is_open


def test_at_most_the_share_of_reads_is_hedged_whatever_they_take() -> None:
    hedging, draw = Hedging(0.05), random.Random(1)
    assert hedging.delay_s is None
    slow = 0
    for i in range(10_000):
        seconds = draw.expovariate(100.0) * (1 + i / 1000)  # it becomes slower all the time
        if hedging.delay_s is not None and seconds > hedging.delay_s:
            slow += 1
            hedging.take()
        hedging.note(seconds)
        assert (hedging.delay_s is None) == (i + 1 < LEAST)
    assert 0.8 * slow <= hedging.hedged <= 0.05 * 10_000 + 1
    assert Hedging(0.0).delay_s is None


async def serve(answer: Callable[[web.Request], Awaitable[web.Response]]) -> tuple[Any, str]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
    return runner, f"http://127.0.0.1:{port}"


async def test_a_slow_read_is_sent_once_more_and_the_first_answer_counts() -> None:
    seen, over = 0, asyncio.Event()

    async def answer(_: web.Request) -> web.Response:
        nonlocal seen
        seen += 1
        if (number := seen) == 1:
            await over.wait()
        return web.json_response({"n": number})

    runner, url = await serve(answer)
    hedging = Hedging()
    hedging._delay_s = 0.02
    upstream = Upstream(url, hedging, random.random)
    try:
        found = await upstream.ask_hedged(r.get("x"), Until.after(40.0))
        assert (r.read_answer(found), hedging.hedged, hedging.won) == ({"n": 2}, 1, 1)
        seen = 0
        hedging._saved = 0.0
        deadline_s = asyncio.get_running_loop().time() + 0.1
        with pytest.raises(DeadlineExceededError):  # no budget, and no more than the deadline
            await upstream.ask_hedged(r.get("x"), Until.after(40.0, deadline_s))
        assert (hedging.hedged, upstream.breaker.is_open) == (1, False)
    finally:
        over.set()
        await upstream.close()
        await runner.cleanup()


async def test_a_lost_connection_is_opened_anew_where_that_is_safe() -> None:
    seen: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.path)
        if len(seen) % 2:
            assert request.transport is not None
            request.transport.abort()
        return web.json_response({})

    runner, url = await serve(answer)
    upstream = Upstream(url, Hedging(), random.random)
    try:
        sent = r.Request("POST", "/again", b"{}")
        assert (await upstream.ask(sent, Until.after(40.0))).status == 200
        with pytest.raises(UnavailableError) as lost:
            await upstream.ask(
                r.Request("POST", "/once", b"{}", repeatable=False), Until.after(40.0)
            )
        assert (lost.value.code, seen) == ("connection_lost", ["/again", "/again", "/once"])
    finally:
        await upstream.close()
        await runner.cleanup()


async def test_who_comes_to_a_silent_shard_doesnt_wait_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mlpd.cluster.router.upstream.SILENCE_S", 0.1)
    speaks = asyncio.Event()

    async def answer(_: web.Request) -> web.Response:
        await speaks.wait()
        return web.json_response({})

    runner, url = await serve(answer)
    upstream = Upstream(url, Hedging(), lambda: 0.0)
    try:
        first = [asyncio.ensure_future(upstream.ask(r.get("x"), Until.after(40.0))) for _ in "abc"]
        await asyncio.sleep(0)  # all three have come, before the time runs
        await asyncio.sleep(0.15)
        with pytest.raises(UnavailableError, match="counts as down"):
            await upstream.ask(r.get("x"), Until.after(40.0))
        speaks.set()
        assert [answer.status for answer in await asyncio.gather(*first)] == [200] * 3
        assert (await upstream.ask(r.get("x"), Until.after(40.0))).status == 200
    finally:
        await upstream.close()
        await runner.cleanup()


class Store:
    """A value per user; `reads` are the users that were asked for."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}
        self.reads: list[str] = []
        self.fails = False

    async def ask(self, rows: Any) -> dict[str, Any]:
        if self.fails:
            raise UnavailableError("it is down", code="unreachable")
        self.reads += [row["user"] for row in rows]
        return {
            "columns": {"x": [self.values.get(row["user"], 0) for row in rows]},
            "statuses": {"x": [0] * len(rows)},
            "event_times": {},
            "t_us": 1,
            "sequence": {"a": len(self.reads)},
        }


def slot(user: str) -> int:
    encoded = encode_entity([DType.STRING], [user], "user")
    assert encoded is not None
    return slot_of(encoded)


USERS = st.sampled_from("abcdef")
STEPS = st.lists(
    st.tuples(st.just("read"), st.lists(USERS, min_size=1, max_size=4))
    | st.tuples(st.just("write"), USERS)
    | st.tuples(st.just("elsewhere"), USERS)
    | st.tuples(st.just("wait"), st.floats(0.0, 2.0)),
    max_size=30,
)


@settings(max_examples=50)
@given(STEPS)
def test_what_this_router_wrote_is_seen_at_once_and_all_else_after_the_age(steps: Any) -> None:
    now_s, store = 0.0, Store()
    cache = HotKeys(1.0, 4, lambda: now_s)
    changed_s: dict[str, float] = {}
    before: dict[str, int] = {}
    for kind, what in steps:
        if kind == "wait":
            now_s += what
        elif kind == "read":
            fields = {"service": "person", "entities": [{"user": user} for user in what]}
            answer = asyncio.run(
                read_cached(cache, TOPOLOGY, "services", ["person"], fields, store.ask)
            )
            for user, value in zip(what, answer["columns"]["x"], strict=True):
                if value != store.values.get(user, 0):  # another router's write, not long ago
                    assert before[user] <= value
                    assert now_s < changed_s[user] + 1.0
            assert len(cache) <= 4
        else:
            store.values[what] = store.values.get(what, 0) + 1
            if kind == "write":
                cache.forget([slot(what)])
                before[what] = store.values[what]
                changed_s.pop(what, None)
            elif what not in changed_s:
                before[what], changed_s[what] = store.values[what] - 1, now_s
            else:
                changed_s[what] = now_s


async def test_a_read_under_way_when_its_slot_changes_is_not_kept() -> None:
    cache, store = HotKeys(10.0, 10), Store()
    fields = {"service": "person", "entities": [{"user": "a"}, {"user": "b"}]}

    async def ask(rows: Any) -> dict[str, Any]:
        cache.forget([slot("a")])
        return await store.ask(rows)

    for _ in range(2):
        await read_cached(cache, TOPOLOGY, "services", ["person"], fields, ask)
    assert store.reads == ["a", "b", "a"]
    store.fails = True
    part = {"service": "person", "entities": [{"user": "z"}, {"user": "b"}]}
    found = await read_cached(cache, TOPOLOGY, "services", ["person"], part, store.ask)
    assert found["columns"]["x"] == [None, 0]
    assert [(e["index"], e["code"]) for e in found["errors"]] == [(0, "unreachable")]
    one = {"service": "person", "entities": [{"user": "z"}]}
    with pytest.raises(MlpdError):
        await read_cached(cache, TOPOLOGY, "services", ["person"], one, store.ask)
    cache.bound(0.0)  # features that promise to be fresh at once
    cache.forget()
    store.fails = False
    for _ in range(2):
        await read_cached(cache, TOPOLOGY, "services", ["person"], fields, store.ask)
    assert store.reads[-4:] == ["a", "b"] * 2


def test_rows_of_an_answer_make_it_again() -> None:
    answer = {
        "columns": {"x": [1, None, 3], "y": ["a", None, "c"]},
        "statuses": {"x": [0, None, 0], "y": [0, None, 1]},
        "event_times": {"v": [7, None, 9]},
        "t_us": 5,
        "sequence": {"a": 3, "b": 2},
        "errors": [{"index": 1, "code": "x"}],
    }
    rows = split_answer(answer, 3)
    assert join_rows(rows, answer["errors"]) == answer  # type: ignore[arg-type]
    older = Row((("x", "y"), ("v",)), (1, "a"), (0, 0), (7,), 4, {"a": 1})
    joined = join_rows([older, rows[2]], ())
    assert (joined["t_us"], joined["sequence"]) == (4, {"a": 1, "b": 2})


def test_counters_and_histograms_add_up_and_gauges_say_whose_they_are() -> None:
    text = (
        '# HELP n_total Things.\n# TYPE n_total counter\nn_total{k="v w"} %d.0\n'
        '# HELP g A gauge.\n# TYPE g gauge\ng %d.5\ng{k="a"} NaN\n'
        '# HELP h H.\n# TYPE h histogram\nh_bucket{le="1.0"} 1\nh_bucket{le="+Inf"} %d\n'
        "h_sum 0.5\nh_count %d\n"
    )
    merged = merge_expositions({"a": text % (1, 1, 2, 2), "b": text % (2, 2, 3, 3) + "x_total 9\n"})
    found = {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(merged)
        for s in family.samples
    }
    assert found["n_total", (("k", "v w"),)] == 3
    assert (found["g", (("shard", "a"),)], found["g", (("shard", "b"),)]) == (1.5, 2.5)
    assert found["h_bucket", (("le", "+Inf"),)] == found["h_count", ()] == 5
    assert found["h_sum", ()] == 1.0


def test_statistics_of_models_add_up_by_version_and_batch_size() -> None:
    def model(n: int, sizes: list[int]) -> dict[str, Any]:
        return {
            "name": "m",
            "version": "1",
            "last_inference": n,
            "inference_count": n,
            "inference_stats": {"success": {"count": n, "ns": 10 * n}},
            "batch_stats": [{"batch_size": s, "compute_infer": {"count": n}} for s in sizes],
        }

    (found,) = merge_statistics(
        [{"model_stats": [model(1, [1])]}, {"model_stats": [model(2, [1, 4])]}]
    )
    assert (found["inference_count"], found["last_inference"]) == (3, 2)
    assert found["inference_stats"]["success"] == {"count": 3, "ns": 30}
    sizes = {b["batch_size"]: b["compute_infer"]["count"] for b in found["batch_stats"]}
    assert sizes == {1: 3, 4: 2}
