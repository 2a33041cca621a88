"""Verb reproduce: a version trained again from its lineage in a child; the trees are compared."""

import asyncio
from dataclasses import asdict
from typing import Any

from mlpd.core.config import PluginsConfig, TrainingConfig
from mlpd.core.errors import UnavailableError, ValidationError
from mlpd.core.time import Clock
from mlpd.daemon.offline import offline_request
from mlpd.daemon.ownership import Ownership
from mlpd.daemon.plugins import Plugins
from mlpd.daemon.process import Child
from mlpd.daemon.state import CatalogState
from mlpd.registry.lineage import Lineage
from mlpd.registry.models import Registry
from mlpd.registry.records import ModelVersion
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory

GOLDEN_FILE = "golden.msgpack"


class Reproduce:
    """Trains versions again, one at a time; nothing of it is kept."""

    def __init__(
        self,
        environment: Environment,
        state: CatalogState,
        registry: Registry,
        ownership: Ownership,
        paths: DataDirectory,
        config: TrainingConfig,
        plugins: PluginsConfig,
        clock: Clock,
    ) -> None:
        self._environment = environment
        self._state = state
        self._registry = registry
        self._ownership = ownership
        self._paths = paths
        self._config = config
        self._plugins = plugins
        self._clock = clock
        self._lock = asyncio.Lock()

    async def run(self, version: ModelVersion) -> dict[str, Any]:
        """Return how a training from the version's lineage compares with it.

        `verdict` is `reproduced` or `different`; `checks` what was compared, in the order of the
        work.  Costs a training.  Cancelling ends the child.  Raises ValidationError(
        code="not_reproducible") for what was not trained here, UnavailableError(
        code="reproduction_timeout"), ConflictError(code="several_shards").
        """
        self._ownership.check_whole("a reproduction")
        lineage = await self._registry.load_lineage(version.name, version.number)
        if not isinstance(lineage, Lineage) or not (lineage.definitions and lineage.job):
            raise ValidationError(
                f"version {version.reference} was not trained by a job here",
                code="not_reproducible",
                hint="Versions that jobs trained can be reproduced; uploaded ones can't.",
            )
        golden = await self._registry.load_file(version.name, version.number, GOLDEN_FILE)
        async with self._lock:
            started_us = self._clock()
            found = await self._compare(lineage, golden)
        return {
            "version": version.reference,
            "verdict": "reproduced" if found.pop("reproduced") else "different",
            "took_s": (self._clock() - started_us) / 1e6,
            **found,
        }

    async def _compare(self, lineage: Lineage, golden: bytes) -> dict[str, Any]:
        with self._environment.snapshot() as snapshot:
            through = snapshot.sequence
            catalog = self._state.read_catalog(snapshot)
        request = {
            **offline_request(self._paths, catalog, through),
            "lineage": asdict(lineage),
            "golden": golden,
            "plugins": (await asyncio.to_thread(Plugins.find, self._plugins)).to_request(),
            "folder": str(self._paths.cache),
        }
        config = self._config
        try:
            async with (
                asyncio.timeout(config.timeout_us / 1e6),
                Child(
                    "reproduce",
                    request,
                    nice=config.nice,
                    idle=config.idle,
                    memory_bytes_max=config.memory_bytes_max,
                    threads=int(lineage.params["num_threads"]),
                ) as child,
            ):
                found: dict[str, Any] = await child.result()
                return found
        except TimeoutError:
            raise UnavailableError(
                "training again took too long and was stopped",
                code="reproduction_timeout",
                hint="See [training] timeout.",
            ) from None
