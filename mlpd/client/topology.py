"""What a client knows of a cluster, and the calls that a split call takes; no I/O.

Both clients drive these generators: they yield calls to be made at once, and get what came of each.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from mlpd.client import requests as r
from mlpd.client.scatter import Gathered, Piece, Scatter, Topology, with_headers
from mlpd.core.errors import ConfigurationError, MisdirectedError, MlpdError, UnavailableError
from mlpd.core.routing import MAX_STALENESS_HEADER, decode_routing
from mlpd.core.shards import Shard, decode_map

T = TypeVar("T")
Call = tuple[str, r.Request]
"""The URL of a daemon, and what it is asked."""

Calls = Generator[Sequence[Call], Sequence[Any], T]
"""Yields calls, gets a value or an MlpdError for each, in order."""

ROUNDS_MAX = 4
"""How often a call is split, where each time the map is another one."""
REPLICAS_ASKED_MAX = 3
"""How many followers of a shard are asked, one after the other."""
STALENESS_S_MAX = 1e6
TRIES_MAX = 5
"""How many members are asked for the map before the first error counts."""


GONE = frozenset(("unreachable", "connection_lost", "timeout", "shard_down"))
"""Codes of errors by which a daemon isn't there: a follower may have taken its place."""
_READS = frozenset(("/v1/features/read", "/v1/cluster/cells"))
"""What followers answer."""


class Guide:
    """The way to the shards: `urls` as they were given, and the newest map, once it is needed.

    With one URL nothing is learned until that daemon says that it doesn't own everything.
    `max_staleness_s`: how stale the answer of a follower may be, for reads of a shard that can't be
    reached; None: followers aren't asked.
    """

    def __init__(self, urls: Sequence[str], max_staleness_s: float | None = None) -> None:
        if not urls:
            raise ConfigurationError("a client needs the URL of a daemon", code="invalid_url")
        if max_staleness_s is not None and not 0.0 <= max_staleness_s <= STALENESS_S_MAX:
            raise ConfigurationError(
                f"max_staleness_s is {max_staleness_s}, not between 0 and {STALENESS_S_MAX:.0f}",
                code="invalid_staleness",
            )
        self.urls = tuple(urls)
        self.topology: Topology | None = None
        self._stale = (
            {}
            if max_staleness_s is None
            else {MAX_STALENESS_HEADER: str(round(1e3 * max_staleness_s))}
        )

    def calls(self, scatter: Scatter) -> Calls[Any]:
        """Make a call, split where it must be; tried once more where the map was old.

        And again if it has changed meanwhile, as it does while slots move.
        """
        if self.topology is None and len(self.urls) == 1:
            (outcome,) = yield [(self.urls[0], scatter.whole())]
            if not isinstance(outcome, MisdirectedError):
                return _value(outcome)
            yield from self.learn()
        topology = self.topology or (yield from self.learn())
        if not scatter.known(topology.routing):
            topology = yield from self.learn()
        if len(topology.shard_map.shards) == 1 or not scatter.known(topology.routing):
            return (yield from self._whole(topology, scatter.whole()))
        done, stale = yield from self._round(scatter, None, Gathered())
        for _ in range(ROUNDS_MAX - 1):
            if not stale:
                break
            known = self.topology
            rows = sorted({row for row, _ in stale} - done.failures.keys())
            with suppress(MlpdError):  # the next try says what is wrong
                yield from self.learn()
            done, stale = yield from self._round(scatter, rows, done)
            if self.topology == known:
                break
        for row, error in stale:
            done.fail([row], error)
        return scatter.merge(done)

    def _whole(self, topology: Topology, request: r.Request) -> Calls[Any]:
        """Send a request to the arbiter as it is; once more if its place was taken."""
        arbiter = topology.shard_map.arbiter
        (outcome,) = yield from self._ask([(arbiter, request)])
        if isinstance(outcome, MlpdError) and _may_be_elsewhere(arbiter, request, outcome):
            with suppress(MlpdError):  # the first error says what is wrong
                newer = (yield from self.learn()).shard_map.arbiter
                if newer.url != arbiter.url:
                    (outcome,) = yield from self._ask([(newer, request)])
        return _value(outcome)

    def _ask(self, asked: Sequence[tuple[Shard, r.Request]]) -> Calls[list[Any]]:
        """Ask shards, and followers of those that can't be reached, where a reader allows it."""
        outcomes = list((yield [(shard.url, request) for shard, request in asked]))
        if not self._stale:
            return outcomes
        for turn in range(REPLICAS_ASKED_MAX):
            left = [
                (place, shard.replicas[turn], request)
                for place, (shard, request) in enumerate(asked)
                if request.path in _READS
                and len(shard.replicas) > turn
                and _is_gone(outcomes[place])
            ]
            if not left:
                break
            found = yield [(url, with_headers(call, self._stale)) for _, url, call in left]
            for (place, *_), outcome in zip(left, found, strict=True):
                if not isinstance(outcome, MlpdError):  # else the owner's error says more
                    outcomes[place] = outcome
        return outcomes

    def learn(self) -> Calls[Topology]:
        """Fetch the map and the routing anew, from the arbiter or whoever answers.

        Raises ConfigurationError(code="no_cluster") if those that answer have no map.
        """
        first: MlpdError | None = None
        for url in self._members():
            outcomes = yield [
                (url, r.get("v1", "cluster", "map")),
                (url, r.get("v1", "cluster", "routing")),
            ]
            try:
                self.topology = _read_topology(url, outcomes, self.topology)
            except MlpdError as error:
                first = first or error
            else:
                return self.topology
        raise first or UnavailableError("no member of the cluster answers")

    def _round(
        self, scatter: Scatter, rows: Sequence[int] | None, done: Gathered
    ) -> Calls[tuple[Gathered, list[tuple[int, MlpdError]]]]:
        """Send what is to be sent of some rows; return what came, and rows whose shard moved.

        What pieces need of other shards is asked for together with pieces that need nothing.
        """
        assert self.topology is not None
        topology = self.topology
        pieces = scatter.split(topology, rows, done)
        ready = [piece for piece in pieces if not piece.needs]
        asks = list({id(ask): ask for piece in pieces for ask in piece.needs}.values())
        outcomes: Sequence[Any] = ()
        if ready or asks:
            calls = [(piece.shard, piece.request) for piece in ready]
            outcomes = yield from self._ask([*calls, *((ask.shard, ask.request) for ask in asks)])
        stale = _note(done, ready, outcomes[: len(ready)])
        if not asks:
            return done, stale
        answers: dict[str, Any] = {}
        for ask, outcome in zip(asks, outcomes[len(ready) :], strict=True):
            if isinstance(outcome, MlpdError):
                stale += _lose(done, ask.shard, ask.request, ask.rows, outcome)
            else:
                answers[ask.shard.name] = outcome
        filled = [scatter.fill(topology, piece, answers) for piece in pieces if piece.needs]
        filled = [piece for piece in filled if piece.rows]
        if filled:
            outcomes = yield from self._ask([(piece.shard, piece.request) for piece in filled])
            stale += _note(done, filled, outcomes)
        return done, stale

    def _members(self) -> Iterator[str]:
        """Return whom to ask for the map, the arbiter first."""
        known = () if self.topology is None else self.topology.shard_map.shards
        first = [url for s in known[:1] for url in (s.url, *s.replicas)]
        urls = dict.fromkeys([*first, *self.urls, *(s.url for s in known)])
        return iter([*urls][: max(TRIES_MAX, len(self.urls))])


def _note(
    done: Gathered, pieces: Sequence[Piece], outcomes: Sequence[Any]
) -> list[tuple[int, MlpdError]]:
    """Note what came of pieces; return the rows whose shard moved, and how that was told."""
    stale: list[tuple[int, MlpdError]] = []
    for piece, outcome in zip(pieces, outcomes, strict=True):
        if not isinstance(outcome, MlpdError):
            done.add(piece, outcome)
        elif not piece.rows:
            raise outcome
        else:
            stale += _lose(done, piece.shard, piece.request, piece.rows, outcome)
    return stale


def _is_gone(outcome: Any) -> bool:
    return isinstance(outcome, MlpdError) and outcome.code in GONE


def _may_be_elsewhere(shard: Shard, request: r.Request, error: MlpdError) -> bool:
    """Tell whether the newest map may name another daemon, and asking that repeats nothing."""
    if isinstance(error, MisdirectedError):
        return True
    safe = request.repeatable or error.code in ("unreachable", "shard_down")
    return error.code in GONE and safe and bool(shard.replicas)


def _lose(
    done: Gathered, shard: Shard, request: r.Request, rows: Sequence[int], error: MlpdError
) -> list[tuple[int, MlpdError]]:
    """Note why rows have no answer, unless their shard may be elsewhere: return those."""
    if _may_be_elsewhere(shard, request, error):
        return [(row, error) for row in rows]
    done.fail(rows, error)
    return []


def _read_topology(url: str, outcomes: Sequence[Any], known: Topology | None) -> Topology:
    """Return what a member told, or the `known` map if that is newer."""
    found, routing = map(_value, outcomes)
    try:
        value, named = found["map"], decode_routing(routing)
    except (LookupError, TypeError, ValueError, AttributeError):
        raise no_daemon(url) from None
    if value is None:
        raise _no_cluster(url)
    shard_map = decode_map(value)
    if known is not None and shard_map.cluster != known.shard_map.cluster:
        raise _other_cluster(url, shard_map.cluster)
    if known is not None and shard_map.epoch < known.shard_map.epoch:
        shard_map = known.shard_map  # whoever answers may be behind
    return Topology(shard_map, named)


def _value(outcome: Any) -> Any:
    if isinstance(outcome, MlpdError):
        raise outcome
    return outcome


def no_daemon(url: str) -> UnavailableError:
    """Return the error for an answer that no daemon gives."""
    return UnavailableError(
        f"what answers at {url} is no mlpd daemon",
        code="no_daemon",
        hint="Correct the URL, or stop what took its port and start the daemon.",
    )


def _other_cluster(url: str, cluster: str) -> ConfigurationError:
    return ConfigurationError(
        f"the daemon at {url} is of another cluster, {cluster}",
        code="other_cluster",
        hint="Give URLs of one cluster's members; mlpd shard list shows them.",
    )


def _no_cluster(url: str) -> ConfigurationError:
    return ConfigurationError(
        f"the daemon at {url} has no map: it is no member of a cluster",
        code="no_cluster",
        hint="Give the URL of one daemon, or make them a cluster: mlpd shard init.",
    )
