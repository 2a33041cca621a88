"""Canaries at work: every second each is looked at, and its route moved on, or back."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from mlpd.daemon.route_store import RouteStore
from mlpd.daemon.routes import Routes
from mlpd.daemon.trials import show_trial

LOOK_S = 1.0
KEEP_LOOKS = 10
"""Looks between two writes of how far trials have come: what a kill makes them forget."""

_log = logging.getLogger("mlpd.canaries")


class Canaries:
    """Drives the canaries of all routes, where `decides` says so; lives on the loop."""

    def __init__(self, routes: Routes, store: RouteStore, decides: Callable[[], bool]) -> None:
        self._routes = routes
        self._store = store
        self._decides = decides
        self._failing: dict[str, str] = {}

    async def run_forever(self) -> None:
        """Look every second; what fails, such as a write on a full disk, is tried again."""
        looks, last_s = 0, time.monotonic()
        while True:
            await asyncio.sleep(LOOK_S)
            now_s, looks = time.monotonic(), looks + 1
            try:
                await self.look(round((now_s - last_s) * 1e6))
                if looks % KEEP_LOOKS == 0:
                    await self.keep()
            except Exception:  # noqa: BLE001 - the routes stay as they are; the next look tries
                _log.exception("canaries could not be moved")
            last_s = now_s

    async def look(self, passed_us: int) -> None:
        """Let so much time pass, and do what every canary asks for then.

        One that can't be moved stays at its step for the next look, and holds up no other.
        """
        self._routes.trials.pass_time(passed_us)
        if not self._decides():
            return
        failing: dict[str, str] = {}
        for name in self._routes.trials.running():
            try:
                await self._routes.follow_canary(name)
            except Exception as error:  # noqa: BLE001 - the others go on, whatever it is
                failing[name] = why = f"{type(error).__name__}: {error}"
                if self._failing.get(name) != why:  # once, not every second
                    _log.error("the canary of route %s can't be moved", name, exc_info=error)
        self._failing = failing

    @property
    def ended(self) -> dict[str, int]:
        """How many have ended since the start, by their state."""
        return dict(self._routes.trials.ended)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return the running canaries by route, as their routes show them."""
        trials = self._routes.trials
        found = {name: trials.get(name) for name in trials.running()}
        return {name: show_trial(trial) for name, trial in found.items() if trial is not None}

    async def keep(self) -> None:
        """Store how far the running ones have come."""
        if changed := self._routes.trials.take_changed():
            await self._store.keep(changed)
