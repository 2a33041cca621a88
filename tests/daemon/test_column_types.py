"""A column keeps the type of its stored events: what would make history unreadable is refused."""

from typing import Any

import polars as pl
import pytest

from mlpd.core.columns import Column, DType
from mlpd.core.convert import column_of
from mlpd.core.definitions import Entity, FeatureService, FeatureView, Source, build_document
from mlpd.core.errors import DefinitionError
from mlpd.daemon.app import Daemon
from mlpd.daemon.history import Question
from mlpd.features.ingest import parse_batch

user = Entity("user")
FIRST = {"user": "string", "x": "float64"}


def document(schema: dict[str, str]) -> dict[str, Any]:
    clicks = Source("clicks", timestamp="at", schema=schema)
    features = [name for name in schema if name != "user"]
    views = [FeatureView("last", user, clicks, features)] if features else []
    return build_document([user, clicks, *views, FeatureService("s", [user, *views])])


async def send(daemon: Daemon, **values: Any) -> None:
    source = daemon.state.catalog.definitions.source("clicks")
    now = daemon.clock()
    columns = {"at": [now - 1], "user": ["a"], **{k: [v] for k, v in values.items()}}
    await daemon.ingest.ingest([parse_batch(source, columns, now_us=now)])


async def joined(daemon: Daemon) -> dict[str, Any]:
    spine: dict[str, Column] = {
        "event_time": column_of(DType.TIMESTAMP, [daemon.clock() + 1]),
        "user": column_of(DType.STRING, ["a"]),
    }
    async with daemon.history.open() as join:
        answer = await join.run(spine, Question(service="s"))
        frame = pl.read_ipc_stream(answer.file)
    return dict(frame.drop("event_time", "user").to_dicts()[0])


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("between", [document({"user": "string", "y": "int64"}), {"format": 1}])
async def test_a_column_that_comes_back_with_another_type_is_refused(
    daemon: Daemon, compacted: bool, between: dict[str, Any]
) -> None:
    await daemon.definitions.apply(document(FIRST))
    await send(daemon, x=1.5)
    if compacted:
        await daemon.compactor.run()
    await daemon.definitions.apply(between)
    wanted = document({"user": "string", "x": "int64"})
    with pytest.raises(DefinitionError, match="'x' is float64 in its events"):
        await daemon.definitions.plan(wanted)
    with pytest.raises(DefinitionError, match="'x' is float64 in its events") as refused:
        await daemon.definitions.apply(wanted)
    assert refused.value.code == "column_type"
    assert "another name" in refused.value.hint
    assert daemon.state.catalog.version == 2
    await daemon.definitions.apply(document(FIRST))
    assert await joined(daemon) == {"last.x": 1.5}


async def test_a_column_that_no_event_has_may_change_its_type(daemon: Daemon) -> None:
    await daemon.definitions.apply(document({"user": "string"}))
    await send(daemon)
    await daemon.definitions.apply(document(FIRST))
    await daemon.definitions.apply(document({"user": "string", "x": "int64"}))
    await send(daemon, x=3)
    assert await joined(daemon) == {"last.x": 3}


async def test_events_that_arrive_during_the_apply_keep_their_type(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    await daemon.definitions.apply(document(FIRST))
    check = daemon.definitions._survey
    stored = []

    def check_then_send(types: Any, sources: Any) -> Any:
        found = check(types, sources)
        stored.append(found)
        if len(stored) == 1:  # the plan
            return found
        batch = parse_batch(
            types[0]["clicks"],
            {"at": [daemon.clock() - 1], "user": ["a"], "x": [1.5]},
            now_us=daemon.clock(),
        )
        daemon.writer.write_blocking(lambda txn: daemon.ingest._write(txn, [batch], None))
        return found

    monkeypatch.setattr(daemon.definitions, "_survey", check_then_send)
    with pytest.raises(DefinitionError) as refused:
        await daemon.definitions.apply(document({"user": "string", "x": "int64"}))
    assert (refused.value.code, len(stored)) == ("column_type", 2)
    assert await joined(daemon) == {"last.x": 1.5}
