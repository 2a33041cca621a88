"""The command `mlpd`: its subcommands by section, each imported when it is used."""

import click

from mlpd import __version__
from mlpd.cli.lazy import Lazy, RootGroup

SECTIONS = {
    "Daemon": {
        "serve": Lazy("mlpd.cli.serve:serve", "Run the daemon."),
        "status": Lazy("mlpd.cli.status:status", "Show how the daemon is doing."),
        "demo": Lazy("mlpd.cli.demo_command:demo", "Everything at work on a year of real flights."),
    },
    "Definitions and data": {
        "plan": Lazy("mlpd.cli.apply:plan", "Show what a definitions folder would change."),
        "apply": Lazy("mlpd.cli.apply:apply", "Make a definitions folder what runs."),
        "events": Lazy(
            "mlpd.cli.events:events", "Send events, import and export files, follow what comes."
        ),
        "features": Lazy("mlpd.cli.features:features", "List and read features."),
    },
    "Models": {
        "jobs": Lazy("mlpd.cli.jobs:jobs", "List training jobs and run them."),
        "runs": Lazy("mlpd.cli.runs:runs", "Follow, read, cancel and retry training runs."),
        "models": Lazy("mlpd.cli.models:models", "List and keep models, move aliases."),
        "routes": Lazy("mlpd.cli.routes:routes", "Decide which models answer."),
        "predictions": Lazy("mlpd.cli.predictions:predictions", "Export the prediction log."),
        "experiments": Lazy("mlpd.cli.experiments:experiments", "Compare models on live traffic."),
    },
    "Monitoring": {
        "drift": Lazy("mlpd.cli.monitor:drift", "Compare what a model sees with its training."),
        "performance": Lazy("mlpd.cli.monitor:performance", "Show a model's live quality."),
        "consistency": Lazy(
            "mlpd.cli.monitor:consistency", "Compare served features with the log."
        ),
        "quality": Lazy("mlpd.cli.monitor:quality", "Show what is wrong with data."),
        "alerts": Lazy("mlpd.cli.alerts:alerts", "List alerts, silence them, try the sinks."),
    },
    "Cluster": {
        "shard": Lazy("mlpd.cli.replica:shard", "Split the keys over several daemons."),
        "router": Lazy("mlpd.cli.router:router", "Answer for all shards at one address."),
    },
    "Data": {
        "backup": Lazy("mlpd.cli.maintenance:backup", "Back up a running daemon."),
        "restore": Lazy("mlpd.cli.maintenance:restore", "Bring a backup back."),
        "fsck": Lazy("mlpd.cli.maintenance:fsck", "Check a data directory."),
    },
}


@click.group(
    cls=RootGroup,
    sections=SECTIONS,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='Completion for bash: eval "$(_MLPD_COMPLETE=bash_source mlpd)"; zsh and fish likewise.',
)
@click.version_option(__version__, message="mlpd %(version)s")
def main() -> None:
    """A whole ML platform in one process.

    Commands talk to the daemon at --url or MLPD_URL (http://127.0.0.1:8700 by default;
    unix:mlpd-data/mlpd.sock works too).  --json gives one JSON document for programs.
    """
