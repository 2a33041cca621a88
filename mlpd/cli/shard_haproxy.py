"""`mlpd shard haproxy`: a configuration that computes our slots, and following the map with it."""

import signal
import threading
from typing import TYPE_CHECKING, Any

import click

from mlpd.cli.output import note, print_json, print_lines
from mlpd.cli.session import Session, connected, examples

if TYPE_CHECKING:
    from mlpd.cluster.haproxy.config import Files, Front
    from mlpd.cluster.haproxy.follow import Done, Follower
    from mlpd.core.shards import ShardMap


@click.command(
    "haproxy",
    epilog=examples(
        "mlpd shard haproxy --dry-run",
        "mlpd shard haproxy --out lb.cfg --bind 127.0.0.1:8790 && haproxy -D -f lb.cfg",
        "mlpd shard haproxy --out lb.cfg --bind 127.0.0.1:8790 --follow",
    ),
)
@click.option(
    "--out",
    default="mlpd-haproxy.cfg",
    show_default=True,
    metavar="FILE",
    help="The configuration; the map of slots is written beside it, as .map.",
)
@click.option(
    "--bind",
    default="127.0.0.1:8790",
    show_default=True,
    metavar="HOST:PORT",
    help="Where HAProxy listens: a loopback address.",
)
@click.option(
    "--socket",
    metavar="PATH",
    help="HAProxy's runtime socket.  [default: beside the configuration, as .sock]",
)
@click.option(
    "--spares",
    type=click.IntRange(0, 100),
    default=8,
    show_default=True,
    help="Backends for shards that join before the next reload.",
)
@click.option("--follow", is_flag=True, help="Go on, and bring every new map to haproxy.")
@click.option(
    "--every",
    type=click.FloatRange(min=0.05, max=3600.0),
    default=0.5,
    show_default=True,
    metavar="SECONDS",
    help="With --follow: between two looks.",
)
@click.option("--dry-run", is_flag=True, help="Print the configuration, write nothing.")
@connected
def haproxy(
    session: Session,
    out: str,
    bind: str,
    socket: str | None,
    spares: int,
    every: float,
    *,
    follow: bool,
    dry_run: bool,
) -> None:
    """Write a configuration of HAProxy that finds a key's shard.

    Requests carry their key in x-mlpd-key (text), x-mlpd-key-int or x-mlpd-key-bytes; HAProxy
    computes the slot by itself.  With --follow a running one is brought to every new map over its
    runtime socket, without a reload, until Ctrl-C or SIGTERM.
    """
    from mlpd.cluster.haproxy.config import Front, check_bind, parse_files, render_config
    from mlpd.cluster.members import fetch_map

    if follow and dry_run:
        raise click.UsageError("--dry-run writes nothing: give it without --follow.")
    files, front = parse_files(out, socket), Front(check_bind(bind), spares)
    found = fetch_map(session.client, session.url)
    if dry_run:
        text = render_config(found, front, files)
        session.show({"dry_run": True, "config": text}, lambda _: print_lines(text.rstrip("\n")))
    elif follow:
        _follow(session, found, files, front, every)
    else:
        _write(session, found, files, front)


def _write(session: Session, found: "ShardMap", files: "Files", front: "Front") -> None:
    from mlpd.cluster.haproxy.config import write_files

    written = write_files(found, front, files)
    answer = {
        "epoch": found.epoch,
        "config": str(files.config),
        "map": str(files.map),
        "socket": str(files.socket),
        "bind": front.bind,
        "written": list(map(str, written)),
    }
    session.show(answer, _print_written)


def _print_written(answer: dict[str, Any]) -> None:
    print_lines(
        *(f"Wrote {path}, epoch {answer['epoch']}." for path in answer["written"]),
        *(() if answer["written"] else ("Nothing had changed.",)),
        f"Start it: haproxy -D -f {answer['config']}",
    )


def _follow(
    session: Session, found: "ShardMap", files: "Files", front: "Front", every_s: float
) -> None:
    """Look every `every_s` seconds; what is wrong at the first look ends the command."""
    from mlpd.cluster.haproxy.follow import Follower, Newest
    from mlpd.cluster.haproxy.runtime import Haproxy
    from mlpd.cluster.members import connections

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with connections("mlpd shard haproxy") as connect:
        haproxy = Haproxy(files.socket, files.map)
        follower = Follower(files, front, haproxy, Newest(found, connect))
        _say(session, follower.step())
        _follow_on(session, follower, stop, every_s)


def _follow_on(
    session: Session, follower: "Follower", stop: threading.Event, every_s: float
) -> None:
    from mlpd.core.errors import MlpdError

    failing = ""
    while not stop.wait(every_s):
        try:
            done = follower.step()
        except MlpdError as error:
            if error.code != failing:
                _say_error(session, error)
            failing = error.code
            continue
        failing = ""
        _say(session, done)


def _say(session: Session, done: "Done | None") -> None:
    if done is None:
        return
    if session.as_json:
        print_json(done.to_dict())
        return
    parts = [f"{done.slots} slots set"] if done.slots else []
    parts += [f"{name} added" for name in done.added]
    parts += [f"{name} at its new address" for name in done.readdressed]
    parts += [f"{path} written" for path in done.files]
    print_lines(f"Epoch {done.epoch}, haproxy {done.pid}: {', '.join(parts) or 'in step'}.")
    if done.reload_needed:
        note(f"Reload haproxy: it has no backend for {', '.join(done.reload_needed)}.")


def _say_error(session: Session, error: Any) -> None:
    if session.as_json:
        print_json({"error": error.to_dict()})
    else:
        note(f"{error.message} [{error.code}]; trying on.")
