"""Values as JSON and msgpack: at once, or in a thread and in turns with the loop.

An encoder in C holds the interpreter's lock from the first value to the last, so that the loop
stands still while a thread works.  Large answers are encoded piece by piece.
"""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import numpy as np

from mlpd.core.convert import bytes_text

JSON_PIECE, MSGPACK_PIECE = 512, 16_384
"""Values of one piece: 0.3 ms for so many floats (0.9 ms where they have all their digits)."""
TURN_BYTES = 4_096
"""After so many bytes the lock is given away: less than a piece of numbers."""

_SMALL_ARRAY = 15
"""Items of an array that msgpack gives a header of one byte; those of a piece have three."""


def encode_json(value: Any) -> bytes:
    """Return the JSON of `value`; numpy arrays become lists, bytes text."""
    return _dumps(value).encode()


def encode_msgpack(value: Any) -> bytes:
    """Return the msgpack of `value`; numpy arrays become lists."""
    packed: bytes = msgpack.packb(value, default=_plain)
    return packed


def encode_in_turns(
    value: Any, *, as_msgpack: bool, give_way: Callable[[float], None] = time.sleep
) -> bytes:
    """Return what `encode_json` or `encode_msgpack` returns; blocks, for threads.

    `give_way` is called with 0 now and then, and lets other threads run.
    """
    parts: list[bytes] = []
    size_bytes = 0
    packer = msgpack.Packer(default=_plain)
    for part in _msgpack(value, packer) if as_msgpack else map(str.encode, _json(value)):
        parts.append(part)
        size_bytes += len(part)
        if size_bytes >= TURN_BYTES:
            size_bytes = 0
            give_way(0)
    return b"".join(parts)


def _dumps(value: Any) -> str:
    return json.dumps(value, default=_plain, separators=(",", ":"), ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, bytes):
        return bytes_text(value)
    raise TypeError(f"{type(value).__name__} has no wire form")


def _json(value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for i, (key, item) in enumerate(value.items()):
            yield "," if i else "{"
            yield _dumps({key: 0})[1:-2]  # with its colon
            yield from _json(item)
        yield "}"
    elif isinstance(value, list | np.ndarray) and len(value):
        for i, piece in enumerate(_split(value, JSON_PIECE)):
            yield "," if i else "["
            if len(piece) > 1:
                yield _dumps(piece)[1:-1]
            else:
                yield from _json(piece[0])
        yield "]"
    else:
        yield _dumps(value)


def _msgpack(value: Any, packer: msgpack.Packer) -> Iterator[bytes]:
    if isinstance(value, dict):
        yield packer.pack_map_header(len(value))
        for key, item in value.items():
            yield packer.pack(key)
            yield from _msgpack(item, packer)
    elif isinstance(value, list | np.ndarray):
        yield packer.pack_array_header(len(value))
        for piece in _split(value, MSGPACK_PIECE):
            if len(piece) > 1:
                yield packer.pack(piece)[1 if len(piece) <= _SMALL_ARRAY else 3 :]
            else:
                yield from _msgpack(piece[0], packer)
    else:
        yield packer.pack(value)


def _split(values: "list[Any] | np.ndarray[Any, Any]", most: int) -> Iterator[list[Any]]:
    """Yield consecutive pieces of about `most` values; what has more alone is a piece.

    Columns and rows are alike from one end to the other: the first item that is there tells whether
    the others are to be weighed, which costs 0.2 us each.
    """
    items = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(next((v for v in items if v is not None), None), list | dict | np.ndarray):
        yield from (items[start : start + most] for start in range(0, len(items), most))
        return
    piece: list[Any] = []
    weight = 0
    for item in items:
        more = len(item) if isinstance(item, list | dict | np.ndarray) else 1
        if piece and weight + more > most:
            yield piece
            piece, weight = [], 0
        piece.append(item)
        weight += more
    if piece:
        yield piece
