"""`mlpd serve`: the daemon in the foreground, until Ctrl-C or SIGTERM."""

from functools import partial
from pathlib import Path

import click


@click.command()
@click.option("--config", type=click.Path(path_type=Path), help="TOML file; see conf/default.toml.")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("mlpd-data"),
    show_default=True,
    envvar="MLPD_DATA_DIR",
    help="Where everything is kept; made if it isn't there.",
)
@click.option("--host", help="Loopback address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="TCP port, 0 for any free one.  [default: 8700]")
@click.option(
    "--follow", metavar="URL", help="Have what the daemon at URL has, and answer reads of it."
)
@click.option(
    "--discard", is_flag=True, help="With --follow: replace the data that is in DATA_DIR."
)
@click.option("--verbose", is_flag=True, help="Log more, to stderr.")
def serve(
    config: Path | None,
    data_dir: Path,
    host: str | None,
    port: int | None,
    follow: str | None,
    *,
    discard: bool,
    verbose: bool,
) -> None:
    """Run the daemon: features, models, training, serving, experiments, monitoring.

    It listens on 127.0.0.1:8700 and on a unix socket in the data directory.  Ctrl-C or SIGTERM
    stops it gracefully: it drains, flushes and closes.

    With --follow it is a follower, for good: started again, it needs the option no more.  mlpd
    shard promote makes it the owner.
    """
    from mlpd.cli.log import set_up_logging
    from mlpd.core.config import Config, load_config, with_server

    set_up_logging(verbose=verbose)
    settings = with_server(
        Config() if config is None else load_config(config), host=host, port=port
    )

    if discard and follow is None:
        raise click.UsageError("--discard goes with --follow URL")

    # After the settings: what is wrong with them is told before a second of imports.
    import asyncio

    from mlpd.cluster.replica.beside import Companion
    from mlpd.http.run import serve as run

    def on_ready(url: str) -> None:
        click.echo(f"mlpd is ready at {url}  (data: {data_dir}; Ctrl-C stops it)")

    told = partial(click.echo, err=True)
    companion = Companion(follow and follow.rstrip("/"), told, discard=discard)
    asyncio.run(run(settings, data_dir, on_ready, companion))
