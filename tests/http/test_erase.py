"""Erasures over HTTP and by the command, as documented."""

import json
from typing import Any

from click.testing import CliRunner

from mlpd.cli import main
from mlpd.client import Client
from mlpd.http.erase import ERASURE, ERASURES, RECEIPT
from tests.http.test_events import EVENT


def test_an_entity_is_erased_and_the_receipt_is_kept(fresh: Any) -> None:
    with Client(fresh.url) as client:
        client.events.send("clicks", [EVENT, {**EVENT, "user": "b"}])
        receipt = client.erase("user", [{"user": "a"}])
        assert receipt.keys() == RECEIPT.fields.keys()
        assert receipt["sources"]["clicks"]["rows"] == 1
        listed = client.erasures()
        assert listed.keys() == ERASURES.fields.keys()
        assert listed == {"open": [], "receipts": [receipt]}
        found = client.erasure(receipt["id"])
        assert found.keys() == ERASURE.fields.keys()
        assert found == {"order": None, "receipt": receipt}
    status, value, _ = fresh.call("GET", "/v1/erase/nothing")
    assert (status, value["error"]["code"]) == (404, "unknown_erasure")
    body = json.dumps({"entity": "user", "keys": [{"name": "a"}]}).encode()
    status, value, _ = fresh.call("POST", "/v1/erase", body, {"Content-Type": "application/json"})
    assert (status, value["error"]["code"]) == (400, "wrong_entity_key")


def test_the_command_asks_and_prints_the_receipt(fresh: Any) -> None:
    with Client(fresh.url) as client:
        client.events.send("clicks", [EVENT, {**EVENT, "user": "b"}])
    runner = CliRunner(env={"COLUMNS": "200", "MLPD_URL": fresh.url})
    refused = runner.invoke(main, ["features", "erase", "user", "user=a"], input="n\n")
    assert refused.exit_code != 0
    done = runner.invoke(main, ["features", "erase", "user", "user=a", "--yes"])
    assert done.exit_code == 0, done.output
    assert "clicks" in done.stdout
    assert "Backups taken before" in done.stdout
    listed = runner.invoke(main, ["features", "erasures", "--json"])
    (receipt,) = json.loads(listed.stdout)["receipts"]
    assert receipt["id"] in done.stdout
    status = runner.invoke(main, ["status"]).stdout
    assert "Segments" in status
    sizes = json.loads(runner.invoke(main, ["status", "--json"]).stdout)["segments"]
    assert (sizes["clicks"]["files"], sizes["clicks"]["rows"]) == (1, 1)
    wrong = runner.invoke(main, ["features", "erase", "user", "name=a", "--yes"])
    assert (wrong.exit_code, "[unknown_field]" in wrong.stderr) == (1, True)
