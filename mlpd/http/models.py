"""Handlers of the model registry: models, versions with their lineage, aliases, history."""

import json
from dataclasses import asdict
from typing import Any

from aiohttp import web

from mlpd.core.names import check_name
from mlpd.core.time import format_time
from mlpd.daemon.app import Daemon
from mlpd.http.shapes import Field, Shape
from mlpd.http.versions import find_version, version_form
from mlpd.http.wire import read_by, read_fields, respond
from mlpd.registry.models import HISTORY_LIMIT
from mlpd.registry.records import (
    Alias,
    Cause,
    Event,
    ModelSummary,
)

REPORT_FILE = "report.json"

MODELS = Shape({"models": Field("rows", "Per model name, version_count, newest, aliases.")})
MODEL = Shape(
    {
        "name": Field("text", "The model."),
        "versions": Field("rows", "Its versions by number, tombstones included."),
        "pinned": Field("any", "The numbers of those that nothing deletes."),
        "aliases": Field("rows", "Its aliases with the versions that they point to."),
    }
)
VERSION = Shape(
    {
        "version": Field("object", "Number, digest, size, state, who and when."),
        "files": Field("object", "Digest and size of each file."),
        "signatures": Field("object", "Signatures by public key."),
        "lineage": Field("object", "What it was made from."),
        "report": Field("object", "Its evaluation, or null if it came without one."),
    }
)
MOVE = Shape(
    {
        "version": Field("integer", "Where the alias shall point.", required=True),
        "expected": Field("any", 'Where it points now: a number, 0 for nowhere, or "any".'),
        "why": Field("text", "For the history."),
        "force": Field("flag", "Move it although it is protected; the history says so."),
    }
)
PROTECTION = Shape(
    {
        "protected": Field("flag", "Whether moving it shall take force.", required=True),
        "why": Field("text", "For the history."),
    }
)
LOADED = Shape({"loaded": Field("flag", "Whether it shall stay loaded.", required=True)})
KEPT_LOADED = Shape(
    {
        "model": Field("text", "The model."),
        "loaded": Field("flag", "Whether it stays loaded."),
    }
)
ROLLBACK = Shape({"why": Field("text", "For the history.")})
ALIAS = Shape(
    {
        "model": Field("text", "The model."),
        "alias": Field("text", "The alias."),
        "version": Field("integer", "Where it points, null for nowhere."),
        "protected": Field("flag", "Whether moving it takes force."),
        "changed": Field("time", "When."),
        "trail": Field("any", "The versions that it left, oldest first."),
    }
)
HISTORY = Shape({"events": Field("rows", "What changed, newest first, by whom and why.")})
HISTORY_OPTIONS = Shape({"alias": Field("text", "Only what concerns this alias.")})


class ModelHandlers:
    """Shows and changes the registry; routes follow moved aliases before the answer."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def list(self, request: web.Request) -> web.Response:
        """Return every model with its newest version and aliases."""
        models = [_summary(model) for model in self._daemon.registry.models()]
        return await respond(request, {"models": models})

    async def show(self, request: web.Request) -> web.Response:
        """Return a model's versions and aliases."""
        registry, name = self._daemon.registry, request.match_info["name"]
        answer = {
            "name": name,
            "versions": [version_form(version) for version in registry.versions(name)],
            "pinned": sorted(registry.pins(name)),
            "aliases": [_alias(alias) for alias in registry.aliases(name)],
        }
        return await respond(request, answer)

    async def version(self, request: web.Request) -> web.Response:
        """Return a version, named by number or alias: state, files, lineage, report."""
        registry, version = self._daemon.registry, find_version(self._daemon.registry, request)
        name = version.name
        manifest = await registry.load_manifest(name, version.number)
        report = None
        if REPORT_FILE in manifest.files:
            report = json.loads(await registry.load_file(name, version.number, REPORT_FILE))
        answer = {
            "version": version_form(version),
            "files": {
                filename: {"digest": found.digest, "size_bytes": found.size_bytes}
                for filename, found in manifest.files.items()
            },
            "signatures": registry.signatures(version),
            "lineage": asdict(await registry.load_lineage(name, version.number)),
            "report": report,
        }
        return await respond(request, answer)

    async def move_alias(self, request: web.Request) -> web.Response:
        """Point an alias at a version; routes that name it serve that version when answered."""
        fields = await read_fields(request, MOVE)
        alias = await self._daemon.models_verb.move_alias(
            *self._alias_of(request),
            fields["version"],
            Cause(read_by(request), fields["why"] or "", force=bool(fields["force"])),
            expected=read_expected(fields["expected"]),
        )
        return await respond(request, _alias(alias))

    async def delete_alias(self, request: web.Request) -> web.Response:
        """Remove an alias."""
        alias = await self._daemon.models_verb.move_alias(
            *self._alias_of(request), None, Cause(read_by(request)), expected="any"
        )
        return await respond(request, _alias(alias))

    async def roll_back(self, request: web.Request) -> web.Response:
        """Point an alias back at the version before."""
        fields = await read_fields(request, ROLLBACK)
        cause = Cause(read_by(request), fields["why"] or "")
        alias = await self._daemon.models_verb.roll_back(*self._alias_of(request), cause)
        return await respond(request, _alias(alias))

    async def protect(self, request: web.Request) -> web.Response:
        """Make an alias protected, so that moving it takes force, or no longer so."""
        fields = await read_fields(request, PROTECTION)
        cause = Cause(read_by(request), fields["why"] or "")
        alias = await self._daemon.registry.protect(
            *self._alias_of(request), fields["protected"], cause
        )
        return await respond(request, _alias(alias))

    async def keep_loaded(self, request: web.Request) -> web.Response:
        """Make a model's champion stay loaded, so that it answers under /v2, or let go of it.

        It stays loaded over restarts and follows its alias; a route needs no such thing.
        """
        fields = await read_fields(request, LOADED)
        name = check_name(request.match_info["name"], "model")
        if fields["loaded"]:
            await self._daemon.models_verb.load(name, read_by(request))
        else:
            await self._daemon.models_verb.unload(name)
        return await respond(request, {"model": name, "loaded": fields["loaded"]})

    async def history(self, request: web.Request) -> web.Response:
        """Return a model's latest changes, newest first, at most 100."""
        options = HISTORY_OPTIONS.read_query(request.query)
        events = self._daemon.registry.history(
            request.match_info["name"], alias=options["alias"], limit=HISTORY_LIMIT
        )
        return await respond(request, {"events": [_event(event) for event in events]})

    def _alias_of(self, request: web.Request) -> tuple[str, str]:
        return request.match_info["name"], request.match_info["alias"]


def read_expected(value: Any) -> Any:
    """Return what the registry takes for `expected`: absent is "any", 0 is nowhere."""
    return {None: "any", 0: None}.get(value, value) if isinstance(value, int | None) else value


def _summary(model: ModelSummary) -> dict[str, Any]:
    return {
        "name": model.name,
        "version_count": model.version_count,
        "newest": None if model.newest is None else version_form(model.newest),
        "aliases": dict(model.aliases),
    }


def _alias(alias: Alias) -> dict[str, Any]:
    form = asdict(alias) | {"changed": format_time(alias.changed_us)}
    del form["changed_us"]
    return form


def _event(event: Event) -> dict[str, Any]:
    return {
        "sequence": event.sequence,
        "time": format_time(event.time_us),
        "kind": str(event.kind),
        "by": event.cause.by,
        "why": event.cause.why,
        "force": event.cause.force,
        "report": event.cause.report,
        **event.body,
    }
