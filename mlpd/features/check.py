"""Checks of online rows for fsck: every key in its slot, every value decodable by its view."""

from collections.abc import Iterator, Mapping, Sequence

from mlpd.core.errors import MlpdError
from mlpd.core.hashing import slot_of
from mlpd.features.latest import LatestPlan
from mlpd.features.view import ViewPlan
from mlpd.features.windows import WindowPlan

KEY_HEAD_BYTES = 6
"""Slot and view id, before the entity bytes."""
WORD_BYTES = 8
_ENTITY_TAGS = b"sibh"

Row = tuple[bytes, bytes, bytes | None]
"""Key, value, and a window view's older tiles, if there are any."""


def view_id_of(key: bytes) -> int:
    """Return the view id in the key of an online row."""
    return int.from_bytes(key[2:KEY_HEAD_BYTES], "big")


def find_faults(
    views: Mapping[int, ViewPlan], rows: Sequence[Row], t_us: int
) -> Iterator[tuple[bytes, str]]:
    """Yield (key, what is wrong) for online rows; `views` by id, rows of other ids have no view.

    `t_us`: later than every event in the rows.
    """
    by_view: dict[int, list[Row]] = {}
    for row in rows:
        key = row[0]
        fault = _key_fault(key)
        if fault:
            yield key, fault
        elif (view_id := view_id_of(key)) in views:
            by_view.setdefault(view_id, []).append(row)
    for view_id, part in by_view.items():
        yield from _value_faults(views[view_id], part, t_us)


def _key_fault(key: bytes) -> str:
    entity = key[KEY_HEAD_BYTES:]
    if not entity or entity[0] not in _ENTITY_TAGS:
        return "its key is no entity's"
    slot = int.from_bytes(key[:2], "big")
    wanted = slot_of(entity)
    return "" if slot == wanted else f"it lies in slot {slot}, its entity belongs to {wanted}"


def _value_faults(view: ViewPlan, rows: Sequence[Row], t_us: int) -> Iterator[tuple[bytes, str]]:
    plan = view.plan
    if isinstance(plan, LatestPlan):
        yield from ((key, fault) for key, value, _ in rows if (fault := plan.fault(value)))
    elif _window_fault(plan, rows, t_us):
        faults = ((row[0], _window_fault(plan, [row], t_us)) for row in rows)
        yield from ((key, fault) for key, fault in faults if fault)


def _window_fault(plan: WindowPlan, rows: Sequence[Row], t_us: int) -> str:
    values, older = [value for _, value, _ in rows], [tiles for _, _, tiles in rows]
    if not all(values) or any(len(part or b"") % WORD_BYTES for part in (*values, *older)):
        return "it is not made of words"
    try:
        plan.read(values, older, t_us, tuple(plan.layout.outputs))
    except MlpdError as error:
        return error.message
    return ""
