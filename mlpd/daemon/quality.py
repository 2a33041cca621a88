"""Verb quality: what is wrong with data, by source at ingest and by feature where it is served."""

from typing import Any

from mlpd.core.time import format_time
from mlpd.daemon.ingest import Ingest
from mlpd.daemon.served_looks import ServedLook
from mlpd.daemon.state import CatalogState
from mlpd.monitoring.drift import ColumnDrift


class Quality:
    """Reads what ingest counted and what the last look at models measured; on the loop."""

    def __init__(self, ingest: Ingest, look: ServedLook, state: CatalogState) -> None:
        self._ingest = ingest
        self._look = look
        self._state = state

    def describe(self) -> dict[str, Any]:
        """Return rates since the start of each source, and of the last window of each feature.

        Beside each rate of a feature is that of training and the threshold of its alert.
        """
        window = self._look.window
        return {
            "sources": [
                self._source(name) for name in sorted(self._state.catalog.definitions.sources)
            ],
            "window": None if window is None else [format_time(at) for at in window],
            "features": [
                {"model": model, "version": version, **self._feature(column)}
                for (model, version), report in self._look.last.items()
                for column in report.features
            ],
        }

    def _source(self, name: str) -> dict[str, Any]:
        ingest = self._ingest
        accepted = ingest.rows_by_source.get(name, 0)
        rejected = ingest.rejected_by_source.get(name, 0)
        rows = accepted + rejected
        return {
            "source": name,
            "rows": rows,
            "rejected": rejected,
            "rejected_share": rejected / rows if rows else None,
            "clamped": ingest.clamped_by_source.get(name, 0),
            **ingest.violations.describe(name),
        }

    def _feature(self, column: ColumnDrift) -> dict[str, Any]:
        problems = {
            problem: {"share": share, "training": usual, "threshold": threshold}
            for problem, share, usual, threshold in self._look.problems(column)
        }
        return {"feature": column.name, "problems": problems}
