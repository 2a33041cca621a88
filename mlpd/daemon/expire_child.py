"""Child entry `expire`: segments written anew without the rows that a source keeps no longer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlpd.core.columns import DType
from mlpd.daemon.child import Send
from mlpd.storage.environment import Environment
from mlpd.storage.expire import Expiry, expire
from mlpd.storage.files import DataDirectory
from mlpd.storage.rewrite import rewriting


def run(request: Mapping[str, Any], _: Send) -> list[bytes]:
    """Write the files of `source`; return the new manifests, encoded.

    `before_us`, `through`: see `Expiry`; `entities`: lists of key columns with their types.
    """
    hint = "Free space or mend the disk; old history goes at the next try."
    with rewriting(Path(request["directory"]), hint=hint) as (environment, data):
        return rewrite(environment, data, request)


def rewrite(
    environment: Environment, data: DataDirectory, request: Mapping[str, Any]
) -> list[bytes]:
    """Do it in this process; raises OSError."""
    entities = [{name: DType(dtype) for name, dtype in keys} for keys in request["entities"]]
    expiry = Expiry(request["source"], request["before_us"], request["through"], entities)
    return [manifest.encode() for manifest in expire(environment, data.segments, expiry)]
