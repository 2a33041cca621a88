"""`mlpd fsck` on a stopped data directory: whatever is damaged is found and named."""

import asyncio
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import polars as pl
import pytest
from click.testing import CliRunner, Result

from mlpd.cli import main
from mlpd.client import Client
from mlpd.core.errors import ConflictError
from mlpd.core.time import system_clock
from mlpd.daemon.fsck import check_stopped
from mlpd.storage.files import DataDirectory
from mlpd.storage.segments import MANIFESTS, Manifest, decode_manifest
from mlpd.storage.tables import Table, u64be

SECTIONS = {"pages", "log", "segments", "definitions", "online", "tables", "predictions"}
SECTIONS |= {"registry"}
BOOKKEEPING = {"lock.mdb", "daemon.lock"}
"""Files that say who uses the directory."""


def check(data: DataDirectory, **options: bool) -> dict[str, Any]:
    return check_stopped(data.root, system_clock, **options)


def codes(report: dict[str, Any]) -> set[str]:
    assert report["clean"] == (not report["problems"])
    return {problem["code"] for problem in report["problems"]}


def fsck(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, ["fsck", *map(str, arguments)])


def digests(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.is_file() and path.name not in BOOKKEEPING]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def the_manifest(data: DataDirectory, tools: Any) -> Manifest:
    ((_, value),) = tools.rows_of(data, Table.SEGMENTS)
    return decode_manifest(value)


def flip_in_lmdb(data: DataDirectory, value: bytes) -> None:
    """Flip a bit in the middle of every copy of a value, those in free pages included."""
    path = data.lmdb / "data.mdb"
    content = bytearray(path.read_bytes())
    piece, start, hits = value[: min(len(value), 1024)], 0, 0
    while (start := content.find(piece, start)) >= 0:
        content[start + len(piece) // 2] ^= 0x01
        start, hits = start + len(piece), hits + 1
    assert hits
    path.write_bytes(content)


class TestCleanDirectory:
    def test_everything_is_looked_at_and_nothing_changed(self, data: DataDirectory) -> None:
        before = digests(data.root)
        report = check(data, deep=True)
        assert report["problems"] == []
        assert report["checked"].keys() == SECTIONS | {"replay"}
        assert report["skipped"] == {}
        checked = report["checked"]
        assert checked["segments"]["rows"] == 3000
        assert checked["log"]["sequence"] == 3001 + sum(range(21)) + 30
        assert checked["online"]["rows"] == 2 * 23
        assert checked["tables"]["predictions"] == 31
        assert checked["tables"]["labels"] == 30
        assert checked["registry"]["versions"] == 1
        assert checked["replay"]["events"] == 3000 + sum(range(21))
        assert digests(data.root) == before

    def test_the_command_says_so_with_exit_code_0(self, data: DataDirectory) -> None:
        done = fsck("--data-dir", data.root)
        assert done.exit_code == 0
        assert "Clean." in done.stdout
        done = fsck("--data-dir", data.root, "--json", "--deep")
        assert done.exit_code == 0
        report = json.loads(done.stdout)
        assert report["clean"]
        assert report["checked"]["replay"]["different"] == 0


class TestCannotRun:
    def test_no_data_directory(self, tmp_path: Path) -> None:
        done = fsck("--data-dir", tmp_path / "nothing")
        assert done.exit_code == 2
        assert "[no_data_directory]" in done.stderr
        assert not (tmp_path / "nothing").exists()

    def test_a_running_daemon(self, tmp_path: Path, tools: Any) -> None:
        with tools.edges.serve(tmp_path / "data") as running:
            done = fsck("--data-dir", tmp_path / "data", "--json")
            assert done.exit_code == 2
            assert json.loads(done.stdout)["error"]["code"] == "data_directory_in_use"
            done = fsck("--online", "--url", running.url)
            assert done.exit_code == 0, done.output
            assert "Clean." in done.stdout

    @pytest.mark.parametrize("option", ["--deep", "--repair"])
    def test_what_needs_a_stopped_directory_is_not_asked_of_a_daemon(self, option: str) -> None:
        done = fsck("--online", option)
        assert done.exit_code == 2
        assert "stands still" in done.stderr


async def test_a_daemon_checks_itself_once_at_a_time(daemon: Any) -> None:
    first = asyncio.create_task(daemon.fsck.run())
    await asyncio.sleep(0)  # it has begun
    with pytest.raises(ConflictError) as caught:
        await daemon.fsck.run()
    assert caught.value.code == "fsck_running"
    report = await first
    assert report["problems"] == []
    assert report["checked"].keys() == SECTIONS - {"pages"}
    assert report["skipped"].keys() == {"pages"}


class TestDamagedLog:
    def test_a_flipped_bit_in_a_record(self, data: DataDirectory, tools: Any) -> None:
        key, value = tools.rows_of(data, Table.LOG)[-5]
        flip_in_lmdb(data, value)
        report = check(data, deep=True)
        assert "log_corrupt" in codes(report)
        named = [p["subject"] for p in report["problems"] if p["code"] == "log_corrupt"]
        assert named == [f"log record {int.from_bytes(key, 'big')}"]
        assert report["skipped"]["replay"]
        done = fsck("--data-dir", data.root)
        assert done.exit_code == 1
        assert named[0] in done.stdout

    def test_a_record_that_is_gone(self, data: DataDirectory, tools: Any) -> None:
        key, _ = tools.rows_of(data, Table.LOG)[-5]
        tools.write(data, lambda txn: txn.delete(Table.LOG, key))
        assert codes(check(data)) == {"log_gap"}


class TestDamagedPages:
    def test_nothing_is_read_through_damaged_pages(self, data: DataDirectory) -> None:
        path = data.lmdb / "data.mdb"
        content = bytearray(path.read_bytes())
        for page in range(2, len(content) // 4096):
            content[page * 4096 + 10 : page * 4096 + 12] = b"\xff\xff"  # the page's flags
        path.write_bytes(content)
        report = check(data, deep=True)
        assert codes(report) == {"lmdb_damaged"}
        assert report["skipped"].keys() == (SECTIONS | {"replay"}) - {"pages"}

    def test_a_file_that_is_no_lmdb(self, data: DataDirectory) -> None:
        (data.lmdb / "data.mdb").write_bytes(b"nothing" * 4096)
        assert codes(check(data)) == {"lmdb_damaged"}

    def test_a_file_that_was_cut(self, data: DataDirectory) -> None:
        path = data.lmdb / "data.mdb"
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        assert codes(check(data)) == {"lmdb_damaged"}


class TestDamagedSegments:
    def segment(self, data: DataDirectory, tools: Any) -> Path:
        found = the_manifest(data, tools).segments[0]
        return data.segments / found.path

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.999])
    def test_one_flipped_bit(self, data: DataDirectory, tools: Any, share: float) -> None:
        path = self.segment(data, tools)
        tools.flip(path, int(share * path.stat().st_size))
        report = check(data)
        assert codes(report) == {"segment_corrupt"}
        assert report["problems"][0]["subject"] == str(path.relative_to(data.segments))

    def test_a_file_that_is_gone(self, data: DataDirectory, tools: Any) -> None:
        self.segment(data, tools).unlink()
        assert codes(check(data)) == {"segment_missing"}

    @pytest.mark.parametrize(
        ("change", "code"),
        [
            ({"last_sequence": 2_999}, "segment_differs"),
            ({"min_event_us": 5}, "segment_differs"),
            ({"max_known_us": 5}, "segment_differs"),
            ({"columns": {}}, "segment_differs"),
        ],
    )
    def test_a_manifest_that_says_otherwise(
        self, data: DataDirectory, tools: Any, change: dict[str, Any], code: str
    ) -> None:
        manifest = the_manifest(data, tools)
        segments = (replace(manifest.segments[0], **change), *manifest.segments[1:])
        self.store(data, tools, replace(manifest, segments=segments))
        assert codes(check(data)) == {code}

    def test_other_rows_under_the_right_digest(self, data: DataDirectory, tools: Any) -> None:
        manifest, path = the_manifest(data, tools), self.segment(data, tools)
        frame = pl.read_parquet(path)
        sequences = frame["__sequence"].to_list()
        sequences[7] = sequences[8]
        frame.with_columns(pl.Series("__sequence", sequences)).write_parquet(path)
        digest = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        segments = (replace(manifest.segments[0], digest=digest), *manifest.segments[1:])
        self.store(data, tools, replace(manifest, segments=segments))
        report = check(data)
        assert codes(report) == {"segment_coverage"}
        assert "is there twice" in report["problems"][0]["message"]

    def test_the_manifests_copy(self, data: DataDirectory, tools: Any) -> None:
        tools.flip(data.segments / MANIFESTS / the_manifest(data, tools).name, 40)
        assert codes(check(data)) == {"manifest_copy"}

    def store(self, data: DataDirectory, tools: Any, manifest: Manifest) -> None:
        key = u64be(manifest.first_sequence)
        tools.write(data, lambda txn: txn.put(Table.SEGMENTS, key, manifest.encode()))
        (data.segments / MANIFESTS / manifest.name).write_bytes(manifest.encode())


class TestDamagedFeatures:
    def view_rows(self, data: DataDirectory, tools: Any, name: str) -> list[tuple[bytes, bytes]]:
        state = msgpack.unpackb(dict(tools.rows_of(data, Table.DEFINITIONS))[b"current"])
        wanted = next(n for key, n in state["view_ids"].items() if key.startswith(f"{name}@"))
        rows = tools.rows_of(data, Table.ONLINE)
        return [row for row in rows if int.from_bytes(row[0][2:6], "big") == wanted]

    @pytest.mark.parametrize("view", ["spend", "profile"])
    def test_a_value_of_another_layout(self, data: DataDirectory, tools: Any, view: str) -> None:
        key, value = self.view_rows(data, tools, view)[3]
        tools.write(data, lambda txn: txn.put(Table.ONLINE, key, b"\x07" + value[1:]))
        report = check(data)
        assert codes(report) == {"online_damaged"}
        assert report["problems"][0]["subject"] == f"{view} key {key.hex()}"

    @pytest.mark.parametrize("view", ["spend", "profile"])
    @pytest.mark.parametrize("cut", [1, 8])
    def test_a_value_that_was_cut(
        self, data: DataDirectory, tools: Any, view: str, cut: int
    ) -> None:
        key, value = self.view_rows(data, tools, view)[3]
        tools.write(data, lambda txn: txn.put(Table.ONLINE, key, value[:-cut]))
        assert codes(check(data)) == {"online_damaged"}

    def test_a_row_in_a_foreign_slot(self, data: DataDirectory, tools: Any) -> None:
        key, value = self.view_rows(data, tools, "profile")[3]
        slot = (int.from_bytes(key[:2], "big") + 1) % 16384
        moved = slot.to_bytes(2, "big") + key[2:]
        tools.write(data, lambda txn: txn.put(Table.ONLINE, moved, value))
        report = check(data, deep=True)
        assert codes(report) == {"online_damaged", "replay_differs"}

    @pytest.mark.parametrize("view", ["spend", "profile"])
    def test_only_the_replay_notices_a_wrong_value(
        self, data: DataDirectory, tools: Any, view: str
    ) -> None:
        rows = self.view_rows(data, tools, view)
        key, value = next(row for row in rows if b"live-7" in row[0])
        other = dict(rows)[next(k for k, _ in rows if b"live-9" in k)]
        assert other != value
        tools.write(data, lambda txn: txn.put(Table.ONLINE, key, other))
        assert codes(check(data)) == set()
        report = check(data, deep=True)
        assert codes(report) == {"replay_differs"}
        assert [p["subject"] for p in report["problems"]] == [f"{view} key {key.hex()}"]

    @pytest.mark.parametrize("view", ["spend", "profile"])
    def test_a_row_that_is_gone_and_one_too_many(
        self, data: DataDirectory, tools: Any, view: str
    ) -> None:
        key = next(k for k, _ in self.view_rows(data, tools, view) if b"live-7" in k)
        tools.write(data, lambda txn: txn.delete(Table.ONLINE, key))
        report = check(data, deep=True)
        assert [p["subject"] for p in report["problems"]] == [f"{view} key {key.hex()}"]
        assert report["checked"]["replay"]["different"] == 1


class TestDamagedTables:
    def test_definitions(self, data: DataDirectory, tools: Any) -> None:
        tools.write(data, lambda txn: txn.put(Table.DEFINITIONS, b"current", b"\x93\x01"))
        report = check(data)
        assert codes(report) == {"definitions_damaged"}
        assert report["skipped"]["online"]

    def test_definitions_that_are_not_the_logs(self, data: DataDirectory, tools: Any) -> None:
        state = msgpack.unpackb(dict(tools.rows_of(data, Table.DEFINITIONS))[b"current"])
        state["document"]["jobs"] = {}
        packed = msgpack.packb(state)
        tools.write(data, lambda txn: txn.put(Table.DEFINITIONS, b"current", packed))
        assert codes(check(data)) == {"definitions_versions", "definitions_log"}

    @pytest.mark.parametrize("table", [Table.PREDICTIONS, Table.LABELS, Table.RUNS, Table.ROUTES])
    def test_rows(self, data: DataDirectory, tools: Any, table: Table) -> None:
        key, value = tools.rows_of(data, table)[0]
        tools.write(data, lambda txn: txn.put(table, key, value[: len(value) // 2]))
        report = check(data)
        assert codes(report) == {"tables_damaged"}
        assert key.hex() in report["problems"][0]["subject"]


class TestDamagedRegistry:
    def blob(self, data: DataDirectory) -> Path:
        return max((data.registry / "blobs" / "sha256").iterdir(), key=lambda p: p.stat().st_size)

    def test_one_flipped_bit_in_a_blob(self, data: DataDirectory, tools: Any) -> None:
        path = self.blob(data)
        tools.flip(path, path.stat().st_size // 2)
        report = check(data)
        assert codes(report) == {"blob_corrupt", "dangling_pointer"}
        assert f"sha256:{path.name}" in {p["subject"] for p in report["problems"]}

    def test_a_blob_that_is_gone(self, data: DataDirectory) -> None:
        self.blob(data).unlink()
        report = check(data)
        assert codes(report) == {"dangling_pointer"}
        assert report["problems"][0]["subject"] == "risk@1"


class TestRepair:
    def test_lost_records_of_the_registry_come_back(self, data: DataDirectory, tools: Any) -> None:
        before = tools.rows_of(data, Table.MODELS)

        def forget(txn: Any) -> None:
            for key, _ in before:
                txn.delete(Table.MODELS, key)

        tools.write(data, forget)
        assert codes(check(data)) >= {"journal_differs", "index_differs"}
        done = fsck("--data-dir", data.root, "--repair")
        assert done.exit_code == 0, done.output
        assert "Repaired: brought 2 records of the registry back into LMDB" in done.stdout
        assert tools.rows_of(data, Table.MODELS) == before

    def test_rows_of_a_killed_apply_go(self, data: DataDirectory, tools: Any) -> None:
        before = tools.rows_of(data, Table.ONLINE)
        strays = {key[:2] + u64be(77)[4:] + key[6:]: value for key, value in before}

        def add(txn: Any) -> None:
            for key, value in strays.items():
                txn.put(Table.ONLINE, key, value)

        tools.write(data, add)
        assert codes(check(data)) == {"online_unapplied"}
        report = check(data, repair=True)
        assert report["clean"]
        assert report["repaired"] == [
            f"removed {len(strays)} online rows of an apply that was killed"
        ]
        assert tools.rows_of(data, Table.ONLINE) == before

    def test_files_of_an_unfinished_compaction_go(self, data: DataDirectory, tools: Any) -> None:
        stray = data.segments / "clicks" / "2013-01-01" / "2000-2999.parquet"
        shutil.copy(data.segments / the_manifest(data, tools).segments[0].path, stray)
        assert check(data)["checked"]["segments"]["unnamed_files"] == 1
        assert stray.exists()
        report = check(data, repair=True, deep=True)
        assert report["clean"]
        assert report["repaired"] == ["removed segments/clicks/2013-01-01/2000-2999.parquet"]
        assert not stray.exists()
        assert report["checked"]["replay"]["different"] == 0

    def test_no_file_goes_while_manifests_are_damaged(
        self, data: DataDirectory, tools: Any
    ) -> None:
        key = u64be(the_manifest(data, tools).first_sequence)
        tools.write(data, lambda txn: txn.delete(Table.SEGMENTS, key))
        files = sorted(data.segments.rglob("*"))
        report = check(data, repair=True)
        assert "watermark" in codes(report)
        assert report["repaired"] == []
        assert sorted(data.segments.rglob("*")) == files

    def test_a_damaged_journal_is_written_anew(self, data: DataDirectory, tools: Any) -> None:
        path = data.registry / ".mlpd" / "journal"
        before = path.read_bytes()
        tools.flip(path, 30)
        assert codes(check(data)) == {"journal_differs"}
        assert check(data, repair=True)["clean"]
        assert path.read_bytes() == before

    def test_what_contradicts_itself_is_left_alone(self, data: DataDirectory) -> None:
        path = data.registry / "index.json"
        index = json.loads(path.read_bytes())
        index["manifests"][0]["digest"] = "sha256:" + "0" * 64
        path.write_text(json.dumps(index))
        before = digests(data.root)
        report = check(data, repair=True)
        assert "registry_diverged" in codes(report)
        assert report["repaired"] == []
        assert {k: v for k, v in digests(data.root).items() if "lmdb" not in k} == {
            k: v for k, v in before.items() if "lmdb" not in k
        }


def test_the_replay_agrees_however_events_came_in(tmp_path: Path, tools: Any) -> None:
    """Imports, late and deleting events, a later view, two compactions: no read can tell."""
    chance = random.Random(3)
    now_us, day_us = system_clock(), 86_400_000_000
    document = tools.edges.DOCUMENT
    first = {**document, "views": {"profile": document["views"]["profile"]}}
    first |= {"services": {}, "jobs": {}}
    send: Callable[..., Any]
    with tools.edges.serve(tmp_path / "data") as running, Client(running.url) as client:
        client.apply(first)
        send = partial(client.events.send, "clicks")
        for part in range(2):
            for _ in range(30):
                times = [now_us - chance.randrange(3 * day_us) for _ in range(40)]
                rows = [
                    {"event_time": t, "user": f"u{chance.randrange(9)}", "amount": chance.random()}
                    for t in times
                ]
                if chance.random() < 0.5:
                    rows = [{**r, "known_at": t + 1000} for r, t in zip(rows, times, strict=True)]
                if chance.random() < 0.5:
                    rows[chance.randrange(40)]["__deleted"] = True
                send(rows)
            tools.compact(running)
            if part == 0:
                client.apply(document)
        send([{"event_time": now_us, "user": "u1", "amount": 0.1}])
    report = check(DataDirectory(tmp_path / "data"), deep=True)
    assert report["problems"] == []
    assert report["checked"]["replay"]["events"] == 2 * 30 * 40 + 1
    assert report["checked"]["replay"]["equal_bytes"] > 0
