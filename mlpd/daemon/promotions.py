"""Verb promote: versions that run as shadows become champions, or not, once enough rows are scored.

What waits is told by the stored runs, and what has been done by the history of aliases: a kill
anywhere leaves a version that waits, or one whose run is concluded at the next look.
"""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from mlpd.core.deploys import SHADOW, canary_share
from mlpd.core.errors import ConflictError
from mlpd.daemon.publish import Publisher
from mlpd.daemon.routes import Routes
from mlpd.daemon.runs import Runs
from mlpd.registry.records import CHALLENGER, CHAMPION, Alias
from mlpd.serving.paired import PairedDifference
from mlpd.serving.shadow import ShadowRunner
from mlpd.training.gates import Report, close_report, judge_shadow, shadow_rows
from mlpd.training.runs import Run

LOOK_S = 5.0

_log = logging.getLogger("mlpd.runs")


class Promotions:
    """Looks at what waits for its shadow; every method belongs to the loop."""

    def __init__(
        self, runs: Runs, publisher: Publisher, routes: Routes, shadows: ShadowRunner
    ) -> None:
        self._runs = runs
        self._routes = routes
        self._publisher = publisher
        self._shadows = shadows
        self._champions: dict[str, Alias] = {}
        """By run that waits: the champion at the last look."""

    async def run_forever(self) -> None:
        """Look every few seconds; what fails, such as a write on a full disk, is tried again."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look()
            except Exception:  # noqa: BLE001 - the next look tries again
                _log.exception("versions that wait for their shadows could not be looked at")

    async def look(self) -> None:
        """Conclude each run whose version's shadow has scored enough rows, or waits in vain.

        One whose version passes and is to be a canary gets that.
        """
        undecided = await asyncio.to_thread(self._runs.undecided)
        waiting = {run.run_id for run in undecided}
        self._champions = {k: v for k, v in self._champions.items() if k in waiting}
        for run in undecided:
            assert run.result is not None, run
            if run.awaits_canary:
                await self._runs.conclude(run.run_id, await self._begin_canary(run, run.result))
                continue
            ended = await self._judge(run, run.result)
            if ended is not None:
                report, deployed = ended
                result = {**run.result, "gate": report, "deployed": deployed}
                await self._runs.conclude(run.run_id, result)

    async def _begin_canary(self, run: Run, result: Mapping[str, Any]) -> dict[str, Any]:
        """Give the version its share of the champion's routes; return the result with `routes`."""
        model, share = result["model"], canary_share(run.deploy)
        if share is None or self._publisher.alias(model, CHALLENGER) != result["version"]:
            return {**result, "deployed": "none", "routes": []}
        routes = await self._routes.begin_canaries(model, share, by=f"run {run.run_id}")
        return {**result, "deployed": run.deploy if routes else SHADOW, "routes": routes}

    async def _judge(self, run: Run, result: Mapping[str, Any]) -> tuple[Report, str] | None:
        """Return the last report and what is deployed; None while it has to wait."""
        model, report = result["model"], result["gate"]
        if done := self._publisher.moved(run, model, CHAMPION):
            return done, "champion"
        if self._publisher.alias(model, CHALLENGER) != result["version"]:
            return close_report(report, "another version is the challenger by now"), "none"
        alias = self._publisher.find_alias(model, CHAMPION)
        champion = None if alias is None else alias.version
        if alias is None or champion is None:
            return close_report(report, "there is no champion any more"), "shadow"
        pair = f"{model}@{champion}", f"{model}@{result['version']}"
        if self._champions.setdefault(run.run_id, alias) != alias:
            self._champions[run.run_id] = alias
            self._shadows.forget(*pair)  # of a champion that came back there may be some
        paired = self._paired(*pair)
        if paired.n < (shadow_rows(report) or 0):
            return None
        # One look, at the first moment with enough rows: the intervals are for one.
        judged = judge_shadow(report, paired.summary())
        if not judged["passed"] or run.deploy != CHAMPION:
            return judged, "shadow"
        return await self._promote(run, result, judged, champion)

    async def _promote(
        self, run: Run, result: Mapping[str, Any], judged: Report, champion: int
    ) -> tuple[Report, str] | None:
        model, number = result["model"], result["version"]
        try:
            await self._publisher.promote(run, model, number, judged, over=champion)
        except ConflictError as error:
            if error.code == "alias_moved":  # meanwhile: it is compared with the new champion
                return None
            return close_report(judged, error.message), "shadow"
        return judged, "champion"

    def _paired(self, champion: str, shadow: str) -> PairedDifference:
        """Return the differences on all routes where the one is primary, the other its shadow."""
        found = PairedDifference()
        for pair, difference in self._shadows.statistics().items():
            if (pair.primary, pair.shadow) == (champion, shadow):
                found.merge(difference)
        return found
