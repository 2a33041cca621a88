"""A block on disk: filled by rows in any order, read back in order, a slice in memory at a time."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import DType
from mlpd.features.block import Block


class SpilledBlock:
    """Values of k features for n rows, in files of a folder that its owner removes.

    As in `Block`, but a text's word is where it begins in the file of texts: its length (u32le)
    and its bytes.
    """

    def __init__(
        self, folder: Path, dtypes: Sequence[DType], rows: int, *, with_state: int
    ) -> None:
        self._dtypes, self._rows, self._with_state = dtypes, rows, with_state
        self._words = _make(folder / "words", len(dtypes) * rows * 8)
        self._valid = _make(folder / "valid", len(dtypes) * rows)
        self._state = _make(folder / "state", with_state * rows)
        self._texts = _make(folder / "texts", 0)
        self._texts_end = 0

    def fill(self, features: slice, rows: NDArray[np.int64], block: Block) -> None:
        """Set `features` of the rows at the ascending places `rows`, the rows of `block`."""
        for feature in range(features.start, features.stop):
            texts, words = block.texts.get(feature), block.words[feature]
            if texts is not None:
                words = self._append(feature, texts)
            self._scatter(self._words, feature, rows, words)
            self._scatter(self._valid, feature, rows, block.valid[feature])
            if feature < self._with_state:
                self._scatter(self._state, feature, rows, block.state[feature])

    def read_into(self, block: Block, start: int) -> None:
        """Set the first features of a block to those of its rows, which begin at `start`."""
        for feature, dtype in enumerate(self._dtypes):
            block.words[feature] = self._slice(self._words, feature, start, block.words[feature])
            block.valid[feature] = self._slice(self._valid, feature, start, block.valid[feature])
            if feature < self._with_state:
                state = block.state[feature]
                block.state[feature] = self._slice(self._state, feature, start, state)
            if not dtype.is_numeric:
                block.texts[feature] = self._read_texts(dtype, block.words[feature])

    def _scatter(
        self, path: Path, feature: int, rows: NDArray[np.int64], values: NDArray[Any]
    ) -> None:
        if not len(rows):
            return
        # Mapped for this feature alone: what is mapped counts as the process's memory.
        first, last = int(rows[0]), int(rows[-1])
        offset = (feature * self._rows + first) * values.itemsize
        mapped = np.memmap(path, values.dtype, "r+", offset, (last - first + 1,))
        mapped[rows - first] = values

    def _slice(self, path: Path, feature: int, start: int, like: NDArray[Any]) -> NDArray[Any]:
        offset = (feature * self._rows + start) * like.dtype.itemsize
        return np.fromfile(path, like.dtype, len(like), offset=offset)

    def _append(self, feature: int, texts: NDArray[Any]) -> NDArray[np.int64]:
        """Append texts to their file, equal ones once; return where each begins."""
        places: dict[Any, int] = {}
        parts: list[bytes] = []
        for text in texts.tolist():
            if text not in places:
                raw = text.encode() if self._dtypes[feature] is DType.STRING else text
                places[text] = self._texts_end
                parts.append(len(raw).to_bytes(4, "little") + raw)
                self._texts_end += len(parts[-1])
        with self._texts.open("ab") as file:
            file.writelines(parts)
        return np.fromiter(map(places.__getitem__, texts.tolist()), np.int64, len(texts))

    def _read_texts(self, dtype: DType, words: NDArray[np.int64]) -> NDArray[Any]:
        found: dict[int, Any] = {}
        with self._texts.open("rb") as file:
            for place in np.unique(words).tolist():
                file.seek(place)
                raw = file.read(int.from_bytes(file.read(4), "little"))
                found[place] = raw.decode() if dtype is DType.STRING else raw
        texts = np.empty(len(words), object)
        texts[:] = [found[place] for place in words.tolist()]
        return texts


def _make(path: Path, size_bytes: int) -> Path:
    with path.open("wb") as file:
        if size_bytes:
            # A mapped file that finds the disk full later would end the process.
            os.posix_fallocate(file.fileno(), 0, size_bytes)
    return path
