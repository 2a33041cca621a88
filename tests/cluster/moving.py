"""What tests of moves share: counts that tell lost and doubled events, and ends in between."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mlpd import Aggregate, Entity, FeatureService, Source, WindowView
from mlpd.client import Client
from mlpd.cluster.members import Connect, connections
from mlpd.cluster.moving import Moved, carry_out, newest_map, plan_moves, wanted_moves
from mlpd.core.definitions import build_document
from mlpd.core.errors import MlpdError
from mlpd.core.shards import ShardMap, decode_map

USERS, SHOPS = [f"u{i}" for i in range(30)], [f"s{i}" for i in range(30)]

user, shop = Entity("user"), Entity("shop")
sales = Source("sales", timestamp="at", schema={"user": "string", "shop": "string", "n": "int64"})
by_user = WindowView("by_user", user, sales, ["1d"], [Aggregate.count(), Aggregate.sum("n")])
by_shop = WindowView("by_shop", shop, sales, ["1d"], [Aggregate.count(), Aggregate.sum("n")])
DOCUMENT = build_document(
    [
        *(user, shop, sales, by_user, by_shop),
        *(FeatureService("users", [by_user]), FeatureService("shops", [by_shop])),
    ]
)
SMALLER = build_document([user, shop, sales, by_user, by_shop])


class Ended(BaseException):
    """The driver ends here, as kill -9 would end it."""


Hook = Callable[[str], None]
"""Called before and after each step that a driver asks for: `before pause`, `after take` ..."""

_STEPS = ("leave", "arrive", "history", "take", "digest", "put_map")


class _Cluster:
    def __init__(self, real: Any, hook: Hook) -> None:
        self._real, self._hook = real, hook

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._real, name)
        if name not in _STEPS:
            return found

        def call(*args: Any, **fields: Any) -> Any:
            step = args[0] if name in ("leave", "arrive") else name
            self._hook(f"before {name} {step}")
            answer = found(*args, **fields)
            self._hook(f"after {name} {step}")
            return answer

        return call


class _Watched:
    def __init__(self, real: Client, hook: Hook) -> None:
        self._real = real
        self.cluster = _Cluster(real.cluster, hook)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def watched(connect: Connect, hook: Hook) -> Connect:
    """Return `connect` with a hook around each step."""
    return lambda url: _Watched(connect(url), hook)  # type: ignore[return-value]


def ends_at(number: int) -> tuple[Hook, list[str]]:
    """Return a hook that ends the driver at the given step, and the steps that came so far."""
    steps: list[str] = []

    def hook(step: str) -> None:
        steps.append(step)
        if len(steps) == number:
            raise Ended

    return hook, steps


def move(
    made: ShardMap, slots: Any, target: str, hook: Hook = lambda _: None
) -> tuple[ShardMap, list[Moved]]:
    """Move slots as the command does; return the newest map then, and what moved."""
    with connections("test") as connect:
        newest = newest_map(made, connect)
        driver = watched(connect, hook)
        plan = plan_moves(newest, wanted_moves(newest, slots, target), driver)
        moved = list(carry_out(plan, driver, lambda _what, _rows: None))
        return newest_map(newest, connect), moved


def map_at(url: str) -> ShardMap:
    with Client(url) as client:
        return decode_map(client.cluster.map()["map"])


class Load:
    """Clients that write and read all the time; what they were told is kept, and checked."""

    def __init__(self, urls: list[str]) -> None:
        self._urls = urls
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.users: Counter[str] = Counter()
        self.shops: Counter[str] = Counter()
        self.failures: list[str] = []
        self.wrong: list[str] = []
        self.reads = 0
        self.waits_s: list[float] = []

    @contextmanager
    def running(self, writers: int = 2) -> Iterator["Load"]:
        threads = [threading.Thread(target=self._write, args=(i,)) for i in range(writers)]
        threads.append(threading.Thread(target=self._read))
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _write(self, seed: int) -> None:
        rng = random.Random(seed)
        with Client(self._urls, timeout_s=20) as client:
            while not self._stop.is_set():
                rows = [
                    {"at": time.time_ns() // 1000, "n": rng.randrange(9)}
                    | {"user": rng.choice(USERS), "shop": rng.choice(SHOPS)}
                    for _ in range(3)
                ]
                began_s = time.monotonic()
                try:
                    answer = client.events.send("sales", rows)
                except MlpdError as error:
                    self.failures.append(f"{error.code}: {error.message}")
                    continue
                assert answer["accepted"] == len(rows), answer
                with self._lock:
                    self.waits_s.append(time.monotonic() - began_s)
                    self.users.update(row["user"] for row in rows)
                    self.shops.update(row["shop"] for row in rows)
                time.sleep(0.005)

    def _read(self) -> None:
        with Client(self._urls, timeout_s=20) as client:
            while not self._stop.is_set():
                with self._lock:
                    least = dict(self.shops)
                found = client.read_features("shops", entities=[{"shop": s} for s in SHOPS])
                counts = found["columns"]["by_shop.count_1d"]
                errors = {error["index"] for error in found.get("errors", ())}
                for i, (name, count) in enumerate(zip(SHOPS, counts, strict=True)):
                    if i not in errors and (count or 0) < least.get(name, 0):
                        self.wrong.append(f"{name}: {count} after {least[name]}")
                self.reads += 1
                time.sleep(0.01)


class Serving:
    """Clients that ask for predictions of the route person and label them; all ids are kept."""

    def __init__(self, urls: list[str], users: list[str]) -> None:
        self._urls, self._users = urls, users
        self._stop = threading.Event()
        self.ids: list[str] = []
        self.labelled: list[str] = []
        self.failures: list[str] = []
        self.waits_s: list[float] = []

    @contextmanager
    def running(self) -> Iterator["Serving"]:
        threads = [threading.Thread(target=work) for work in (self._predict, self._label)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _predict(self) -> None:
        rng = random.Random(5)
        with Client(self._urls, timeout_s=20) as client:
            while not self._stop.is_set():
                rows = [{"user": rng.choice(self._users), "age": rng.random()} for _ in range(3)]
                began_s = time.monotonic()
                try:
                    found = client.predict("person", rows)["predictions"]
                except MlpdError as error:
                    self.failures.append(f"predict {error.code}: {error.message}")
                    continue
                self.waits_s.append(time.monotonic() - began_s)
                self.failures += [f"row: {one['error']}" for one in found if "error" in one]
                self.ids += [one["prediction_id"] for one in found if "error" not in one]
                time.sleep(0.01)

    def _label(self) -> None:
        with Client(self._urls, timeout_s=20) as client:
            while not self._stop.is_set() or len(self.labelled) < len(self.ids) // 2:
                waiting = self.ids[len(self.labelled) * 2 :: 2][:20]  # each second one
                try:
                    rows = [{"prediction_id": name, "label": name[-1] > "7"} for name in waiting]
                    answer = client.feedback(rows)
                except MlpdError as error:
                    self.failures.append(f"feedback {error.code}: {error.message}")
                    continue
                if answer["orphans"] or answer["rejected"]:
                    self.failures.append(f"labels: {answer}")
                self.labelled += waiting
                time.sleep(0.02)


def check_served(urls: list[str], ids: list[str], labelled: list[str]) -> None:
    """Check that predictions and labels count once each, over all shards, and are found by id."""
    with Client(urls) as client:
        again = client.feedback([{"prediction_id": n, "label": n[-1] > "7"} for n in labelled])
        assert (again["orphans"], again["conflicts"], again["joined"]) == (0, 0, 0), again
        assert again["accepted"] == len(labelled)
    wanted = len(ids), len(labelled)
    until_s = time.monotonic() + 30
    while (found := _sums(urls)) != wanted and time.monotonic() < until_s:
        time.sleep(0.05)  # after a start they are counted in the background
    assert found == wanted


def _sums(urls: list[str]) -> tuple[int, int]:
    with Client(urls[0]) as client:  # adds up what all have
        cohorts = client.performance("person")["cohorts"]
    every = [one for one in cohorts if one["period"] == "all"]
    return sum(one["predictions"] for one in every), sum(one["labelled"] for one in every)


def counts_of(urls: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Return what users and shops count, read through the cluster."""
    with Client(urls) as client:
        asked = (("users", "user", USERS), ("shops", "shop", SHOPS))
        return tuple(  # type: ignore[return-value]
            dict(
                zip(
                    names,
                    client.read_features(service, entities=[{key: n} for n in names])["columns"][
                        f"by_{key}.count_1d"
                    ],
                    strict=True,
                )
            )
            for service, key, names in asked
        )
