"""Arrow IPC streams written frame by frame, for child processes: memory for one frame at a time."""

import io
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mlpd.core.errors import InternalError

if TYPE_CHECKING:
    import polars as pl

_CONTINUES = b"\xff\xff\xff\xff"
END = _CONTINUES + bytes(4)
"""What closes a stream: a message of no length."""


class StreamFile:
    """One Arrow IPC stream in a file; a context manager.

    Every frame becomes record batches of the one stream whose schema the first frame gives.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._schema: bytes | None = None

    def write(self, frame: "pl.DataFrame") -> None:
        """Append a frame; InternalError if its schema is another one."""
        buffer = io.BytesIO()
        frame.write_ipc_stream(buffer)
        with buffer.getbuffer() as stream:
            # A stream is its schema's message (a mark, the length of what follows), messages of
            # batches, and the end.
            head = 8 + int.from_bytes(stream[4:8], "little")
            schema = bytes(stream[:head])
            if self._schema is None:
                self._schema = schema
                self._file.write(schema)
            if schema != self._schema or stream[-len(END) :] != END:
                raise InternalError("a frame doesn't fit into the stream", code="arrow_stream")
            self._file.write(stream[head : -len(END)])

    def close(self) -> None:
        """Write the end and close; idempotent.  A stream without a frame is an empty file."""
        if not self._file.closed:
            if self._schema is not None:
                self._file.write(END)
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
