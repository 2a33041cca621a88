import json
import os
import sys
import threading
from importlib import import_module, invalidate_caches, reload
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mlpd.core.errors import InternalError
from mlpd.core.kernels import Kernels, build, cache, default_cache_dir, load_kernels, precompile
from mlpd.core.kernels.cache import fetch, store
from mlpd.core.kernels.unit import ModuleUnit, cache_key

HELPERS = """
from mlpd.core.kernels import device

STEP = 1


@device
def bump(x):
    return x + 1
"""

KERNELS = """
import numpy as np
from {helpers} import STEP, bump
from mlpd.core.kernels import kernel

TABLE = np.arange(3)


@kernel("i8", returns="i8")
def run(x):
    return bump(x) * STEP + TABLE[0]
"""


class Pair:
    """A kernel module and its helper module, rewritten at will, always within one second.

    Python takes bytecode for its source's if the source's second and size are those it was
    compiled of: a module that is rewritten as quickly as that must never have had any.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.write("helpers", HELPERS)
        self.write("kernels", KERNELS.format(helpers=f"{name}_helpers"))
        self.cache = folder / "cache"

    def write(self, part: str, text: str) -> None:
        path = self.folder / f"{self.name}_{part}.py"
        path.write_text(text)
        os.utime(path, (0, 0))

    def replace(self, part: str, old: str, new: str) -> None:
        text = (self.folder / f"{self.name}_{part}.py").read_text()
        assert old in text
        self.write(part, text.replace(old, new))

    def module(self) -> ModuleType:
        """Import both afresh, as the next process would."""
        invalidate_caches()
        for part in ("helpers", "kernels"):
            module = import_module(f"{self.name}_{part}")
            reload(module)
        return module

    def key(self, *, boundscheck: bool = False) -> str:
        return cache_key(ModuleUnit(self.module(), boundscheck=boundscheck))

    def load(self) -> Kernels:
        self.module()
        return load_kernels(f"{self.name}_kernels", cache_dir=self.cache)


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # the compiler imports the modules, too
    return Pair(tmp_path, tmp_path.name)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_request: str) -> bytes:
        raise AssertionError("nothing should have been compiled")

    monkeypatch.setattr(build, "_run_child", refuse)


@pytest.mark.usefixtures("no_compiler")
def test_a_cached_module_starts_no_compiler(shared_cache: Path, kernels: Kernels) -> None:
    again = load_kernels("sample_kernels", cache_dir=shared_cache, boundscheck=True)
    assert again.narrowed(5) == kernels.narrowed(5)
    precompile([["sample_kernels"]], cache_dir=shared_cache, boundscheck=True)


@pytest.mark.usefixtures("no_compiler")
def test_the_environment_can_ask_for_the_bounds_check(
    shared_cache: Path, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLPD_BOUNDSCHECK", "1")
    assert kernels
    assert load_kernels("sample_kernels", cache_dir=shared_cache).narrowed(1) == 1


def test_the_cache_belongs_to_its_owner_alone(shared_cache: Path, kernels: Kernels) -> None:
    assert kernels
    assert shared_cache.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in shared_cache.iterdir()} == {0o600}
    assert {path.suffix for path in shared_cache.iterdir()} == {".o", ".json"}


@pytest.mark.parametrize(
    ("part", "old", "new"),
    [
        ("kernels", "bump(x) *", "bump(x) +"),
        ("kernels", "np.arange(3)", "np.arange(3) + 1"),
        ("helpers", "x + 1", "x + 2"),
        ("helpers", "STEP = 1", "STEP = 2"),
    ],
)
def test_any_change_of_the_code_changes_the_key(pair: Pair, part: str, old: str, new: str) -> None:
    before = pair.key()
    assert pair.key() == before
    assert pair.key(boundscheck=True) != before
    pair.replace(part, old, new)
    assert pair.key() != before


def test_a_constant_computed_elsewhere_changes_the_key(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pair.module()
    unit = ModuleUnit(module, boundscheck=False)
    before = cache_key(unit)
    monkeypatch.setattr(module, "STEP", 7)
    assert cache_key(unit) != before


def test_changed_code_is_compiled_anew(pair: Pair) -> None:
    assert pair.load().run(5) == 6
    pair.replace("helpers", "x + 1", "x + 2")
    assert pair.load().run(5) == 7


def damage_object(folder: Path) -> None:
    path = next(folder.glob("*.o"))
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def cut_object(folder: Path) -> None:
    path = next(folder.glob("*.o"))
    os.truncate(path, 100)


def remove_object(folder: Path) -> None:
    next(folder.glob("*.o")).unlink()


def damage_record(folder: Path) -> None:
    next(folder.glob("*.json")).write_text('{"object": 3')


def retype_record(folder: Path) -> None:
    next(folder.glob("*.json")).write_text("[]")


@pytest.mark.parametrize(
    "damage", [damage_object, cut_object, remove_object, damage_record, retype_record]
)
def test_a_damaged_entry_counts_as_absent_and_is_written_again(tmp_path: Path, damage: Any) -> None:
    store(tmp_path, "key", bytes(200))
    assert fetch(tmp_path, "key") == bytes(200)
    damage(tmp_path)
    assert fetch(tmp_path, "key") is None
    store(tmp_path, "key", bytes(200))
    assert fetch(tmp_path, "key") == bytes(200)


def test_a_damaged_object_is_compiled_anew(pair: Pair) -> None:
    store(pair.cache, pair.key(), bytes(200))
    damage_object(pair.cache)
    assert pair.load().run(5) == 6


def test_the_cache_keeps_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "FILES_MAX", 6)
    for number in range(5):
        store(tmp_path, f"key{number}", bytes([number]))
        for path in tmp_path.glob(f"key{number}*"):
            os.utime(path, (number, number))
    kept = [number for number in range(5) if fetch(tmp_path, f"key{number}") is not None]
    assert kept == [2, 3, 4]
    assert len(list(tmp_path.iterdir())) == 6


def test_processes_may_compile_the_same_at_once(pair: Pair) -> None:
    pair.module()
    results = []

    def work() -> None:
        results.append(load_kernels(f"{pair.name}_kernels", cache_dir=pair.cache).run(1))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [2, 2]
    assert not list(pair.cache.glob(".tmp-*"))


def test_a_killed_compiler_is_an_error_and_leaves_nothing(pair: Pair) -> None:
    suicide = 'import os\nimport sys\nif "numba" in sys.modules:\n    os.kill(os.getpid(), 9)\n'
    pair.write("kernels", suicide + KERNELS.format(helpers=f"{pair.name}_helpers"))
    with pytest.raises(InternalError, match="compiler failed: it ended with status -9") as caught:
        pair.load()
    assert caught.value.code == "kernel_compiler"
    assert not pair.cache.exists()


def test_a_compiler_that_crashes_shows_what_it_said(pair: Pair) -> None:
    loud = 'import sys\nif "numba" in sys.modules:\n    raise OSError("x" * 100_000 + "the end")\n'
    pair.write("kernels", loud + KERNELS.format(helpers=f"{pair.name}_helpers"))
    with pytest.raises(InternalError, match="ended with status 1") as caught:
        pair.load()
    complaint = caught.value.details["stderr"]
    assert "the end" in complaint
    assert len(complaint) <= build.OUTPUT_BYTES_MAX


def test_a_compiler_that_takes_too_long_is_ended(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "COMPILE_TIMEOUT_S", 0.05)
    with pytest.raises(InternalError, match=r"took longer than 0.05 s"):
        pair.load()


def test_numbas_switches_dont_reach_the_compiler(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    monkeypatch.setenv("NUMBA_BOUNDSCHECK", "1")
    assert pair.load().run(np.int64(5)) == 6


def test_precompile_fills_the_cache_with_a_child_for_each_group(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = []
    run_child = build._run_child
    monkeypatch.setattr(build, "_run_child", lambda r: children.append(r) or run_child(r))
    pairs = [pair, *(Pair(pair.folder, f"{word}_{pair.name}") for word in ("other", "third"))]
    for each in pairs:
        each.module()
    first, second, third = (f"{p.name}_kernels" for p in pairs)
    precompile([[first, second], [third]], cache_dir=pair.cache)
    assert sorted(len(json.loads(child)["units"]) for child in children) == [1, 2]
    assert pair.load().run(5) == 6
    precompile([[first, second], [third]], cache_dir=pair.cache)
    assert len(children) == 2


def test_the_default_cache_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MLPD_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "mlpd"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "mlpd"
    monkeypatch.setenv("MLPD_CACHE_DIR", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"
