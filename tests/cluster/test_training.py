"""Training over the events of all shards: what one daemon trains that holds everything."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

from mlpd.client import Client
from mlpd.core.errors import MlpdError
from mlpd.core.hashing import definition_hash
from mlpd.daemon.at_home import is_home, is_stray
from mlpd.storage.lineage import Import, Lineage

pytestmark = pytest.mark.timeout(200)


@pytest.fixture
def filled(three: Any, cluster_module: Any) -> Any:
    """Three shards by a map, which hold the sales that the trio's single daemon holds."""
    m = cluster_module
    made = m.give_map(three)
    with Client(three[1].url) as client:
        client.apply(m.DOCUMENT)
    m.send_split(made, three, m.sale_columns())
    return made


def files_of(edge: Any) -> dict[str, str]:
    with Client(edge.url) as client:
        found = client.models.version("person", 1)
    return {name: file["digest"] for name, file in found["files"].items()}


@pytest.mark.usefixtures("filled")
def test_a_run_asked_for_anywhere_sees_all_events_and_trains_the_same_model(
    trio: Any, three: Any
) -> None:
    with Client(three[2].url) as client:
        run = client.runs.wait(client.runs.start("person")["run_id"], timeout_s=120)
        assert run["state"] == "succeeded", run["error"]
        assert client.runs.list()["runs"][0]["run_id"] == run["run_id"]
        assert client.models.get("person")["aliases"]
    want, found = files_of(trio.single), [files_of(edge) for edge in three]
    assert found[1:] == found[:1] * 2
    # Those two say what it was made from and how long that took; model, profile, golden rows,
    # certificate and all the others are the same bytes.
    assert {"model.onnx", "profile.json", "golden.msgpack", "parity.json"} <= set(want)
    differing = {name for name in want | found[0] if want.get(name) != found[0].get(name)}
    assert differing == {"lineage.json", "report.json"}
    for edge in three:
        assert not list(edge.daemon.paths.joins.glob("*.parquet"))
        assert not list(edge.daemon.paths.runs.glob("*/out"))


@pytest.mark.usefixtures("filled")
def test_the_files_of_all_shards_have_each_event_once(
    three: Any, cluster_module: Any, tmp_path: Path
) -> None:
    m = cluster_module
    digest, frames = definition_hash(m.DOCUMENT), []
    for number, edge in enumerate(three):
        path = tmp_path / f"{number}.parquet"
        with Client(edge.url) as client:
            data = client.cluster.home_events("sales", definitions=digest, epoch=1)
            path.write_bytes(data)
            frames.append(pl.read_parquet(path))
            for how, want in (
                ({"definitions": "0" * 32, "epoch": 1}, "other_definitions"),
                ({"definitions": digest, "epoch": 2}, "epoch_moved"),
            ):
                with pytest.raises(MlpdError) as refused:
                    client.cluster.home_events("sales", **how)
                assert refused.value.code == want
            with pytest.raises(MlpdError) as unknown:
                client.cluster.home_events("nothing", definitions=digest, epoch=1)
            assert unknown.value.code == "unknown_source"
    sent = m.sale_columns()
    every = pl.concat(frames).sort("__event_time")
    assert all(len(frame) for frame in frames)
    assert every["__event_time"].to_list() == sent["event_time"]
    for name in ("user", "shop", "amount", "bought"):
        assert every[name].to_list() == sent[name]


def test_home_is_the_slot_of_the_first_entity_that_has_a_key() -> None:
    none = -1
    concerned = np.array([[5, none, none], [6, 7, none], [none, none, 9]])
    sequences = np.arange(3)
    assert is_home(concerned, sequences, None, None).tolist() == [True] * 3

    class Owned:
        flags = bytes(slot in (5, 9) for slot in range(16384))

    found: Any = Owned()
    assert is_home(concerned, sequences, found, None).tolist() == [True, False, True]


def test_an_event_of_no_entity_is_astray_if_it_came_for_other_slots_than_its_source() -> None:
    none = -1
    concerned = np.array([[5, none, none, none], [none, 9, 9, 9]])
    sequences = np.array([3, 4, 10, 11])
    lineage = Lineage(
        (
            Import(1, (5,), since=2, live_from=6, ranges=((3, 4),)),
            Import(2, (9,), since=6, live_from=10, ranges=((10, 10),)),
        )
    )
    assert is_stray(concerned, sequences, None, None).tolist() == [False] * 4
    assert is_stray(concerned, sequences, None, lineage).tolist() == [False, True, False, False]
    for owned, want in (((5,), [False, True, True, True]), ((9,), [False] * 4)):
        flags = bytes(slot in owned for slot in range(16384))
        part: Any = SimpleNamespace(flags=flags, shard_map=SimpleNamespace(epoch=1))
        assert is_stray(concerned, sequences, part, None).tolist() == want
        part.shard_map.epoch = 2
        assert is_stray(concerned, sequences, part, None).tolist() == [False] * 4


def test_without_a_shard_nothing_is_trained(
    tmp_path: Path, transform_cache: Path, cluster_module: Any
) -> None:
    m = cluster_module
    with m.serve_all(tmp_path / "up", 2, transform_cache) as up:
        with m.serve_all(tmp_path / "down", 1, transform_cache) as down:
            made = m.give_map([*up, *down])
            with Client(up[0].url) as client:
                client.apply(m.DOCUMENT)
            m.send_split(made, [*up, *down], m.sale_columns(60))
        with Client(up[1].url) as client:
            run = client.runs.wait(client.runs.start("person")["run_id"], timeout_s=60)
            assert run["state"] == "failed"
            assert run["error"]["code"] == "part_missing"
            assert not client.models.list()["models"]
