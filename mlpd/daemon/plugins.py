"""Plugins: trainers found by name, through entry points and the paths in `[plugins]`.

Names are known without importing anything: the daemon only looks; the child of a run imports.
"""

import importlib.util
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from mlpd.core.config import PluginsConfig, parse_command
from mlpd.core.errors import ConfigurationError, DefinitionError, MlpdError
from mlpd.core.names import NAME_PATTERN
from mlpd.core.specs import JobSpec
from mlpd.core.trainers import Trainer

GROUP = "mlpd.plugins"
KIND = "trainer."
"""How the entry points of trainers are named: `trainer.sklearn`."""

OWN_PREFIX = "mlpd_"
ATTRIBUTE = "TRAINER"
"""What a module in `[plugins] paths` must define."""

BUILT_IN = {"lightgbm": "mlpd.training.lightgbm_trainer:TRAINER"}
EXTRAS = {"sklearn": "sklearn"}
"""Which extra of mlpd brings what a trainer imports."""


@dataclass(frozen=True, slots=True)
class Plugins:
    """Where trainers are: an entry point or a file each, by name; plain values for a child."""

    trainers: Mapping[str, str]
    commands: Mapping[str, tuple[str, ...]]

    @classmethod
    def find(cls, config: PluginsConfig) -> "Plugins":
        """Return what is installed and configured.

        Of two with one name the configured path comes first, then what is built in.  Raises
        ConfigurationError for a path that is no Python file or package.
        """
        installed = {
            point.name.removeprefix(KIND): point.value
            for point in entry_points(group=GROUP)
            if point.name.startswith(KIND)
        }
        paths = dict(_named_path(Path(path)) for path in config.paths)
        commands = dict(parse_command(text) for text in config.commands)
        return cls({**installed, **BUILT_IN, **paths}, commands)

    def check_jobs(self, jobs: Iterable[JobSpec]) -> None:
        """Raise DefinitionError(code="unknown_trainer") for a job whose trainer isn't there."""
        for job in jobs:
            self.place_of(job.trainer, f"job {job.name!r}: ")

    def place_of(self, name: str, where: str = "") -> str:
        """Return where a trainer is; raises DefinitionError(code="unknown_trainer")."""
        if name not in self.trainers:
            raise DefinitionError(
                f"{where}unknown trainer {name!r}; known: {', '.join(sorted(self.trainers))}",
                code="unknown_trainer",
                hint="Install its package beside mlpd, or name its file in [plugins] paths.",
            )
        return self.trainers[name]

    def to_request(self) -> dict[str, Any]:
        """Return plain values that `from_request` takes in a child."""
        return {"trainers": dict(self.trainers), "commands": dict(self.commands)}

    @classmethod
    def from_request(cls, request: Mapping[str, Any]) -> "Plugins":
        """Return what `to_request` gave."""
        commands = {name: tuple(words) for name, words in request["commands"].items()}
        return cls(request["trainers"], commands)


def check_paths(config: PluginsConfig) -> None:
    """Raise ConfigurationError for a path that is no Python file or package; costs a stat each."""
    for path in config.paths:
        _named_path(Path(path))


def load_trainer(plugins: Plugins, name: str) -> Trainer:
    """Return a trainer, imported; for children.

    Raises DefinitionError: `unknown_trainer`, `plugin_dependency` for an import that isn't there,
    `invalid_plugin` for one that breaks or isn't a trainer.
    """
    place = plugins.place_of(name)
    try:
        if place.startswith("/"):
            found = getattr(_import_path(name, Path(place)), ATTRIBUTE)
        else:
            found = EntryPoint(KIND + name, place, GROUP).load()
    except ModuleNotFoundError as error:
        raise _lacks(name, error.name or "") from error
    except MlpdError:
        raise
    except Exception as error:
        raise _invalid(name, place, repr(error)) from error
    return _checked(name, place, found)


def _checked(name: str, place: str, found: Any) -> Trainer:
    objectives = getattr(found, "objectives", None)
    if not callable(getattr(found, "fit", None)) or not isinstance(objectives, tuple):
        raise _invalid(name, place, "it has no method 'fit' or no tuple 'objectives'")
    trainer: Trainer = found
    return trainer


def _named_path(path: Path) -> tuple[str, str]:
    """Return the name of a plugin file or package folder, and its absolute path."""
    full = path.expanduser().resolve()
    is_package = (full / "__init__.py").is_file()
    name = full.stem.removeprefix(OWN_PREFIX)
    if not (is_package or (full.suffix == ".py" and full.is_file())):
        raise ConfigurationError(
            f"[plugins] paths: {str(path)!r} is neither a Python file nor a package",
            code="invalid_plugin",
            hint="Name a file such as /opt/mlpd/majority.py; its trainer is called majority.",
        )
    if NAME_PATTERN.fullmatch(name) is None:
        raise ConfigurationError(
            f"[plugins] paths: {full.name!r} can't name a trainer",
            code="invalid_plugin",
            hint="Use lower-case letters, digits, '.', '_' or '-'.",
        )
    return name, str(full)


def _import_path(name: str, path: Path) -> ModuleType:
    file = path / "__init__.py" if path.is_dir() else path
    module_name = path.stem if path.is_dir() else f"mlpd_plugin_{name}"
    inside = [str(path)] if path.is_dir() else None
    spec = importlib.util.spec_from_file_location(
        module_name, file, submodule_search_locations=inside
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module


def _lacks(trainer: str, module: str) -> DefinitionError:
    extra = EXTRAS.get(trainer)
    package = f"mlpd[{extra}]" if extra else f"the package of {module!r}"
    return DefinitionError(
        f"trainer {trainer!r} needs the module {module!r}, which isn't installed",
        code="plugin_dependency",
        hint=f"Install {package} where mlpd runs; no restart is needed.",
    )


def _invalid(name: str, place: str, problem: str) -> DefinitionError:
    return DefinitionError(
        f"trainer {name!r} ({place}) can't be used: {problem}"[:2000],
        code="invalid_plugin",
        hint="docs/paths/plugins.md tells what a trainer must have; the run's log tells more.",
    )
