"""LightGBM as the trainer needs it: a quick import, and parameters with one name each."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from mlpd.core.errors import DefinitionError

_UNNEEDED = ("sklearn", "pandas", "dask", "matplotlib", "graphviz")
"""What LightGBM imports when it is there, for wrappers that we don't use."""


def import_lightgbm() -> ModuleType:
    """Return `lightgbm`, imported without its optional companions: 0.25 s instead of 0.65-3.6 s.

    Companions that this process has imported already stay as they are.
    """
    with _hidden(name for name in _UNNEEDED if name not in sys.modules):
        import lightgbm  # noqa: PLC0415 - costs a quarter of a second, only training pays it
    return lightgbm


def canonical_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return `params` under LightGBM's main names (`n_jobs` is `num_threads`).

    Raises DefinitionError: `unknown_parameter` for a name that LightGBM would ignore in silence,
    `duplicate_parameter` for two names of one parameter.
    """
    main_names = _main_names()
    found: dict[str, Any] = {}
    for name, value in params.items():
        main = main_names.get(name)
        if main is None:
            raise DefinitionError(
                f"LightGBM has no parameter {name!r}",
                code="unknown_parameter",
                hint="See LightGBM's Parameters page for the names.",
            )
        if main in found:
            raise DefinitionError(
                f"parameter {name!r} is {main!r} under another name, which is given too",
                code="duplicate_parameter",
                hint=f"Keep {main!r} only.",
            )
        found[main] = value
    return found


def _main_names() -> dict[str, str]:
    lightgbm = import_lightgbm()
    aliases = lightgbm.basic._ConfigAliases._get_all_param_aliases()  # noqa: SLF001 - no public way
    return {name: main for main, names in aliases.items() for name in (main, *names)}


@contextmanager
def _hidden(names: Iterator[str]) -> Iterator[None]:
    """Make `import name` fail within the block, as if it weren't installed."""
    hidden = list(names)
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None is the documented mark
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
