"""The floors over HTTP: aiohttp handlers that do the I/O that ours must do, and nothing else.

    python -m bench.bare read LMDB_DIRECTORY      the same LMDB gets, and as many values answered
    python -m bench.bare predict MODEL_ONNX       vectors as JSON through the same session
    python -m bench.bare ingest DIRECTORY         the body's bytes into LMDB, same group commit

The port (a free one) is the first line of stdout.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from aiohttp import web

from bench.watch import watch_loop
from mlpd.core.closure import build_closure
from mlpd.core.columns import DType
from mlpd.core.document import parse_document
from mlpd.core.keys import encode_entity, online_keys
from mlpd.core.time import system_clock
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table
from mlpd.storage.writer import Writer

SERVICE = "flight_risk"


def read_handler(directory: Path) -> Any:
    """Return a handler that gets the rows of every view that the service reads.

    Like ours it gets each distinct entity once, and answers as many numbers as the service has
    features; it decodes nothing.
    """
    environment = Environment.open(directory, clock=system_clock, readonly=True)
    width, entities = _read_plan(environment)

    async def read(request: web.Request) -> web.Response:
        rows = msgpack.unpackb(await request.read())["entities"]
        keys: list[bytes] = []
        for column, view_ids in entities:
            distinct = dict.fromkeys(row[column] for row in rows)
            keys += online_keys(view_ids, [entity_bytes(value) for value in distinct])
        with environment.snapshot() as snapshot:
            values = snapshot.get_many(Table.ONLINE, keys)
        found = float(sum(len(value or b"") for value in values))
        body = msgpack.packb({"columns": [[found] * len(rows)] * width})
        return web.Response(body=body, content_type="application/msgpack")

    return read


def _read_plan(environment: Environment) -> tuple[int, list[tuple[str, list[int]]]]:
    """Return the number of features, and per key column the ids of the views it reads."""
    with environment.snapshot() as snapshot:
        stored = snapshot.get(Table.DEFINITIONS, b"current")
    assert stored is not None
    state = msgpack.unpackb(stored)
    definitions = parse_document(state["document"])
    service = definitions.service(SERVICE)
    ids = {key.partition("@")[0]: view_id for key, view_id in state["view_ids"].items()}
    entities: dict[str, list[int]] = {}
    for name in build_closure(definitions, service).view_features:
        (column,) = definitions.entities[definitions.view(name).entity].columns
        entities.setdefault(column, []).append(ids[name])
    return len(service.features) + len(service.request), list(entities.items())


def predict_handler(model: Path) -> Any:
    """Return a handler that runs vectors through the session that ours would make."""
    from mlpd.serving.graphs import build_inference  # noqa: PLC0415 - only this server's

    session = build_inference(model.read_bytes(), "the model")

    async def predict(request: web.Request) -> web.Response:
        vectors = np.array((await request.json())["vectors"], np.float64)
        raw = session.run(["raw_score"], {"features": vectors})[0]
        return web.json_response({"scores": raw[:, 0].tolist()})

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


async def alive(_: web.Request) -> web.Response:
    """Answer as the daemon's /healthz does."""
    return web.json_response({"alive": True})


@contextmanager
def bare(
    kind: str, argument: Path, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[str, int]]:
    """Run a bare server; yield its URL and process id."""
    command = [sys.executable, "-m", "bench.bare", kind, str(argument)]
    env = {**os.environ, **(environment or {})}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/", process.pid
        finally:
            process.terminate()


async def _serve(handler: Any) -> web.Application:
    app = web.Application(client_max_size=64 << 20)
    app.router.add_post("/", handler)
    app.router.add_get("/healthz", alive)
    watch_loop()
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
