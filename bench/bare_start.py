"""The floor of a start: the libraries that a daemon can't do without, and a server that is ready.

python -m bench.bare_start PORT
"""

import sys

import lmdb
import msgpack
import numpy as np
import onnxruntime
from aiohttp import web

LIBRARIES = (lmdb, msgpack, np, onnxruntime)


async def ready(_: web.Request) -> web.Response:
    """Answer as the daemon's /readyz does."""
    return web.json_response({"ready": True})


if __name__ == "__main__":
    app = web.Application()
    app.router.add_get("/readyz", ready)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None, access_log=None)
