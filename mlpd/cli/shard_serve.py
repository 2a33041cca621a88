"""`mlpd shard serve`: a whole cluster on one machine by one command, until Ctrl-C or SIGTERM."""

import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from mlpd.cli.lazy import AS_JSON
from mlpd.cli.output import note, print_json, print_lines, print_table
from mlpd.cli.session import examples

if TYPE_CHECKING:
    from mlpd.cli.local_cluster import ClusterPlan

_SHARDS: Final = 3
_LOOK_S: Final = 0.2


class _Stopped(Exception):  # noqa: N818 - no error
    """A signal came."""


@click.command(
    epilog=examples(
        "mlpd shard serve",
        "mlpd shard serve --config conf/shards.toml --data-dir /var/lib/mlpd",
        "mlpd shard serve --dry-run",
    )
)
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="TOML file with names and ports; see conf/shards.toml, which is the default.",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("mlpd-shards"),
    show_default=True,
    help="Where each shard keeps everything, in a folder by its name.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be started, and start nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object once all are ready.")
@click.pass_context
def serve(
    context: click.Context, config: Path | None, data_dir: Path, *, dry_run: bool, as_json: bool
) -> None:
    """Run a cluster on this machine: daemons, and a router over them.

    The first start makes them a cluster; later ones go on with what is in DATA_DIR.  Ctrl-C or
    SIGTERM stops all of them gracefully; so does the end of one, which is told with its log.
    """
    from mlpd.cli.local_cluster import ClusterPlan, LocalCluster

    context.meta[AS_JSON] = as_json
    plan = ClusterPlan.of(_SHARDS) if config is None else ClusterPlan.load(config)
    note(_sentence(plan, data_dir, dry_run=dry_run))
    if dry_run:
        _show_plan(plan, data_dir, as_json=as_json)
        return
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())

    def check() -> None:
        if stopping.is_set():
            raise _Stopped

    cluster = LocalCluster(data_dir, plan, check)
    try:
        cluster.start()
        if as_json:
            print_json(cluster.to_dict())
        else:
            _show(cluster.to_dict())
        while not stopping.wait(_LOOK_S):
            cluster.check_running()
    except _Stopped:
        pass
    finally:
        cluster.stop()
    note("All are stopped.")


def _sentence(plan: "ClusterPlan", data_dir: Path, *, dry_run: bool) -> str:
    verb = "Would start" if dry_run else "Starting"
    count = len(plan.ports)
    daemons = f"{count} daemon" + ("s" if count != 1 else "")
    at = f"at port {plan.router_port}" if plan.router_port else "at any free port"
    return (
        f"{verb} {daemons} ({', '.join(plan.ports)}) with their data in {data_dir}/, as one "
        f"cluster, and a router {at}."
    )


def _show_plan(plan: "ClusterPlan", data_dir: Path, *, as_json: bool) -> None:
    shards = [
        {"name": name, "port": port, "data_dir": str(data_dir / name)}
        for name, port in plan.ports.items()
    ]
    if as_json:
        print_json({"dry_run": True, "router_port": plan.router_port, "shards": shards})
    else:
        print_table(("shard", "port", "data"), [[*shard.values()] for shard in shards])


def _show(found: dict[str, Any]) -> None:
    rows = [
        [shard[name] for name in ("name", "url", "pid", "data_dir")] for shard in found["shards"]
    ]
    print_table(("shard", "url", "pid", "data"), rows)
    count = len(rows)
    print_lines("", f"mlpd is ready at {found['url']}  ({count} shards; Ctrl-C stops all of them)")
