"""`mlpd shard move`, `cancel`, `rebalance`, `drain`, `add`, `remove`: slots change hands."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from mlpd.cli.output import Bar, print_lines, print_table, progress
from mlpd.cli.session import Session, confirm, connected, examples, yes_option
from mlpd.cli.shard import shard

if TYPE_CHECKING:
    from mlpd.cluster.members import Connect
    from mlpd.cluster.moving import Moved, Plan
    from mlpd.core.shards import ShardMap

Wanted = dict[tuple[str, str], list[int]]
"""Slots by (source, target)."""

_dry_run = click.option("--dry-run", is_flag=True, help="Show what would move, change nothing.")


@shard.command(
    epilog=examples(
        "mlpd shard move 0-4095 --to c --dry-run",
        'mlpd shard move "0-99 700" --to b --yes',
    )
)
@click.argument("slots")
@click.option("--to", "target", required=True, metavar="SHARD", help="The new owner.")
@click.option("--from", "source", metavar="SHARD", help="Refuse slots of other owners than this.")
@_dry_run
@yes_option
@connected
def move(
    session: Session, slots: str, target: str, source: str | None, *, dry_run: bool, yes: bool
) -> None:
    """Move slots to a shard, with all that they hold.

    Reads and writes go on, except for a short pause of each part; history goes along.  If it is
    interrupted, the same command goes on where it was.
    """
    from mlpd.cluster.moving import wanted_moves
    from mlpd.core.shards import parse_runs

    def wanted(shard_map: "ShardMap", _: "Connect") -> "tuple[ShardMap, Wanted]":
        found = wanted_moves(shard_map, parse_runs(slots), target)
        _check_source(found, source)
        return shard_map, found

    _run(session, "mlpd shard move", wanted, dry_run=dry_run, yes=yes)


@shard.command()
@_dry_run
@yes_option
@connected
def rebalance(session: Session, *, dry_run: bool, yes: bool) -> None:
    """Give every shard the same number of slots.

    As few move as can be.
    """
    from mlpd.cluster.placement import moves
    from mlpd.cluster.placement import rebalance as place

    def wanted(shard_map: "ShardMap", _: "Connect") -> "tuple[ShardMap, Wanted]":
        return shard_map, moves(shard_map, place(shard_map, shard_map.shards))

    _run(session, "mlpd shard rebalance", wanted, dry_run=dry_run, yes=yes)


@shard.command()
@click.argument("name", metavar="SHARD")
@_dry_run
@yes_option
@connected
def drain(session: Session, name: str, *, dry_run: bool, yes: bool) -> None:
    """Move all slots of a shard to the others.

    It stays a member without any.
    """
    from mlpd.cluster.membership import drain_moves

    def wanted(shard_map: "ShardMap", _: "Connect") -> "tuple[ShardMap, Wanted]":
        return shard_map, drain_moves(shard_map, name)

    _run(session, "mlpd shard drain", wanted, dry_run=dry_run, yes=yes)


@shard.command(epilog=examples("mlpd shard add d=http://127.0.0.1:8704"))
@click.argument("member", metavar="NAME=URL")
@_dry_run
@yes_option
@connected
def add(session: Session, member: str, *, dry_run: bool, yes: bool) -> None:
    """Make an empty daemon a member, with its share.

    That share of the slots moves there, once it has the definitions and models of the others.
    """
    from mlpd.cluster.members import parse_member
    from mlpd.cluster.membership import add_member
    from mlpd.cluster.placement import moves
    from mlpd.cluster.placement import rebalance as place

    def wanted(shard_map: "ShardMap", connect: "Connect") -> "tuple[ShardMap, Wanted]":
        new = parse_member(member)
        grown = add_member(shard_map, new, connect, dry_run=True)
        if not dry_run:
            confirm(session, f"Make {new.name} at {new.url} a member?", yes=yes)
            grown = add_member(shard_map, new, connect, dry_run=False)
        return grown, moves(grown, place(grown, grown.shards))

    _run(session, "mlpd shard add", wanted, dry_run=dry_run, yes=yes)


@shard.command()
@click.argument("name", metavar="SHARD")
@_dry_run
@yes_option
@connected
def remove(session: Session, name: str, *, dry_run: bool, yes: bool) -> None:
    """Drain a shard and take it off the map.

    All its slots move to the others.  Its data directory keeps what is left, and may then be
    deleted.
    """
    from mlpd.cluster.membership import check_removable, drain_moves, remove_member

    def wanted(shard_map: "ShardMap", _: "Connect") -> "tuple[ShardMap, Wanted]":
        check_removable(shard_map, name)
        return shard_map, drain_moves(shard_map, name)

    def afterwards(shard_map: "ShardMap", connect: "Connect") -> "ShardMap":
        return remove_member(shard_map, name, connect)

    _run(session, "mlpd shard remove", wanted, dry_run=dry_run, yes=yes, afterwards=afterwards)


@shard.command()
@yes_option
@connected
def cancel(session: Session, *, yes: bool) -> None:
    """Cancel the moves that are under way.

    The slots stay where they were.  A move whose new map is out already can't be cancelled, and is
    finished by its command.
    """
    from mlpd.cluster.leftovers import forget, leftovers
    from mlpd.cluster.members import connections, fetch_map
    from mlpd.cluster.moving import cancel as cancel_move
    from mlpd.cluster.moving import newest_map, pending

    with connections("mlpd shard cancel") as connect:
        shard_map = newest_map(fetch_map(session.client, session.url), connect)
        begun, left = (list(find(shard_map, connect)) for find in (pending, leftovers))
        if begun or left:
            lines = [f"{part.slots} from {part.source} to {part.target}" for part in begun + left]
            confirm(session, f"Cancel moving {'; '.join(lines)}?", yes=yes)
        for part in begun:
            shard_map = cancel_move(shard_map, part, connect)
        for part in left:
            forget(shard_map, part, connect)
    answer = {"cancelled": [_shown(part) for part in begun + left], "epoch": shard_map.epoch}
    session.show(answer, lambda _: print_lines(_cancelled(answer)))


def _cancelled(answer: dict[str, Any]) -> str:
    count = len(answer["cancelled"])
    return f"Cancelled: {count}; the map is of epoch {answer['epoch']}." if count else "None moves."


def _run(
    session: Session,
    by: str,
    wanted: "Callable[[ShardMap, Connect], tuple[ShardMap, Wanted]]",
    *,
    dry_run: bool,
    yes: bool,
    afterwards: "Callable[[ShardMap, Connect], ShardMap] | None" = None,
) -> None:
    """Plan, say what will be done, ask, do it, say what was done."""
    from mlpd.cluster.members import connections, fetch_map
    from mlpd.cluster.moving import newest_map, plan_moves

    with connections(by) as connect:
        shard_map = newest_map(fetch_map(session.client, session.url), connect)
        planned, moves = wanted(shard_map, connect)
        members = shard_map if dry_run else planned
        plan = plan_moves(planned, moves, connect, members=members)
        if not session.as_json:
            _print_plan(plan)
        done: list[Moved] = []
        if not dry_run and plan.parts:
            confirm(session, "Move this?", yes=yes)
            done = _carry_out(plan, connect)
        if not dry_run and afterwards is not None:
            planned = afterwards(newest_map(planned, connect), connect)
        epoch = planned.epoch if dry_run else newest_map(planned, connect).epoch
    answer = {
        "dry_run": dry_run,
        "slots": plan.slots,
        "rows": plan.rows,
        "parts": [_shown(part) for part in plan.parts],
        "moved": [_moved(one) for one in done],
        "epoch": epoch,
    }
    session.show(answer, lambda _: _print_done(answer))


def _carry_out(plan: "Plan", connect: "Connect") -> "list[Moved]":
    from mlpd.cluster.moving import carry_out

    done: list[Moved] = []
    with progress("Moving slots", float(plan.slots), unit="slots") as bar:

        def told(what: str, _: int, bar: Bar = bar) -> None:
            part = plan.parts[len(done)]
            bar.describe(f"{part.source} to {part.target}: {what}")

        for one in carry_out(plan, connect, told):
            done.append(one)
            bar.advance(len(_slots(one.part.slots)))
    return done


def _slots(text: str) -> list[int]:
    from mlpd.core.shards import parse_runs

    return parse_runs(text)


def _check_source(found: Any, source: str | None) -> None:
    from mlpd.core.errors import ConflictError
    from mlpd.core.shards import format_runs

    for (owner, _), slots in found.items():
        if source is not None and owner != source:
            raise ConflictError(
                f"slots {format_runs(slots)[:60]} belong to {owner}, not {source}",
                code="not_owned",
                hint="mlpd shard list shows who owns what.",
            )


def _shown(part: Any) -> dict[str, Any]:
    return {"from": part.source, "to": part.target, "slots": part.slots, "rows": part.rows}


def _moved(one: "Moved") -> dict[str, Any]:
    return {
        **_shown(one.part),
        "epoch": one.epoch,
        "events": one.events,
        "predictions": one.predictions,
        "pause_s": round(one.pause_s, 4),
        "seconds": round(one.seconds, 3),
    }


def _print_plan(plan: "Plan") -> None:
    if not plan.parts:
        print_lines("Nothing is to be moved.")
        return
    pairs = list(dict.fromkeys((part.source, part.target) for part in plan.parts))
    who = ", ".join(f"{source} to {target}" for source, target in pairs)
    print_lines(
        f"{plan.slots:,} slots with {plan.rows:,} online rows move from {who}, in "
        f"{len(plan.parts)} parts, with their history.",
        "Each part pauses for a moment at its end; the source keeps no rows of it.",
        "",
    )
    rows = [
        (
            source,
            target,
            sum(len(_slots(p.slots)) for p in plan.parts if (p.source, p.target) == pair),
            sum(p.rows for p in plan.parts if (p.source, p.target) == pair),
        )
        for pair in pairs
        for source, target in (pair,)
    ]
    print_table(["from", "to", "slots", "rows"], rows)


def _print_done(answer: dict[str, Any]) -> None:
    if answer["dry_run"]:
        print_lines("", "Nothing was changed.")
        return
    moved = answer["moved"]
    if moved:
        longest = max(one["pause_s"] for one in moved)
        events = sum(one["events"] for one in moved)
        predictions = sum(one["predictions"] for one in moved)
        print_lines(
            "",
            f"Moved {answer['slots']:,} slots, {events:,} events and {predictions:,} predictions "
            f"in {sum(one['seconds'] for one in moved):.1f} s; the longest pause took "
            f"{longest * 1000:.0f} ms. The map is of epoch {answer['epoch']}.",
        )
