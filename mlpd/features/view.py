"""A view at work: its place on disk, its entity, and the plan that reads and writes its rows."""

from dataclasses import dataclass

from mlpd.core.specs import EntitySpec, ViewSpec
from mlpd.features.latest import LatestPlan
from mlpd.features.windows import WindowPlan


@dataclass(frozen=True, slots=True)
class ViewPlan:
    """A view with its on-disk id, its entity and the plan that reads and writes its rows."""

    view: ViewSpec
    view_id: int
    entity: EntitySpec
    plan: LatestPlan | WindowPlan
