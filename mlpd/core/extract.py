"""Extract: the part of a definitions document that one feature service depends on."""

from collections.abc import Mapping
from typing import Any

from mlpd.core.document import DOCUMENT_FORMAT
from mlpd.core.specs import Closure, Definitions


def extract_service(
    document: Mapping[str, Any], definitions: Definitions, closure: Closure
) -> dict[str, Any]:
    """Return a document with a service of `document`, and what it reads, under their names.

    `definitions` and `closure` are those of `document`.  The service's closure in the result has
    the same hash.
    """
    views = {name: definitions.views[name] for name in closure.view_features}
    wanted = {
        "entities": {entity.name for entity in closure.entities},
        "sources": {view.source for view in views.values()},
        "views": views.keys(),
        "transforms": {transform.name for transform in closure.transforms},
        "services": {closure.service.name},
    }
    part = {
        kind: {name: body for name, body in (document.get(kind) or {}).items() if name in names}
        for kind, names in wanted.items()
    }
    return {"format": DOCUMENT_FORMAT, **part}
