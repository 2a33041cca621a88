"""A block on disk gives back what was put into it, in any order of parts."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mlpd.core.columns import DType
from mlpd.core.errors import InternalError
from mlpd.features.block import Block
from mlpd.features.spilled import SpilledBlock
from mlpd.storage.arrow_stream import StreamFile

TYPES = [DType.FLOAT64, DType.STRING, DType.INT64, DType.BYTES]
ROWS = 1000


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    whole = Block.empty(4, ROWS, with_state=2)
    whole.words[:] = rng.integers(-(2**62), 2**62, (4, ROWS))
    whole.valid[:] = rng.random((4, ROWS)) < 0.5
    whole.state[:] = rng.integers(0, 4, (2, ROWS))
    texts = rng.choice(np.array(["", "ä\x00", "long" * 100], object), ROWS)
    whole.texts.update({1: texts, 3: np.array([text.encode() for text in texts], object)})
    spilled = SpilledBlock(tmp_path, TYPES, ROWS, with_state=2)
    part_of = rng.integers(0, 5, ROWS)
    for part in (3, 0, 4, 1, 2):
        rows = np.flatnonzero(part_of == part)
        for features in (slice(0, 1), slice(1, 4)):
            spilled.fill(features, rows, whole.take(rows))
    for start in range(0, ROWS, 300):
        rows = np.arange(start, min(start + 300, ROWS))
        expected, found = whole.take(rows), Block.empty(5, len(rows), with_state=2)
        spilled.read_into(found, start)
        for row in (0, 2):
            assert found.words[row].tolist() == expected.words[row].tolist()
        assert found.valid[:4].tolist() == expected.valid.tolist()
        assert found.state.tolist() == expected.state.tolist()
        for row in (1, 3):
            assert found.texts[row].tolist() == expected.texts[row].tolist()


def test_nothing_is_fine(tmp_path: Path) -> None:
    spilled = SpilledBlock(tmp_path, TYPES, 0, with_state=2)
    none = Block.empty(4, 0, with_state=2)
    spilled.fill(slice(0, 4), np.empty(0, np.int64), none)
    spilled.read_into(none, 0)
    assert none.texts[1].tolist() == []


def test_frames_become_one_stream(tmp_path: Path) -> None:
    whole = pl.DataFrame({"a": [1, None, 3, 4], "b": ["x", "y", None, ""]})
    path = tmp_path / "stream"
    with StreamFile(path) as stream:
        for part in (whole[:1], whole[1:1], whole[1:3], whole[3:]):
            stream.write(part)
    assert pl.read_ipc_stream(path).equals(whole)
    with StreamFile(path) as stream:
        stream.write(whole)
        with pytest.raises(InternalError):
            stream.write(whole.select("b", "a"))
    with StreamFile(path):
        pass
    assert path.stat().st_size == 0
