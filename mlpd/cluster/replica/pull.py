"""Pulling: commits of the owner, one answer after the other, with the files that they name."""

import asyncio
import logging
from typing import Any

from mlpd.client import AsyncClient
from mlpd.client.retries import Retries
from mlpd.cluster.replica.files import fetch_file
from mlpd.core.errors import ConflictError, MisdirectedError, MlpdError, NotFoundError
from mlpd.core.shards import decode_map
from mlpd.daemon.app import Daemon
from mlpd.storage.tables import Head

PAUSE_S = 0.1
PAUSE_MAX_S = 1.0
"""Between two tries while the owner doesn't answer."""
ANSWER_S = 10.0
"""What an answer may take; a commit has at most some 100 MB."""

_log = logging.getLogger("mlpd.replica")


class HistoryGoneError(Exception):
    """The owner can't send what follows: the follower starts again from a backup."""


class Puller:
    """Lets a daemon follow; one per run.  `url`: the follower's own, as the map has it."""

    def __init__(self, daemon: Daemon, url: str) -> None:
        self._daemon = daemon
        self._own_url = url
        self._ticket: int | None = None
        self._lease_us = 0
        self._wait = False

    async def run(self) -> None:
        """Pull until the daemon follows no more; raises HistoryGoneError."""
        roles, tailing, pause_s = self._daemon.roles, self._daemon.tailing, PAUSE_S
        while roles.role.name == "follower":
            url = roles.role.url
            async with _client(url) as client:
                while (roles.role.name, roles.role.url) == ("follower", url):
                    try:
                        await self.turn(client)
                    except MlpdError as error:
                        await self._note(error)
                        await asyncio.sleep(pause_s)
                        pause_s = min(2 * pause_s, PAUSE_MAX_S)
                    else:
                        tailing.trouble, pause_s = None, PAUSE_S

    async def turn(self, client: AsyncClient) -> None:
        """Ask once, and apply what comes; raises MlpdError, HistoryGoneError."""
        tailing, roles = self._daemon.tailing, self._daemon.roles
        ticket = self._ticket if self._lease_us else None
        if ticket is not None:
            await roles.ask(self._lease_us)
        asked_s = tailing.now_s
        answer = await client.cluster.feed(
            tailing.head.text, follower=self._own_url, ticket=ticket, wait=self._wait
        )
        self._ticket, self._lease_us = answer["ticket"], answer["lease_us"]
        await self._apply(client, answer["commits"])
        newest = Head.parse(answer["head"])
        tailing.note(asked_s, newest)
        self._wait = tailing.head == newest
        if answer["epoch"] > self._daemon.ownership.epoch:
            found = await client.cluster.map()
            await asyncio.to_thread(self._daemon.ownership.adopt, decode_map(found["map"]))

    async def _apply(self, client: AsyncClient, data: bytes) -> None:
        if not data:
            return
        tailing = self._daemon.tailing
        commits = await asyncio.to_thread(tailing.decode, data)
        while missing := await asyncio.to_thread(tailing.missing, commits):
            for needed in missing:
                try:
                    await fetch_file(client, needed.path, needed.digest, self._daemon.paths.root)
                except NotFoundError:  # replaced since: only a backup has what is there now
                    raise HistoryGoneError(needed.path) from None
        await tailing.apply(commits, len(data))

    async def _note(self, error: MlpdError) -> None:
        """Say what keeps it from coming on; go to the owner that a former one names."""
        if error.code in ("feed_gone", "feed_damaged"):
            raise HistoryGoneError(error.message) from None
        tailing, roles = self._daemon.tailing, self._daemon.roles
        if tailing.trouble is None:
            _log.warning("this follower stands still: %s", error.message)
        tailing.trouble = error.message
        url = _named(error)
        if url and url not in (roles.role.url, self._own_url) and roles.role.name == "follower":
            await roles.follow(url)


def _named(error: MlpdError) -> str | None:
    """Return the URL of the owner that a daemon names which isn't it."""
    is_other = isinstance(error, MisdirectedError) or (
        isinstance(error, ConflictError) and error.code == "wrong_role"
    )
    found: Any = error.details.get("url") if is_other else None
    return found if isinstance(found, str) else None


def _client(url: str) -> AsyncClient:
    never = Retries(lambda: 1e9)  # the loop above is the retry
    return AsyncClient(url, timeout_s=ANSWER_S, by="mlpd follower", retries=never)
