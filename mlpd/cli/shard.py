"""`mlpd shard`: making a cluster of daemons, and looking at one."""

from typing import TYPE_CHECKING, Any

import click

from mlpd.cli.lazy import OrderedGroup
from mlpd.cli.output import print_lines, print_pairs, print_table, show_share
from mlpd.cli.session import Session, connected, examples
from mlpd.cli.shard_haproxy import haproxy
from mlpd.cli.shard_serve import serve

if TYPE_CHECKING:
    from mlpd.cluster.members import Member
    from mlpd.core.shards import Shard, ShardMap


@click.group(cls=OrderedGroup)
def shard() -> None:
    """Split the keys over several daemons."""


shard.add_command(serve)
shard.add_command(haproxy)


@shard.command(
    epilog=examples(
        "mlpd shard init a=http://127.0.0.1:8701 b=http://127.0.0.1:8702 --dry-run",
        "mlpd shard init a=http://127.0.0.1:8701 b=http://127.0.0.1:8702",
    )
)
@click.argument("members", nargs=-1, required=True, metavar="NAME=URL...")
@click.option("--dry-run", is_flag=True, help="Ask all daemons, change nothing.")
@connected
def init(session: Session, members: tuple[str, ...], *, dry_run: bool) -> None:
    """Make a cluster of running daemons without data.

    Each gets a name, and an even share of the 16,384 slots that keys hash into.  Nothing is changed
    unless all of them agree; a command that died half-way is finished by the same command.
    """
    from mlpd.cluster.members import connections, give_map, parse_member, plan_cluster

    with connections("mlpd shard init") as connect:
        made = plan_cluster([parse_member(text) for text in members], connect)
        said = f"Cluster {made.cluster} of {_count(len(made.shards), 'shard')}"
        if not session.as_json:
            print_lines(f"{said}: every daemon is ready to take this map.", "")
            _print_shards(made)
        told: list[str] = []
        if not dry_run:
            give_map(made, connect, lambda shard: told.append(shard.name))
    done = {"dry_run": dry_run, "given_to": told, "epoch": made.epoch, "map": made.to_dict()}
    last = "Nothing was changed." if dry_run else f"All of them go by it now, epoch {made.epoch}."
    session.show(done, lambda _: print_lines("", last))


@shard.command("list")
@connected
def list_shards(session: Session) -> None:
    """List the shards in a daemon's map, with what they own."""
    from mlpd.cluster.members import fetch_map

    found = fetch_map(session.client, session.url)
    session.show(found.to_dict(), lambda _: _print_map(found))


@shard.command()
@connected
def status(session: Session) -> None:
    """Ask every shard and follower how it is, and what moves.

    Which map it goes by, how far it is.  Exits with 1 if one of the shards isn't ok.
    """
    from mlpd.cluster.members import connections, fetch_map, survey
    from mlpd.cluster.moving import pending
    from mlpd.cluster.replica.listing import survey_replicas

    known = fetch_map(session.client, session.url)
    with connections("mlpd shard status") as connect:
        newest, members = survey(known, connect)
        down = {member.url for member in members if member.state == "no answer"}
        begun = list(pending(newest, connect, down))
        replicas = survey_replicas(newest, connect)
    answer = {
        "cluster": newest.cluster,
        "epoch": newest.epoch,
        "digest": newest.digest,
        "arbiter": newest.arbiter.name,
        "shards": [_status_of(member, newest) for member in members],
        "moves": [
            {"from": one.source, "to": one.target, "slots": one.slots, "state": one.state}
            for one in begun
        ],
        "replicas": replicas,
    }
    session.show(answer, _print_status)
    if any(member.state != "ok" for member in members):
        click.get_current_context().exit(1)


def _status_of(member: "Member", newest: "ShardMap") -> dict[str, Any]:
    expected = next(shard for shard in newest.shards if shard.url == member.url)
    return {
        "shard": member.shard,
        "url": member.url,
        "state": member.state,
        "why": member.why,
        "slots": len(newest.slots_of(expected.name)),
        "epoch": member.epoch,
        "digest": member.digest,
        "sequence": member.sequence,
        "version": member.version,
    }


def _print_map(found: "ShardMap") -> None:
    print_pairs({"cluster": found.cluster, "epoch": found.epoch, "arbiter": found.arbiter.name})
    print_lines("")
    _print_shards(found)


def _print_shards(found: "ShardMap") -> None:
    rows = [_row(found, shard) for shard in found.shards]
    print_table(["shard", "url", "slots", "share", "which"], rows)


def _row(found: "ShardMap", shard: "Shard") -> tuple[Any, ...]:
    from mlpd.core.hashing import SLOTS
    from mlpd.core.shards import format_runs

    slots = found.slots_of(shard.name)
    runs = format_runs(slots).split()
    which = " ".join(runs[:3]) + (f" and {len(runs) - 3} more runs" if len(runs) > 3 else "")  # noqa: PLR2004 - shown
    return shard.name, shard.url, len(slots), show_share(len(slots) / SLOTS), which or "none"


def _print_status(answer: dict[str, Any]) -> None:
    print_pairs({name: answer[name] for name in ("cluster", "epoch", "arbiter")})
    print_lines("")
    names = ("shard", "url", "state", "epoch", "slots", "sequence", "why")
    rows = [[shard[name] for name in names] for shard in answer["shards"]]
    print_table(names, rows)
    if answer["moves"]:
        print_lines("", "Under way:")
        print_table([*answer["moves"][0]], [[*move.values()] for move in answer["moves"]])
    if answer["replicas"]:
        print_lines("", "Followers:")
        names = ("shard", "url", "role", "sequence", "lag_rows", "staleness_ms", "why")
        print_table(names, [[replica[name] for name in names] for replica in answer["replicas"]])


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")
