"""`mlpd demo`: the whole platform at work on a year of real flights."""

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlpd.cli.lazy import AS_JSON
from mlpd.cli.output import note, print_json, print_lines

if TYPE_CHECKING:
    from mlpd.cli.demo.process import Running


@click.command()
@click.option(
    "--months",
    type=click.IntRange(1, 3),
    default=3,
    show_default=True,
    help="Replay October alone (1), also November with its shadow (2), also December with its "
    "experiment (3).",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("mlpd-demo"),
    show_default=True,
    help="Where the demo's daemon keeps everything; must be new or empty.",
)
@click.option(
    "--shards",
    type=click.IntRange(1, 8),
    default=1,
    show_default=True,
    help="Daemons that own a part of the keys each, behind a router; 1 for one with everything.",
)
@click.option(
    "--port",
    type=int,
    help="TCP port, 0 for any free one; of several shards the router's, theirs are those behind "
    "it.  [default: 8700]",
)
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on one line.")
@click.option("--exit", "stop", is_flag=True, help="Stop what it started at the end.")
@click.pass_context
def demo(
    context: click.Context,
    months: int,
    data_dir: Path,
    shards: int,
    port: int | None,
    *,
    as_json: bool,
    stop: bool,
) -> None:
    """Everything at work on the 336,776 flights that left New York in 2013.

    Starts a daemon of its own, imports January to September, trains a model that says whether a
    flight will arrive late, and lives through October to December as it happened: features by key,
    predictions, labels; a shadow in November, an A/B experiment in December.  Then it checks every
    prediction against the log, bit for bit.  Takes minutes; needs pip install "mlpd[demo]".

    With --shards 3 the same is done by one URL, a router's: carriers, airports and aircraft live on
    three daemons.
    """
    import time

    from mlpd.cli.demo.demo import Scope, run_demo
    from mlpd.cli.demo.flights import data_folder
    from mlpd.cli.demo.process import running_cluster, running_daemon
    from mlpd.cli.demo.report import print_report, save_report

    context.meta[AS_JSON] = as_json
    started_s = time.monotonic()
    data_folder()  # a missing extra is told before anything is made
    made: AbstractContextManager[Running] = (
        running_daemon(data_dir, port) if shards == 1 else running_cluster(data_dir, shards, port)
    )
    try:
        with _interrupted_by_sigterm(), made as daemon:
            findings = run_demo(daemon, Scope(months=months), started_s)
            save_report(findings)
            print_report(findings)
    except KeyboardInterrupt:
        who = "daemon is" if shards == 1 else "daemons are"
        note(f"Interrupted: the demo's {who} stopped; remove the data with rm -r {data_dir}")
        raise
    if stop:
        daemon.stop()
    else:
        daemon.leave_running()
    print_lines("", *_farewell(daemon, data_dir, stopped=stop))
    if as_json:
        print_json(findings.to_dict())


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does: who ends the demo half-way ends its daemons, too."""
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _farewell(daemon: "Running", data_dir: Path, *, stopped: bool) -> list[str]:
    from mlpd.cli.demo.process import start_again

    pids = " ".join(map(str, daemon.pids))
    is_one = len(daemon.pids) == 1
    if stopped:
        return [
            "The daemon is stopped." if is_one else "The daemons and their router are stopped.",
            f"Start {'it' if is_one else 'them'} again: {start_again(data_dir)}",
        ]
    who = "The daemon goes" if is_one else "The daemons go"
    status = "mlpd status" if is_one else "mlpd status; mlpd shard list"
    return [
        f"{who} on at {daemon.url} (pid {pids}).",
        f"Look around:  export MLPD_URL={daemon.url}; {status}; mlpd drift flight-risk",
        f"{'Stop it:' if is_one else 'Stop all:':<14}kill {pids}",
        f"Start again:  {start_again(data_dir)}",
    ]
