"""The demo itself, end to end, on a slice: a few days of each month after a month of history."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner

from mlpd.cli.demo.demo import Scope, run_demo
from mlpd.cli.demo.findings import Findings
from mlpd.cli.demo.flights import data_folder
from mlpd.cli.demo.process import claim_directory, running_daemon
from mlpd.cli.demo.report import print_report, save_report
from mlpd.cli.demo.timeline import month_us
from mlpd.cli.main import main
from mlpd.core.errors import ConflictError, UnavailableError
from mlpd.storage.files import DataDirectory
from mlpd.storage.lock import read_holder

KEYS = (
    *("events_ingested", "events_per_s", "predictions", "predictions_per_s", "predict_p50_ms"),
    *("predict_p99_ms", "offline_auc", "ablation_auc", "live_auc", "consistency", "parity"),
    *("shadow", "experiment", "drift", "duration_s", "data_dir", "url"),
)
SLICE = Scope(months=3, days=1, history_us=month_us(9), latency_requests=50)


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    try:
        data_folder()
    except UnavailableError as error:
        pytest.skip(f"{error.message}: {error.hint}")
    directory = tmp_path_factory.mktemp("demo") / "data"
    with running_daemon(directory, 0) as daemon:
        found = run_demo(daemon, SLICE, time.monotonic())
        with pytest.raises(ConflictError) as caught:
            claim_directory(directory)
        assert str(daemon.pid) in caught.value.hint
        daemon.stop()
    save_report(found)
    return found


pytestmark = pytest.mark.timeout(240)


def test_json_object_has_the_keys_of_the_main_job(findings: Findings) -> None:
    assert tuple(findings.to_dict()) == KEYS
    json.dumps(findings.to_dict(), allow_nan=False)


def test_every_prediction_is_recomputed_from_the_log_bit_for_bit(findings: Findings) -> None:
    found = findings.to_dict()
    assert found["consistency"]["rows_compared"] == found["predictions"] + SLICE.latency_requests
    assert found["consistency"]["values_compared"] > 25 * found["predictions"]
    assert found["consistency"]["mismatches"] == 0
    assert findings.audit["unavailable"] == 0


def test_served_scores_are_bit_equal_to_the_trainers(findings: Findings) -> None:
    parity = findings.to_dict()["parity"]
    assert parity["bit_equal"] == parity["rows"] >= 20_000


def test_features_are_worth_more_than_the_request_alone(findings: Findings) -> None:
    found = findings.to_dict()
    assert found["offline_auc"] > found["ablation_auc"] + 0.03


def test_live_auc_is_told_for_every_month_and_arm(findings: Findings) -> None:
    live = findings.to_dict()["live_auc"]
    assert {month: set(arms) for month, arms in live.items()} == {
        "2013-10": {"champion"},
        "2013-11": {"champion"},
        "2013-12": {"champion", "challenger"},
    }
    assert all(0.5 < auc <= 1 for arms in live.values() for auc in arms.values())


def test_shadow_scored_all_of_november_beside_the_champion(findings: Findings) -> None:
    shadow = findings.to_dict()["shadow"]
    november = [c for c in findings.observed.cohorts if c["period"] == "2013-11"]
    assert shadow["rows"] == sum(cohort["predictions"] for cohort in november)
    assert shadow["primary"] != shadow["shadow"]


def test_experiment_splits_december_by_aircraft(findings: Findings) -> None:
    experiment = findings.to_dict()["experiment"]
    assert set(experiment["lift"]) == {"correct", "squared_error"}
    assert experiment["units"] > 100
    assert experiment["srm"]["alarm"] is False


def test_drift_is_told_by_week(findings: Findings) -> None:
    drift = findings.to_dict()["drift"]
    assert "2013-10-01" in drift
    assert all(re.fullmatch(r"2013-\d\d-\d\d", week) for week in drift)


def test_report_shows_tables_and_writes_a_picture(
    findings: Findings, capsys: pytest.CaptureFixture[str]
) -> None:
    print_report(findings)
    shown = capsys.readouterr().out
    for title in ("Models", "Live performance", "Shadow", "Experiment", "Drift", "Checks"):
        assert title in shown
    picture = Path(findings.data_dir) / "report.svg"
    assert ET.fromstring(picture.read_text()).tag.endswith("svg")


def test_second_demo_on_the_same_directory_says_what_it_found(findings: Findings) -> None:
    done = CliRunner().invoke(main, ["demo", "--data-dir", findings.data_dir])
    assert done.exit_code == 1
    assert "no daemon is running" in done.output
    assert "mlpd serve --data-dir" in done.output


def test_directory_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    done = CliRunner().invoke(main, ["demo", "--data-dir", str(tmp_path)])
    assert done.exit_code == 1
    assert "not empty" in done.output
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


def test_daemon_that_does_not_start_is_told_with_its_log_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UnavailableError) as caught, running_daemon(tmp_path / "data", port):
            pass
    assert caught.value.code == "daemon_failed"
    assert str(port) in caught.value.message
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_stops_its_daemon(tmp_path: Path, number: signal.Signals) -> None:
    paths = DataDirectory(tmp_path / "data")
    command = [sys.executable, "-m", "mlpd", "demo", "--port", "0", "--data-dir", paths.root]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        deadline_s = time.monotonic() + 60
        while not paths.socket.exists() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        child.send_signal(number)
        told = child.communicate()[1]
    assert child.returncode == 130
    assert "Interrupted" in told
    assert read_holder(paths.lock_file) is None


def test_wrong_months_are_a_usage_error() -> None:
    done = CliRunner().invoke(main, ["demo", "--months", "4"])
    assert done.exit_code == 2
