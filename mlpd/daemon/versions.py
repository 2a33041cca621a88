"""The parsed files of the versions that are served: what the model table loads, and keeps.

A version is read from the registry when it is first needed, every digest verified.
"""

import asyncio

from mlpd.core.errors import NotFoundError
from mlpd.daemon.packages import TrainedVersion, read_package, read_version
from mlpd.registry.models import Registry
from mlpd.registry.origin import Origin
from mlpd.serving.package import ModelPackage
from mlpd.serving.routes import PREVIOUS


class Versions:
    """The parsed files of loaded versions: vectorizer, profile, lineage by `model@version`."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._parsed: dict[str, TrainedVersion] = {}
        self._held: frozenset[str] = frozenset()

    async def fetch(self, model: str, number: int) -> ModelPackage:
        """Return a version's package, every digest verified; what the model table loads with.

        Raises ConflictError(code="signature_required") for one that nobody trusted has signed.
        """
        self._registry.require_trusted(self._registry.get(model, number))
        loaded = await self._registry.load(model, number)
        if isinstance(loaded.lineage, Origin):
            return await asyncio.to_thread(read_package, loaded)
        trained = await asyncio.to_thread(read_version, loaded)
        self._parsed[trained.reference] = trained
        return trained.package

    def aliases(self, model: str) -> dict[str, int]:
        """Return a model's aliases with the versions that they point to, and pointed to before."""
        found: dict[str, int] = {}
        for alias in self._registry.aliases(model):
            if alias.version is not None:
                found[alias.alias] = alias.version
            before = [number for number in alias.trail if number != alias.version]
            if before and not self._is_deleted(model, before[-1]):
                found[alias.alias + PREVIOUS] = before[-1]
        return found

    def _is_deleted(self, model: str, number: int) -> bool:
        try:
            self._registry.get(model, number)
        except NotFoundError:
            return True
        return False

    def get(self, reference: str) -> TrainedVersion:
        """Return a loaded version's files; KeyError for one that isn't loaded."""
        return self._parsed[reference]

    def hold(self, references: frozenset[str]) -> None:
        """Keep the files of what routes serve, loaded or not, instead of what was held before."""
        self._held = references

    def keep_only(self, references: frozenset[str]) -> None:
        """Forget the files of every version that is neither loaded nor held any more."""
        for reference in self._parsed.keys() - references - self._held:
            del self._parsed[reference]
