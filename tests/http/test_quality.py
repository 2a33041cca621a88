"""What is wrong with data: counted by code, with samples that show the form and not the values."""

import json
from typing import Any

import pytest

from mlpd.client import Client
from mlpd.core.errors import InvalidRequestError

SECRET = "Jane-4111"


def bad_rows(count: int) -> list[dict[str, Any]]:
    return [{"event_time": "2013-01-01 10:00", "user": SECRET, "amount": i} for i in range(count)]


def source(client: Client) -> dict[str, Any]:
    (found,) = client.quality()["sources"]
    return dict(found)


def test_refused_rows_are_counted_and_sampled_without_their_values(fresh: Any) -> None:
    with Client(fresh.url) as client:
        assert source(client)["rejected_share"] is None
        good = {"event_time": "2013-01-01T10:00:00Z", "user": SECRET}
        wrong = {**good, "amount": "12 EUR"}
        done = client.events.send("clicks", [good, *bad_rows(2), wrong])
        assert (done["accepted"], len(done["rejected"])) == (1, 3)
        found = source(client)
        assert (found["rows"], found["rejected"], found["rejected_share"]) == (4, 3, 0.75)
        assert found["rows_by_code"] == {"naive_time": 2, "wrong_type": 1}
        assert found["samples"][0]["code"] == "wrong_type"
        assert found["samples"][0]["row"] == {
            "event_time": "9999-99-99A99:99:99A",
            "user": "Aaaa-9999",
            "amount": "99 AAA",
        }
        assert found["samples"][1]["row"]["event_time"] == "9999-99-99 99:99"
        assert SECRET not in json.dumps(found)
        metrics = client.metrics()
        assert 'mlpd_ingest_violations_total{source="clicks",code="naive_time"} 2.0' in metrics


def test_samples_are_bounded_and_the_newest_come_first(fresh: Any) -> None:
    with Client(fresh.url) as client:
        for size in range(1, 31):
            client.events.send("clicks", [{"event_time": "x" * size}])
        found = source(client)
        assert found["rejected"] == 30
        assert [sample["row"]["event_time"] for sample in found["samples"]] == [
            "a" * size for size in range(30, 10, -1)
        ]
        client.events.send("clicks", bad_rows(500))
        assert len(source(client)["samples"]) == 20  # of one batch five at most


def test_a_retried_batch_counts_once(fresh: Any) -> None:
    with Client(fresh.url) as client:
        good = {"event_time": "2013-01-01T10:00:00Z", "user": "u"}
        for _ in range(3):
            client.events.send("clicks", [good, *bad_rows(1)], idempotency_key="once")
        assert source(client)["rejected"] == 1


def test_requests_that_are_refused_whole_are_counted_apart(fresh: Any) -> None:
    with Client(fresh.url) as client:
        for _ in range(2):
            with pytest.raises(InvalidRequestError):
                client.events.send("clicks", [{"event_time": 1, "colour": "red"}])
        with pytest.raises(InvalidRequestError):
            client.events.send("clicks", bad_rows(1), all_or_nothing=True)
        found = source(client)
        assert found["requests_by_code"] == {"unknown_column": 2, "naive_time": 1}
        assert found["rows_by_code"] == {}


def test_columns_that_are_to_be_redacted_keep_nothing(fresh: Any) -> None:
    fresh.daemon.ingest.violations._redact = ("us*",)
    with Client(fresh.url) as client:
        client.events.send("clicks", bad_rows(1))
        (sample,) = source(client)["samples"]
        assert sample["row"]["user"] == "redacted"
        assert sample["row"]["event_time"] == "9999-99-99 99:99"
