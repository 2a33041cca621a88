"""Asks /healthz of a server 200 times a second and prints the waits, ascending, as JSON.

    python -m bench.health URL SECONDS

A wait counts from the moment that the request was due: moments that pass while an answer is
awaited are asked after it, as late as they are.
"""

import asyncio
import json
import sys
import time
from urllib.parse import urlsplit

from bench.load import connect

PERIOD_S = 0.005


async def sample(url: str, seconds: float) -> list[float]:
    """Return the waits of `seconds`, in milliseconds, ascending."""
    request = f"GET /healthz HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n\r\n".encode()
    connection = await connect(url)
    waits, started = [], time.perf_counter()
    for number in range(int(seconds / PERIOD_S)):
        due = started + number * PERIOD_S
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        await connection.ask(request)
        waits.append(1e3 * (time.perf_counter() - due))
    connection.close()
    return sorted(waits)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(sample(sys.argv[1], float(sys.argv[2])))))
