"""The scenario of metrics measures the same work on both sides."""

import pytest

from bench import metrics as scenario
from bench.options import Options


def test_both_sides_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prometheus_client")
    monkeypatch.setattr(scenario, "OBSERVATIONS", 100)
    monkeypatch.setattr(scenario, "REPEATS", 1)
    found = scenario.metrics(Options(rounds=1))
    assert set(found) == {"histogram", "counter", "scrape"}
    assert found["scrape"]["notes"]["series"] >= 10_000
    for case in found.values():
        assert case["ours"][case["measure"]]["median"] > 0
        assert case["against"][case["measure"]]["median"] > 0
