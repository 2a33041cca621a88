"""Native kernels without numba in this process: declared here, compiled in a child, mapped.

    @device                                   a helper, inlined into the kernels that call it
    @routine                                  a helper that they call, for much code, seldom run
    @kernel("const f8[], i8", returns="f8")   an entry; both stay ordinary Python functions
    load_kernels("mlpd.features.x")           the entries of a module as native code
    compile_sources(text, kernels={...})      the same for source text, as users' transforms
    precompile([...])                         fills the cache, for the start of a daemon

A kernel module imports `math`, `numpy` and this package alone.  Why it is made this way:
docs/decisions/kernels-without-numba-in-the-daemon.md
"""

from mlpd.core.kernels.build import Kernels, compile_sources, load_kernels, precompile
from mlpd.core.kernels.call import MEMORY, Kernel, KernelError, address_of, word_numbers
from mlpd.core.kernels.declare import Signature, device, kernel, parse_signature, routine
from mlpd.core.kernels.unit import default_cache_dir

__all__ = [
    "MEMORY",
    "Kernel",
    "KernelError",
    "Kernels",
    "Signature",
    "address_of",
    "compile_sources",
    "default_cache_dir",
    "device",
    "kernel",
    "load_kernels",
    "parse_signature",
    "precompile",
    "routine",
    "word_numbers",
]
