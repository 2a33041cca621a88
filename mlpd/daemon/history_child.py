"""Child entry `history`: a point-in-time join for a spine that a client sent, file to file."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlpd.core.closure import build_closure
from mlpd.core.columns import DType, decode_columns
from mlpd.core.errors import ValidationError
from mlpd.core.routing import key_slots
from mlpd.core.specs import Closure, ServiceSpec
from mlpd.daemon.child import Send
from mlpd.daemon.frame_files import write_frames
from mlpd.daemon.offline import Offline, open_offline
from mlpd.daemon.part import part_of
from mlpd.daemon.spines import (
    EVENT_TIME,
    SEQUENCE,
    check_spine,
    frame_of,
    read_spine_file,
    spine_types,
)
from mlpd.features.assemble import FeatureFrame
from mlpd.features.bounded import join_bounded
from mlpd.features.horizon import check_kept
from mlpd.features.offline import JoinOptions, Spine
from mlpd.features.on_stale import apply_on_stale
from mlpd.storage.frames import FrameColumns, to_series

if TYPE_CHECKING:
    import polars as pl


def run(request: dict[str, Any], send: Send) -> int:  # noqa: ARG001 - every entry takes both
    """Write the joined frame to the file `answer`, in the media type `format`; return its rows.

    The spine is `spine` (encoded columns) or `spine_file` of media type `spine_format`: its
    columns come first, then the features.  Everything is written in `folder`.  MisdirectedError
    for a key of another shard.
    """
    with open_offline(request) as offline:
        closure = _closure(offline, request)
        spine = read_spine(request, closure)
        _check_keys(spine, closure, request)
        frames = _joined_frames(offline, closure, spine, request)
        return write_frames(frames, request["format"], Path(request["answer"]))


def _closure(offline: Offline, request: Mapping[str, Any]) -> Closure:
    definitions = offline.catalog.definitions
    if request["service"] is not None:
        return build_closure(definitions, definitions.service(request["service"]))
    fields = {name: DType(dtype) for name, dtype in request["request"].items()}
    return build_closure(definitions, ServiceSpec("features", tuple(request["features"]), fields))


def read_spine(request: Mapping[str, Any], closure: Closure) -> "pl.DataFrame":
    """Return the request's spine, typed and whole; raises ValidationError and TooLargeError."""
    if "spine" in request:
        frame = frame_of(decode_columns(request["spine"]))
    else:
        frame = read_spine_file(Path(request["spine_file"]), request["spine_format"], closure)
        types = spine_types(closure)
        check_spine(closure, {name: types[name] for name in frame.columns}, request["mode"])
    for name, code in ((EVENT_TIME, "missing_timestamp"), (SEQUENCE, "missing_sequence")):
        if name in frame.columns and frame[name].null_count():
            raise ValidationError(f"a spine row has no {name}", code=code)
    return frame


def _check_keys(frame: "pl.DataFrame", closure: Closure, request: Mapping[str, Any]) -> None:
    """Raise unless every key of the spine is in a slot of this shard: of others not all is here."""
    part = part_of(request["part"])
    if part is None:
        return
    for entity in closure.entities:
        keys = frame.select(entity.columns).unique(maintain_order=True)
        columns = {name: keys[name].to_list() for name in entity.columns}
        what = f"entity {entity.name!r}: key"
        part.check_slots(key_slots(entity, columns, len(keys)).tolist(), what)


def _joined_frames(
    offline: Offline, closure: Closure, frame: "pl.DataFrame", request: Mapping[str, Any]
) -> "Iterator[pl.DataFrame]":
    """Yield the spine's columns, the features and, if asked for, their statuses."""
    given = FrameColumns(frame, {name: spine_types(closure)[name] for name in frame.columns})
    sequences = given[SEQUENCE].values if SEQUENCE in given else None
    spine = Spine(given, given[EVENT_TIME].values, sequences)
    on_stale = request["on_stale"]
    options = JoinOptions(
        request["mode"],
        request["closed"],
        keep_stale=on_stale == "value",
        lineage=offline.lineage() if offline.gathered is None else None,  # else each is there once
    )
    _check_kept(offline, closure, spine, options)
    start, folder = 0, Path(request["folder"])
    for joined in join_bounded(offline.catalog, closure, spine, offline, folder, options):
        apply_on_stale(joined, on_stale, first_row=start)
        yield _output(frame[start : start + len(joined)], joined, statuses=request["statuses"])
        start += len(joined)
    _check_kept(offline, closure, spine, options)  # history may have gone under the join


def _check_kept(offline: Offline, closure: Closure, spine: Spine, options: JoinOptions) -> None:
    asked = offline.catalog, closure, offline.horizons()
    check_kept(*asked, spine.t_us, spine.sequences, options.mode)


def _output(spine: "pl.DataFrame", joined: FeatureFrame, *, statuses: bool) -> "pl.DataFrame":
    import polars as pl  # noqa: PLC0415 - in the child alone

    features = {n: c for n, c in joined.columns.items() if n not in spine.columns}
    series = [*spine.get_columns(), *(to_series(name, c) for name, c in features.items())]
    if statuses:
        series += [
            pl.Series(f"{name}__status", status.astype(np.uint8))
            for name, status in joined.statuses.items()
        ]
    return pl.DataFrame(series)
