"""Map an x86-64 ELF object file, as LLVM emits it, into this process: no linker, no LLVM.

Numba uses the large code model, so the code reaches everything through 64-bit absolute
addresses and the whole of linking is: copy the sections, store the addresses, mprotect.
Reference: System V ABI, AMD64 supplement, sections 4.2 to 4.4 (relocation), and gABI chapter 4.
"""

import ctypes
import mmap
import platform
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from mlpd.core.errors import InternalError

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")

_RELOCATABLE, _X86_64 = 1, 62
_SYMTAB, _RELA, _NOBITS = 2, 4, 8
_WRITE, _ALLOC, _EXEC = 1, 2, 4
_UNDEFINED, _ABSOLUTE, _COMMON = 0, 0xFFF1, 0xFFF2
_STORED = {1: ("<Q", False), 2: ("<i", True), 4: ("<i", True), 24: ("<q", True)}
"""How R_X86_64_64, PC32, PLT32 and PC64 are stored, and whether relative to their place."""
_PAGE = mmap.PAGESIZE
_UNWIND = ".eh_frame"  # nothing unwinds through a kernel

_LIBM = """
    acos acosh asin asinh atan atan2 atanh cbrt ceil copysign cos cosh erf erfc exp exp2 expm1 fabs
    floor fma fmax fmin fmod hypot lgamma log log10 log1p log2 nearbyint pow rint round sin sincos
    sinh sqrt tan tanh tgamma trunc
"""
LIBM_SYMBOLS = frozenset(name + suffix for name in _LIBM.split() for suffix in ("", "f"))
LIBC_SYMBOLS = frozenset({"bcmp", "memcmp", "memcpy", "memmove", "memset"})
"""All that a kernel may reach outside itself: mathematics and memory moves."""


def is_host_supported() -> bool:
    """Tell whether this machine runs what `load` maps: x86-64 Linux."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


class _Section(NamedTuple):
    name: int
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry_bytes: int


class _Symbol(NamedTuple):
    name: str
    section: int
    value: int
    size: int


@dataclass(frozen=True, slots=True)
class ElfObject:
    """A parsed relocatable object: sections, symbols by index, and the bytes they point into."""

    data: bytes
    sections: list[_Section]
    names: list[str]
    symbols: list[_Symbol]

    def undefined_symbols(self) -> list[str]:
        """Return the sorted names that the object wants from outside."""
        return sorted({s.name for s in self.symbols if s.section == _UNDEFINED and s.name})


def parse(data: bytes) -> ElfObject:
    """Return the object in `data`; raises InternalError if it isn't an x86-64 relocatable one."""
    try:
        ident, kind, machine, *_, offset, _, _, _, _, _, count, name_index = _HEADER.unpack_from(
            data
        )
        if ident[:6] != b"\x7fELF\x02\x01" or (kind, machine) != (_RELOCATABLE, _X86_64):
            raise _broken("it is no x86-64 relocatable ELF object")
        sections = [
            _Section(*_SECTION.unpack_from(data, offset + i * _SECTION.size)) for i in range(count)
        ]
        names = [_string(data, sections[name_index], s.name) for s in sections]
        return ElfObject(data, sections, names, _symbols(data, sections))
    except (struct.error, IndexError, OverflowError, ValueError) as error:
        raise _broken(f"it is cut short ({error})") from error


def _symbols(data: bytes, sections: list[_Section]) -> list[_Symbol]:
    for table in sections:
        if table.type == _SYMTAB:
            rows = _SYMBOL.iter_unpack(data[table.offset : table.offset + table.size])
            strings = sections[table.link]
            return [
                _Symbol(_string(data, strings, name), section, value, size)
                for name, _, _, section, value, size in rows
            ]
    return []


def _string(data: bytes, table: _Section, position: int) -> str:
    start = table.offset + position
    return data[start : data.index(b"\0", start)].decode()


_REBUILD = "delete the kernel cache directory; it is rebuilt on the next start"
_ALLOW = "let this process map code: with systemd, MemoryDenyWriteExecute=no"


def _broken(reason: str, hint: str = _REBUILD) -> InternalError:
    message = f"the kernel object can't be loaded: {reason}"
    return InternalError(message, code="kernel_object", hint=hint)


@dataclass(frozen=True, slots=True)
class Image:
    """Mapped code: the addresses of its `symbols` are valid as long as this object lives."""

    owner: object
    symbols: dict[str, int]


@dataclass(slots=True)
class _Layout:
    """Where each section goes; groups of equal protection start on pages of their own."""

    offsets: dict[int, int] = field(default_factory=dict)
    common: dict[str, int] = field(default_factory=dict)
    groups: list[tuple[int, int, int]] = field(default_factory=list)
    size: int = 0

    def place(self, size: int, alignment: int) -> int:
        offset = _round_up(self.size, max(alignment, 1))
        self.size = offset + size
        return offset


def load(data: bytes) -> Image:
    """Return `data` mapped, relocated and executable; costs well under a millisecond.

    Raises InternalError for an unknown symbol or relocation: nothing is resolved but
    LIBM_SYMBOLS and LIBC_SYMBOLS, and no page is ever writable and executable at once.
    """
    elf = parse(data)
    layout = _lay_out(elf)
    memory = mmap.mmap(-1, layout.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    _copy_sections(elf, layout, memory)
    addresses = _resolve(elf, layout, base)
    for section in elf.sections:
        if section.type == _RELA and section.info in layout.offsets:
            _relocate(elf, section, layout.offsets[section.info], addresses, memory, base)
    _protect(layout, base)
    pairs = zip(elf.symbols, addresses, strict=True)
    return Image(memory, {s.name: a for s, a in pairs if s.name and s.section in layout.offsets})


def _lay_out(elf: ElfObject) -> _Layout:
    layout = _Layout()
    for protection in (_EXEC, 0, _WRITE):
        start = layout.size
        for index, section in enumerate(elf.sections):
            wanted = section.flags & _ALLOC and elf.names[index] != _UNWIND
            if wanted and section.flags & (_EXEC | _WRITE) == protection:
                layout.offsets[index] = layout.place(section.size, section.alignment)
        if protection == _WRITE:
            for symbol in elf.symbols:
                if symbol.section == _COMMON:  # then st_value holds the alignment
                    layout.common[symbol.name] = layout.place(symbol.size, symbol.value)
        layout.size = _round_up(layout.size, _PAGE)
        layout.groups.append((start, layout.size - start, protection))
    return layout


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _copy_sections(elf: ElfObject, layout: _Layout, memory: mmap.mmap) -> None:
    for index, offset in layout.offsets.items():
        section = elf.sections[index]
        if section.type != _NOBITS:
            content = elf.data[section.offset : section.offset + section.size]
            if len(content) != section.size:
                raise _broken(f"section {elf.names[index]} is cut short")
            memory[offset : offset + section.size] = content


def _resolve(elf: ElfObject, layout: _Layout, base: int) -> list[int]:
    externals = _external_addresses(elf.undefined_symbols())
    addresses = []
    for symbol in elf.symbols:
        if symbol.section in layout.offsets and symbol.section != _UNDEFINED:
            address = base + layout.offsets[symbol.section] + symbol.value
        elif symbol.section == _COMMON:
            address = base + layout.common[symbol.name]
        elif symbol.section == _ABSOLUTE:
            address = symbol.value
        else:
            address = externals.get(symbol.name, 0)
        addresses.append(address)
    return addresses


def refused_symbols(names: Iterable[str]) -> list[str]:
    """Return those of `names` that a kernel may not reach."""
    return [name for name in names if name not in LIBM_SYMBOLS and name not in LIBC_SYMBOLS]


def _external_addresses(names: list[str]) -> dict[str, int]:
    if refused := refused_symbols(names):
        raise _broken(f"it wants {', '.join(refused)}, which kernels may not reach")
    libm, libc = ctypes.CDLL("libm.so.6"), ctypes.CDLL("libc.so.6")
    addresses = {}
    for name in names:
        function = getattr(libm if name in LIBM_SYMBOLS else libc, name)
        addresses[name] = ctypes.cast(function, ctypes.c_void_p).value or 0
    return addresses


def _relocate(
    elf: ElfObject,
    table: _Section,
    target: int,
    addresses: list[int],
    memory: mmap.mmap,
    base: int,
) -> None:
    """Store the addresses that one relocation table wants into the section at `target`."""
    rows = elf.data[table.offset : table.offset + table.size]
    for offset, info, addend in _RELOCATION.iter_unpack(rows):
        kind, place = info & 0xFFFFFFFF, target + offset
        value = addresses[info >> 32] + addend
        if kind not in _STORED:
            raise _broken(f"it has a relocation of the unknown kind {kind}")
        layout, is_relative = _STORED[kind]
        try:
            struct.pack_into(layout, memory, place, value - is_relative * (base + place))
        except struct.error as error:
            raise _broken("a relocation reaches too far") from error


def _protect(layout: _Layout, base: int) -> None:
    protections = {
        _EXEC: mmap.PROT_READ | mmap.PROT_EXEC,
        0: mmap.PROT_READ,
        _WRITE: mmap.PROT_READ | mmap.PROT_WRITE,
    }
    mprotect = ctypes.CDLL("libc.so.6", use_errno=True).mprotect
    mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start, size, protection in layout.groups:
        if size and mprotect(base + start, size, protections[protection]):
            raise _broken(f"mprotect failed with errno {ctypes.get_errno()}", _ALLOW)
