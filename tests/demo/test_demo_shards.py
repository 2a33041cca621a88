"""The demo on two shards behind a router: a day, with the same report and the same checks."""

import time
from pathlib import Path

import pytest

from mlpd.cli.demo.demo import Scope, run_demo
from mlpd.cli.demo.flights import data_folder
from mlpd.cli.demo.process import claim_directory, running_cluster, start_again
from mlpd.cli.demo.timeline import month_us
from mlpd.cli.local_cluster import PLAN_FILE, ClusterPlan
from mlpd.client import Client
from mlpd.core.errors import ConflictError, UnavailableError
from mlpd.core.time import DAY_US

SLICE = Scope(months=1, days=1, history_us=month_us(10) - 7 * DAY_US, latency_requests=20)

pytestmark = pytest.mark.timeout(300)


def test_all_predictions_of_a_day_are_recomputed_from_the_logs_of_two_shards(
    tmp_path: Path,
) -> None:
    try:
        data_folder()
    except UnavailableError as error:
        pytest.skip(f"{error.message}: {error.hint}")
    directory = tmp_path / "data"
    with running_cluster(directory, 2, 0) as cluster:
        found = run_demo(cluster, SLICE, time.monotonic())
        told = found.to_dict()
        with Client(cluster.url) as client:
            logged = {
                name: member.status()["predictions"]["logged"]
                for name, member in client.members().items()
            }
        with pytest.raises(ConflictError) as caught:
            claim_directory(directory)
        assert f"kill {' '.join(map(str, cluster.pids))};" in caught.value.hint
        plan = cluster.running_plan()
        cluster.stop()
    served = told["predictions"] + SLICE.latency_requests
    assert all(logged.values())
    assert sum(logged.values()) == served > 500
    assert told["consistency"]["rows_compared"] == served
    assert told["consistency"]["mismatches"] == found.audit["unavailable"] == 0
    assert told["parity"]["bit_equal"] == told["parity"]["rows"] > 5_000
    assert 0.5 < told["live_auc"]["2013-10"]["champion"] <= 1
    assert told["offline_auc"] > told["ablation_auc"]
    assert told["drift"].keys() == {"2013-10-01"}
    assert ClusterPlan.load(directory / PLAN_FILE) == plan
    assert start_again(directory).startswith("mlpd shard serve --config")
