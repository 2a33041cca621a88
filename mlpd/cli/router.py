"""`mlpd router`: one address for all shards, in the foreground, until Ctrl-C or SIGTERM."""

from typing import TYPE_CHECKING

import click

from mlpd.cli.session import examples

if TYPE_CHECKING:
    from mlpd.cluster.router.app import Router


@click.command(
    epilog=examples(
        "mlpd router --shards http://127.0.0.1:8701,http://127.0.0.1:8702",
        "mlpd router --shards http://127.0.0.1:8701 --port 8800 --timeout 2",
    )
)
@click.option(
    "--shards",
    required=True,
    metavar="URL[,URL...]",
    envvar="MLPD_SHARDS",
    show_envvar=True,
    help="Some members of the cluster: the first that answers tells the others.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Loopback address.")
@click.option("--port", type=int, default=8700, show_default=True, help="0 for any free one.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.01),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="What a read or a prediction may take that comes without a deadline.",
)
@click.option(
    "--hedge",
    type=click.FloatRange(0.0, 1.0),
    default=0.05,
    show_default=True,
    metavar="SHARE",
    help="Of reads that may be sent twice when they are slow; 0 for none.",
)
@click.option(
    "--cache-max-age",
    type=click.FloatRange(0.0, 3600.0),
    default=0.0,
    show_default=True,
    metavar="SECONDS",
    help="How long rows of features are kept and given again; 0 for not at all.",
)
@click.option(
    "--cache-rows",
    type=click.IntRange(1, 10_000_000),
    default=10_000,
    show_default=True,
    help="How many rows are kept, 1 kB or so each.",
)
@click.option(
    "--max-staleness",
    type=click.FloatRange(0.0, 1e6),
    metavar="SECONDS",
    help="Read from followers of a shard that can't be reached, if they are as fresh.",
)
@click.option("--verbose", is_flag=True, help="Log more, to stderr.")
def router(  # noqa: PLR0913 - one per option
    shards: str,
    host: str,
    port: int,
    timeout: float,
    hedge: float,
    cache_max_age: float,
    cache_rows: int,
    max_staleness: float | None,
    *,
    verbose: bool,
) -> None:
    """Answer for all shards at one address.

    It speaks the API of a daemon: rows are split by key and asked for in parallel, changes go to
    all shards, and what only one shard can tell is refused by name.  It keeps nothing, so several
    may run side by side.  Ctrl-C or SIGTERM stops it when requests under way have ended.
    """
    import asyncio

    from mlpd.cli.log import set_up_logging
    from mlpd.cluster.router.app import RouterConfig
    from mlpd.cluster.router.run import serve
    from mlpd.core.address import parse_address
    from mlpd.core.config import Config, with_server

    set_up_logging(verbose=verbose)
    urls = tuple(url.strip().rstrip("/") for url in shards.split(",") if url.strip())
    for url in urls:
        parse_address(url)
    server = with_server(Config(), host=host, port=port).server
    config = RouterConfig(
        *(urls, server),
        read_s=timeout,
        hedge_share=hedge,
        cache_age_s=cache_max_age,
        cache_rows=cache_rows,
        max_staleness_s=max_staleness,
    )

    def on_start(url: str, made: "Router") -> None:
        known = [shard.name or shard.url for shard in made.members.shards()]
        what = ", ".join(known) if made.members.ready else "waiting for a shard to answer"
        click.echo(f"mlpd router is at {url}  ({what}; Ctrl-C stops it)")

    asyncio.run(serve(config, on_start))
