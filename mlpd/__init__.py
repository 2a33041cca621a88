"""An ML platform in one daemon: features, registry, training, serving, experiments, monitoring."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlpd.core.definitions import (
        Aggregate,
        Entity,
        FeatureService,
        FeatureView,
        Job,
        Source,
        Spine,
        Transform,
        WindowView,
        transform,
    )

__all__ = [
    "Aggregate",
    "Entity",
    "FeatureService",
    "FeatureView",
    "Job",
    "Source",
    "Spine",
    "Transform",
    "WindowView",
    "__version__",
    "transform",
]


def __getattr__(name: str) -> Any:
    """Import the definitions on first use: the command line does without them for most of its work.

    That is half of the time that `mlpd --help` would take.
    """
    if name not in __all__:
        raise AttributeError(f"module 'mlpd' has no attribute {name!r}")
    from mlpd.core import definitions  # noqa: PLC0415

    return getattr(definitions, name)
