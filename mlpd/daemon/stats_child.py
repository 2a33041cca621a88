"""Child entry `stats`: what online serving holds of some views, summarized feature by feature."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Columns, concat, decode_columns, encode_columns
from mlpd.core.hashing import SLOTS
from mlpd.core.time import system_clock
from mlpd.daemon.child import Send
from mlpd.daemon.offline import open_offline
from mlpd.daemon.part import part_of
from mlpd.features.check import KEY_HEAD_BYTES, Row, view_id_of
from mlpd.features.latest import LatestPlan, empty_column
from mlpd.features.status import Status
from mlpd.features.summary import quantiles, summarize
from mlpd.features.view import ViewPlan
from mlpd.features.windows import WindowPlan
from mlpd.storage.check import scan_parts
from mlpd.storage.tables import Table

AGE_SHARES = (0.5, 0.95, 1.0)
"""Shares of the entities whose greatest age is told."""

_PRESENT, _NULL = int(Status.PRESENT), int(Status.NULL)


def run(request: dict[str, Any], send: Send) -> list[dict[str, Any]] | bytes:
    """Summarize `views` (name to features) over up to `entities` of each, as of now.

    Rows lie in the order of their entities' hashes, so the first ones are a sample by lot.  Only
    those of slots in `part` count.  `packed`: return the sample itself, for the shard that has it
    among its `parts` and summarizes all: what comes first over all shards is its sample.
    """
    part_here = part_of(request["part"])
    with open_offline(request) as offline:
        samples = {
            offline.catalog.views[name].view_id: _Sample(offline.catalog.views[name], features)
            for name, features in request["views"].items()
        }
        for part in scan_parts(offline.environment, Table.ONLINE, Table.TILES):
            t_us = max(system_clock(), part.head.known_us + 1)
            rows: dict[int, list[Row]] = {view_id: [] for view_id in samples}
            for (key, value), older in zip(part.rows, part.beside, strict=True):
                is_here = part_here is None or part_here.flags[key[0] << 8 | key[1]]
                if view_id_of(key) in rows and is_here:
                    rows[view_id_of(key)].append((key, value, older))
            for view_id, sample in samples.items():
                sample.add(rows[view_id], t_us, request["entities"])
            send({"kind": "progress", "entities": sum(s.entities for s in samples.values())})
            if all(sample.full for sample in samples.values()):
                break
    if request["packed"]:
        packed: bytes = msgpack.packb([sample.pack() for sample in samples.values()])
        return packed
    others = [msgpack.unpackb(packed) for packed in request["parts"]]
    for place, sample in enumerate(samples.values()):
        sample.join([packed[place] for packed in others], request["entities"])
    return [sample.report() for sample in samples.values()]


class _Sample:
    """Values of a view's features, part by part; `full` once it left an entity out."""

    def __init__(self, view: ViewPlan, features: Sequence[str]) -> None:
        self._view, self._features = view, tuple(features)
        self._parts: list[Columns] = [
            {name: empty_column(view.view.features[name], 0) for name in self._features}
        ]
        self._statuses: list[list[NDArray[np.uint8]]] = [[] for _ in self._features]
        self._ages_us: list[NDArray[np.int64]] = []
        self._keys: list[bytes] = []
        """Slot and entity of each, without the view, whose id is each daemon's own."""
        self.entities = 0
        self.full = False

    def add(self, rows: Sequence[Row], t_us: int, entities_max: int) -> None:
        """Read entities as of `t_us`, later than all their events, in the order of their keys."""
        taken = rows[: entities_max - self.entities]
        self.full |= len(taken) < len(rows)
        if not taken:
            return
        self.entities += len(taken)
        self._keys += [key[:2] + key[KEY_HEAD_BYTES:] for key, _, _ in taken]
        plan = self._view.plan
        if isinstance(plan, LatestPlan):
            columns, statuses = self._read_latest(plan, taken, t_us)
        else:
            columns, statuses = self._read_windows(plan, taken, t_us)
        self._parts.append(columns)
        for place, status in enumerate(statuses):
            self._statuses[place].append(status)

    def _read_latest(
        self, plan: LatestPlan, rows: Sequence[Row], t_us: int
    ) -> tuple[Columns, list[NDArray[np.uint8]]]:
        names, types = self._features, self._view.view.features
        block, event_us = plan.read([row[1] for row in rows], t_us, names)
        self._ages_us.append(t_us - event_us)
        columns = {n: block.column(i, types[n], whole=False) for i, n in enumerate(names)}
        return columns, list(block.state)

    def _read_windows(
        self, plan: WindowPlan, rows: Sequence[Row], t_us: int
    ) -> tuple[Columns, list[NDArray[np.uint8]]]:
        columns = plan.read([r[1] for r in rows], [r[2] for r in rows], t_us, self._features)
        masks = (columns[name].mask() for name in self._features)
        return columns, [np.where(mask, _PRESENT, _NULL).astype(np.uint8) for mask in masks]

    def pack(self) -> dict[str, Any]:
        """Return the sample as `join` takes it."""
        return {
            "keys": self._keys,
            "full": self.full,
            "columns": encode_columns(self._whole()),
            "statuses": [_joined(parts, np.uint8).tobytes() for parts in self._statuses],
            "ages": _joined(self._ages_us, np.int64).tobytes(),
        }

    def join(self, others: Sequence[Mapping[str, Any]], entities_max: int) -> None:
        """Take in the samples of other shards: what is first of all of them stays."""
        if not others:
            return
        columns = [self._whole(), *(decode_columns(other["columns"]) for other in others)]
        keys = self._keys + [key for other in others for key in other["keys"]]
        order = np.array(sorted(range(len(keys)), key=keys.__getitem__)[:entities_max], np.int64)
        self.full |= len(order) < len(keys) or any(other["full"] for other in others)
        self._parts = [
            {name: concat(c[name] for c in columns).take(order) for name in self._features}
        ]
        for place, parts in enumerate(self._statuses):
            more = [np.frombuffer(other["statuses"][place], np.uint8) for other in others]
            parts[:] = [_joined([*parts, *more], np.uint8)[order]]
        ages_us = [np.frombuffer(other["ages"], np.int64) for other in others]
        ages_us = [*self._ages_us, *ages_us]
        if any(map(len, ages_us)):
            self._ages_us = [_joined(ages_us, np.int64)[order]]
        self._keys = [keys[place] for place in order.tolist()]
        self.entities = len(order)

    def _whole(self) -> Columns:
        return {name: concat(part[name] for part in self._parts) for name in self._features}

    def report(self) -> dict[str, Any]:
        """Return the summary; where entities were left out, their number follows from the slots."""
        total = self.entities
        if self.full:
            last_slot = int.from_bytes(self._keys[-1][:2], "big")
            total = round(self.entities * SLOTS / (last_slot + 1))
        features = []
        for (name, column), statuses in zip(self._whole().items(), self._statuses, strict=True):
            features.append({"name": name, **summarize(column, _joined(statuses, np.uint8))})
        return {
            "view": self._view.view.name,
            "entities": self.entities,
            "entities_total": total,
            "complete": not self.full,
            "ages_s": self._ages(),
            "features": features,
        }

    def _ages(self) -> dict[str, float]:
        """Return ages of the newest events, empty for a window view, which keeps no such time."""
        if not self._ages_us:
            return {}
        found = quantiles(np.concatenate(self._ages_us), AGE_SHARES)
        return {str(share): age / 1e6 for share, age in zip(AGE_SHARES, found, strict=True)}


def _joined(parts: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *parts])
