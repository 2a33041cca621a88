"""Every call of the API, once for both clients: arguments to a Request, handed to the client.

`A` is what a call gives: `dict` in `Client`, an awaitable of it in `AsyncClient`.  Fields that the
answers carry stand in /openapi.json.  Calls raise core.errors by the answer's status and code.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from mlpd.client import requests as r
from mlpd.client.steps import Progress, Steps, wait_ready, wait_run
from mlpd.core.definitions import build_document

A = TypeVar("A")
Text = TypeVar("Text")
Frame = TypeVar("Frame")

Time = Any
"""A moment: RFC 3339 text with an offset, an aware datetime, or microseconds UTC."""


LONG_S = 900.0
"""What calls that start a process, or build views from history, may take at least."""

_READ_ONLY = ("name", "version", "serving", "error")
"""What a route shows beside its definition."""


class _Group(Generic[A, Text, Frame]):
    def __init__(self, client: "Operations[A, Text, Frame]") -> None:
        self._client = client

    def _object(self, request: r.Request) -> A:
        found: A = self._client.send(request)
        return found


class Events(_Group[A, Text, Frame]):
    """Sends events.  Every call carries an Idempotency-Key, so it is retried safely."""

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
        options = {"all_or_nothing": all_or_nothing}
        request = r.batch("v1", "events", source, data=data, fields=options)
        return self._object(r.with_idempotency_key(request, idempotency_key))

    def send_many(
        self,
        sources: Mapping[str, r.Rows | r.ColumnData],
        *,
        all_or_nothing: bool | None = None,
        idempotency_key: str | None = None,
    ) -> A:
        """Store events of several sources, all in one transaction."""
        parts = {
            name: {"columns" if isinstance(data, Mapping) else "rows": r.plain_table(data)}
            for name, data in sources.items()
        }
        fields = {"sources": parts, "all_or_nothing": all_or_nothing}
        request = r.call("POST", "v1", "events", fields=fields)
        return self._object(r.with_idempotency_key(request, idempotency_key))


class Models(_Group[A, Text, Frame]):
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

    def history(self, name: str, *, alias: str | None = None) -> A:
        """Return a model's latest changes, newest first."""
        return self._object(r.get("v1", "models", name, "history", alias=alias))

    def move_alias(
        self, name: str, alias: str, version: int, *, expected: int | str = "any", why: str = ""
    ) -> A:
        """Point an alias at a version; routes follow before this returns.

        `expected`: where it must point now, 0 for nowhere; else ConflictError.
        """
        fields = {"version": version, "expected": expected, "why": why}
        path = ("v1", "models", name, "aliases", alias)
        return self._object(r.call("PUT", *path, fields=fields, repeatable=expected == "any"))

    def delete_alias(self, name: str, alias: str) -> A:
        """Remove an alias."""
        return self._object(r.call("DELETE", "v1", "models", name, "aliases", alias))

    def roll_back(self, name: str, alias: str, *, why: str = "") -> A:
        """Point an alias back at the version before."""
        path = ("v1", "models", name, "aliases", alias, "rollback")
        return self._object(r.call("POST", *path, fields={"why": why}, repeatable=False))


class Routes(_Group[A, Text, Frame]):
    """Serving routes."""

    def list(self) -> A:
        """Return every route."""
        return self._object(r.get("v1", "routes"))

    def get(self, name: str) -> A:
        """Return a route with the versions that serve it now."""
        return self._object(r.get("v1", "routes", name))

    def put(self, name: str, route: Mapping[str, Any], *, expected: int | None = None) -> A:
        """Make `route` (service, arms, shadows, experiment, fallback) the next version.

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


class Experiments(_Group[A, Text, Frame]):
    """Experiments."""

    def list(self) -> A:
        """Return the names of all experiments."""
        return self._object(r.get("v1", "experiments"))

    def get(self, name: str) -> A:
        """Return an experiment with its result at this look."""
        return self._object(r.get("v1", "experiments", name))

    def put(self, name: str, experiment: Mapping[str, Any]) -> A:
        """Create an experiment, or change its weights."""
        return self._object(r.call("PUT", "v1", "experiments", name, fields=experiment))


class Runs(_Group[A, Text, Frame]):
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

    def log(self, run_id: str) -> Text:
        """Return the end of a run's log, at most 1 MiB."""
        found: Text = self._client.send(r.get("v1", "runs", run_id, "log"))
        return found


class Operations(Generic[A, Text, Frame]):
    """The API; `send` and `drive` are what a client adds."""

    def __init__(self, *, deadline_s: float | None) -> None:
        self._deadline_s = deadline_s
        self.events: Events[A, Text, Frame] = Events(self)
        self.models: Models[A, Text, Frame] = Models(self)
        self.routes: Routes[A, Text, Frame] = Routes(self)
        self.experiments: Experiments[A, Text, Frame] = Experiments(self)
        self.runs: Runs[A, Text, Frame] = Runs(self)

    def send(self, request: r.Request) -> Any:
        """Send any request and return the value of its answer."""
        raise NotImplementedError

    def drive(self, steps: Steps[Any]) -> Any:
        """Do what `steps` say and return what they return."""
        raise NotImplementedError

    def _object(self, request: r.Request) -> A:
        found: A = self.send(request)
        return found

    def predict(
        self,
        route: str,
        rows: r.Rows | r.ColumnData,
        *,
        at: Time = None,
        min_sequence: int | None = None,
        include: Sequence[str] = (),
        arm: str | None = None,
        deadline_s: float | None = None,
    ) -> A:
        """Return scores for rows of entity keys and request fields.

        `deadline_s`: after it the daemon drops the work (DeadlineExceededError); the client's by
        default.  Never retried: a prediction is logged.
        """
        fields: dict[str, Any] = {"rows": r.plain_table(rows)}
        if at is not None:
            fields["at"] = r.pack_time(at)
        if min_sequence is not None:
            fields["min_sequence"] = min_sequence
        if include:
            fields["include"] = list(include)
        if arm is not None:
            fields["arm"] = arm
        deadline_s = self._deadline_s if deadline_s is None else deadline_s
        headers = {} if deadline_s is None else {"x-deadline-ms": f"{deadline_s * 1000:.3f}"}
        path = r.build_path(("v1", "predict", route))
        return self._object(
            r.Request("POST", path, r.pack(fields), headers=headers, repeatable=False)
        )

    def feedback(self, labels: r.Rows) -> A:
        """Store labels: each a prediction_id, a label and, optionally, a label_time."""
        return self._object(r.call("POST", "v1", "feedback", fields={"labels": list(labels)}))

    def read_features(
        self,
        service: str | None = None,
        *,
        entities: r.Rows | r.ColumnData,
        features: Sequence[str] | None = None,
        request: Mapping[str, str] | None = None,
        at: Time = None,
        min_sequence: int | None = None,
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
            "entities": r.plain_table(entities),
            "at": r.pack_time(at),
            "min_sequence": min_sequence,
            "on_stale": on_stale,
        }
        return self._object(r.call("POST", "v1", "features", "read", fields=fields))

    def history(
        self,
        service: str | None = None,
        *,
        spine: r.Data,
        features: Sequence[str] | None = None,
        request: Mapping[str, str] | None = None,
        mode: str | None = None,
        statuses: bool | None = None,
        on_stale: str | None = None,
    ) -> Frame:
        """Return a polars frame: the spine's columns and the features as of each `event_time`.

        `spine`: rows, columns or a polars frame with `event_time`, keys and request fields.
        `on_stale`: as in `read_features`.
        """
        fields: dict[str, Any] = {
            "service": service,
            "features": None if features is None else list(features),
            "mode": mode,
            "statuses": statuses,
            "on_stale": on_stale,
        }
        path = ("v1", "features", "history")
        if r.is_frame(spine) and request is None:
            body, kind = r.arrow_bytes(spine), r.ARROW
            sent = r.Request("POST", r.build_path(path, fields), body, kind, kind, timeout_s=LONG_S)
        else:
            fields |= {"request": request, "entities": r.plain_table(spine)}
            packed = r.call("POST", *path, fields=fields)
            sent = r.Request("POST", packed.path, packed.body, accept=r.ARROW, timeout_s=LONG_S)
        found: Frame = self.send(sent)
        return found

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
                timeout_s=LONG_S,
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
    ) -> A:
        """Return the drift of what a version served against its training profile."""
        query = {"version": version, "route": route, "start": start, "end": end, "step": step}
        return self._object(r.get("v1", "drift", model, **query))

    def performance(self, model: str) -> A:
        """Return how well a model's labelled predictions did."""
        return self._object(r.get("v1", "performance", model))

    def freshness(self) -> A:
        """Return the ages at which views were served, and how far sources have come."""
        return self._object(r.get("v1", "freshness"))

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
            r.call("POST", "v1", "consistency", "run", fields=fields, timeout_s=LONG_S)
        )

    def backup(self, destination: str, *, copy: bool | None = None) -> A:
        """Take a backup to an absolute path on the daemon's host; returns its figures.

        `copy`: no hard links, even on one filesystem.
        """
        fields = {"destination": destination, "copy": copy}
        return self._object(
            r.call(*("POST", "v1", "backup"), fields=fields, repeatable=False, timeout_s=LONG_S)
        )

    def fsck(self) -> A:
        """Let the daemon check its data directory; returns what it found."""
        return self._object(r.call("POST", "v1", "fsck", timeout_s=LONG_S))

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


def _document(definitions: Mapping[str, Any] | Iterable[object]) -> Mapping[str, Any]:
    return definitions if isinstance(definitions, Mapping) else build_document(definitions)
