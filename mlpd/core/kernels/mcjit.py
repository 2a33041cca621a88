"""Map a kernel object with LLVM's own loader, on machines for which `elf` can't: the fallback.

Costs 55 MB for llvmlite, which is why x86-64 Linux does without.
"""

from collections.abc import Iterable

from mlpd.core.kernels.elf import Image


def load(data: bytes, names: Iterable[str]) -> Image:
    """Return the object mapped, with the addresses of its symbols `names`."""
    from llvmlite import binding as llvm  # type: ignore[import-untyped]  # noqa: PLC0415

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(data))
    engine.finalize_object()
    return Image(engine, {name: engine.get_function_address(name) for name in names})
