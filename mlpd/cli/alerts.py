"""`mlpd alerts`: what is wrong, silences, and a message to try the sinks."""

from typing import Any

import click

from mlpd.cli.lazy import OrderedGroup
from mlpd.cli.output import print_lines, print_pairs, print_table, show_time
from mlpd.cli.session import Session, connected, examples
from mlpd.core.matchers import parse_matchers


@click.group(cls=OrderedGroup)
def alerts() -> None:
    """List alerts, silence them, try the sinks."""


@alerts.command("list")
@click.option("--all", "everything", is_flag=True, help="Resolved and silenced ones, too.")
@connected
def list_alerts(session: Session, *, everything: bool) -> None:
    """List what is wrong, silences, and how the sinks are doing.

    Resolved alerts are kept for a day.
    """
    session.show(session.client.alerts.list(), lambda found: _print(found, everything=everything))


@alerts.command(
    epilog=examples(
        "mlpd alerts silence model=flight-risk --for 2h --why 'retrained tonight'",
        "mlpd alerts silence alertname=FeatureDrift 'feature=weather.*' --for 1d",
    )
)
@click.argument("matchers", nargs=-1, required=True, metavar="LABEL=PATTERN...")
@click.option("--for", "lasts", required=True, metavar="DURATION", help="Such as 2h; at most 90d.")
@click.option("--why", default="", help="A reason, for others.")
@connected
def silence(session: Session, matchers: tuple[str, ...], *, lasts: str, why: str) -> None:
    """Tell nobody of alerts with such labels, for a time.

    All labels must match.  What still fires when the silence ends is told then.
    """
    made = session.client.alerts.silence(parse_matchers(matchers), lasts=lasts, why=why)
    session.show(made, _print_silence)


@alerts.command()
@click.argument("silence_id", metavar="ID")
@connected
def unsilence(session: Session, silence_id: str) -> None:
    """End a silence."""
    session.show(session.client.alerts.unsilence(silence_id), _print_silence)


@alerts.command()
@click.option("--sink", help="Only this one: log, alertmanager, webhook.")
@connected
def test(session: Session, *, sink: str | None) -> None:
    """Send a message through the sinks, now.

    Not through training.  A sink that does not take it gives exit code 1.
    """
    found = session.client.alerts.test(sink=sink)
    session.show(found, _print_tested)
    if not all(tried["sent"] for tried in found["sinks"]):
        click.get_current_context().exit(1)


def _print(found: dict[str, Any], *, everything: bool) -> None:
    shown = [
        alert
        for alert in found["alerts"]
        if everything or (alert["state"] != "resolved" and not alert["silenced"])
    ]
    rows = [
        (
            *(alert["labels"]["alertname"], "silenced" if alert["silenced"] else alert["state"]),
            *(_subject(alert["labels"]), show_time(alert["starts"]), alert["text"]),
        )
        for alert in shown
    ]
    print_table(["alert", "state", "of", "since", "what"], rows, empty="Nothing is wrong.")
    if hidden := len(found["alerts"]) - len(shown):
        print_lines("", f"{hidden} more are resolved or silenced; --all shows them.")
    if found["silences"]:
        silences = [
            (s["id"], _labels(s["matchers"]), show_time(s["ends"]), s["by"], s["why"])
            for s in found["silences"]
        ]
        print_table(["id", "of", "until", "by", "why"], silences, title="Silences")
    sinks = [
        (
            *(sink["name"], sink["state"], sink["waiting"], sink["sent"], sink["failed"]),
            sink["error"] and sink["error"]["message"],
        )
        for sink in found["sinks"]
    ]
    print_table(["sink", "state", "waiting", "sent", "failed", "why"], sinks, title="Sinks")


def _print_silence(made: dict[str, Any]) -> None:
    print_pairs(
        {
            "id": made["id"],
            "of": _labels(made["matchers"]),
            "until": show_time(made["ends"]),
            "by": made["by"],
            "why": made["why"] or None,
        }
    )


def _print_tested(found: dict[str, Any]) -> None:
    rows = [
        (
            *(tried["sink"], "ok" if tried["sent"] else "failed"),
            tried["error"] and tried["error"]["message"],
        )
        for tried in found["sinks"]
    ]
    print_table(["sink", "state", "why"], rows)


def _subject(labels: dict[str, str]) -> str | None:
    return _labels({name: value for name, value in labels.items() if name != "alertname"}) or None


def _labels(labels: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in labels.items())
