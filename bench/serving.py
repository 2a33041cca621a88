"""Scenarios of the request paths, each over HTTP against a bare server that does the same I/O."""

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack

from bench.bare import bare
from bench.load import Target, compare
from bench.options import Options
from bench.turns import Case
from bench.world import JOB, ROUTE, SERVICE, World, build_requests, open_world
from mlpd.core.time import SECOND_US, system_clock
from mlpd.registry.manifest import MODEL_FILE
from mlpd.registry.referrers import TITLE

FLIGHTS = 60_000
VECTORS = 1_000
JSON = "application/json"
DATA = "data"
INGEST_SIZES = ((1, 64), (100, 64), (1_000, 4), (10_000, 1))
"""Rows to a request, and writers."""
PREDICT_SIZES = ((1, 1), (1, 16), (4, 16), (20, 16))
"""Rows to a request, and requests at once."""


def read(options: Options) -> dict[str, Case]:
    """Online read of the flights service, against the same LMDB gets and no decoding.

    The 1,000 rows come again and again and no events between them, so ours finds its entities
    resident (docs/paths/read.md), as the bare handler finds its pages in the processor's caches;
    `growth` draws from more entities than stay.
    """
    found: dict[str, Case] = {}
    with tempfile.TemporaryDirectory() as folder, open_world(Path(folder) / DATA, FLIGHTS) as world:
        rows = build_requests(1_000)
        with bare("read", Path(folder) / DATA / "lmdb") as (url, _):
            for entities in (1, 100):
                parts = _parts(rows, entities)
                bodies = [msgpack.packb({"service": SERVICE, "entities": part}) for part in parts]
                for concurrency in (1, 16):
                    found[f"{entities} entities, {concurrency} concurrent"] = compare(
                        Target(f"{world.daemon.url}/v1/features/read", bodies),
                        Target(url, bodies),
                        concurrency=concurrency,
                        seconds=options.seconds,
                        rounds=options.rounds,
                    )
    return found


def model_file(data: Path) -> Path:
    """Return where the ONNX file of a data directory's first version is: in its registry."""
    registry = data / "registry"
    first = json.loads((registry / "index.json").read_bytes())["manifests"][0]

    def blob(descriptor: Mapping[str, str]) -> Path:
        return registry / "blobs" / descriptor["digest"].replace(":", "/")

    layers = json.loads(blob(first).read_bytes())["layers"]
    return next(blob(each) for each in layers if each["annotations"][TITLE] == MODEL_FILE)


def predict(options: Options) -> dict[str, Case]:
    """Predict rows by entity key, and one by vector, against the bare session on the vectors.

    By key: features looked up, predictions logged and counted.  By vector: the Open Inference
    Protocol, validation, statistics and metrics on; its ratio is the overhead of the server.
    """
    found: dict[str, Case] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        open_world(Path(folder) / DATA, FLIGHTS, model=True) as world,
    ):
        rows = build_requests(VECTORS)
        vectors = read_vectors(world, rows)
        model = model_file(Path(folder) / DATA)
        with bare("predict", model) as (url, _):

            def measure(ours: Target, size: int, concurrency: int) -> Case:
                least = [json.dumps({"vectors": part}).encode() for part in _parts(vectors, size)]
                return compare(
                    ours,
                    Target(url, least, JSON),
                    concurrency=concurrency,
                    seconds=options.seconds,
                    rounds=options.rounds,
                    rows_per_request=size,
                    features=len(vectors[0]),
                )

            for size, concurrency in PREDICT_SIZES:
                bodies = [json.dumps({"rows": part}).encode() for part in _parts(rows, size)]
                by_key = Target(f"{world.daemon.url}/v1/predict/{ROUTE}", bodies, JSON)
                name = f"by key, {size} rows, {concurrency} concurrent"
                found[name] = measure(by_key, size, concurrency)
            bodies = [json.dumps(_tensor(vector)).encode() for vector in vectors]
            by_vector = Target(f"{world.daemon.url}/v2/models/{JOB}/infer", bodies, JSON)
            for concurrency in (1, 16):
                name = f"by vector, 1 rows, {concurrency} concurrent"
                found[name] = measure(by_vector, 1, concurrency)
    return found


def ingest(options: Options) -> dict[str, Case]:
    """Durable ingest of departures into four window views, against their bytes into LMDB."""
    found: dict[str, Case] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory() as other,
        open_world(Path(folder) / DATA, FLIGHTS) as world,
        bare("ingest", Path(other)) as (url, _),
    ):
        for size, writers in INGEST_SIZES:
            bodies = departures(size, requests=20)
            case = compare(
                Target(f"{world.daemon.url}/v1/events/departures", bodies),
                Target(url, bodies),
                concurrency=writers,
                seconds=options.seconds,
                rounds=options.rounds,
                rows_per_request=size,
            )
            for side in ("ours", "against"):
                rates = case[side]["requests_per_s"]
                case[side]["rows_per_s"] = {name: rates[name] * size for name in rates}
            found[f"{size} rows, {writers} writers"] = case
    return found


def read_vectors(world: World, rows: list[dict[str, Any]]) -> list[list[float | None]]:
    """Return the vectors that the route serves for `rows`; None is missing."""
    answer = world.client.predict(ROUTE, rows, include=["vector"])
    vectors = [prediction["vector"] or [] for prediction in answer["predictions"]]
    return [[None if x is None or math.isnan(x) else x for x in vector] for vector in vectors]


def departures(size: int, *, requests: int) -> list[bytes]:
    """Return bodies of `size` departures each, a minute old."""
    now_us, rows = system_clock() - 60 * SECOND_US, build_requests(size * requests)
    return [_events(part, now_us) for part in _parts(rows, size)]


def _parts(rows: list[Any], size: int) -> list[list[Any]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _events(rows: list[dict[str, Any]], now_us: int) -> bytes:
    keys = ("carrier", "origin", "dest", "tailnum")
    columns: dict[str, list[Any]] = {key: [row[key] for row in rows] for key in keys}
    columns["event_time"] = [now_us] * len(rows)
    columns["dep_delay"] = [row["distance"] % 90 for row in rows]
    packed: bytes = msgpack.packb({"columns": columns})
    return packed


def _tensor(vector: list[float | None]) -> dict[str, Any]:
    tensor = {"name": "features", "datatype": "FP64", "shape": [1, len(vector)], "data": vector}
    return {"inputs": [tensor]}
