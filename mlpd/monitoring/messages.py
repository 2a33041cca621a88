"""Alerts as other programs read them: Alertmanager's API version 2 and its webhook version 4.

Forms: https://github.com/prometheus/alertmanager/blob/main/api/v2/openapi.yaml and
https://prometheus.io/docs/alerting/latest/configuration/#webhook_config
"""

import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from mlpd.core.time import format_time
from mlpd.monitoring.alerts import ALERTNAME, Alert, State

NEVER: Final = "0001-01-01T00:00:00Z"
"""How Alertmanager writes a time that there isn't."""

TEST: Final = "MlpdTest"

Labels = Mapping[str, str]


def alertmanager_body(alerts: Iterable[Alert], *, now_us: int, lasts_us: int) -> bytes:
    """Return the body of `POST /api/v2/alerts`: firing alerts end `lasts_us` from now.

    Until the next time that they are sent, that is.
    """
    return _json([_posted(alert, now_us + lasts_us) for alert in alerts])


def webhook_body(group: str, alerts: Sequence[Alert], *, receiver: str) -> bytes:
    """Return the body of a webhook for alerts of one group, at least one."""
    firing = any(alert.state is State.FIRING for alert in alerts)
    return _json(
        {
            "version": "4",
            "groupKey": group,
            "truncatedAlerts": 0,
            "status": "firing" if firing else "resolved",
            "receiver": receiver,
            "groupLabels": {"group": group},
            "commonLabels": _common([alert.labels for alert in alerts]),
            "commonAnnotations": _common([_annotations(alert) for alert in alerts]),
            "externalURL": "",
            "alerts": [_hooked(alert) for alert in alerts],
        }
    )


def sign(secret: bytes, body: bytes, time_s: int) -> str:
    """Return the value of the header `mlpd-signature`: HMAC-SHA256 over the time and the body."""
    signed = hmac.new(secret, b"%d." % time_s + body, hashlib.sha256).hexdigest()
    return f"t={time_s},v1={signed}"


def summarize(group: str, alerts: Sequence[Alert]) -> str:
    """Return one line for people: what fires, what is over."""
    firing = [_brief(alert) for alert in alerts if alert.state is State.FIRING]
    resolved = [_brief(alert) for alert in alerts if alert.state is not State.FIRING]
    parts = [
        f"{len(found)} {what}: {'; '.join(found)}"
        for what, found in (("firing", firing), ("resolved", resolved))
        if found
    ]
    return f"{group}: {', '.join(parts)}"


def describe_alert(alert: Alert) -> dict[str, Any]:
    """Return an alert as the API shows it."""
    return {
        "fingerprint": alert.fingerprint,
        "labels": dict(alert.labels),
        "group": alert.group,
        "state": alert.state.value,
        "value": alert.value,
        "threshold": alert.threshold,
        "text": alert.text,
        "starts": _time(alert.starts_us),
        "ends": _time(alert.ends_us),
    }


def _posted(alert: Alert, ends_us: int) -> dict[str, Any]:
    if alert.state is not State.FIRING and alert.ends_us is not None:
        ends_us = alert.ends_us
    return {
        "labels": dict(alert.labels),
        "annotations": _annotations(alert),
        "startsAt": _time(alert.starts_us),
        "endsAt": format_time(ends_us),
    }


def _hooked(alert: Alert) -> dict[str, Any]:
    return {
        "status": "firing" if alert.state is State.FIRING else "resolved",
        "labels": dict(alert.labels),
        "annotations": _annotations(alert),
        "startsAt": _time(alert.starts_us) or NEVER,
        "endsAt": NEVER if alert.state is State.FIRING else _time(alert.ends_us) or NEVER,
        "generatorURL": "",
        "fingerprint": alert.fingerprint,
    }


def _annotations(alert: Alert) -> dict[str, str]:
    return {
        "summary": alert.text,
        "value": f"{alert.value:.6g}",
        "threshold": f"{alert.threshold:.6g}",
    }


def _common(labels: Sequence[Labels]) -> dict[str, str]:
    shared = set(labels[0].items()).intersection(*(other.items() for other in labels[1:]))
    return dict(sorted(shared))


def _brief(alert: Alert) -> str:
    labels = {name: value for name, value in alert.labels.items() if name != ALERTNAME}
    named = " ".join(f"{name}={value}" for name, value in labels.items())
    return f"{alert.name} {named}: {alert.text}" if named else f"{alert.name}: {alert.text}"


def _time(time_us: int | None) -> str | None:
    return None if time_us is None else format_time(time_us)


def _json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False).encode()
