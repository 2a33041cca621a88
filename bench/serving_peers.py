"""Scenario serving: the same model behind mlpd and behind MLServer, LitServe, BentoML, PyTriton."""

import http.client
import json
import math
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import copy
from typing import Any
from urllib.parse import urlsplit

from bench.load import Target, compare
from bench.options import Options, SkippedError
from bench.peers import FOLDER, python_of
from bench.serving import model_file, read_vectors
from bench.turns import Case
from bench.world import JOB, ROUTE, World, build_requests, open_world

FLIGHTS, VECTORS, CONCURRENCY = 20_000, 200, 16
JSON = "application/json"
START_S, STOP_S = 90.0, 10.0
PATIENT = {"predict": "30s"}
"""So that a machine with other work refuses nothing: peers have no such limit."""
Vector = list[float]
_OK = 200


@dataclass(frozen=True, slots=True)
class Peer:
    """How a server of another project is started, asked and understood.

    `command` gets its environment's folder of programs, the model, the width of a vector, a free
    port and a folder of its own, and returns the command line.  `score` finds it in an answer.
    """

    name: str
    package: str
    path: str
    command: Callable[[Path, Path, int, int, Path], list[str]]
    body: Callable[[Vector], Any]
    score: Callable[[Any], float]


def serving(options: Options) -> dict[str, Case]:
    """Predict one row, 16 concurrent, by entity key and by vector, against peers by vector.

    Ours by key looks features up, validates, logs and counts; theirs only runs the session.  One
    process each (and what it starts for itself), one thread in the session, JSON both ways.
    Missing features are sent as 0: not every peer takes NaN.
    """
    found: dict[str, Case] = {}
    missing: list[str] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        open_world(Path(folder) / "data", FLIGHTS, model=True, limits=PATIENT) as world,
    ):
        rows = build_requests(VECTORS)
        vectors = [[0.0 if x is None else x for x in v] for v in read_vectors(world, rows)]
        model = model_file(Path(folder) / "data")
        for peer in PEERS:
            try:
                python = python_of(peer.package, options.peers)
            except SkippedError as error:
                missing.append(str(error))
                continue
            own = Path(folder) / peer.name
            own.mkdir()
            with _serve(peer, python, model, len(vectors[0]), own) as url:
                found |= _measure(world, peer, url, rows, vectors, options)
    if not found:
        raise SkippedError("; ".join(missing))
    return found


def _measure(
    world: World,
    peer: Peer,
    url: str,
    rows: list[dict[str, Any]],
    vectors: list[Vector],
    options: Options,
) -> dict[str, Case]:
    daemon = world.daemon.url
    theirs = _target(url + peer.path, [peer.body(vector) for vector in vectors])
    by_vector = _target(f"{daemon}/v2/models/{JOB}/infer", [_tensor(v) for v in vectors])
    by_key = _target(f"{daemon}/v1/predict/{ROUTE}", [{"rows": [row]} for row in rows])
    check_same(peer.score(_ask(theirs)), _score(_ask(by_vector)))
    return {
        f"{peer.name}, {how}": compare(
            ours,
            theirs,
            concurrency=CONCURRENCY,
            seconds=options.seconds,
            rounds=options.rounds,
            features=len(vectors[0]),
        )
        for how, ours in (("ours by key", by_key), ("ours by vector", by_vector))
    }


def check_same(theirs: float, ours: float) -> None:
    """Raise RuntimeError unless both servers give the first vector the same score."""
    if not math.isclose(theirs, ours, rel_tol=1e-12):
        raise RuntimeError(f"the peer gives {theirs!r}, mlpd {ours!r}")


def _tensor(vector: Vector) -> dict[str, Any]:
    tensor = {"name": "features", "datatype": "FP64", "shape": [1, len(vector)], "data": vector}
    return {"inputs": [tensor]}


def _score(answer: Any) -> float:
    return float(answer["outputs"][0]["data"][0])


def _mlserver(bin_: Path, model: Path, _: int, port: int, own: Path) -> list[str]:
    copy(FOLDER / "mlserver_model.py", own)
    settings = {"http_port": port, "grpc_port": port + 1, "metrics_port": port + 2}
    quiet = {"host": "127.0.0.1", "parallel_workers": 0, "debug": False}
    (own / "settings.json").write_text(json.dumps({**settings, **quiet}))
    runtime = {"name": "bench", "implementation": "mlserver_model.Scorer"}
    parameters = {"parameters": {"uri": str(model)}}
    (own / "model-settings.json").write_text(json.dumps({**runtime, **parameters}))
    return [str(bin_ / "mlserver"), "start", str(own)]


def _litserve(bin_: Path, model: Path, _: int, port: int, __: Path) -> list[str]:
    return [str(bin_ / "python"), str(FOLDER / "litserve_serve.py"), str(model), str(port)]


def _bentoml(bin_: Path, _: Path, __: int, port: int, ___: Path) -> list[str]:
    command = [str(bin_ / "bentoml"), "serve", "bentoml_service:Scorer", "--port", str(port)]
    return [*command, "--host", "127.0.0.1", "--working-dir", str(FOLDER)]


def _pytriton(bin_: Path, model: Path, width: int, port: int, _: Path) -> list[str]:
    script = str(FOLDER / "pytriton_serve.py")
    return [str(bin_ / "python"), script, str(model), str(width), str(port)]


PEERS = (
    Peer("mlserver", "mlserver", "/v2/models/bench/infer", _mlserver, _tensor, _score),
    Peer(
        *("litserve", "litserve", "/predict", _litserve),
        lambda vector: {"vector": vector},
        lambda answer: float(answer["score"]),
    ),
    Peer("bentoml", "bentoml", "/score", _bentoml, lambda vector: {"vector": vector}, float),
    Peer("pytriton", "nvidia-pytriton", "/v2/models/bench/infer", _pytriton, _tensor, _score),
)


@contextmanager
def _serve(peer: Peer, python: Path, model: Path, width: int, own: Path) -> Iterator[str]:
    """Run a peer until the block ends; yields its URL once it answers."""
    port = _free_port()
    environment = {
        "PYTHONPATH": "",
        "BENCH_MODEL": str(model),
        "BENTOML_DO_NOT_TRACK": "True",
        "PATH": f"{python.parent}:{os.environ['PATH']}",
    }
    command = peer.command(python.parent, model, width, port, own)
    log = own / "server.log"
    with log.open("wb") as out, _group(command, out.fileno(), environment) as process:
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}{peer.path}", peer.body([0.0] * width), process, log)
        yield url


@contextmanager
def _group(
    command: list[str], out: int, environment: Mapping[str, str]
) -> "Iterator[subprocess.Popen[bytes]]":
    """Run a server with all that it starts for itself, until the block ends."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=out,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.terminate()  # so that it ends its workers, wherever they are
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(url: str, body: Any, process: "subprocess.Popen[bytes]", log: Path) -> None:
    stop = time.monotonic() + START_S
    while time.monotonic() < stop and process.poll() is None:
        try:
            _ask(_target(url, [body]))
        except (OSError, http.client.HTTPException, ValueError):
            time.sleep(0.2)
        else:
            return
    raise RuntimeError(f"{log.parent.name} does not answer: {log.read_text()[-2000:]}")


def _target(url: str, bodies: list[Any]) -> Target:
    return Target(url, [json.dumps(body).encode() for body in bodies], JSON)


def _ask(target: Target) -> Any:
    parts = urlsplit(target.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30.0)
    headers: Mapping[str, str] = {"Content-Type": JSON, "Accept": JSON}
    try:
        connection.request("POST", parts.path, target.bodies[0], headers)
        response = connection.getresponse()
        body = response.read()
        if response.status != _OK:
            raise ValueError(f"{response.status}: {body[:200]!r}")
        return json.loads(body)
    finally:
        connection.close()


def _free_port() -> int:
    """Return a port that is free, with two after it."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port: int = first.getsockname()[1]
            try:
                for other in (port + 1, port + 2):
                    socket.create_server(("127.0.0.1", other)).close()
            except OSError:
                continue
            return port
