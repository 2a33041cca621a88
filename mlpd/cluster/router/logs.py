"""The prediction log over shards: one page of all of them, in the order in which rows were logged.

A position is the time at which its rows were logged and the key of their list, so positions of all
shards are of one order, and the one at which a page ends is where the next begins on each of them.
"""

import asyncio
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiohttp import web

from mlpd.client import requests as r
from mlpd.cluster.router.everywhere import whole
from mlpd.cluster.router.members import Members
from mlpd.cluster.router.upstream import Until
from mlpd.core.media import ARROW
from mlpd.daemon.prediction_files import ARROW_ROWS, PAGE_ROWS, check_page
from mlpd.daemon.served_frames import POSITION, plain_columns
from mlpd.http.predict import LOG_OPTIONS
from mlpd.http.wire import read_deadline, respond

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True, slots=True)
class _Page:
    """A page in the form that was asked for, and its rows."""

    data: bytes
    columns: dict[str, Any]
    position: str


class LogHandlers:
    """Gives out the prediction log; one per router."""

    def __init__(self, members: Members) -> None:
        self._members = members

    async def predictions(self, request: web.Request) -> web.Response:
        """Return served rows of all shards, page by page, with the vectors served.

        Each shard is asked for its share of a page; it ends where one of them may have more.
        """
        options = LOG_OPTIONS.read_query(request.query)
        arrow = ARROW in request.headers.get("Accept", "")
        limit, after = options["limit"], options["after"] or ""
        limit = (ARROW_ROWS if arrow else PAGE_ROWS) if limit is None else limit
        check_page(limit, after, arrow=arrow)
        share = -(-limit // len(self._members.shards()))
        query = {**options, "limit": share, "after": after or None}
        asked = r.Request("GET", r.build_path(("v1", "predictions"), query), accept=ARROW)
        until = Until.after(r.LONG_S, read_deadline(request))
        found = await self._members.fetch_all(asked, until)
        bodies = [answer.body for answer in whole(found, "the prediction log").values()]
        page = await asyncio.to_thread(_merge, bodies, share, limit, after, arrow=arrow)
        if arrow:
            return web.Response(body=page.data, content_type=ARROW)
        answer = {"columns": page.columns, "position": page.position}
        return await respond(request, answer, large=True)


def _merge(bodies: Sequence[bytes], share: int, limit: int, after: str, *, arrow: bool) -> _Page:
    import polars as pl  # noqa: PLC0415 - takes 0.1 s, and few ask for pages

    frame = merge_pages([pl.read_ipc_stream(body) for body in bodies], share, limit)
    position = frame[POSITION][-1].hex() if len(frame) else after
    if not arrow:
        return _Page(b"", plain_columns(frame), position)
    buffer = io.BytesIO()
    frame.write_ipc_stream(buffer)
    return _Page(buffer.getvalue(), {}, position)


def merge_pages(frames: "Sequence[pl.DataFrame]", share: int, limit: int) -> "pl.DataFrame":
    """Return the first rows of all pages in the order of their positions.

    A page with `share` rows or more may not be its shard's last, so nothing behind its end counts
    yet.  About `limit` rows; those of one position stay together.
    """
    import polars as pl  # noqa: PLC0415 - as above

    ends = [frame[POSITION][-1] for frame in frames if len(frame) >= share]
    merged = pl.concat(frames).sort(POSITION, maintain_order=True)
    if len(merged) > limit:
        ends.append(merged[POSITION][limit - 1])
    return merged.filter(pl.col(POSITION) <= min(ends)) if ends else merged
