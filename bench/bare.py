"""The bare limits: aiohttp handlers that do the least that ours must do, each in a process.

    python -m bench.bare read LMDB_DIRECTORY      the same LMDB gets, values as msgpack
    python -m bench.bare predict MODEL_ONNX       one vector as JSON through onnxruntime
    python -m bench.bare ingest DIRECTORY         the body's bytes into LMDB by group commit

The port (a free one) is the first line of stdout.
"""

import itertools
import sys
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from aiohttp import web

from mlpd.core.columns import DType
from mlpd.core.keys import encode_entity, online_keys
from mlpd.core.time import system_clock
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table
from mlpd.storage.writer import Writer


def read_handler(directory: Path) -> Any:
    """Return a handler that gets the rows of every view of each entity and packs their bytes."""
    environment = Environment.open(directory, clock=system_clock, readonly=True)
    with environment.snapshot() as snapshot:
        stored = snapshot.get(Table.DEFINITIONS, b"current")
    assert stored is not None
    state = msgpack.unpackb(stored)
    columns = {
        name: next(iter(entity["keys"])) for name, entity in state["document"]["entities"].items()
    }
    views = [
        (view_id, columns[state["document"]["views"][key.partition("@")[0]]["entity"]])
        for key, view_id in state["view_ids"].items()
        if key.partition("@")[0] != "tail_departures"  # which the service doesn't read
    ]

    async def read(request: web.Request) -> web.Response:
        rows = msgpack.unpackb(await request.read())["rows"]
        keys = [
            key
            for row in rows
            for view_id, column in views
            for key in online_keys([view_id], [entity_bytes(row[column])])
        ]
        with environment.snapshot() as snapshot:
            values = snapshot.get_many(Table.ONLINE, keys)
        sizes = [0 if value is None else len(value) for value in values]
        return web.Response(body=msgpack.packb(sizes), content_type="application/msgpack")

    return read


def predict_handler(model: Path) -> Any:
    """Return a handler that runs one vector."""
    import onnxruntime  # noqa: PLC0415 - only this server's

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.read_bytes(), options)

    async def predict(request: web.Request) -> web.Response:
        vector = np.array((await request.json())["vector"], np.float64).reshape(1, -1)
        raw = session.run(["raw_score"], {"features": vector})[0]
        return web.json_response({"score": float(raw[0, 0])})

    return predict


def ingest_handler(directory: Path) -> Any:
    """Return a handler that stores the body under the next key; durable when answered."""
    environment = Environment.open(directory, clock=system_clock)
    writer = Writer(environment)
    numbers = itertools.count()

    async def ingest(request: web.Request) -> web.Response:
        body, key = await request.read(), next(numbers).to_bytes(8, "big")
        await writer.write(lambda txn: txn.put(Table.LOG, key, body))
        return web.Response(body=b"\x01", content_type="application/msgpack")

    return ingest


HANDLERS = {"read": read_handler, "predict": predict_handler, "ingest": ingest_handler}


def entity_bytes(value: str) -> bytes:
    """Return the key bytes of an entity with one text key."""
    return encode_entity((DType.STRING,), (value,), "entity") or b""


async def _serve(handler: Any) -> web.Application:
    app = web.Application(client_max_size=64 << 20)
    app.router.add_post("/", handler)
    return app


def main() -> None:
    """Serve the handler named on the command line on a free port until SIGTERM."""
    import asyncio  # noqa: PLC0415
    import socket  # noqa: PLC0415

    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    handler = HANDLERS[sys.argv[1]](Path(sys.argv[2]))
    web.run_app(
        _serve(handler), sock=listener, print=None, access_log=None, loop=asyncio.new_event_loop()
    )


if __name__ == "__main__":
    main()
