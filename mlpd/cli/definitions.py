"""Definition folders: their *.py files run here, in the user's process, and give one document.

The daemon never executes them: it gets the document, where transforms are source text.
"""

import runpy
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlpd
from mlpd.core.definitions import Definition, build_document
from mlpd.core.errors import DefinitionError, MlpdError, NotFoundError

FILES_MAX = 1_000
DEMO = "flights"


def load_folder(path: Path) -> dict[str, Any]:
    """Return the document of all definitions in a folder's *.py files (or in one file).

    Files run in order of their names and may import one another; names that begin with `_` or `.`
    are passed over.  Raises NotFoundError for a missing or empty folder, DefinitionError with file
    and line.
    """
    found: list[object] = []
    files = _files(path)
    with _importable(files[0].parent):
        for file in files:
            found.extend(_run(file))
    if not found:
        raise DefinitionError(
            f"{path} defines nothing",
            code="no_definitions",
            hint="Assign Entity, Source, FeatureView ... objects to names at the top level.",
        )
    return build_document(found)


def conf_folder(name: str = DEMO) -> Path:
    """Return a folder of definitions that comes with mlpd, from the checkout or from the wheel."""
    package = Path(mlpd.__file__).parent
    for parent in (package, package.parent):
        folder = parent / "conf" / name
        if folder.is_dir():
            return folder
    raise NotFoundError(
        f"the definitions {name!r} are missing from this installation",
        code="unknown_definitions",
        hint="Install mlpd again, or run it from its checkout.",
    )


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(file for file in path.glob("*.py") if file.name[0] not in "._")
    if not files:
        what = "has no *.py files" if path.is_dir() else "does not exist"
        raise NotFoundError(
            f"the definitions folder {path} {what}",
            code="no_definitions",
            hint="Name a folder of definitions, such as conf/flights.",
        )
    if len(files) > FILES_MAX:
        raise DefinitionError(f"{path} has {len(files)} files; the limit is {FILES_MAX}")
    return files


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let files of the folder import one another, and forget their modules afterwards."""
    known = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in sys.modules.keys() - known:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and Path(file).parent == folder:
                del sys.modules[name]


def _run(file: Path) -> list[object]:
    try:
        namespace = runpy.run_path(str(file))
    except MlpdError as error:
        raise DefinitionError(
            f"{_place(file, error)}: {error.message}", code=error.code, hint=error.hint
        ) from error
    except SyntaxError as error:
        raise DefinitionError(
            f"{error.filename}:{error.lineno}: {error.msg}", code="definition_syntax"
        ) from error
    except Exception as error:
        raise DefinitionError(
            f"{_place(file, error)}: {type(error).__name__}: {error}",
            code="definition_failed",
            hint="Definitions are plain Python: make the file run by itself first.",
        ) from error
    return [value for value in namespace.values() if isinstance(value, Definition)]


def _place(file: Path, error: BaseException) -> str:
    """Return `file:line` of the innermost frame of the error that lies in the user's file."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(file)
    ]
    return f"{file}:{lines[-1]}" if lines else str(file)
