"""The native entries of the feature engines, loaded together."""

from itertools import chain
from types import SimpleNamespace
from typing import Any, Protocol, cast

from mlpd.core.kernels import load_kernels

MODULES = (
    ("mlpd.features.window_kernel", "mlpd.features.read_kernel"),
    (
        "mlpd.features.update_kernel",
        "mlpd.features.latest_kernel",
        "mlpd.features.resident_kernel",
        "mlpd.features.pack_kernel",
    ),
)
"""The modules behind `load_feature_kernels`, as `precompile` takes them.  Reads and joins fold
tiles with the same helpers: together they take 34 s of a crowded processor, apart 48."""


class FeatureKernels(Protocol):
    """The entries of MODULES; reads and latest-value views need native ones, for `raw`."""

    update_recent: Any
    update_all: Any
    read_views: Any
    group_rows: Any
    join_rows: Any
    settle_rows: Any
    copy_cells: Any
    keep_cells: Any
    pack_features: Any


def load_feature_kernels(*, boundscheck: bool | None = None) -> FeatureKernels:
    """Return the native kernels; see `load_kernels`."""
    entries: dict[str, Any] = {}
    for module in chain.from_iterable(MODULES):
        kernels = load_kernels(module, boundscheck=boundscheck)
        entries |= {name: kernels[name] for name in kernels}
    return cast("FeatureKernels", SimpleNamespace(**entries))
