"""An ML platform in one daemon: features, registry, training, serving, experiments, monitoring."""

__version__ = "0.1.0"

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
