"""The training set of a job: its spine's rows with features and labels, split by time.

Belongs to child processes: both what trains and what trains again build their rows here.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column, Columns
from mlpd.core.errors import ValidationError
from mlpd.core.expressions import parse_expression
from mlpd.core.specs import Closure, JobSpec
from mlpd.core.vector import Vectorizer
from mlpd.daemon.offline import Offline
from mlpd.features.assemble import FeatureFrame
from mlpd.features.horizon import check_kept, find_kept
from mlpd.features.offline import JoinOptions, Spine, join_history
from mlpd.features.tombstones import deleted_rows
from mlpd.training.ranking import group_sizes
from mlpd.training.split import Timeline, split_rows
from mlpd.training.trainer import Dataset

Floats = NDArray[np.float64]

_DIGEST_ROWS = 65_536


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """Rows in time order: feature columns, labels float64 [n], times and sequences int64 [n].

    Of a ranking, groups in the order of their first rows, each in time order; `groups` numbers
    them, int64 [n].
    """

    frame: FeatureFrame
    labels: Floats
    t_us: NDArray[np.int64]
    sequences: NDArray[np.int64]
    groups: NDArray[np.int64] | None = None
    left_out: int = 0
    """Rows that lay before the horizon: the history that they would see is no longer kept."""

    @property
    def timeline(self) -> Timeline:
        """Where these rows may be cut."""
        return Timeline.of(self.t_us, None if self.groups is None else group_sizes(self.groups))

    def dataset(self, vectors: Floats, rows: slice, names: tuple[str, ...]) -> Dataset:
        """Return some of the rows as a trainer takes them; `vectors` float64 [n, F] of all."""
        groups = None if self.groups is None else group_sizes(self.groups[rows])
        return Dataset(np.asfortranarray(vectors[rows]), self.labels[rows], names, groups)

    @property
    def digest(self) -> str:
        """Digest of the ordered rows: which events, when, with which label."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.sequences, self.t_us, self.labels):
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Vectors:
    """A training set as a trainer sees it.

    `parts`: rows of train, valid and test.  `rows`: float64 [n, F] in time order, column by column
    in memory, as in `sets`: LightGBM bins them quickest so.
    """

    vectorizer: Vectorizer
    parts: Mapping[str, slice]
    rows: Floats
    sets: Mapping[str, Dataset]

    @property
    def digest(self) -> str:
        """Digest of every bit of every vector, row by row; 0.3 s for 100 MB."""
        sha = hashlib.sha256()
        for start in range(0, len(self.rows), _DIGEST_ROWS):
            sha.update(self.rows[start : start + _DIGEST_ROWS].astype("<f8").tobytes("C"))
        return f"sha256:{sha.hexdigest()}"


def build_training_set(offline: Offline, job: JobSpec, closure: Closure) -> TrainingSet:
    """Return the rows of `job`'s spine with features and labels, in time order.

    `offline` has each event once: gathered, or from a log to which no slot came from elsewhere.
    """
    source = offline.catalog.definitions.source(job.spine_source)
    events = offline.events(source.name, tuple(source.schema))
    columns, stamps = events.columns, events.stamps
    t_us = columns[job.spine_time].values
    label = parse_expression(job.label, source.schema, "label").evaluate(columns)
    keep = columns[job.spine_time].mask() & label.mask()
    deleted = deleted_rows(columns)
    if deleted is not None:
        keep &= ~deleted
    if job.spine_filter is not None:
        kept = parse_expression(job.spine_filter, source.schema, "filter").evaluate(columns)
        keep &= kept.mask() & kept.values.astype(np.bool_)
    if job.start_us is not None:
        keep &= t_us >= job.start_us
    if job.end_us is not None:
        keep &= t_us < job.end_us
    asked = keep
    keep = keep & _find_kept(offline, job, closure, t_us, stamps.event_us)
    left_out = int(asked.sum() - keep.sum())
    order = np.flatnonzero(keep)
    order = order[np.lexsort((stamps.sequences[order], t_us[order]))]
    groups = None
    if job.group is not None:
        numbers = _number_groups(columns[job.group].take(order))
        by_group = np.argsort(numbers, kind="stable")
        order, groups = order[by_group], numbers[by_group]
    if not len(order):
        raise ValidationError(
            f"job {job.name!r} has no rows: source {source.name!r} holds {len(keep)} events, "
            "none of which has a label within the job's bounds and the history that is kept "
            f"({left_out} lie before it)",
            code="no_rows",
            hint="Import events first, or widen the spine's start, end and filter.",
        )
    needed = [*closure.key_columns, *closure.service.request]
    given: Mapping[str, Column] = {name: columns[name].take(order) for name in needed}
    spine = Spine(given, t_us[order])
    options = JoinOptions(job.mode, job.spine_closed)
    joined = join_history(offline.catalog, closure, spine, offline.events, options)
    horizons = offline.horizons()  # history may have gone under the join
    check_kept(offline.catalog, closure, horizons, spine.t_us, None, job.mode)
    labels = label.values[order].astype(np.float64)
    return TrainingSet(joined, labels, t_us[order], stamps.sequences[order], groups, left_out)


def _find_kept(
    offline: Offline,
    job: JobSpec,
    closure: Closure,
    t_us: NDArray[np.int64],
    event_us: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Return which rows lie within the history of the job's source, and of all that they see."""
    horizons = offline.horizons()
    kept = find_kept(offline.catalog, closure, horizons, t_us)
    if job.spine_source in horizons:  # what is there of before is the newest of each entity alone
        kept &= event_us >= horizons[job.spine_source].before_us
    return kept


def _number_groups(column: Column) -> NDArray[np.int64]:
    """Return each row's group, numbered in the order of their first rows; null is a group."""
    numbers: dict[object, int] = {}
    found = [numbers.setdefault(value, len(numbers)) for value in column.to_list()]
    return np.array(found, np.int64)


def build_vectors(job: JobSpec, data: TrainingSet) -> Vectors:
    """Return the vectors of `data`, categories frozen on the training rows."""
    parts = split_rows(
        data.timeline,
        valid_share=job.valid_share,
        test_share=job.test_share,
        gap_us=job.gap_us,
    )
    columns = data.frame.columns
    vectorizer = Vectorizer.fit(_take(columns, parts["train"]), job.categorical)
    vectors = vectorizer.vectorize(columns, order="F")
    sets = {name: data.dataset(vectors, rows, vectorizer.names) for name, rows in parts.items()}
    return Vectors(vectorizer, parts, vectors, sets)


def _take(columns: Columns, rows: slice) -> Columns:
    return {name: column.take(rows) for name, column in columns.items()}
