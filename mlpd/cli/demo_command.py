"""`mlpd demo`: the whole platform at work on a year of real flights."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlpd.cli.lazy import AS_JSON
from mlpd.cli.output import note, print_json, print_lines

if TYPE_CHECKING:
    from mlpd.cli.demo.process import DaemonProcess


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
@click.option("--port", type=int, help="TCP port, 0 for any free one.  [default: 8700]")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on one line.")
@click.option("--exit", "stop", is_flag=True, help="Stop the daemon at the end.")
@click.pass_context
def demo(
    context: click.Context,
    months: int,
    data_dir: Path,
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
    """
    import time

    from mlpd.cli.demo.demo import Scope, run_demo
    from mlpd.cli.demo.flights import data_folder
    from mlpd.cli.demo.process import running_daemon
    from mlpd.cli.demo.report import print_report, save_report

    context.meta[AS_JSON] = as_json
    started_s = time.monotonic()
    data_folder()  # a missing extra is told before anything is made
    try:
        with running_daemon(data_dir, port) as daemon:
            findings = run_demo(daemon, Scope(months=months), started_s)
            save_report(findings)
            print_report(findings)
    except KeyboardInterrupt:
        note(f"Interrupted: the demo's daemon is stopped; remove its data with rm -r {data_dir}")
        raise
    if stop:
        daemon.stop()
    else:
        daemon.leave_running()
    print_lines("", *_farewell(daemon, data_dir, stopped=stop))
    if as_json:
        print_json(findings.to_dict())


def _farewell(daemon: "DaemonProcess", data_dir: Path, *, stopped: bool) -> list[str]:
    if stopped:
        return [
            "The daemon is stopped.",
            f"Start it again: mlpd serve --data-dir {data_dir}",
        ]
    return [
        f"The daemon goes on at {daemon.url} (pid {daemon.pid}).",
        f"Look around:  export MLPD_URL={daemon.url}; mlpd status; mlpd drift flight-risk",
        f"Stop it:      kill {daemon.pid}",
        f"Start again:  mlpd serve --data-dir {data_dir}",
    ]
