"""Members: the daemons of a cluster, asked all at once and told one after the other.

The arbiter hears of a map first and decides; docs/decisions/shards.md says why.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mlpd.client import Client
from mlpd.client.topology import no_daemon
from mlpd.cluster.placement import first_map
from mlpd.core.errors import ConflictError, MlpdError, NotFoundError, ValidationError
from mlpd.core.shards import CLUSTER_DIGITS, Shard, ShardMap, decode_map

TIMEOUT_S = 10.0
ASKED_AT_ONCE = 16

Connect = Callable[[str], Client]
"""Returns a client for the daemon at a URL."""


@dataclass(frozen=True, slots=True)
class Member:
    """What a daemon says of itself: `state` is ok, or what is wrong with it, and `why`.

    `epoch` and `digest` of the map that it goes by; `sequence` of its newest event.
    """

    shard: str
    url: str
    state: str
    epoch: int | None = None
    digest: str | None = None
    version: str | None = None
    sequence: int | None = None
    why: str = ""
    """What is wrong; of a member that is `ok` so far, what keeps it from following the arbiter."""
    map: Mapping[str, Any] | None = None


@contextmanager
def connections(by: str) -> Iterator[Connect]:
    """Yield what connects to daemons; all connections are closed at the end."""
    clients: dict[str, Client] = {}

    def connect(url: str) -> Client:
        if url not in clients:
            clients[url] = Client(url, timeout_s=TIMEOUT_S, by=by)
        return clients[url]

    try:
        yield connect
    finally:
        for client in clients.values():
            client.close()


def fetch_map(client: Client, url: str) -> ShardMap:
    """Return the map that a daemon goes by; raises NotFoundError(code="no_cluster")."""
    found = client.cluster.map()
    if not isinstance(found, Mapping) or "map" not in found:
        raise no_daemon(url)
    if found["map"] is None:
        raise NotFoundError(
            f"the daemon at {url} has no map: it owns every slot",
            code="no_cluster",
            hint="mlpd shard init makes a cluster of empty daemons.",
        )
    return decode_map(found["map"])


def ask_all(shards: Sequence[Shard], connect: Connect) -> list[Member]:
    """Return what each daemon says, in order; one that says nothing is in state `no answer`."""
    clients = [connect(shard.url) for shard in shards]
    with ThreadPoolExecutor(min(ASKED_AT_ONCE, len(shards))) as pool:
        return list(pool.map(_ask, shards, clients))


def check_answered(members: Sequence[Member]) -> None:
    """Raise ConflictError(code="member_unavailable") if one of them says nothing."""
    for member in members:
        if member.state == "no answer":
            raise ConflictError(
                f"shard {member.shard} at {member.url} can't take part: {member.why}",
                code="member_unavailable",
                hint="Start it, or correct its URL; nothing was changed.",
            )


def survey(shard_map: ShardMap, connect: Connect) -> tuple[ShardMap, list[Member]]:
    """Return the newest map that a member has, and every member, judged by it.

    States: `ok`, `no map`, `behind`, `another map`, `another shard`, `another cluster`,
    `not following`, `no answer`.
    """
    found = ask_all(shard_map.shards, connect)
    maps = [decode_map(member.map) for member in found if member.map is not None]
    newest = max(
        (m for m in maps if m.cluster == shard_map.cluster),
        key=lambda m: m.epoch,
        default=shard_map,
    )
    if newest.shards != shard_map.shards:
        found = ask_all(newest.shards, connect)
    return newest, [_judge(member, newest) for member in found]


def plan_cluster(shards: Sequence[Shard], connect: Connect) -> ShardMap:
    """Return the first map of a cluster of these daemons, to which none of them objects.

    If some of them have a map of just these shards, it is that one: what an earlier command began
    is finished.  Changes nothing.  Raises ConflictError: `already_member`, `versions_differ`, and
    what a daemon would refuse the map for.
    """
    drawn = first_map(secrets.token_hex(CLUSTER_DIGITS // 2), shards)
    made = decode_map(drawn.to_dict())  # names and URLs are checked
    found = ask_all(made.shards, connect)
    check_answered(found)
    if len(versions := {member.version for member in found}) > 1:
        raise ConflictError(
            f"the daemons run different versions: {', '.join(sorted(map(str, versions)))}",
            code="versions_differ",
            hint="Bring all of them to one version first.",
        )
    begun = [decode_map(member.map) for member in found if member.map is not None]
    for member, theirs in zip((m for m in found if m.map is not None), begun, strict=True):
        if theirs.shards != made.shards or theirs != begun[0]:
            raise ConflictError(
                f"the daemon at {member.url} belongs to cluster {theirs.cluster} already",
                code="already_member",
                hint=f"mlpd shard status --url {member.url} shows it.",
            )
    made = begun[0] if begun else made
    for shard in made.shards:
        _put(connect(shard.url), made, shard, dry_run=True)
    return made


def give_map(shard_map: ShardMap, connect: Connect, told: Callable[[Shard], None]) -> None:
    """Give a first map to all its members, the arbiter first; `told` is called after each."""
    for shard in shard_map.shards:
        _put(connect(shard.url), shard_map, shard, dry_run=False)
        told(shard)


def parse_member(text: str) -> Shard:
    """Return the shard in `NAME=URL`; its name and URL are checked with the map."""
    name, equals, url = text.partition("=")
    if not (name and equals and url):
        raise ValidationError(
            f"{text!r} is not NAME=URL", code="invalid_member", hint="a=http://127.0.0.1:8701"
        )
    return Shard(name, url.rstrip("/"))


def _ask(shard: Shard, client: Client) -> Member:
    try:
        return _describe(shard, client.cluster.map(), client.status())
    except MlpdError as error:
        why = error.message
        if error.code == "unknown_path":
            why = "it is of a version that knows no shards"
    except (LookupError, TypeError):
        why = no_daemon(shard.url).message
    return Member(shard.name, shard.url, "no answer", why=why)


def _describe(shard: Shard, found: Mapping[str, Any], status: Mapping[str, Any]) -> Member:
    return Member(
        shard.name if found["shard"] is None else found["shard"],
        shard.url,
        "ok" if found["map"] else "no map",
        found["epoch"],
        found["digest"],
        status["version"],
        status["sequence"],
        why=status.get("shared", {}).get("why", ""),
        map=found["map"],
    )


def _judge(member: Member, newest: ShardMap) -> Member:
    state = member.state
    if member.map is not None:
        theirs = decode_map(member.map)
        expected = next(shard.name for shard in newest.shards if shard.url == member.url)
        if theirs.cluster != newest.cluster:
            state = "another cluster"
        elif member.shard != expected:
            state = "another shard"
        elif theirs.epoch < newest.epoch:
            state = "behind"
        elif theirs != newest:
            state = "another map"
        elif member.why:
            state = "not following"
    return Member(
        *(member.shard, member.url, state, member.epoch, member.digest, member.version),
        *(member.sequence, member.why),
    )


def _put(client: Client, shard_map: ShardMap, shard: Shard, *, dry_run: bool) -> None:
    """Put a map; errors name the shard."""
    try:
        client.cluster.put_map(
            shard_map.to_dict(), shard=shard.name, expected=0, dry_run=dry_run or None
        )
    except MlpdError as error:
        raise type(error)(
            f"shard {shard.name} at {shard.url}: {error.message}",
            code=error.code,
            hint=error.hint,
            details=error.details,
        ) from None
