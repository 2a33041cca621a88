"""Every call of the API, once for both clients: arguments to a Request, handed to the client.

`A` is what a call gives: `dict` in `Client`, an awaitable of it in `AsyncClient`.  Fields that the
answers carry stand in /openapi.json.  Calls raise core.errors by the answer's status and code.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar, Unpack

from mlpd.client import requests as r
from mlpd.client.scatter import Labels, Scatter
from mlpd.client.scatter_events import EventRows
from mlpd.client.scatter_rows import Rows, owners_of
from mlpd.client.steps import Progress, Steps, wait_ready, wait_run
from mlpd.core.definitions import build_document
from mlpd.core.media import ARROW, PARQUET, SPINE_FILES, frame_format

A = TypeVar("A")
Text = TypeVar("Text")
Frame = TypeVar("Frame")
Binary = TypeVar("Binary")
Scores = TypeVar("Scores")
Kept = TypeVar("Kept")

Sequenced = int | Mapping[str, int] | None
"""What an answer had as its `sequence`: a number, or of several shards one for each."""

Time = Any
"""A moment: RFC 3339 text with an offset, an aware datetime, or microseconds UTC."""

FRAME_ROWS = 200_000
"""Rows of a page as a frame."""

_READ_ONLY = ("name", "version", "serving", "serving_fallbacks", "trial", "error")
"""What a route shows beside its definition."""


class JoinOptions(TypedDict, total=False):
    """What a join may be told.

    `features`: single ones instead of a service; `request` types the fields that they read, for
    spines of rows.  `mode`: `as_known` (the default), `as_corrected`, `as_of_sequence`.  `closed`:
    "left" hides events of a row's own time from latest values.  `statuses`: adds NAME__status.
    `on_stale`: as in `read_features`.
    """

    features: Sequence[str] | None
    request: Mapping[str, str] | None
    mode: str | None
    closed: str | None
    statuses: bool | None
    on_stale: str | None


class _Group(Generic[A, Text, Frame, Binary]):
    def __init__(self, client: "Operations[A, Text, Frame, Binary, Any, Any]") -> None:
        self._client = client

    def _object(self, request: r.Request | Scatter) -> A:
        found: A = self._client.send(request)
        return found


class Events(_Group[A, Text, Frame, Binary]):
    """Sends and reads events.  What sends carries an Idempotency-Key, so it is retried safely."""

    def send(
        self,
        source: str,
        data: r.Data,
        *,
        all_or_nothing: bool | None = None,
        idempotency_key: str | None = None,
    ) -> A:
        """Store events of a source: rows, columns (numpy too) or a polars frame.

        Durable on return.  At most 100,000 rows and the daemon's body limit.
        """
        return self._object(
            EventRows(
                {source: data},
                single=True,
                all_or_nothing=all_or_nothing,
                idempotency_key=idempotency_key,
            )
        )

    def send_many(
        self,
        sources: Mapping[str, r.Rows | r.ColumnData],
        *,
        all_or_nothing: bool | None = None,
        idempotency_key: str | None = None,
    ) -> A:
        """Store events of several sources, all in one transaction (per shard)."""
        return self._object(
            EventRows(
                sources,
                single=False,
                all_or_nothing=all_or_nothing,
                idempotency_key=idempotency_key,
            )
        )

    def page(
        self,
        source: str,
        *,
        after: int = 0,
        through: int | None = None,
        limit: int | None = None,
        start: Time | None = None,
        end: Time | None = None,
    ) -> A:
        """Return stored events of a source after a sequence, in the order of the log.

        `columns`, `sequence` (the `after` of the next page) and `through`: at it there are no more.
        `start` (inclusive) and `end` (exclusive) bound the event time.
        """
        query = {"after": after, "through": through, "limit": limit}
        span = {"start": r.pack_time(start), "end": r.pack_time(end)}
        return self._object(r.get("v1", "events", source, **query, **span))

    def page_frame(
        self,
        source: str,
        *,
        after: int = 0,
        through: int | None = None,
        limit: int = FRAME_ROWS,
        start: Time | None = None,
        end: Time | None = None,
    ) -> Frame:
        """Return such a page as a polars frame; one with fewer rows than `limit` is the last.

        The largest `__sequence` in it is the `after` of the next.
        """
        query = {"after": after, "through": through, "limit": limit}
        query |= {"start": r.pack_time(start), "end": r.pack_time(end)}
        path = r.build_path(("v1", "events", source), query)
        found: Frame = self._client.send(r.Request("GET", path, accept=ARROW, timeout_s=r.LONG_S))
        return found


class Models(_Group[A, Text, Frame, Binary]):
    """The model registry."""

    def list(self) -> A:
        """Return every model with its newest version and aliases."""
        return self._object(r.get("v1", "models"))

    def get(self, name: str) -> A:
        """Return a model's versions and aliases."""
        return self._object(r.get("v1", "models", name))

    def version(self, name: str, version: int | str = "champion") -> A:
        """Return a version, by number or alias: state, files, lineage, report."""
        return self._object(r.get("v1", "models", name, "versions", str(version)))

    def register(
        self,
        name: str,
        model: bytes,
        *,
        golden: Mapping[str, Any] | None = None,
        why: str = "",
    ) -> A:
        """Make an ONNX file the model's next version, or return the version that has it.

        `golden`: `{"inputs": [...], "outputs": [...], "rtol": 1e-6}` with tensors as in /v2, which
        every load must reproduce.
        """
        parts = {"model": model}
        if golden is not None:
            parts["golden"] = json.dumps(golden).encode()
        return self._object(r.form("v1", "models", name, "versions", parts=parts, why=why or None))

    def adopt(self, archive: bytes, *, why: str = "") -> A:
        """Register the version in an OCI archive under its own name, digest and all."""
        path = r.build_path(("v1", "registry", "archives"), {"why": why or None})
        return self._object(r.Request("POST", path, archive, r.TAR, timeout_s=r.LONG_S))

    def sign(self, name: str, version: int | str, *, key: str, signature: str, why: str = "") -> A:
        """Attach a signature over a version's digest; `registry.signing.sign` makes one."""
        path = ("v1", "models", name, "versions", str(version), "signature")
        fields = {"key": key, "signature": signature, "why": why}
        return self._object(r.call("PUT", *path, fields=fields))

    def diff(self, name: str, version: int | str, to: int | str | None = None) -> A:
        """Return what changes from a version to another (`model@version`, too), or the champion."""
        return self._object(r.get("v1", "models", name, "versions", str(version), "diff", to=to))

    def reproduce(self, name: str, version: int | str = "champion") -> A:
        """Train a version again from its lineage and compare; answers when that is done."""
        path = ("v1", "models", name, "versions", str(version), "reproduce")
        return self._object(r.call("POST", *path, timeout_s=r.LONG_S))

    def picture(self, name: str, version: int | str, picture: str) -> Text:
        """Return a picture of a version as SVG: importance, contributions, learning ..."""
        path = r.build_path(("v1", "models", name, "versions", str(version), "pictures", picture))
        found: Text = self._client.send(r.Request("GET", path, accept=r.SVG))
        return found

    def archive(self, name: str, version: int | str = "champion") -> Binary:
        """Return a version as an OCI archive."""
        path = r.build_path(("v1", "models", name, "versions", str(version), "archive"))
        found: Binary = self._client.send(r.Request("GET", path, accept=r.TAR))
        return found

    def load(self, name: str, loaded: bool = True) -> A:
        """Keep a model's champion loaded, so that it answers under /v2 without any route.

        Until it is called with `loaded` False; over restarts, and wherever the alias moves.
        """
        fields = {"loaded": loaded}
        return self._object(r.call("PUT", "v1", "models", name, "loaded", fields=fields))

    def history(self, name: str, *, alias: str | None = None) -> A:
        """Return a model's latest changes, newest first."""
        return self._object(r.get("v1", "models", name, "history", alias=alias))

    def move_alias(
        self,
        name: str,
        alias: str,
        version: int,
        *,
        expected: int | str = "any",
        why: str = "",
        force: bool | None = None,
    ) -> A:
        """Point an alias at a version; routes follow before this returns.

        `expected`: where it must point now, 0 for nowhere; else ConflictError.
        `force`: although it is protected.
        """
        fields = {"version": version, "expected": expected, "why": why, "force": force}
        path = ("v1", "models", name, "aliases", alias)
        return self._object(r.call("PUT", *path, fields=fields, repeatable=expected == "any"))

    def delete_alias(self, name: str, alias: str) -> A:
        """Remove an alias."""
        return self._object(r.call("DELETE", "v1", "models", name, "aliases", alias))

    def roll_back(self, name: str, alias: str, *, why: str = "") -> A:
        """Point an alias back at the version before."""
        path = ("v1", "models", name, "aliases", alias, "rollback")
        return self._object(r.call("POST", *path, fields={"why": why}, repeatable=False))

    def protect(self, name: str, alias: str, protected: bool = True, *, why: str = "") -> A:
        """Let an alias move by force alone, or freely again."""
        path = ("v1", "models", name, "aliases", alias, "protection")
        return self._object(r.call("PUT", *path, fields={"protected": protected, "why": why}))

    def set_state(self, name: str, version: int | str, state: str, *, why: str = "") -> A:
        """Make a version `ready`, `archived`, `quarantined` or `deleted` (for good)."""
        path = ("v1", "models", name, "versions", str(version), "state")
        return self._object(r.call("PUT", *path, fields={"state": state, "why": why}))

    def pin(self, name: str, version: int | str, pinned: bool = True, *, why: str = "") -> A:
        """Let nothing delete a version, or let it be deleted again."""
        path = ("v1", "models", name, "versions", str(version), "pin")
        return self._object(r.call("PUT", *path, fields={"pinned": pinned, "why": why}))

    def collect(
        self, *, grace: str | None = None, keep: int | None = None, delete: bool = False
    ) -> A:
        """Return what no version needs, or remove it with `delete`.

        `grace`: how long something must have been useless, such as `7d`.  `keep`: how many versions
        of each model stay whatever happens; None deletes no version.
        """
        fields = {"grace": grace, "keep": keep, "delete": delete}
        return self._object(r.call("POST", "v1", "registry", "collect", fields=fields))


class Routes(_Group[A, Text, Frame, Binary]):
    """Serving routes."""

    def list(self) -> A:
        """Return every route."""
        return self._object(r.get("v1", "routes"))

    def get(self, name: str) -> A:
        """Return a route with the versions that serve it now."""
        return self._object(r.get("v1", "routes", name))

    def put(self, name: str, route: Mapping[str, Any], *, expected: int | None = None) -> A:
        """Make `route` (service, arms, shadows, experiment, canary, fallbacks) the next version.

        What `get` returned may be changed and put back.
        `expected`: the version seen, 0 for a new route; another one raises ConflictError.
        """
        changed = {name: value for name, value in route.items() if name not in _READ_ONLY}
        fields = {**changed, "expected": expected}
        return self._object(r.call("PUT", "v1", "routes", name, fields=fields, repeatable=False))

    def delete(self, name: str) -> A:
        """Remove a route; its history stays."""
        return self._object(r.call("DELETE", "v1", "routes", name, repeatable=False))

    def history(self, name: str) -> A:
        """Return a route's versions, newest first, each with what it changed."""
        return self._object(r.get("v1", "routes", name, "history"))

    def roll_back(self, name: str, version: int) -> A:
        """Make an earlier version's content the next version."""
        path = ("v1", "routes", name, "rollback")
        return self._object(r.call("POST", *path, fields={"version": version}, repeatable=False))


class Experiments(_Group[A, Text, Frame, Binary]):
    """Experiments."""

    def list(self) -> A:
        """Return the names of all experiments."""
        return self._object(r.get("v1", "experiments"))

    def get(self, name: str) -> A:
        """Return an experiment with its result at this look."""
        return self._object(r.get("v1", "experiments", name))

    def put(self, name: str, experiment: Mapping[str, Any], *, force: bool = False) -> A:
        """Create an experiment, or change its weights.

        `force`: also for an arm that a guardrail stopped and that still cools down.
        """
        fields = {**experiment, **({"force": True} if force else {})}
        return self._object(r.call("PUT", "v1", "experiments", name, fields=fields))

    def end(self, name: str, arm: str, *, why: str = "", force: bool = False) -> A:
        """End an experiment: its routes serve `arm` to everybody, its results stay readable.

        `force`: also an arm that a guardrail stopped and that still cools down.
        """
        fields = {"arm": arm, "why": why or None, "force": force or None}
        return self._object(r.call("POST", "v1", "experiments", name, "end", fields=fields))

    def history(self, name: str) -> A:
        """Return what happened to an experiment, newest first, by whom and why."""
        return self._object(r.get("v1", "experiments", name, "history"))

    def send_outcomes(self, name: str, outcomes: r.Data) -> A:
        """Store what became of units: rows of unit, id and values by metric; durable on return.

        An id that is there already is replaced, so sending twice does no harm.
        """
        path = ("v1", "experiments", name, "outcomes")
        return self._object(r.call("POST", *path, fields={"outcomes": outcomes}))

    def timeline(self, name: str) -> A:
        """Return how an experiment's comparisons stood over time, oldest first."""
        return self._object(r.get("v1", "experiments", name, "timeline"))

    def picture(self, name: str, *, metric: str | None = None, arm: str | None = None) -> Text:
        """Return a comparison over time as SVG; of the first metric and arm by default."""
        request = r.get("v1", "experiments", name, "picture", metric=metric, arm=arm)
        found: Text = self._client.send(request)
        return found


class Runs(_Group[A, Text, Frame, Binary]):
    """Training jobs and their runs."""

    def jobs(self) -> A:
        """Return every job with its schedule and next due time."""
        return self._object(r.get("v1", "jobs"))

    def list(self, *, limit: int | None = None) -> A:
        """Return the newest runs, newest first."""
        return self._object(r.get("v1", "runs", limit=limit))

    def start(self, job: str, *, deploy: str | None = None) -> A:
        """Queue a run of a job; returns the run."""
        fields = {"job": job, "deploy": deploy}
        return self._object(r.call("POST", "v1", "runs", fields=fields, repeatable=False))

    def get(self, run_id: str) -> A:
        """Return a run with its progress."""
        return self._object(r.get("v1", "runs", run_id))

    def wait(
        self,
        run_id: str,
        *,
        on_progress: Progress | None = None,
        timeout_s: float = 3600.0,
        poll_s: float = 0.2,
    ) -> A:
        """Return a run once it has ended, however it ended: look at its `state` and `error`."""
        found: A = self._client.drive(wait_run(run_id, on_progress, timeout_s, poll_s))
        return found

    def cancel(self, run_id: str) -> A:
        """Stop a queued or running run."""
        return self._object(r.call("POST", "v1", "runs", run_id, "cancel", repeatable=False))

    def retry(self, run_id: str) -> A:
        """Queue a new run like one that failed or was cancelled; returns the new one."""
        return self._object(r.call("POST", "v1", "runs", run_id, "retry", repeatable=False))

    def picture(self, run_id: str, picture: str) -> Text:
        """Return a picture of the version that a run made, as SVG."""
        path = r.build_path(("v1", "runs", run_id, "pictures", picture))
        found: Text = self._client.send(r.Request("GET", path, accept=r.SVG))
        return found

    def log(self, run_id: str) -> Text:
        """Return the end of a run's log, at most 1 MiB."""
        found: Text = self._client.send(r.get("v1", "runs", run_id, "log"))
        return found


class Alerts(_Group[A, Text, Frame, Binary]):
    """Alerts, silences, and a message to try the sinks."""

    def list(self) -> A:
        """Return alerts that are not ok, silences, and how each sink is doing."""
        return self._object(r.get("v1", "alerts"))

    def silence(self, matchers: Mapping[str, str], *, lasts: str, why: str = "") -> A:
        """Tell nobody of alerts whose labels match these patterns, for a time such as 2h."""
        fields = {"matchers": dict(matchers), "lasts": lasts, "why": why}
        path = ("v1", "alerts", "silences")
        return self._object(r.call("POST", *path, fields=fields, repeatable=False))

    def unsilence(self, silence_id: str) -> A:
        """End a silence."""
        return self._object(r.call("DELETE", "v1", "alerts", "silences", silence_id))

    def test(self, *, sink: str | None = None) -> A:
        """Send a message through one sink, or all but training; returns what they made of it."""
        fields = {"sink": sink}
        return self._object(r.call("POST", "v1", "alerts", "test", fields=fields, repeatable=False))


class Cluster(_Group[A, Text, Frame, Binary]):
    """The shard map as one daemon has it."""

    def map(self) -> A:
        """Return the daemon's `shard`, the `epoch` and `digest` of its map, and the `map`."""
        return self._object(r.get("v1", "cluster", "map"))

    def put_map(
        self,
        shard_map: Mapping[str, Any],
        *,
        shard: str,
        expected: int,
        dry_run: bool | None = None,
    ) -> A:
        """Let the daemon go by a map, as `shard`; the same one may come again.

        `expected`: the epoch of the map that it has, 0 for none; another one raises ConflictError.
        `dry_run`: change nothing, raise what would be raised.
        """
        fields = {"map": shard_map, "shard": shard, "expected": expected, "dry_run": dry_run}
        return self._object(r.call("PUT", "v1", "cluster", "map", fields=fields))

    def routing(self) -> A:
        """Return which entities events, services and routes concern."""
        return self._object(r.get("v1", "cluster", "routing"))

    def changes(
        self, cluster: str, shard: str, after: int, *, wait_s: float = 0.0, why: str = ""
    ) -> A:
        """Return what changed, behind a revision, of what members share; of the arbiter alone.

        For a member: `shard` is its name, `why` what hinders it from following.
        """
        fields = {"cluster": cluster, "shard": shard, "after": after, "wait_s": wait_s, "why": why}
        asked = r.call("POST", "v1", "cluster", "changes", fields=fields, timeout_s=wait_s + 10.0)
        return self._object(asked)

    def blob(self, digest: str) -> Any:
        """Return a file of the registry by its digest, as bytes."""
        return self._client.send(r.get("v1", "registry", "blobs", digest))

    def home_events(self, source: str, *, definitions: str, epoch: int) -> Any:
        """Return the events of a source that have their home on a shard, as a Parquet file."""
        query = {"definitions": definitions, "epoch": epoch}
        path = r.build_path(("v1", "cluster", "events", source), query)
        return self._client.send(r.Request("GET", path, accept=PARQUET, timeout_s=r.LONG_S))

    def part(self, what: str, **fields: Any) -> A:
        """Return a member's part of what all of them know, as they ask each other for it."""
        asked = {"what": what, "fields": fields}
        return self._object(r.call("POST", "v1", "cluster", "parts", fields=asked))

    def stop_arm(self, experiment: str, arm: str, *, guardrail: str, reason: str) -> A:
        """Stop an arm of an experiment, for a member whose guardrail was broken."""
        fields = {"experiment": experiment, "arm": arm, "guardrail": guardrail, "reason": reason}
        return self._object(r.call("POST", "v1", "cluster", "stops", fields=fields))

    def cells(self, keys: r.Rows, **named: Any) -> A:
        """Return a shard's stored values of its keys, to be handed to another one as `cells`.

        `keys`: per entity its key `columns` and `values`.  `named`: a `route`, a `service`, or
        `features` and `request`; with `at` and `min_sequence` as in `read_features`.
        """
        fields = {**named, "keys": list(keys)}
        return self._object(r.call("POST", "v1", "cluster", "cells", fields=fields))

    def moves(self) -> A:
        """Return what is `leaving` the daemon and what is `arriving`, null for nothing."""
        return self._object(r.get("v1", "cluster", "moves"))

    def survey(self, slots: str) -> A:
        """Return what moving these slots away would move; changes nothing."""
        return self._move("survey", slots=slots)

    def digest(self, slots: str, at: int | None = None, **since: Any) -> A:
        """Return a digest over all that can be read of slots, at a moment, by default now.

        `since` a sequence, `after` a position of predictions: of slots `touched` behind them, or
        of the others.
        """
        return self._move("digest", slots=slots, at=at, **since)

    def leave(self, step: str, move: str, **fields: Any) -> A:
        """Take a step of the source: begin (`slots`, `shard`), pause, leave, cancel, finish."""
        return self._move("leaving", step=step, move=move, **fields)

    def history(self, move: str, after: int) -> A:
        """Return the next `chunk` of the history of slots that leave."""
        return self._move("history", move=move, after=after)

    def predictions(self, move: str, after: str) -> A:
        """Return the next `chunk` of the prediction log of slots that leave."""
        return self._move("predictions", move=move, after=after)

    def arrive(self, step: str, move: str, **fields: Any) -> A:
        """Take a step of the target.

        begin (`slots`, `shard`, `definitions`, `experiments`, `size_bytes`, `dry_run`), seal
        (`through`, `served`, `horizons`, `experiments`), cancel, finish.
        """
        return self._move("arriving", step=step, move=move, **fields)

    def take(self, move: str, chunk: bytes) -> A:
        """Store a chunk of history of slots that arrive."""
        return self._move("import", move=move, chunk=chunk)

    def role(self) -> A:
        """Return what the daemon is to its shard, and how far behind followers are."""
        return self._object(r.get("v1", "cluster", "replica"))

    def feed(
        self, after: str, *, follower: str, ticket: int | None = None, wait: bool = False
    ) -> A:
        """Return the commits that follow the head `after`, as bytes; `wait` a moment for one."""
        fields = {"after": after, "follower": follower, "ticket": ticket, "wait": wait}
        return self._object(
            r.call("POST", "v1", "cluster", "replica", "feed", fields=fields, repeatable=False)
        )

    def snapshot(self) -> A:
        """Let the daemon take a backup for a follower; returns its id and files."""
        path = ("v1", "cluster", "replica", "snapshots")
        return self._object(r.call("POST", *path, repeatable=False, timeout_s=r.LONG_S))

    def forget_snapshot(self, snapshot: str) -> A:
        """Remove a backup that was fetched."""
        return self._object(r.call("DELETE", "v1", "cluster", "replica", "snapshots", snapshot))

    def file(self, path: str, offset: int, *, snapshot: str | None = None) -> A:
        """Return up to 4 MiB of a file, of a snapshot or of the daemon, and its size."""
        fields = {"path": path, "offset": offset, "snapshot": snapshot}
        return self._object(r.call("POST", "v1", "cluster", "replica", "file", fields=fields))

    def step_role(self, step: str, **fields: Any) -> A:
        """Take a step of a promotion.

        pause (`url`, `token`), resume (`token`), fence (`map`, `token`), stand, promote (`map`,
        `head`).
        """
        fields = {"step": step, **fields}
        return self._object(r.call("POST", "v1", "cluster", "replica", "role", fields=fields))

    def _move(self, verb: str, **fields: Any) -> A:
        path = ("v1", "cluster", "moves", verb)
        return self._object(r.call("POST", *path, fields=fields, timeout_s=r.LONG_S))


class Operations(Generic[A, Text, Frame, Binary, Scores, Kept]):
    """The API; `send` and `drive` are what a client adds."""

    def __init__(self, *, deadline_s: float | None) -> None:
        self._deadline_s = deadline_s
        self.events: Events[A, Text, Frame, Binary] = Events(self)
        self.models: Models[A, Text, Frame, Binary] = Models(self)
        self.routes: Routes[A, Text, Frame, Binary] = Routes(self)
        self.experiments: Experiments[A, Text, Frame, Binary] = Experiments(self)
        self.runs: Runs[A, Text, Frame, Binary] = Runs(self)
        self.alerts: Alerts[A, Text, Frame, Binary] = Alerts(self)
        self.cluster: Cluster[A, Text, Frame, Binary] = Cluster(self)

    def send(self, request: r.Request | Scatter) -> Any:
        """Send any request and return the value of its answer.

        A `Scatter` goes to the shards that it concerns, where there are several; a request goes to
        the daemon whose URL was given, the first of several.
        """
        raise NotImplementedError

    def drive(self, steps: Steps[Any]) -> Any:
        """Do what `steps` say and return what they return."""
        raise NotImplementedError

    def _object(self, request: r.Request | Scatter) -> A:
        found: A = self.send(request)
        return found

    def predict(
        self,
        route: str,
        rows: r.Data,
        *,
        at: Time = None,
        min_sequence: Sequenced = None,
        include: Sequence[str] = (),
        explain: bool = False,
        arm: str | None = None,
        deadline_s: float | None = None,
    ) -> Scores:
        """Return scores for entity keys and request fields: rows, columns (numpy too) or a frame.

        `explain` adds what each feature contributed to the raw score; it takes a second or so.
        `deadline_s`: after it, retries and all, the daemon drops the work (DeadlineExceededError);
        the client's by default.  Asked again only where the daemon refused it unexecuted: what was
        answered is logged.
        """
        fields: dict[str, Any] = {"rows": rows}
        if at is not None:
            fields["at"] = r.pack_time(at)
        if min_sequence is not None:
            fields["min_sequence"] = min_sequence
        if include:
            fields["include"] = list(include)
        if explain:
            fields["explain"] = True
        if arm is not None:
            fields["arm"] = arm
        deadline_s = self._deadline_s if deadline_s is None else deadline_s
        path = r.build_path(("v1", "predict", route))
        request = r.Request("POST", path, repeatable=False, deadline_s=deadline_s)
        found: Scores = self.send(Rows("routes", [route], request, fields, "rows"))
        return found

    def predictions(
        self,
        *,
        after: str | None = None,
        limit: int | None = None,
        route: str | None = None,
        start: Time | None = None,
        end: Time | None = None,
    ) -> Frame:
        """Return a page of the prediction log as a polars frame: vectors, requests, labels so far.

        The last row's `position`, in hex, is the `after` of the next page; one without rows is the
        last.  `start` (inclusive) and `end` (exclusive) bound when rows were served.
        """
        query = {"after": after, "limit": limit, "route": route}
        query |= {"start": r.pack_time(start), "end": r.pack_time(end)}
        path = r.build_path(("v1", "predictions"), query)
        found: Frame = self.send(r.Request("GET", path, accept=ARROW, timeout_s=r.LONG_S))
        return found

    def feedback(self, labels: r.Rows) -> Kept:
        """Store labels: each a prediction_id, a label and, optionally, a label_time."""
        found: Kept = self.send(Labels(list(labels)))
        return found

    def read_features(
        self,
        service: str | None = None,
        *,
        entities: r.Rows | r.ColumnData,
        features: Sequence[str] | None = None,
        request: Mapping[str, str] | None = None,
        at: Time = None,
        min_sequence: Sequenced = None,
        on_stale: str | None = None,
    ) -> A:
        """Return the features of entities as of now: of a service, or single ones.

        `entities` brings the keys and request fields; `request` types the fields of single ones.
        `on_stale`: what a value older than its ttl becomes: `null` (or its default; this is the
        default), `value` (it stays) or `error` (ConflictError).
        """
        fields = {
            "service": service,
            "features": None if features is None else list(features),
            "request": request,
            "entities": entities,
            "at": r.pack_time(at),
            "min_sequence": min_sequence,
            "on_stale": on_stale,
        }
        sent = r.Request("POST", r.build_path(("v1", "features", "read")))
        if service is not None:
            return self._object(Rows("services", [service], sent, fields, "entities"))
        return self._object(Rows("features", owners_of(features or ()), sent, fields, "entities"))

    def history(
        self, service: str | None = None, *, spine: r.Data | Path, **how: Unpack[JoinOptions]
    ) -> Frame:
        """Return a polars frame: the spine's columns and the features as of each `event_time`.

        `spine`: rows, columns, a polars frame, or the path of a Parquet or Arrow file, with
        `event_time`, keys and request fields.
        """
        found: Frame = self.send(replace(_history(service, spine, how), accept=ARROW))
        return found

    def save_history(
        self,
        to: Path | str,
        service: str | None = None,
        *,
        spine: r.Data | Path,
        on_progress: r.Told | None = None,
        **how: Unpack[JoinOptions],
    ) -> A:
        """Write what `history` returns to a file; return its `path`, `rows` and `size_bytes`.

        Neither the answer nor a spine that is a file is ever in memory as a whole.  The name says
        the format: .parquet, .arrow, .arrows (a stream), .msgpack, .json.  `on_progress` is called
        with "sent" or "received", the bytes so far, and all of them.
        """
        kind = frame_format(Path(to).name)
        sent = _history(service, spine, how)
        return self._object(replace(sent, accept=kind, to=Path(to), told=on_progress))

    def feature_stats(
        self, name: str, *, kind: str | None = None, entities: int | None = None
    ) -> A:
        """Return a summary of every feature of a service or view, over what online serving holds.

        `kind`: "service" or "view"; by default the service of that name, else the view.
        `entities`: how many of each view at most, 20,000 by default; of more, a sample by lot.
        """
        path = r.build_path(("v1", "features", "stats", name), {"kind": kind, "entities": entities})
        return self._object(r.Request("GET", path, timeout_s=r.LONG_S))

    def definitions(self) -> A:
        """Return the definitions that run, and their version."""
        return self._object(r.get("v1", "definitions"))

    def plan(self, definitions: Mapping[str, Any] | Iterable[object]) -> A:
        """Return what a document (or definition objects) would change."""
        fields = {"document": _document(definitions)}
        return self._object(r.call("POST", "v1", "definitions", "plan", fields=fields))

    def apply(
        self,
        definitions: Mapping[str, Any] | Iterable[object],
        *,
        expected_version: int | None = None,
    ) -> A:
        """Make a document (or definition objects) what runs, all of it or nothing."""
        fields = {"document": _document(definitions), "expected_version": expected_version}
        return self._object(
            r.call(
                *("POST", "v1", "definitions", "apply"),
                fields=fields,
                repeatable=False,
                timeout_s=r.LONG_S,
            )
        )

    def drift(
        self,
        model: str,
        *,
        version: int | str | None = None,
        route: str | None = None,
        start: Time = None,
        end: Time = None,
        step: str | None = None,
        reference: str | None = None,
        count: int | None = None,
    ) -> A:
        """Return the drift of what a version served against a reference.

        `reference`: "training", "rolling" (the `count` windows before), "same_hour" (of the `count`
        weeks before) or "previous" (what the version before this one served).
        """
        query = {"version": version, "route": route, "start": start, "end": end, "step": step}
        query |= {"reference": reference, "count": count}
        where = r.build_path(("v1", "drift", model), query)
        return self._object(r.Request("GET", where, timeout_s=r.LONG_S))

    def drift_picture(
        self,
        model: str,
        feature: str,
        *,
        version: int | str | None = None,
        route: str | None = None,
        start: Time = None,
        end: Time = None,
        reference: str | None = None,
        count: int | None = None,
    ) -> Text:
        """Return a feature's histograms, reference and live over each other, as SVG text."""
        query = {"version": version, "route": route, "start": start, "end": end}
        query |= {"reference": reference, "count": count}
        where = r.build_path(("v1", "drift", model, "features", feature), query)
        found: Text = self.send(r.Request("GET", where, accept="image/svg+xml", timeout_s=r.LONG_S))
        return found

    def check_drift(
        self,
        model: str,
        *,
        version: int | str | None = None,
        start: Time = None,
        end: Time = None,
        count: int | None = None,
    ) -> A:
        """Check features together, in a child: components of training, and a classifier."""
        fields = {"version": version, "start": start, "end": end, "count": count}
        return self._object(
            r.call("POST", "v1", "drift", model, "check", fields=fields, timeout_s=r.LONG_S)
        )

    def performance(self, model: str) -> A:
        """Return how well a model's labelled predictions did."""
        return self._object(r.get("v1", "performance", model))

    def analysis(
        self, model: str, *, by: str | None = None, start: Time = None, end: Time = None
    ) -> A:
        """Return labelled predictions judged by day, and by slices of `by`; joined in a child.

        With estimates before labels come, label delays, and whether the concept drifts.
        """
        path = ("v1", "performance", model, "analysis")
        where = r.build_path(path, {"by": by, "start": start, "end": end})
        return self._object(r.Request("GET", where, timeout_s=r.LONG_S))

    def freshness(self) -> A:
        """Return the ages at which views were served, and how far sources have come."""
        return self._object(r.get("v1", "freshness"))

    def quality(self) -> A:
        """Return what is wrong with data: by source at ingest, by feature where it is served."""
        return self._object(r.get("v1", "quality"))

    def shadows(self) -> A:
        """Return every shadow's paired difference to its primary."""
        return self._object(r.get("v1", "shadows"))

    def consistency(self) -> A:
        """Return what the last consistency audit found."""
        return self._object(r.get("v1", "consistency"))

    def run_consistency(self, *, limit: int | None = None) -> A:
        """Recompute logged predictions from the log and compare; returns what was found."""
        fields = {"limit": limit}
        return self._object(
            r.call("POST", "v1", "consistency", "run", fields=fields, timeout_s=r.LONG_S)
        )

    def backup(self, destination: str, *, copy: bool | None = None) -> A:
        """Take a backup to an absolute path on the daemon's host; returns its figures.

        `copy`: no hard links, even on one filesystem.
        """
        fields = {"destination": destination, "copy": copy}
        return self._object(
            r.call(*("POST", "v1", "backup"), fields=fields, repeatable=False, timeout_s=r.LONG_S)
        )

    def erase(self, entity: str, keys: r.Rows | r.ColumnData) -> A:
        """Remove entities from everything, by 1 to 100 keys; returns the receipt."""
        fields = {"entity": entity, "keys": r.plain_table(keys)}
        return self._object(r.call("POST", "v1", "erase", fields=fields, timeout_s=r.LONG_S))

    def erasures(self) -> A:
        """Return orders to erase that are under way, and all receipts."""
        return self._object(r.get("v1", "erase"))

    def erasure(self, order: str) -> A:
        """Return the receipt of an order to erase, or how far it has come."""
        return self._object(r.get("v1", "erase", order))

    def fsck(self) -> A:
        """Let the daemon check its data directory; returns what it found."""
        return self._object(r.call("POST", "v1", "fsck", timeout_s=r.LONG_S))

    def metrics(self) -> Text:
        """Return all metrics as Prometheus text."""
        found: Text = self.send(r.Request("GET", "/metrics", accept="text/plain"))
        return found

    def status(self) -> A:
        """Return what runs and how much there is."""
        return self._object(r.get("v1", "status"))

    def wait_ready(self, *, timeout_s: float = 30.0, poll_s: float = 0.05) -> Any:
        """Return once the daemon is ready; raises UnavailableError after `timeout_s`."""
        return self.drive(wait_ready(timeout_s, poll_s))


def _history(service: str | None, spine: Any, how: JoinOptions) -> r.Request:
    """Return the request for a join: with a frame or a file its options are in the query."""
    fields: dict[str, Any] = {"service": service, **how}
    types = fields.pop("request", None)
    if fields.get("features") is not None:
        fields["features"] = list(fields["features"])
    path = ("v1", "features", "history")
    if isinstance(spine, Path):
        kind = frame_format(spine.name, only=SPINE_FILES)
        where = r.build_path(path, fields)
        return r.Request("POST", where, r.file_body(spine), kind, timeout_s=r.LONG_S)
    if r.is_frame(spine) and types is None:
        where = r.build_path(path, fields)
        return r.Request("POST", where, r.arrow_bytes(spine), ARROW, timeout_s=r.LONG_S)
    fields |= {"request": types, "entities": r.plain_table(spine)}
    return r.call("POST", *path, fields=fields, timeout_s=r.LONG_S)


def _document(definitions: Mapping[str, Any] | Iterable[object]) -> Mapping[str, Any]:
    return definitions if isinstance(definitions, Mapping) else build_document(definitions)
