"""All scenarios by name; each returns its cases: ours, its floor, and their ratio."""

from collections.abc import Callable

from bench.backup import backup
from bench.bandits import bandits
from bench.cluster import cluster
from bench.counting import counting
from bench.drift import drift
from bench.drift_days import drift_days
from bench.event_ids import event_ids
from bench.experiments import experiments
from bench.exporter import exporter
from bench.feast import feast
from bench.footprint import footprint
from bench.growth import growth
from bench.guardrails import guardrails
from bench.haproxy import haproxy
from bench.join import join, join_large
from bench.labels import labels
from bench.loop import loop
from bench.metrics import metrics
from bench.monitoring import monitoring
from bench.moving import moving
from bench.options import Options
from bench.overload import overloads
from bench.paced import paced
from bench.replica import replica
from bench.scaling import scaling
from bench.serving import ingest, predict, read
from bench.serving_peers import serving
from bench.start import start
from bench.training import training
from bench.turns import Case

SCENARIOS: dict[str, Callable[[Options], dict[str, Case]]] = {
    "read": read,
    "predict": predict,
    "ingest": ingest,
    "event_ids": event_ids,
    "join": join,
    "join-large": join_large,
    "counting": counting,
    "drift": drift,
    "drift_days": drift_days,
    "experiments": experiments,
    "guardrails": guardrails,
    "bandits": bandits,
    "start": start,
    "paced": paced,
    "loop": loop,
    "overload": overloads,
    "training": training,
    "exporter": exporter,
    "footprint": footprint,
    "growth": growth,
    "backup": backup,
    "cluster": cluster,
    "scaling": scaling,
    "moving": moving,
    "replica": replica,
    "metrics": metrics,
    "labels": labels,
    "feast": feast,
    "serving": serving,
    "monitoring": monitoring,
    "haproxy": haproxy,
}

LONG = ("join-large",)
"""Scenarios that `all` leaves out."""
