"""A version trained again from its lineage, whatever has happened since: the same to the bit."""

import asyncio
import copy
import dataclasses
from typing import Any

import numpy as np
import pytest

from mlpd.core.errors import ValidationError
from mlpd.core.time import HOUR_US
from mlpd.daemon.app import Daemon
from mlpd.registry.lineage import Lineage
from mlpd.registry.records import Cause, ModelVersion
from tests.conftest import children_with, until
from tests.daemon.quick import prepare, send_clicks, train

LAST_US = 1_356_998_400_000_000 + 999 * 60_000_000


async def train_version(daemon: Daemon) -> ModelVersion:
    run = await train(daemon)
    assert run.result is not None
    return daemon.registry.get("quick", run.result["version"])


async def trained(daemon: Daemon, document: Any, columns: Any) -> ModelVersion:
    await prepare(daemon, document, columns)
    return await train_version(daemon)


def some_clicks(seed: int, first_us: int, known_us: int | None) -> dict[str, Any]:
    """200 clicks a second apart; known as they happened, or when `known_us` says."""
    rng = np.random.default_rng(seed)
    times = (first_us + np.arange(200) * 1_000_000).tolist()
    return {
        "at": times,
        "known_at": times if known_us is None else [known_us] * 200,
        "shown_at": times,
        "user": rng.choice(["a", "b", "d"], 200).tolist(),
        "amount": (rng.normal(size=200) * 9).tolist(),
        "bought": rng.integers(0, 2, 200).tolist(),
    }


def changed(document: dict[str, Any]) -> dict[str, Any]:
    """Another window, another job under the same names, and one aggregate less."""
    other = copy.deepcopy(document)
    other["views"]["spend"]["windows"] = ["2h"]
    other["jobs"]["quick"].update(num_boost_round=3, label="bought == 0", test_share=0.3)
    del other["views"]["spend"]["aggregates"][0]
    other["services"]["risk"]["features"] = ["spend.amount_mean_2h"]
    return other


def verdict(found: dict[str, Any]) -> tuple[str, list[str]]:
    return found["verdict"], [c["what"] for c in found["checks"] if not c["same"]]


async def test_a_version_comes_out_again_whatever_has_arrived_since(
    open_daemon: Any, trainable: Any, click_columns: Any
) -> None:
    async with open_daemon() as daemon:
        first = await trained(daemon, trainable, click_columns)
        await send_clicks(daemon, some_clicks(1, LAST_US + HOUR_US, None))  # newer
        await send_clicks(daemon, some_clicks(2, LAST_US - 9 * HOUR_US, LAST_US))  # late
        await send_clicks(daemon, some_clicks(3, LAST_US - 8 * HOUR_US, None))  # claims to be early
        await daemon.compactor.run()
        await daemon.definitions.apply(changed(trainable))
        found = await daemon.reproduce.run(first)
        assert verdict(found) == ("reproduced", []), found
        compared = {check["what"]: check["found"] for check in found["checks"]}
        assert compared["rows"] == 1000
        assert compared["golden rows"] == 32
        assert {"events and labels", "features", "trees", "test auc"} <= compared.keys()
        assert (found["packages"], found["cpu_flags"]) == ([], [])
        second = await train_version(daemon)
        lineages = [await daemon.registry.load_lineage("quick", v.number) for v in (first, second)]
        digests = {lineage.tree_digest for lineage in lineages if isinstance(lineage, Lineage)}
        assert len(digests) == 2  # all of it does make another model
    async with open_daemon() as daemon:
        assert verdict(await daemon.reproduce.run(second)) == ("reproduced", [])


async def test_the_order_of_request_fields_and_key_columns_is_kept(
    daemon: Daemon, trainable: Any, click_columns: Any
) -> None:
    document = copy.deepcopy(trainable)
    document["sources"]["clicks"]["schema"].update(size="float64", device="string")
    document["entities"]["pair"] = {"keys": {"user": "string", "device": "string"}}
    document["views"]["both"] = {
        "kind": "latest", "entity": "pair", "source": "clicks", "features": ["size", "amount"],
    }  # fmt: skip
    risk = document["services"]["risk"]
    risk["features"] += ["both.size", "both.amount"]
    risk["request"] = {"size": "float64", "amount": "float64"}
    rng = np.random.default_rng(11)
    columns = {
        **click_columns,
        "size": rng.normal(size=1000).tolist(),
        "device": rng.choice(["x", "y"], 1000).tolist(),
    }
    version = await trained(daemon, document, columns)
    assert verdict(await daemon.reproduce.run(version)) == ("reproduced", [])


async def test_what_was_erased_cannot_come_out_again(
    daemon: Daemon, trainable: Any, click_columns: Any
) -> None:
    version = await trained(daemon, trainable, click_columns)
    await daemon.erase.run("user", [{"user": "a"}])
    found = await daemon.reproduce.run(version)
    assert verdict(found) == ("different", ["rows", "events and labels"])
    left = click_columns["user"].count("b") + click_columns["user"].count("c")
    assert [c["found"] for c in found["checks"] if c["what"] == "rows"] == [left]


@pytest.mark.parametrize(
    ("change", "different"),
    [
        ({"params": {"learning_rate": 0.3}}, "trees"),
        ({"split": {"by": "time", "valid_share": 0.3, "test_share": 0.15}}, "trees"),
        ({"label": "amount > 0.1"}, "events and labels"),
        ({"as_of_sequence": 900}, "rows"),
    ],
)
async def test_another_recipe_makes_another_model_and_the_check_says_where(
    daemon: Daemon,
    trainable: Any,
    click_columns: Any,
    change: dict[str, Any],
    different: str,
) -> None:
    version = await trained(daemon, trainable, click_columns)
    lineage = await daemon.registry.load_lineage("quick", version.number)
    assert isinstance(lineage, Lineage)
    golden = await daemon.registry.load_file("quick", version.number, "golden.msgpack")
    params = {**lineage.params, **change.pop("params", {})}
    lineage = dataclasses.replace(lineage, params=params, **change)
    found = await daemon.reproduce._compare(lineage, golden)
    assert not found["reproduced"]
    assert different in [check["what"] for check in found["checks"] if not check["same"]]


async def test_packages_that_differ_are_named(
    daemon: Daemon, trainable: Any, click_columns: Any
) -> None:
    version = await trained(daemon, trainable, click_columns)
    lineage = await daemon.registry.load_lineage("quick", version.number)
    assert isinstance(lineage, Lineage)
    golden = await daemon.registry.load_file("quick", version.number, "golden.msgpack")
    packages = {**lineage.packages, "lightgbm": "3.3.2"}
    flags = ("avx", *(flag for flag in lineage.cpu_flags if flag != "avx"), "avx9000")
    older = dataclasses.replace(lineage, packages=packages, cpu_flags=flags)
    found = await daemon.reproduce._compare(older, golden)
    here = lineage.packages["lightgbm"]
    assert found["packages"] == [{"name": "lightgbm", "from": "3.3.2", "to": here}]
    assert "avx9000" in found["cpu_flags"]
    assert found["reproduced"]


async def test_a_version_without_its_events_is_refused(
    open_daemon: Any, trainable: Any, click_columns: Any
) -> None:
    async with open_daemon() as daemon:
        version = await trained(daemon, trainable, click_columns)
        lineage = await daemon.registry.load_lineage("quick", version.number)
        assert isinstance(lineage, Lineage)
        ahead = dataclasses.replace(lineage, as_of_sequence=lineage.as_of_sequence + 1)
        with pytest.raises(ValidationError, match="this log ends at") as raised:
            await daemon.reproduce._compare(ahead, b"")
        assert raised.value.code == "not_reproducible"
        nobody = dataclasses.replace(lineage, job=None)
        files = await daemon.registry.load(version.name, version.number)
        contents = {n: d for n, d in files.files.items() if n != "lineage.json"}
        by_hand = await daemon.registry.register(
            "quick", contents, dataclasses.asdict(nobody), Cause("hand")
        )
        with pytest.raises(ValidationError) as raised:
            await daemon.reproduce.run(by_hand)
        assert raised.value.code == "not_reproducible"


async def test_a_cancelled_reproduction_leaves_no_child(
    daemon: Daemon, trainable: Any, click_columns: Any
) -> None:
    version = await trained(daemon, trainable, click_columns)
    work = asyncio.create_task(daemon.reproduce.run(version))

    await until(lambda: children_with("reproduce"))
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert not children_with("reproduce")
