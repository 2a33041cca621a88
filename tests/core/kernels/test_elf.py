import gc
import platform
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpd.core.errors import InternalError
from mlpd.core.kernels import Kernels, elf

pytestmark = pytest.mark.skipif(not elf.is_host_supported(), reason="x86-64 Linux's own loader")


@pytest.fixture(scope="session")
def sample_object(shared_cache: Path, kernels: Kernels) -> bytes:
    assert kernels
    return max((path.read_bytes() for path in shared_cache.glob("*.o")), key=len)


def test_every_kernel_is_a_symbol(sample_object: bytes) -> None:
    image = elf.load(sample_object)
    assert {"mlpd.fold", "mlpd.exponentials"} <= image.symbols.keys()


def permissions_at(address: int) -> str:
    """Return how this process maps `address`; empty if it doesn't."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last, permissions = re.match(r"(\w+)-(\w+) (\S+)", line).groups()
        if int(first, 16) <= address < int(last, 16):
            return permissions
    return ""


def test_code_is_executable_never_writable_and_goes_with_its_image(sample_object: bytes) -> None:
    image = elf.load(sample_object)
    address = image.symbols["mlpd.fold"]
    assert permissions_at(address) == "r-xp"
    del image
    gc.collect()
    assert "x" not in permissions_at(address)


def test_an_unknown_symbol_is_refused(sample_object: bytes) -> None:
    assert elf.parse(sample_object).undefined_symbols() == ["exp"]
    foreign = sample_object.replace(b"\0exp\0", b"\0run\0")
    assert foreign != sample_object
    with pytest.raises(InternalError, match="it wants run, which kernels may not reach"):
        elf.load(foreign)


def test_an_unknown_relocation_is_refused(sample_object: bytes) -> None:
    parsed = elf.parse(sample_object)
    section = next(s for s in parsed.sections if s.type == 4 and "text" in parsed.names[s.info])
    data = bytearray(sample_object)
    data[section.offset + 8] = 10  # R_X86_64_32: an address that needs the low 4 GiB
    with pytest.raises(InternalError, match="relocation of the unknown kind 10"):
        elf.load(bytes(data))


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"#!/bin/sh\n" * 20])
def test_what_isnt_an_object_is_refused(data: bytes) -> None:
    with pytest.raises(InternalError, match="the kernel object can't be loaded"):
        elf.parse(data)


def test_another_machines_object_is_refused(sample_object: bytes) -> None:
    data = bytearray(sample_object)
    data[18] = 183  # aarch64
    with pytest.raises(InternalError, match="no x86-64 relocatable ELF object"):
        elf.parse(bytes(data))


def test_a_section_table_beyond_all_memory_is_refused(sample_object: bytes) -> None:
    data = bytearray(sample_object)
    data[47] = 0x80  # the table's offset, 2**63 and more
    with pytest.raises(InternalError, match="cut short"):
        elf.parse(bytes(data))


PLACES = st.integers(0, 1 << 24)
"""Taken modulo the length: what is drawn doesn't depend on it."""


@settings(deadline=None)
@given(end=PLACES, changes=st.lists(st.tuples(PLACES, st.integers(0, 255)), max_size=8))
def test_a_damaged_object_parses_or_is_refused(
    sample_object: bytes, end: int, changes: list[tuple[int, int]]
) -> None:
    damaged = bytearray(sample_object[: end % (len(sample_object) + 1)])
    for place, byte in changes if damaged else ():
        damaged[place % len(damaged)] = byte
    with suppress(InternalError):
        elf.parse(bytes(damaged))


SMALL_CODE_MODEL = """
import ctypes, sys
from llvmlite import binding as llvm
from mlpd.core.kernels import elf

llvm.initialize_native_target()
llvm.initialize_native_asmprinter()
module = llvm.parse_assembly('''
@counter = internal global i64 5
@table = internal constant [3 x double] [double 1.5, double 2.5, double 3.5]
define internal double @pick(i64 %i) noinline {
  %p = getelementptr [3 x double], ptr @table, i64 0, i64 %i
  %v = load double, ptr %p
  ret double %v
}
define double @entry(i64 %i) {
  %n = load i64, ptr @counter
  %m = add i64 %n, 1
  store i64 %m, ptr @counter
  %v = call double @pick(i64 %i)
  %w = fmul double %v, 3.25
  %f = sitofp i64 %m to double
  %s = fadd double %w, %f
  ret double %s
}
''')
target = llvm.Target.from_default_triple()
machine = target.create_target_machine(reloc='pic', codemodel='small')
data = machine.emit_object(module)
kinds = set()
parsed = elf.parse(data)
for section in parsed.sections:
    if section.type == 4 and parsed.names[section.info].startswith('.text'):
        rows = data[section.offset : section.offset + section.size]
        kinds |= {info & 0xFFFFFFFF for _, info, _ in elf._RELOCATION.iter_unpack(rows)}
assert 2 in kinds or 4 in kinds, kinds
image = elf.load(data)
entry = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_int64)(image.symbols['entry'])
assert [entry(i) for i in range(3)] == [1.5 * 3.25 + 6, 2.5 * 3.25 + 7, 3.5 * 3.25 + 8]
"""

MCJIT = """
import sys
from pathlib import Path
import numpy as np
from mlpd.core.kernels import Kernel, mcjit
from mlpd.core.kernels.cache import symbol_of
from mlpd.core.kernels.declare import declared_kernels
import sample_kernels

signatures = declared_kernels(sample_kernels)
image = mcjit.load(Path(sys.argv[1]).read_bytes(), map(symbol_of, signatures))
scaled = Kernel("scaled", signatures["scaled"], image)
out = np.zeros(2, dtype=np.int64)
scaled(np.array([2**60, 5]), out)
assert out.tolist() == [3 * 2**60 + 1, 16]
assert "numba" not in sys.modules
"""

DENIED = """
import ctypes, sys
from pathlib import Path
from mlpd.core.errors import InternalError
from mlpd.core.kernels import elf

PR_SET_MDWE, REFUSE_EXEC_GAIN = 65, 1
assert ctypes.CDLL(None).prctl(PR_SET_MDWE, REFUSE_EXEC_GAIN, 0, 0, 0) == 0
try:
    elf.load(Path(sys.argv[1]).read_bytes())
except InternalError as error:
    assert "MemoryDenyWriteExecute=no" in error.hint, error.hint
else:
    sys.exit("code was mapped all the same")
"""


def run(script: str, *arguments: str) -> None:
    """Run `script` in a process of its own, for what must not be imported in this one."""
    path = [str(Path(elf.__file__).parents[3]), str(Path(__file__).parent)]
    command = [sys.executable, "-P", "-c", f"import sys\nsys.path[:0] = {path}\n{script}"]
    done = subprocess.run([*command, *arguments], capture_output=True, check=False, timeout=50)
    assert done.returncode == 0, done.stderr.decode()


def test_relative_relocations_are_applied() -> None:
    run(SMALL_CODE_MODEL)


def test_llvms_own_loader_maps_the_same_object(sample_object: bytes, tmp_path: Path) -> None:
    (tmp_path / "sample.o").write_bytes(sample_object)
    run(MCJIT, str(tmp_path / "sample.o"))


@pytest.mark.skipif(
    tuple(map(int, platform.release().split(".")[:2])) < (6, 3), reason="no PR_SET_MDWE"
)
def test_a_host_that_forbids_new_code_is_told_what_to_change(
    sample_object: bytes, tmp_path: Path
) -> None:
    (tmp_path / "sample.o").write_bytes(sample_object)
    run(DENIED, str(tmp_path / "sample.o"))
