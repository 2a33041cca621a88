"""Faults planted in a child, one for each thing that durability rests on; never in the product."""

import os
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import lmdb

from mlpd.registry import layout
from mlpd.storage import blobs, creation, segment_files


def _open_with(**options: Any) -> None:
    lmdb.open = partial(lmdb.open, **options)  # type: ignore[assignment]


def _skip(module: Any, name: str) -> None:
    assert hasattr(module, name), f"{module.__name__} flushes nothing by {name}"
    setattr(module, name, lambda _: None)


def _skip_blob_flush() -> None:
    blobs.os = SimpleNamespace(**{**vars(os), "fsync": lambda _: None})  # type: ignore[assignment]


def _skip_blob_names() -> None:
    _skip(blobs, "fsync_dir")  # either of the two is enough
    _skip(layout, "fsync_dir")


FAULTS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "LMDB without sync": partial(_open_with, sync=False),
    "LMDB without metasync": partial(_open_with, metasync=False),
    "the name of the environment not flushed": partial(_skip, creation, "fsync_dir"),
    "segments not flushed before their manifest": partial(_skip, segment_files, "fsync_file"),
    "names of segments not flushed": partial(_skip, segment_files, "fsync_dir"),
    "blobs not flushed": _skip_blob_flush,
    "names of blobs not flushed": _skip_blob_names,
}
