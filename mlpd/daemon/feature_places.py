"""Where the numbers of a version's features stand in the vectors that it was served with."""

import json
from collections.abc import Callable, Mapping

from mlpd.core.errors import MlpdError
from mlpd.core.vector import Vectorizer
from mlpd.registry.models import Registry

Places = Mapping[str, int]


class FeaturePlaces:
    """Positions by feature name, of each (model, version); belongs to the loop.

    `loaded` returns the vectorizer of a `model@version` that is loaded, else raises KeyError.
    Categorical features are left out: their codes are no quantities.
    """

    def __init__(self, registry: Registry, loaded: Callable[[str], Vectorizer]) -> None:
        self._registry = registry
        self._loaded = loaded
        self._known: dict[tuple[str, int], Places] = {}

    def get(self, model: str, version: int) -> Places:
        """Return the places in a version's vectors; none if it is neither loaded nor known."""
        known = self._known.get((model, version))
        if known is not None:
            return known
        try:
            return self._keep(model, version, self._loaded(f"{model}@{version}"))
        except KeyError:
            return {}

    async def load(self, model: str, version: int) -> None:
        """Learn the features of a version that may not be served any more; once for each."""
        if self.get(model, version) or (model, version) in self._known:
            return
        try:
            encoder = await self._registry.load_file(model, version, "encoder.json")
        except MlpdError:  # it was deleted: its rows have no covariates
            self._known[model, version] = {}
        else:
            self._keep(model, version, Vectorizer.from_dict(json.loads(encoder)))

    def _keep(self, model: str, version: int, vectorizer: Vectorizer) -> Places:
        places = {
            feature.name: place
            for place, feature in enumerate(vectorizer.features)
            if feature.encoder is None
        }
        self._known[model, version] = places
        return places
