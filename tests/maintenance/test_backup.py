"""Backups and restores: the same bits come back, and nothing unfinished passes for whole."""

import asyncio
import json
import random
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mlpd.cli import main
from mlpd.client import Client
from mlpd.core.config import Config, format_config, load_config
from mlpd.core.errors import ConflictError, MlpdError, NotFoundError, OverloadedError
from mlpd.core.time import system_clock
from mlpd.daemon import backup as backup_module
from mlpd.daemon import backup_child
from mlpd.daemon.app import Daemon
from mlpd.daemon.backup import Backup
from mlpd.daemon.fsck import check_stopped
from mlpd.daemon.restore import restore
from mlpd.registry.models import Registry
from mlpd.registry.records import Cause
from mlpd.storage.backup import (
    MANIFEST_FILE,
    BackupFile,
    BackupManifest,
    decode_backup,
    find_damage,
    load_backup,
)
from mlpd.storage.files import DataDirectory
from mlpd.storage.offline import scan_events
from mlpd.storage.tables import HEAD_KEY, Table
from mlpd.storage.writer import Writer

CRASH_CHILD = Path(__file__).parent / "crash_child.py"
LATER_US = 3_600_000_000


def mlpd(*arguments: object, url: str = "") -> Result:
    return CliRunner(env={"COLUMNS": "200", "MLPD_URL": url}).invoke(
        main, list(map(str, arguments))
    )


def back_up(data: DataDirectory, destination: Path, send: Any = lambda _: None) -> dict[str, Any]:
    """What the child does, in this process, on a stopped directory."""
    destination.mkdir()
    request = {"directory": str(data.root), "destination": str(destination)}
    return backup_child.run({**request, "link": True, "config": format_config(Config())}, send)


def tables_of(data: DataDirectory, tools: Any) -> dict[str, dict[bytes, bytes]]:
    """Every row of every table, but for the arrival time of the last group."""
    found = {str(table): dict(tools.rows_of(data, table)) for table in Table}
    found["meta"][HEAD_KEY] = found["meta"][HEAD_KEY][:8] + found["meta"][HEAD_KEY][16:]
    return found


@pytest.fixture
def backup(data: DataDirectory, tmp_path: Path) -> Path:
    """A backup of the template."""
    back_up(data, tmp_path / "backup")
    return tmp_path / "backup"


def test_a_restored_daemon_serves_the_same_bits(
    data: DataDirectory, tmp_path: Path, tools: Any
) -> None:
    destination, target = tmp_path / "backup", tmp_path / "restored"
    at_us = system_clock() + LATER_US
    with tools.edges.serve(data.root) as running, Client(running.url) as client:
        done = client.backup(str(destination))
        before = served(client, at_us)
    assert done["segments"] == 1
    assert mlpd("restore", destination, "--data-dir", target).exit_code == 0
    shutil.rmtree(data.root)  # hard links: what was restored owes nothing to it
    shutil.rmtree(destination)
    with tools.edges.serve(target) as running, Client(running.url) as client:
        assert client.status()["sequence"] == done["sequence"]
        assert served(client, at_us) == before
        audit = client.run_consistency()
        assert (audit["rows_compared"], audit["mismatches"], audit["unavailable"]) == (37, 0, 0)


def served(client: Client, at_us: int) -> dict[str, Any]:
    """What a daemon answers, with its floats as they are."""
    users = ["a", "b", "c", "live-3", "live-19", "nobody"]
    entities = [{"user": user, "age": 0.5} for user in users]
    spine = [{**entity, "event_time": at_us - 1_000 * i} for i, entity in enumerate(entities)]
    spine += [{**e, "event_time": 1_356_998_400_000_000 + 60_000_000 * 99} for e in entities]
    scores = client.predict("risk", entities, at=at_us, include=["vector"])["predictions"]
    version = client.models.version("risk", "champion")
    return {
        "features": client.read_features("risk", entities=entities, at=at_us)["columns"],
        "history": client.history("risk", spine=spine).to_dicts(),
        "scores": [(p["score"], p["arm"], p["version"]) for p in scores],
        "vectors": np.array([p["vector"] for p in scores]).tobytes(),
        "definitions": client.definitions(),
        "route": client.routes.get("risk")["serving"],
        "route_history": client.routes.history("risk"),
        "models": client.models.list(),
        "version": version,
        "model_history": client.models.history("risk"),
        "runs": client.runs.list(),
    }


def test_every_row_of_every_table_comes_back(
    data: DataDirectory, backup: Path, tmp_path: Path, tools: Any
) -> None:
    restored = DataDirectory(tmp_path / "restored")
    report = restore(backup, restored.root, system_clock)["fsck"]
    assert report["clean"]
    assert tables_of(restored, tools) == tables_of(data, tools)
    for path in ("index.json", ".mlpd/journal", "oci-layout"):
        assert (restored.registry / path).read_bytes() == (data.registry / path).read_bytes()
    assert check_stopped(restored.root, system_clock, deep=True)["problems"] == []


def test_a_backup_holds_exactly_the_rows_up_to_its_sequence(
    data: DataDirectory, tmp_path: Path, tools: Any
) -> None:
    """Four writers go on while it is taken, and the log is compacted before and meanwhile."""
    acknowledged: list[int] = []
    stop = threading.Event()

    def send(number: int) -> None:
        with Client(url) as sender:
            while not stop.is_set():
                rows = tools.live_rows(7, f"writer-{number}")
                acknowledged.append(sender.events.send("clicks", rows)["sequence"])

    with tools.edges.serve(data.root) as running:
        url = running.url
        writers = [threading.Thread(target=send, args=(number,)) for number in range(4)]
        for writer in writers:
            writer.start()
        try:
            wait_until(lambda: len(acknowledged) > 20)
            tools.compact(running)
            before = len(acknowledged)
            newest = max(acknowledged[:before])
            with Client(url) as client:
                compacting = asyncio.run_coroutine_threadsafe(
                    running.daemon.compactor.run(), running.loop
                )
                done = client.backup(str(tmp_path / "backup"))
                compacting.result(50)
            wait_until(lambda: max(acknowledged) > done["sequence"])
        finally:
            stop.set()
            for writer in writers:
                writer.join()
    assert done["sequence"] >= newest
    restored = DataDirectory(tmp_path / "restored")
    restore(tmp_path / "backup", restored.root, system_clock)
    found, wanted = (rows_up_to(d, done["sequence"], tools) for d in (restored, data))
    assert found.equals(wanted)
    sequences = rows_up_to(restored, None, tools)["__sequence"]
    assert sequences.max() <= done["sequence"]
    assert rows_up_to(data, None, tools)["__sequence"].max() > done["sequence"]
    assert check_stopped(restored.root, system_clock, deep=True)["problems"] == []


def rows_up_to(data: DataDirectory, sequence: int | None, tools: Any) -> Any:
    with tools.opened(data) as environment:
        frame = scan_events(environment, data.segments, "clicks", through_sequence=sequence)
        return frame.sort("__sequence").collect()


def wait_until(condition: Any, *, seconds: float = 40.0) -> None:
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_what_comes_after_the_copy_is_not_in_it(
    data: DataDirectory, tmp_path: Path, tools: Any
) -> None:
    """The registry moves on while files are placed: its journal is then ahead of the copy."""

    async def point_elsewhere(writer: Writer, environment: Any) -> None:
        registry = await asyncio.to_thread(Registry.open, environment, writer, data.registry)
        await registry.move_alias("risk", "late", 1, Cause("a test"), expected=None)

    def send(message: dict[str, Any]) -> None:
        if message["section"] == "files":
            with tools.opened(data) as environment:
                writer = Writer(environment)
                asyncio.run(point_elsewhere(writer, environment))
                writer.close()

    back_up(data, tmp_path / "backup", send)
    assert b'"late"' in (data.registry / ".mlpd" / "journal").read_bytes()
    restored = DataDirectory(tmp_path / "restored")
    restore(tmp_path / "backup", restored.root, system_clock)
    assert b'"late"' not in (restored.registry / ".mlpd" / "journal").read_bytes()
    with tools.edges.serve(restored.root) as running, Client(running.url) as client:
        assert client.models.list()["models"][0]["aliases"] == {"champion": 1}


class TestLinksAndCopies:
    @pytest.mark.parametrize("copy", [False, True])
    def test_segments_and_blobs_are_links_unless_copies_are_wanted(
        self, data: DataDirectory, tmp_path: Path, tools: Any, copy: bool
    ) -> None:
        with tools.edges.serve(data.root) as running, Client(running.url) as client:
            done = client.backup(str(tmp_path / "backup"), copy=copy)
        segments = [*(tmp_path / "backup" / "segments").rglob("*.parquet")]
        blobs = [*(tmp_path / "backup" / "registry" / "blobs" / "sha256").iterdir()]
        assert (len(segments), len(blobs)) == (done["segments"], done["blobs"])
        assert {path.stat().st_nlink for path in segments + blobs} == {1 if copy else 2}
        shared = sum(path.stat().st_size for path in segments + blobs)
        assert done["linked_bytes"] == (0 if copy else shared)
        assert [*find_damage(tmp_path / "backup", load_backup(tmp_path / "backup"))] == []

    def test_restored_files_are_nobodys_links(self, backup: Path, tmp_path: Path) -> None:
        restore(backup, tmp_path / "restored", system_clock)
        files = [path for path in (tmp_path / "restored").rglob("*") if path.is_file()]
        assert {path.stat().st_nlink for path in files} == {1}


def test_what_a_destination_may_not_be(tmp_path: Path, tools: Any) -> None:
    def refused(destination: object) -> str:
        with pytest.raises(MlpdError) as caught:
            client.backup(str(destination))
        assert caught.value.hint
        return caught.value.code

    root = tmp_path / "parent" / "data"
    root.mkdir(parents=True)
    (tmp_path / "link").symlink_to(root)
    (tmp_path / "file").write_text("mine")
    with tools.edges.serve(root) as running, Client(running.url) as client:
        assert refused("backups/today") == "destination_not_absolute"
        assert refused("") == "destination_not_absolute"
        assert refused(root / "backup") == "destination_inside"
        assert refused(root / "x" / ".." / "backup") == "destination_inside"
        assert refused(root) == "destination_inside"
        assert refused(root.parent) == "destination_inside"
        assert refused(tmp_path / "link" / "backup") == "destination_inside"
        assert refused(tmp_path / "file") == "destination_not_empty"
        assert refused(tmp_path / "file" / "below") == "destination_unwritable"
        assert refused(tmp_path / "parent" / ".." / "link" / ".." / "..") == "destination_inside"
        assert refused(f"{tmp_path}/a\x00b") == "destination_unwritable"
        assert (tmp_path / "file").read_text() == "mine"
        (tmp_path / "empty").mkdir()
        client.backup(str(tmp_path / "empty"))
        assert load_backup(tmp_path / "empty").sequence == 0
        assert refused(tmp_path / "empty") == "destination_not_empty"
        client.backup(str(tmp_path / "new" / "backup"))
        assert (tmp_path / "new" / "backup").stat().st_mode & 0o077 == 0


def test_a_body_of_nonsense_is_refused_by_name(tmp_path: Path, tools: Any) -> None:
    good, nonsense = str(tmp_path / "backup"), f"{tmp_path}/{'x' * 300}"
    bodies = [
        *(None, [], "x", {}, {"copy": True}, {"destination": None}, {"destination": 5}),
        *({"destination": [good]}, {"destination": good, "copy": "yes"}),
        *({"destination": good, "link": True}, {"destination": "~/backup"}),
        *({"destination": nonsense}, {"destination": f"{nonsense}/below"}),
        *({"destination": f"{tmp_path}/\ud800"}, {"destination": "\x00"}, {"destination": "/"}),
    ]
    with tools.edges.serve(tmp_path / "data") as running:
        for body in bodies:
            status, value, _ = running.call("POST", "/v1/backup", body)
            assert status == 400, (body, value)
            assert value["error"]["code"], body
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_settings_come_along(data: DataDirectory, tmp_path: Path, tools: Any) -> None:
    with tools.edges.serve(data.root, body_bytes_max=12345) as running:
        with Client(running.url) as client:
            client.backup(str(tmp_path / "backup"))
        wanted = running.daemon.config
    assert wanted.server.body_bytes_max == 12345
    assert load_config(tmp_path / "backup" / "config.toml") == wanted


class TestFailedBackup:
    def test_a_damaged_segment_is_not_passed_on(
        self, data: DataDirectory, tmp_path: Path, tools: Any
    ) -> None:
        path = next(data.segments.rglob("*.parquet"))
        tools.flip(path, 1000)
        with (
            tools.edges.serve(data.root) as running,
            Client(running.url) as client,
            pytest.raises(ConflictError) as caught,
        ):
            client.backup(str(tmp_path / "backup"))
        assert caught.value.code == "file_differs"
        assert path.name in caught.value.message
        assert not (tmp_path / "backup").exists()

    async def test_a_copy_that_lets_lmdb_grow_too_much_is_given_up(
        self, daemon: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(backup_module, "_WATCH_S", 0.0)
        verb = Backup(
            *(daemon.environment, daemon.writer, daemon.predictions, daemon.compactor),
            *(daemon.paths, daemon.config),
            growth_bytes_min=-(1 << 40),
        )
        with pytest.raises(OverloadedError) as caught:
            await verb.run(str(tmp_path / "backup"))
        assert caught.value.code == "backup_outgrown"
        assert not (tmp_path / "backup").exists()
        assert not verb.running

    async def test_one_at_a_time_and_a_cancelled_one_leaves_nothing(
        self, daemon: Any, tmp_path: Path
    ) -> None:
        first = asyncio.create_task(daemon.backup.run(str(tmp_path / "first")))
        await asyncio.to_thread(wait_until, (tmp_path / "first").exists)
        with pytest.raises(ConflictError) as caught:
            await daemon.backup.run(str(tmp_path / "second"))
        assert caught.value.code == "backup_running"
        assert not (tmp_path / "second").exists()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert not (tmp_path / "first").exists()
        await daemon.backup.run(str(tmp_path / "third"))
        assert load_backup(tmp_path / "third").sequence == 0


async def test_an_apply_under_way_is_waited_for(
    daemon: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has built so far isn't defined yet: in a copy it would be nobody's."""
    started: list[str] = []

    class Noted(backup_module.Child):
        def __init__(self, entry: str, *args: Any, **kwargs: Any) -> None:
            started.append(entry)
            super().__init__(entry, *args, **kwargs)

    monkeypatch.setattr(backup_module, "Child", Noted)
    async with daemon.compactor.paused():  # as apply holds it
        backing_up = asyncio.create_task(daemon.backup.run(str(tmp_path / "backup")))
        await asyncio.to_thread(wait_until, (tmp_path / "backup").exists)
        await asyncio.sleep(0.3)  # the child would be started by now
        assert started == []
    await backing_up
    assert started == ["backup"]
    assert load_backup(tmp_path / "backup").sequence == 0


class TestDamagedBackup:
    def test_any_byte_of_any_file(self, backup: Path, tmp_path: Path, tools: Any) -> None:
        """One flipped bit, first, last and somewhere between: the file is named."""
        chance = random.Random(5)
        manifest = load_backup(backup)
        parts = {file.path.partition("/")[0] for file in manifest.files}
        assert parts == {"lmdb", "segments", "registry", "config.toml"}
        for file in manifest.files:
            path = backup / file.path
            for offset in {0, file.size_bytes - 1, chance.randrange(file.size_bytes)}:
                whole = path.read_bytes()
                tools.flip(path, offset)
                with pytest.raises(ConflictError) as caught:
                    restore(backup, tmp_path / "restored", system_clock)
                assert caught.value.code == "backup_damaged"
                assert file.path in caught.value.message
                path.chmod(0o600)
                path.write_bytes(whole)
        assert [*find_damage(backup, manifest)] == []
        assert not (tmp_path / "restored").exists()

    def test_any_byte_of_the_manifest(self, backup: Path) -> None:
        data = (backup / MANIFEST_FILE).read_bytes()
        assert decode_backup(data).encode() == data
        for offset in range(len(data)):
            damaged = bytearray(data)
            damaged[offset] ^= 0x04
            with pytest.raises(ConflictError):
                decode_backup(bytes(damaged))

    @pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a/../../b", "", "a//b", "."])
    def test_a_manifest_never_leads_outside(self, path: str) -> None:
        file = BackupFile(path, 1, "sha256:" + "0" * 64)
        with pytest.raises(ConflictError):
            decode_backup(BackupManifest("0.1.0", "2026-01-01T00:00:00Z", 1, (file,)).encode())

    def test_a_file_that_is_gone_or_cut(self, backup: Path, tmp_path: Path) -> None:
        path = backup / "lmdb" / "data.mdb"
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 4096)
        next((backup / "segments").rglob("*.parquet")).unlink()
        done = mlpd("restore", backup, "--data-dir", tmp_path / "restored", "--json")
        assert done.exit_code == 1
        damage = json.loads(done.stdout)["error"]["details"]["damage"]
        assert [line.partition(" ")[0].partition("/")[0] for line in damage] == ["lmdb", "segments"]


class TestRestore:
    def test_what_is_there_stays(self, backup: Path, tmp_path: Path) -> None:
        target = tmp_path / "restored"
        target.mkdir()
        (target / "mine").write_text("mine")
        done = mlpd("restore", backup, "--data-dir", target)
        assert done.exit_code == 1
        assert "[data_directory_not_empty]" in done.stderr
        assert [path.name for path in target.iterdir()] == ["mine"]

    def test_an_empty_folder_becomes_the_data_directory(self, backup: Path, tmp_path: Path) -> None:
        (tmp_path / "restored").mkdir()
        done = mlpd("restore", backup, "--data-dir", tmp_path / "restored")
        assert done.exit_code == 0, done.output
        assert "mlpd serve --data-dir" in done.stdout
        assert not list(tmp_path.glob(".restored*"))

    def test_a_directory_that_is_there_is_filled_and_stays(
        self, backup: Path, tmp_path: Path, tools: Any
    ) -> None:
        """As a mount point has to, which can't be replaced; with what a new filesystem has."""
        target = tmp_path / "restored"
        target.mkdir(mode=0o750)
        (target / "lost+found").mkdir()
        inode = target.stat().st_ino
        assert restore(backup, target, system_clock)["fsck"]["clean"]
        assert (target.stat().st_ino, target.stat().st_mode & 0o777) == (inode, 0o750)
        names = {path.name for path in target.iterdir()}
        assert {"lmdb", "segments", "registry", "config.toml", "lost+found"} <= names
        assert ".restoring" not in names
        with tools.edges.serve(target) as running, Client(running.url) as client:
            assert client.status()["ready"]
        with pytest.raises(ConflictError) as caught:
            restore(backup, target, system_clock)
        assert caught.value.code == "data_directory_not_empty"

    def test_a_failed_filling_leaves_the_directory_empty(
        self, data: DataDirectory, tmp_path: Path, tools: Any
    ) -> None:
        key, _ = tools.rows_of(data, Table.LOG)[-3]
        tools.write(data, lambda txn: txn.delete(Table.LOG, key))
        back_up(data, tmp_path / "backup")
        target = tmp_path / "restored"
        target.mkdir()
        with pytest.raises(ConflictError) as caught:
            restore(tmp_path / "backup", target, system_clock)
        assert caught.value.code == "restored_with_problems"
        assert not [*target.iterdir()]

    @pytest.mark.parametrize("there", [True, False])
    def test_one_restore_at_a_time(self, backup: Path, tmp_path: Path, *, there: bool) -> None:
        target = tmp_path / "restored"
        codes = []

        def again(_: str) -> None:
            with pytest.raises(ConflictError) as caught:
                restore(backup, target, system_clock)
            codes.append(caught.value.code)

        if there:
            target.mkdir()
        stages = iter([lambda _: None, again])  # verify, copy
        restore(backup, target, system_clock, on_stage=lambda s: next(stages, len)(s) and None)
        assert codes == ["restore_running"]
        assert check_stopped(target, system_clock)["clean"]

    def test_what_is_no_backup(self, data: DataDirectory, tmp_path: Path) -> None:
        done = mlpd("restore", data.root, "--data-dir", tmp_path / "restored")
        assert done.exit_code == 1
        assert "[no_backup]" in done.stderr
        assert not (tmp_path / "restored").exists()

    def test_problems_that_were_backed_up_are_told(
        self, data: DataDirectory, tmp_path: Path, tools: Any
    ) -> None:
        key, _ = tools.rows_of(data, Table.LOG)[-3]
        tools.write(data, lambda txn: txn.delete(Table.LOG, key))
        back_up(data, tmp_path / "backup")
        arguments = ("restore", tmp_path / "backup", "--data-dir", tmp_path / "restored")
        done = mlpd(*arguments)
        assert done.exit_code == 1
        assert "[restored_with_problems]" in done.stderr
        assert not (tmp_path / "restored").exists()
        done = mlpd(*arguments, "--despite-problems", "--json")
        assert done.exit_code == 0
        report = json.loads(done.stdout)["fsck"]
        assert [problem["code"] for problem in report["problems"]] == ["log_gap"]


def crash(action: str, source: Path, work: Path, step: int) -> list[dict[str, Any]]:
    work.mkdir()
    command = [sys.executable, str(CRASH_CHILD), action, str(source), str(work), str(step)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=55, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_killed_backup_never_passes_for_one(data: DataDirectory, tmp_path: Path) -> None:
    """kill -9 at every file operation: no manifest, or all that it names is there."""
    ended = crash("backup", data.root, tmp_path / "work", 1)
    assert len(ended) > 50
    assert all(one["killed"] for one in ended[:-1])
    assert ended[-1]["done"]
    whole = 0
    for one in ended:
        target = tmp_path / "work" / str(one["at"]) / "target"
        with suppress(NotFoundError):
            assert [*find_damage(target, load_backup(target))] == []
            whole += 1
    assert 1 <= whole <= 5  # after the rename two folders are opened and flushed


def test_a_killed_restore_leaves_no_data_directory(backup: Path, tmp_path: Path) -> None:
    """kill -9 at every seventh file operation; the next restore begins anew."""
    ended = crash("restore", backup, tmp_path / "work", 7)
    assert len(ended) > 5
    assert all(one["killed"] for one in ended[:-1])
    assert ended[-1]["done"]
    for one in ended[:-1]:
        target = tmp_path / "work" / str(one["at"]) / "target"
        if target.exists():  # killed after the rename
            assert check_stopped(target, system_clock)["clean"]
    killed = tmp_path / "work" / str(ended[len(ended) // 2]["at"]) / "target"
    assert not killed.exists()
    assert restore(backup, killed, system_clock)["fsck"]["clean"]
    assert [path.name for path in killed.parent.iterdir()] == ["target"]


def test_a_killed_filling_is_no_data_directory(backup: Path, tmp_path: Path) -> None:
    """kill -9 at every 25th file operation; no daemon starts on it, the next restore does it."""
    ended = crash("fill", backup, tmp_path / "work", 25)
    assert len(ended) > 3
    assert ended[-1]["done"]
    unfinished = []
    for one in ended[:-1]:
        target = tmp_path / "work" / str(one["at"]) / "target"
        if (target / ".restoring").exists():
            unfinished.append(target)
            with pytest.raises(ConflictError) as caught:
                Daemon(target, Config())
            assert caught.value.code == "restore_unfinished"
        elif (target / "lmdb").exists():
            assert check_stopped(target, system_clock)["clean"]
        else:
            assert not target.exists() or {p.name for p in target.iterdir()} <= {"lost+found"}
    assert restore(backup, unfinished[-1], system_clock)["fsck"]["clean"]
    assert not (unfinished[-1] / ".restoring").exists()


def test_a_killed_daemon_leaves_no_half_backup(serve_process: Any, tmp_path: Path) -> None:
    """kill -9 of the daemon at random moments of a backup: its child ends with it."""
    chance = random.Random(11)
    for number in range(3):
        destination = tmp_path / f"backup-{number}"
        killer = threading.Timer(chance.uniform(0.05, 0.8), serve_process.process.kill)
        killer.start()
        with Client(serve_process.url, timeout_s=20.0) as client, suppress(MlpdError, OSError):
            client.backup(str(destination))
        killer.join()
        serve_process.kill()
        if (destination / MANIFEST_FILE).exists():
            assert [*find_damage(destination, load_backup(destination))] == []
        else:
            with pytest.raises(NotFoundError):
                restore(destination, tmp_path / "restored", system_clock)
        serve_process.start()


def test_backup_and_restore_from_the_command_line(tmp_path: Path, tools: Any) -> None:
    with tools.edges.serve(tmp_path / "data") as running:
        done = mlpd("backup", tmp_path / "backup", url=running.url)
        assert done.exit_code == 0, done.output
        assert str(tmp_path / "backup") in done.stdout
        done = mlpd("backup", "--copy", "--json", tmp_path / "copy", url=running.url)
        assert json.loads(done.stdout)["linked_bytes"] == 0
        done = mlpd("backup", tmp_path / "copy", url=running.url)
        assert done.exit_code == 1
        assert "[destination_not_empty]" in done.stderr
    done = mlpd("restore", tmp_path / "copy", "--data-dir", tmp_path / "restored", "--json")
    assert json.loads(done.stdout)["data_directory"] == str(tmp_path / "restored")


def test_settings_are_written_as_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(format_config(Config()))
    assert load_config(tmp_path / "config.toml") == Config()
