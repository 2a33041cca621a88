"""Moving slots: what is to be done is planned, then carried out step by step, by asking daemons.

Whoever drives keeps nothing: each step is noted by the daemons, so that the same command goes on
where another one ended.  The order of steps, and why: docs/decisions/moving-slots.md.
"""

import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

from mlpd.client.operations import Cluster
from mlpd.client.topology import no_daemon
from mlpd.cluster.members import Connect, Member, survey
from mlpd.core.errors import ConflictError, InvalidRequestError, MlpdError
from mlpd.core.shards import Shard, ShardMap, decode_map, format_runs, parse_runs
from mlpd.daemon.moved_predictions import peek

LITTLE = 2_000
"""Events of all slots that may come while both sides are compared: the pause looks through them."""
ROUNDS_MAX = 5
"""How often more than that may come: a longer pause is better than none."""
TAIL_ROWS = 200
"""What came during a round is the tail if it is one chunk with fewer rows: the pause brings it."""
HOPELESS = frozenset(
    (
        *("checksum_differs", "definitions_changed", "experiments_differ"),
        "too_many_rows",
    )
)
"""What is found out in the pause and doesn't pass: the move is cancelled."""
COMPARED = ("digest", "rows", "served", "predictions")
"""Of both sides' digests."""
SKEW_S = 10.0
"""How far the source's clock may be ahead of the target's."""
_SKEW_POLL_S = 0.02
_NOTHING = object()
"""Where an answer lacks what every daemon says."""

Told = Callable[[str, int], None]
"""Called with what is done now, and rows that came over since the last call."""


@dataclass(frozen=True, slots=True)
class Part:
    """One move: slots as text, from a shard to another, with their online `rows`.

    `move` and `state`: its id and how far it is, if it is under way already.
    """

    source: str
    target: str
    slots: str
    rows: int
    move: str = ""
    state: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Moves in their order, by the newest map."""

    shard_map: ShardMap
    parts: tuple[Part, ...]
    size_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def slots(self) -> int:
        """How many slots move."""
        return sum(len(parse_runs(part.slots)) for part in self.parts)

    @property
    def rows(self) -> int:
        """How many online rows they hold."""
        return sum(part.rows for part in self.parts)


@dataclass(frozen=True, slots=True)
class Moved:
    """What became of a part: `pause_s` from the pause to the new map at the target."""

    part: Part
    epoch: int
    events: int
    predictions: int
    pause_s: float
    seconds: float


def newest_map(known: ShardMap, connect: Connect) -> ShardMap:
    """Return the newest map, after every member that answers was told of it.

    Raises ConflictError(code="member_unavailable") if the arbiter doesn't answer, and what a
    member's state makes impossible: `another map`, `another shard`, `another cluster`.
    """
    newest, members = survey(known, connect)
    for member in members:
        if member.state in ("another map", "another shard", "another cluster"):
            raise ConflictError(
                f"the daemon at {member.url} is in state {member.state!r}",
                code="member_differs",
                hint="mlpd shard status shows all; nothing was moved.",
            )
    arbiter = next(m for m in members if m.url == newest.arbiter.url)
    if arbiter.state == "no answer":
        raise _unavailable(arbiter)
    spread(newest, connect, [m.url for m in members if m.state == "no answer"])
    return newest


def spread(shard_map: ShardMap, connect: Connect, down: Iterable[str] = ()) -> list[str]:
    """Tell all members of a map; return the names of those that didn't take it.

    The order is arbiter, others that lose slots, others that gain some: nobody answers for slots
    that another one still does.
    """
    failed, down = [], set(down)
    for shard in _losers_first(shard_map, connect, down):
        try:
            put_map(shard_map, shard, connect)
        except MlpdError:
            failed.append(shard.name)
    return failed + [shard.name for shard in shard_map.shards if shard.url in down]


def put_map(shard_map: ShardMap, shard: Shard, connect: Connect) -> None:
    """Give a member a map, whichever older one it has."""
    cluster, fields = connect(shard.url).cluster, shard_map.to_dict()
    try:  # most have the one before; to ask costs as much as to tell
        cluster.put_map(fields, shard=shard.name, expected=shard_map.epoch - 1)
    except ConflictError as error:
        if error.code != "epoch_moved":
            raise
        cluster.put_map(fields, shard=shard.name, expected=error.details["epoch"])


def _losers_first(shard_map: ShardMap, connect: Connect, down: set[str]) -> list[Shard]:
    others = [s for s in shard_map.shards[1:] if s.url not in down]
    leaving = []
    for shard in others:
        with suppress(MlpdError):
            if _leaving(shard, connect) is not None:
                leaving.append(shard)
    first = [shard_map.arbiter] if shard_map.arbiter.url not in down else []
    return [*first, *leaving, *(shard for shard in others if shard not in leaving)]


def pending(shard_map: ShardMap, connect: Connect, down: Collection[str] = ()) -> Iterator[Part]:
    """Yield the moves that are under way at the shards that answer; those `down` aren't asked.

    Raises UnavailableError(code="no_daemon") for a member at whose URL something else answers: it
    may take part in a move, and nobody could tell.
    """
    for shard in shard_map.shards:
        if shard.url in down:
            continue
        try:
            note = _leaving(shard, connect)
        except MlpdError as error:
            if error.code == "no_daemon":
                raise
            continue
        if note is not None:
            yield Part(shard.name, note["shard"], note["slots"], 0, note["move"], note["state"])


def _leaving(shard: Shard, connect: Connect) -> Mapping[str, Any] | None:
    """Return what leaves a shard; raises UnavailableError(code="no_daemon") for a stranger."""
    found = connect(shard.url).cluster.moves()
    note = found.get("leaving", _NOTHING) if isinstance(found, Mapping) else _NOTHING
    is_note = isinstance(note, Mapping) and note.keys() >= {"move", "slots", "shard", "state"}
    if note is not None and not is_note:
        raise no_daemon(shard.url)
    return cast("Mapping[str, Any] | None", note)


def plan_moves(
    shard_map: ShardMap,
    wanted: Mapping[tuple[str, str], Sequence[int]],
    connect: Connect,
    *,
    members: ShardMap | None = None,
) -> Plan:
    """Return the plan of moves: slots by (source, target); changes nothing.

    What is under way already comes first, and before it what is only to be finished, as its map is
    out.  Raises what both sides would refuse; targets that are not in `members`, the map that is in
    force, are not asked yet.
    """
    known = {shard.name for shard in (members or shard_map).shards}
    found = [*pending(members or shard_map, connect)]
    gone = [part for part in found if _owner(shard_map, part) == part.target]
    parts = gone + _begun(wanted, [part for part in found if part not in gone])
    busy = {name for part in parts for name in (part.source, part.target)}
    begun = {slot for part in parts for slot in parse_runs(part.slots)}
    sizes: dict[str, int] = {}
    for (source, target), slots in wanted.items():
        if left := [slot for slot in slots if slot not in begun]:
            is_asked = target in known and target not in busy
            asked = _survey(shard_map, source, target, left, ask_target=is_asked, connect=connect)
            parts += [Part(source, target, p["slots"], p["rows"]) for p in asked["parts"]]
            sizes[source] = asked["size_bytes"]
    return Plan(shard_map, tuple(parts), sizes)


def _owner(shard_map: ShardMap, part: Part) -> str:
    return shard_map.owner(parse_runs(part.slots)[0]).name


def _begun(wanted: Mapping[tuple[str, str], Sequence[int]], begun: Iterable[Part]) -> list[Part]:
    """Return what is under way and wanted; raises ConflictError(code="move_under_way").

    That is for a move of other slots by a shard that takes part, unless what is wanted there is
    under way as well: two people may have begun at once, and the target says who was first.
    """
    parts: list[Part] = []
    others: list[Part] = []
    for part in begun:
        slots = {*wanted.get((part.source, part.target), ())}
        is_wanted = bool(slots) and slots.issuperset(parse_runs(part.slots))
        (parts if is_wanted else others).append(part)
    going = {(part.source, part.target) for part in parts}
    for part in others:
        pairs = [pair for pair in wanted if pair not in going]
        if any(part.source == source or part.target == target for source, target in pairs):
            raise ConflictError(
                f"slots {part.slots[:60]} move from {part.source} to {part.target} already",
                code="move_under_way",
                hint="Finish that by the same mlpd shard move, or mlpd shard cancel it.",
                details={"slots": part.slots},
            )
    return parts


def _survey(
    shard_map: ShardMap,
    source: str,
    target: str,
    slots: Sequence[int],
    *,
    ask_target: bool,
    connect: Connect,
) -> Mapping[str, Any]:
    """Return what the source would let go; and what would be refused."""
    text = format_runs(slots)
    found = ask(shard_map, source, connect, lambda c: c.survey(text))
    asked = {key: found[key] for key in ("definitions", "size_bytes")}
    if ask_target:
        begin = partial(Cluster.arrive, step="begin", move="plan", slots=text, shard=source)
        ask(shard_map, target, connect, lambda c: begin(c, dry_run=True, **asked))
    return found


def wanted_moves(
    shard_map: ShardMap, slots: Sequence[int], target: str
) -> dict[tuple[str, str], list[int]]:
    """Return slots by (owner, target), without those that the target has."""
    shard_map.index(target)
    found: dict[tuple[str, str], list[int]] = {}
    for slot in slots:
        owner = shard_map.owner(slot).name
        if owner != target:
            found.setdefault((owner, target), []).append(slot)
    return found


def carry_out(plan: Plan, connect: Connect, told: Told) -> Iterator[Moved]:
    """Carry out a plan, and yield each part when it is done.

    Raises what a step raises: the same plan, made anew, goes on there.
    """
    shard_map = plan.shard_map
    for part in plan.parts:
        move = _Move(shard_map, part, plan.size_bytes.get(part.source, 0), connect, told)
        yield move.run()
        shard_map = move.shard_map


def cancel(shard_map: ShardMap, part: Part, connect: Connect) -> ShardMap:
    """Cancel a move that is under way; return the map then.  Its target may have been removed.

    Raises ConflictError(code="move_done") if the new map came first: the move is to be finished.
    """
    ask(shard_map, part.source, connect, lambda c: c.leave("cancel", part.move))
    while True:
        shard_map = newest_map(shard_map, connect)
        if _owner(shard_map, part) == part.target:
            raise ConflictError(
                "the slots have moved: the new map was first",
                code="move_done",
                hint="Finish it by the same mlpd shard move.",
            )
        fenced = shard_map.next(shard_map.shards, shard_map.owners)
        if set_map(fenced, connect):
            break
    spread(fenced, connect)
    if any(shard.name == part.target for shard in fenced.shards):
        ask(fenced, part.target, connect, lambda c: c.arrive("cancel", part.move))
    ask(fenced, part.source, connect, lambda c: c.leave("finish", part.move))
    return fenced


class _Move:
    """One part on its way."""

    def __init__(
        self, shard_map: ShardMap, part: Part, size_bytes: int, connect: Connect, told: Told
    ) -> None:
        self.shard_map = shard_map
        self._part = part if part.move else replace(part, move=secrets.token_hex(8))
        self._size_bytes = size_bytes
        self._told = told
        self._connect = connect
        self._url = shard_map.shard(part.source).url
        self._source = connect(self._url).cluster
        self._target = connect(shard_map.shard(part.target).url).cluster
        self._rows = self._predictions = 0
        self._since: Mapping[str, Any] = {}
        """What is to be compared in the pause, all by default."""

    def run(self) -> Moved:
        part, began_s = self._part, time.monotonic()
        paused_s = began_s
        slots = parse_runs(part.slots)
        if _owner(self.shard_map, part) != part.target:
            note = self._begin()
            if note["state"] == "copying":
                self._told("copying", 0)
                self._or_cancel(self._copy_before_the_pause)
            paused_s = time.monotonic()
            if note["state"] != "leaving":
                self._or_cancel(self._pause)
            self._switch(slots)
        self._put_both()
        pause_s = time.monotonic() - paused_s
        spread(self.shard_map, self._connect)
        self._told("removing at the source", 0)
        self._target.arrive("finish", part.move)
        self._source.leave("finish", part.move)
        seconds = time.monotonic() - began_s
        done = self.shard_map.epoch, self._rows, self._predictions
        return Moved(part, *done, pause_s, seconds)

    def _begin(self) -> Mapping[str, Any]:
        part = self._part
        fields = {"slots": part.slots}
        begun = self._source.leave("begin", part.move, shard=part.target, **fields)
        note: Mapping[str, Any] = begun["leaving"]
        if note["state"] == "cancelling":
            raise ConflictError(
                "the move is being cancelled",
                code="move_state",
                hint="Run mlpd shard cancel again, then move.",
            )
        arriving = self._target.arrive(
            "begin", part.move, shard=part.source, definitions=note["definitions"],
            experiments=begun["experiments"], size_bytes=self._size_bytes, **fields,
        )["arriving"]  # fmt: skip
        self._note(arriving)
        self._sealed = arriving["state"] == "sealed"
        return note

    def _copy_before_the_pause(self) -> None:
        """Bring all over until little comes meanwhile, compare, and bring over what came since."""
        for _ in range(ROUNDS_MAX):
            self._catch_up()
            self._compare_untouched()
            newest = self._newest()
            if newest - self._through < LITTLE:
                break
        self._copy(newest)
        self._copy_predictions()

    def _catch_up(self) -> None:
        """Bring history over in rounds, each up to the newest event, until little came meanwhile.

        A chunk without rows is no sign of that: the slots may have none in 5,000 records.  So too
        with predictions.
        """
        while True:
            newest, rows = self._newest(), self._rows
            if self._copy(newest) > 1 or self._rows - rows >= TAIL_ROWS:
                continue
            if self._copy_predictions() <= 1:
                return

    def _newest(self) -> int:
        found: int = self._connect(self._url).status()["sequence"]
        return found

    def _copy(self, through: int) -> int:
        """Bring history over up to a sequence of the source; return in how many chunks."""
        chunks = 0
        while self._through < through:
            chunk = self._source.history(self._part.move, self._through)["chunk"]
            arriving = self._take(chunk)
            self._told("copying", arriving["rows"] - self._rows)
            self._note(arriving)
            chunks += 1
        return chunks

    def _copy_predictions(self) -> int:
        """Bring predictions over up to the newest; return in how many chunks."""
        chunks, done = 0, False
        while not done:
            chunk = self._source.predictions(self._part.move, self._served)["chunk"]
            needs, done, is_new = peek(chunk)
            if not is_new:
                break
            self._copy(needs)  # the events that they saw come first
            before = self._predictions
            self._note(self._take(chunk))
            self._told("copying predictions", self._predictions - before)
            chunks += 1
        return chunks

    def _note(self, arriving: Mapping[str, Any]) -> None:
        """Note how far the target is."""
        self._through, self._rows = arriving["through"], arriving["rows"]
        self._served, self._predictions = arriving["served"], arriving["predictions"]

    def _take(self, chunk: bytes) -> Mapping[str, Any]:
        """Store a chunk; an event that the target's clock has not come to yet waits for it."""
        until_s = time.monotonic() + SKEW_S
        while True:
            try:
                found: Mapping[str, Any] = self._target.take(self._part.move, chunk)["arriving"]
            except InvalidRequestError as error:
                if error.code != "known_time_ahead":
                    raise
                if time.monotonic() > until_s:
                    raise _clocks_differ(self._part) from None
                time.sleep(_SKEW_POLL_S)
            else:
                return found

    def _put_both(self) -> None:
        """Give the new map to source and target, unless one is the arbiter, which has it."""
        both = map(self.shard_map.shard, (self._part.target, self._part.source))
        others = [shard for shard in both if shard != self.shard_map.arbiter]
        with ThreadPoolExecutor(len(others)) as pool:
            list(pool.map(lambda shard: put_map(self.shard_map, shard, self._connect), others))

    def _or_cancel(self, step: Callable[[], None]) -> None:
        """Take a step; where that shows that the move can't end well, cancel it."""
        try:
            step()
        except MlpdError as error:
            if error.code in HOPELESS:
                self.shard_map = cancel(self.shard_map, self._part, self._connect)
            raise

    def _compare_untouched(self) -> None:
        """Compare both sides but for what was touched since the target came so far."""
        since = {"since": self._through, "after": self._served}
        self._told("comparing", 0)
        ours = self._source.digest(self._part.slots, **since)
        if ours["slots"]:
            self._check_same(ours, self._target.digest(ours["slots"], ours["at"]))
        self._since = {**since, "touched": True}

    def _pause(self) -> None:
        """Stop writes, bring over what is left, and compare what was touched."""
        part = self._part
        self._told("pausing", 0)
        paused = self._source.leave("pause", part.move)
        sequence = paused["leaving"]["sequence"]
        with ThreadPoolExecutor(1) as beside:
            asked = beside.submit(self._source.digest, part.slots, **self._since)
            if not self._sealed:
                self._copy(sequence)
                self._copy_predictions()
            ours = asked.result()
            sealed = beside.submit(
                self._target.arrive, "seal", part.move, through=sequence, served=self._served,
                horizons=ours["horizons"], experiments=paused["experiments"],
            )  # fmt: skip
            if ours["slots"]:
                self._check_same(ours, self._target.digest(ours["slots"], ours["at"]))
            sealed.result()

    def _check_same(self, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
        part = self._part
        if any(ours[name] != theirs[name] for name in COMPARED):
            raise ConflictError(
                f"slots {part.slots[:60]} read otherwise at {part.target} than at {part.source}: "
                f"{_described(theirs)}, not {_described(ours)}",
                code="checksum_differs",
                hint="The move was cancelled, nothing changed; mlpd fsck --deep tells which of the "
                "two differs from its log.",
            )

    def _switch(self, slots: Sequence[int]) -> None:
        """Set the new map at the arbiter, once the source answers no more for the slots.

        The map was read before: a cancellation in between makes its epoch an old one.
        """
        part, current = self._part, self.shard_map
        while True:
            self._source.leave("leave", part.move)
            owners, target = list(current.owners), current.index(part.target)
            for slot in slots:
                owners[slot] = target
            self.shard_map = current.next(current.shards, owners)
            if set_map(self.shard_map, self._connect):
                return
            arbiter = self.shard_map.arbiter.url
            current = decode_map(self._connect(arbiter).cluster.map()["map"])


def _described(found: Mapping[str, Any]) -> str:
    return (
        f"{found['rows']} rows of digest {found['digest']}, {found['predictions']} predictions and "
        f"labels of {found['served']}"
    )


def set_map(shard_map: ShardMap, connect: Connect) -> bool:
    """Compare and set a map at the arbiter; tell whether it was the next one there."""
    arbiter = shard_map.arbiter
    try:
        connect(arbiter.url).cluster.put_map(
            shard_map.to_dict(), shard=arbiter.name, expected=shard_map.epoch - 1
        )
    except ConflictError as error:
        if error.code not in ("epoch_moved", "older_map", "map_differs"):
            raise
        return False
    return True


def ask(
    shard_map: ShardMap, name: str, connect: Connect, call: Callable[[Any], Any]
) -> Mapping[str, Any]:
    """Ask a shard; errors name it, and a daemon that knows no moves."""
    shard = shard_map.shard(name)
    try:
        found: Mapping[str, Any] = call(connect(shard.url).cluster)
    except MlpdError as error:
        known = error.code != "unknown_path"
        message = error.message if known else "it is of a version that can't move slots"
        raise type(error)(
            f"shard {name} at {shard.url}: {message}",
            code=error.code if known else "older_version",
            hint=error.hint if known else "Bring all shards to one version first.",
            details=error.details,
        ) from None
    return found


def _clocks_differ(part: Part) -> ConflictError:
    return ConflictError(
        f"the clock of {part.source} is over {SKEW_S:.0f} s ahead of that of {part.target}",
        code="clocks_differ",
        hint="Set both by NTP, then run the same mlpd shard move, or mlpd shard cancel.",
    )


def _unavailable(member: Member) -> ConflictError:
    return ConflictError(
        f"the arbiter, shard {member.shard} at {member.url}, doesn't answer: {member.why}",
        code="member_unavailable",
        hint="The map can't change without it; start it first.",
    )
