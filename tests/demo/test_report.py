import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from mlpd.cli.demo.findings import Findings, Observed, Trained
from mlpd.cli.demo.pictures import draw_report
from mlpd.cli.demo.replay import Totals
from mlpd.cli.demo.report import print_report, save_report
from mlpd.cli.demo.steps import Backfill


def cohort(period: str, arm: str, auc: float | None) -> dict[str, Any]:
    bins = [{"rows": 10, "score_mean": 0.1, "positive_share": 0.2}]
    empty = {"rows": 0, "score_mean": None, "positive_share": None}
    scores = {"auc": auc, "log_loss": 0.3, "brier": 0.1, "calibration_error": 0.01}
    return {
        "period": period,
        "arm": arm,
        "version": 1,
        "predictions": 12,
        "labelled": 10,
        "performance": {**scores, "calibration": [*bins, empty]},
    }


def trained(version: int, auc: float) -> dict[str, Any]:
    return {
        "model": "flight-risk",
        "version": version,
        "metrics": {"auc": auc, "log_loss": 0.3, "brier": 0.1},
        "parity": {"rows": 100, "bit_equal": 100},
    }


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    """What --months 1 finds: no shadow, no experiment, one model less."""
    return Findings(
        imported=Backfill(1000, 0.5),
        replayed=Totals(ticks=10, events=20, predictions=30, labels=25),
        replay_s=2.0,
        trained=Trained(trained(1, 0.8), trained(1, 0.6)),
        observed=Observed(
            [cohort("2013-10", "champion", 0.75)],
            [{"start": "2013-10-01T00:00:00Z", "rows": 12, "drifted": ["a", "b", "c", "d"]}],
            None,
            None,
        ),
        audit={"rows_compared": 30, "values_compared": 1320, "mismatches": 0},
        latency_ms=[float(i) for i in range(1, 101)],
        duration_s=12.34,
        memory_bytes=0,
        data_dir=str(tmp_path),
        url="http://127.0.0.1:1",
    )


def test_object_sums_import_and_replay(findings: Findings) -> None:
    found = findings.to_dict()
    assert found["events_ingested"] == 1020
    assert found["events_per_s"] == 2000
    assert found["predictions_per_s"] == 15
    assert (found["predict_p50_ms"], found["predict_p99_ms"]) == (51.0, 100.0)
    assert found["live_auc"] == {"2013-10": {"champion": 0.75}}
    assert found["drift"] == {"2013-10-01": ["a", "b", "c", "d"]}


def test_parity_counts_every_trained_model(findings: Findings) -> None:
    three = replace(findings, trained=replace(findings.trained, challenger=trained(2, 0.8)))
    assert three.to_dict()["parity"] == {"rows": 300, "bit_equal": 300}


def test_what_was_not_replayed_is_null_and_said(
    findings: Findings, capsys: pytest.CaptureFixture[str]
) -> None:
    found = findings.to_dict()
    assert found["shadow"] is found["experiment"] is None
    print_report(findings)
    shown = capsys.readouterr().out
    assert "No shadow: it runs in November" in shown
    assert "No experiment: it runs in December" in shown
    assert "a, b, c and 1 more" in shown


def test_saved_object_is_what_json_prints(findings: Findings) -> None:
    picture = save_report(findings)
    assert json.loads((picture.parent / "report.json").read_text()) == findings.to_dict()


def test_picture_escapes_names_and_leaves_out_what_has_no_auc() -> None:
    cohorts = [cohort("2013-10", "<arm>", 0.7), cohort("2013-11", "champion", None)]
    drift = {"2013-10-01": ["a&b", "c"], "2013-10-08": ["c"]}
    text = draw_report(cohorts, {"offline": 0.8}, drift)
    root = ET.fromstring(text)
    words = [node.text for node in root.iter() if node.tag.endswith("}text")]
    assert "<arm>" in words
    assert "0.700" in words
    assert "offline 0.800" in words
    assert words.index("c") < words.index("a&b")  # drifted in more weeks
    assert "<script" not in text
