"""Promoting: a follower takes its owner's place; planned, then step by step, by asking daemons.

Whoever drives keeps nothing.  The steps are a generator that yields what is to be asked, or for how
long to wait, so that the same code runs over a network and in a simulation of one.
"""

import secrets
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from mlpd.cluster.members import Connect
from mlpd.core.errors import ConflictError, MlpdError, NotFoundError, UnavailableError
from mlpd.core.shards import Shard, ShardMap, decode_map
from mlpd.storage.tables import Head

T = TypeVar("T")
POLL_S = 0.05
CATCH_UP_S = 30.0
"""How long an owner stays paused for its follower; then it is opened again."""
READY_S = 60.0
LOST_EPOCHS = 1_000
"""How far the epoch jumps at least if the arbiter is lost: it may have set some that nobody heard
of.  And then by chance up to as much: of two followers that are promoted in a network that is cut
in two, one has the newer map, and the other hears of it."""


_token = partial(secrets.token_hex, 8)


@dataclass(frozen=True, slots=True)
class Ask:
    """A question to a daemon: a method of `client.cluster`, its arguments."""

    url: str
    method: str
    fields: Mapping[str, Any] = field(default_factory=dict)


Steps = Generator[Ask | float, Any, T]
"""Yields questions, gets answers, or their errors thrown in; and seconds to wait."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done: `new` is the map that it ends with.

    `decided`: it is in force already.  `lag_rows`, `silent_s`: how far the follower is known to be
    behind, and for how long nothing is known; None: it never was up to date.
    """

    shard: str
    owner: str
    follower: str
    current: ShardMap
    new: ShardMap
    lost: bool
    decided: bool
    lag_rows: int
    silent_s: float | None

    @property
    def decides(self) -> bool:
        """Whether the shard's own copy of the map is the one that decides."""
        return self.current.arbiter.name == self.shard


@dataclass(frozen=True, slots=True)
class Promoted:
    """What became of it: `pause_s` from when the owner wrote nothing more to the new one's start.

    `not_told`: members that haven't taken the map yet.
    """

    epoch: int
    sequence: int
    pause_s: float
    not_told: tuple[str, ...]


def run_steps(steps: Steps[T], connect: Connect) -> T:
    """Carry steps out by asking daemons."""
    try:
        step = next(steps)
        while True:
            if isinstance(step, float):
                time.sleep(step)
                step = next(steps)
                continue
            try:
                answer = getattr(connect(step.url).cluster, step.method)(**step.fields)
            except MlpdError as error:
                step = steps.throw(error)
            else:
                step = steps.send(answer)
    except StopIteration as stop:
        found: T = stop.value
        return found


def plan_promotion(
    known: ShardMap,
    shard: str,
    *,
    to: str | None = None,
    lost: bool = False,
    draw: Callable[[int], int] = secrets.randbelow,
) -> Steps[Plan]:
    """Return the plan; changes nothing.

    `draw`: a number below another one, by chance.  `to`: URL of a follower; by default the one that
    has most.  Raises NotFoundError: `unknown_shard`, `no_replica`,
    `unknown_replica`; ConflictError: `owner_answers` for one that is said to be lost,
    `owner_unavailable` for one that isn't.
    """
    current = yield from newest_map(known, shard)
    found = current.shard(shard)
    begun = yield from _begun(current, found)
    if begun is not None:
        return begun
    roles = {}
    for url in found.replicas:
        role = yield from _role(url)
        if role is not None and role["role"] in ("follower", "standing"):
            roles[url] = role
    follower = _choose(found, roles, to)
    owner = yield from _role(found.url)
    if lost and owner is not None:
        raise ConflictError(
            f"the owner at {found.url} answers",
            code="owner_answers",
            hint="Promote without --lost: then nothing is lost. If it hangs, stop it first.",
        )
    if not lost and owner is None:
        raise ConflictError(
            f"the owner at {found.url} doesn't answer",
            code="owner_unavailable",
            hint="Start it; or, if it won't come back: mlpd shard promote --lost says what is "
            "lost with it.",
        )
    role = roles[follower]
    stale_ms = role["staleness_ms"]
    return Plan(
        *(shard, found.url, follower, current),
        promoted_map(current, shard, follower, lost=lost, jump=draw(LOST_EPOCHS)),
        *(lost, False, role["lag_rows"]),
        None if stale_ms is None else stale_ms / 1e3,
    )


def promoted_map(
    current: ShardMap, shard: str, follower: str, *, lost: bool, jump: int = 0
) -> ShardMap:
    """Return the map with a follower in its owner's place, which becomes a follower if it lives.

    `jump`: by how much more than one the epoch grows, beside `LOST_EPOCHS`, if it decided on maps.
    """
    found = current.shard(shard)
    replicas = [url for url in found.replicas if url != follower]
    after = Shard(shard, follower, tuple(replicas if lost else [*replicas, found.url]))
    shards = [after if one == found else one for one in current.shards]
    new = current.next(shards, current.owners)
    if lost and current.arbiter == found:
        return replace(new, epoch=new.epoch + LOST_EPOCHS + jump)
    return new


def carry_out(
    plan: Plan,
    clock: Callable[[], float] = time.monotonic,
    draw: Callable[[], str] = _token,
) -> Steps[Promoted]:
    """Promote; may be asked for again by the same plan made anew, wherever it ended.

    `draw`: names a pause, never twice the same.  Raises what a step raises; ConflictError(
    code="follower_behind") if the follower doesn't come to where the owner stopped: then that
    writes again.
    """
    began_s, new, head = clock(), plan.new, None
    if plan.lost:
        yield from _stand(plan.follower)
        began_s = clock()
        new = plan.new if plan.decided else (yield from _decide_lost(plan))
    elif plan.decided:  # the owner stopped before the map was set, and the follower had all
        head = (yield Ask(plan.follower, "role"))["head"]
    else:
        new, head = yield from _hand_over(plan, clock, draw)
    if not plan.lost:
        with suppress(UnavailableError):  # it is paused; the new owner tells it when it is back
            yield Ask(plan.owner, "step_role", {"step": "fence", "map": new.to_dict()})
    fields = {"step": "promote", "map": new.to_dict(), "head": head}
    yield Ask(plan.follower, "step_role", fields)
    role = yield from _ready(plan.follower, clock)
    pause_s = clock() - began_s
    not_told = yield from _tell(new, plan.shard)
    return Promoted(new.epoch, role["sequence"], pause_s, tuple(not_told))


def _hand_over(
    plan: Plan, clock: Callable[[], float], draw: Callable[[], str]
) -> Steps[tuple[ShardMap, str]]:
    """Pause the owner, bring its follower to the same head, and decide; return map and head.

    The map that is to be followed is read before the pause: whoever opens the owner again changes
    the epoch in between, so that what was planned before can't be decided after.
    """
    current = plan.current
    while True:
        token = draw()
        fields = {"step": "pause", "url": plan.follower, "token": token}
        yield Ask(plan.owner, "step_role", fields)
        try:
            head = yield from _catch_up(plan, clock)
        except MlpdError:
            with suppress(MlpdError):
                yield from give_up(current, plan.shard)
            raise
        new = promoted_map(current, plan.shard, plan.follower, lost=False)
        if plan.decides:
            decided = yield from _fence(plan.owner, new, token)
        else:
            decided = yield from _set_map(new)
        if decided:
            return new, head
        current = yield from _map_at(current.arbiter, plan)


def _decide_lost(plan: Plan) -> Steps[ShardMap]:
    """Set the map without the owner; where it decided on maps, its follower's `promote` does."""
    new, current = plan.new, plan.current
    while not plan.decides:
        if (yield from _set_map(new)):
            break
        current = yield from _map_at(current.arbiter, plan)
        new = promoted_map(current, plan.shard, plan.follower, lost=True)
    return new


def give_up(known: ShardMap, shard: str) -> Steps[ShardMap]:
    """Open a paused owner, and let standing followers follow again; return the map.

    What names the pause is read first, then the epoch is moved on, then that pause is ended: so
    nobody decides on the ground of a pause that is over.  Only the map's owner is opened: a paused
    follower is the former one, which stopped for a map that is out.  Raises ConflictError(
    code="promotion_done") once it is, whether the new owner answers or not.
    """
    found = (yield from newest_map(known, shard)).shard(shard)
    roles = {}
    for url in (found.url, *found.replicas):
        roles[url] = yield from _role(url)
    current = yield from newest_map(known, shard)
    is_out = roles[found.url] is None and any(_is(roles[url], "paused") for url in found.replicas)
    while True:
        is_out = is_out or current.shard(shard).url != found.url
        if is_out or (yield from _begun(current, found)):
            raise ConflictError(
                "the new map was first: the follower is to be the owner",
                code="promotion_done",
                hint="Finish it by the same mlpd shard promote.",
            )
        if current.arbiter.name == shard:  # its pause is what decides
            break
        moved_on = current.next(current.shards, current.owners)
        if (yield from _set_map(moved_on)):
            current = moved_on
            break
        current = decode_map((yield Ask(current.arbiter.url, "map"))["map"])
    for url, role in roles.items():
        if role is not None and _is(role, "paused" if url == found.url else "standing"):
            yield Ask(url, "step_role", {"step": "resume", "token": role["token"]})
    return current


def newest_map(known: ShardMap, shard: str) -> Steps[ShardMap]:
    """Return the newest map that a member, or a follower of the shard, goes by."""
    newest = known
    urls = [one.url for one in known.shards]
    for url in dict.fromkeys([*urls, *known.shard(shard).replicas]):
        try:
            answer = yield Ask(url, "map")
            found = None if answer["map"] is None else decode_map(answer["map"])
        except (MlpdError, LookupError, TypeError):
            continue
        if found is not None and found.cluster == known.cluster and found.epoch > newest.epoch:
            newest = found
    newest.index(shard)
    return newest


def _begun(current: ShardMap, found: Shard) -> Steps[Plan | None]:
    """Return the rest of a promotion whose map is out, None where there is none."""
    role = yield from _role(found.url)
    if role is None or role["role"] not in ("follower", "standing"):
        return None
    lost = role["url"] not in found.replicas
    return Plan(found.name, role["url"], found.url, current, current, lost, True, 0, None)


def _choose(found: Shard, roles: Mapping[str, Mapping[str, Any]], to: str | None) -> str:
    if to is not None and to not in found.replicas:
        raise NotFoundError(
            f"{to} is no follower of shard {found.name} in the map",
            code="unknown_replica",
            hint=f"Known: {', '.join(found.replicas) or 'none'}; mlpd shard replicas adds some.",
        )
    able = {url: role for url, role in roles.items() if to in (None, url)}
    if not able:
        raise NotFoundError(
            f"no follower of shard {found.name} answers{'' if to is None else f' at {to}'}",
            code="no_replica",
            hint="mlpd serve --follow makes one, mlpd shard replicas writes it into the map.",
        )
    return max(sorted(able), key=lambda url: _progress(able[url]))


def _progress(role: Mapping[str, Any]) -> tuple[int, int]:
    """Return how far a follower is: sequence, and arrival time of its newest commit."""
    return role["sequence"], Head.parse(role["head"]).group_us


def _is(role: Mapping[str, Any] | None, name: str) -> bool:
    return role is not None and role["role"] == name


def _role(url: str) -> Steps[Mapping[str, Any] | None]:
    try:
        found: Mapping[str, Any] = yield Ask(url, "role")
    except UnavailableError:
        return None
    return found


def _stand(follower: str) -> Steps[None]:
    """Wait until what the follower has promised to the owner is over."""
    while True:
        role = yield Ask(follower, "step_role", {"step": "stand"})
        if role["wait_s"] <= 0.0:
            return
        yield role["wait_s"] + POLL_S


def _catch_up(plan: Plan, clock: Callable[[], float]) -> Steps[str]:
    """Return the head where the paused owner stands, once the follower has it.

    Raises ConflictError(code="follower_behind").
    """
    head: str = (yield Ask(plan.owner, "role"))["head"]
    until_s = clock() + CATCH_UP_S
    while (yield Ask(plan.follower, "role"))["head"] != head:
        if clock() > until_s:
            raise ConflictError(
                f"the follower at {plan.follower} didn't come to where the owner stopped within "
                f"{CATCH_UP_S:.0f} s; the owner writes again",
                code="follower_behind",
                hint="mlpd shard status shows how far it is; promote when it is close.",
            )
        yield POLL_S
    return head


def _fence(url: str, new: ShardMap, token: str) -> Steps[bool]:
    """Let a paused owner that decides on maps take one; tell whether it followed the one there."""
    fields: dict[str, Any] = {"step": "fence", "map": new.to_dict(), "token": token}
    try:
        yield Ask(url, "step_role", fields)
    except ConflictError as error:
        if error.code != "epoch_moved":
            raise
        return False
    return True


def _set_map(new: ShardMap) -> Steps[bool]:
    """Compare and set a map at the arbiter; tell whether it followed the one there."""
    arbiter = new.arbiter
    fields = {"shard_map": new.to_dict(), "shard": arbiter.name, "expected": new.epoch - 1}
    try:
        yield Ask(arbiter.url, "put_map", fields)
    except ConflictError as error:
        if error.code not in ("epoch_moved", "older_map", "map_differs"):
            raise
        return False
    return True


def _map_at(arbiter: Shard, plan: Plan) -> Steps[ShardMap]:
    """Return the map that counts by now; ConflictError(code="epoch_moved") for another owner."""
    current = decode_map((yield Ask(arbiter.url, "map"))["map"])
    if current.shard(plan.shard).url != plan.owner:
        raise ConflictError(
            f"shard {plan.shard} has another owner by now",
            code="epoch_moved",
            hint="Run the command again.",
        )
    return current


def _ready(url: str, clock: Callable[[], float]) -> Steps[Mapping[str, Any]]:
    """Return the role of the new owner once it has started as one."""
    until_s = clock() + READY_S
    while True:
        role = yield from _role(url)
        if role is not None and role["role"] == "owner" and role["started"]:
            return role
        if clock() > until_s:
            raise UnavailableError(
                f"the new owner at {url} didn't start within {READY_S:.0f} s",
                code="timeout",
                hint="Its log says why; it is the owner, and the same command goes on.",
            )
        yield POLL_S


def _tell(new: ShardMap, promoted: str) -> Steps[Iterable[str]]:
    """Tell the other members of a map; return who didn't take it."""
    failed = []
    for shard in new.shards:
        if shard.name == promoted:
            continue
        fields = {"shard_map": new.to_dict(), "shard": shard.name}
        try:
            epoch = (yield Ask(shard.url, "map"))["epoch"]
            if epoch < new.epoch:
                yield Ask(shard.url, "put_map", {**fields, "expected": epoch})
        except MlpdError:
            failed.append(shard.name)
    return failed
