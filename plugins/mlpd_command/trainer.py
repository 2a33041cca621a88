"""Writes the order, runs the program, and reads what it made."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlpd.core.errors import DefinitionError, MlpdError
from mlpd.core.time import parse_duration
from mlpd.core.trainers import Bound, Examples, FittedModel, Floats, Tell, TrainingOrder
from mlpd.training.adapt import adapt_onnx
from mlpd_command.process import run_program

LABEL = "__label__"
ORDER, TRAIN, VALID, SAMPLE = "order.json", "train.parquet", "valid.parquet", "sample.parquet"
MODEL, RESULT, SCORES = "model.onnx", "result.json", "scores.parquet"

MODEL_BYTES_MAX = 256 * 1024**2
RESULT_BYTES_MAX = 1024**2

_OWN_PARAMS = ("command", "timeout", "seed")
_RESULT_KEYS = ("metrics", "importance", "bound", "output", "column", "link", "trainer")


class CommandTrainer:
    """A user's program as a trainer; whatever language and libraries it is written with."""

    objectives = ("binary", "regression", "multiclass")

    def fit(self, order: TrainingOrder, tell: Tell) -> FittedModel:
        """Return what the program wrote.

        Raises DefinitionError: `unknown_command`, `command_failed`, `command_result` for files that
        are missing or wrong; ValidationError(code="plugin_graph") for its ONNX file.
        """
        name, words = _command(order)
        folder = order.folder
        _write_order(order)
        timeout_s = _timeout_s(order.params)
        command = [*words, str(folder / ORDER)]
        run_program(command, folder, threads=order.threads, timeout_s=timeout_s, tell=tell)
        result = _read_result(folder / RESULT)
        scores = _read_scores(folder / SCORES, len(order.sample))
        outputs = scores.shape[1]
        onnx = adapt_onnx(
            _read(folder / MODEL, MODEL_BYTES_MAX),
            width=len(order.features),
            outputs=outputs,
            output=result.get("output"),
            column=result.get("column"),
        )
        absolute, relative = result.get("bound", (0.0, 0.0))
        return FittedModel(
            onnx=onnx,
            rows=order.sample,
            scores=scores,
            trainer=f"command {name}: {result.get('trainer', words[0])}"[:200],
            params={**order.params, "seed": order.seed, "num_threads": order.threads},
            digest=f"sha256:{hashlib.sha256(onnx).hexdigest()}",
            outputs=outputs,
            link=result.get("link", {"kind": "identity"}),
            bound=Bound(absolute, relative),
            importance=_importance(result, order.features),
            metrics=result.get("metrics", {}),
        )


def _command(order: TrainingOrder) -> tuple[str, tuple[str, ...]]:
    name = str(order.params.get("command"))
    if name not in order.commands:
        known = ", ".join(sorted(order.commands)) or "none"
        raise DefinitionError(
            f"params name the command {name!r}; the operator allows: {known}",
            code="unknown_command",
            hint='Name it in the daemon\'s configuration: [plugins] commands = ["NAME = PROGRAM"].',
        )
    return name, order.commands[name]


def _timeout_s(params: Mapping[str, Any]) -> float | None:
    given = params.get("timeout")
    return None if given is None else parse_duration(given, "params: timeout") / 1e6


def _write_order(order: TrainingOrder) -> None:
    """Write the rows as Parquet, float64 columns in vector order, and what is asked as JSON."""
    folder = order.folder
    _write_rows(folder / TRAIN, order, order.train)
    _write_rows(folder / VALID, order, order.valid)
    _write_rows(folder / SAMPLE, order, order.sample)
    asked = {
        "objective": order.objective,
        "features": list(order.features),
        "categorical": {order.features[i]: n for i, n in order.categorical.items()},
        "label": LABEL,
        "params": {k: v for k, v in order.params.items() if k not in _OWN_PARAMS},
        "seed": order.seed,
        "rounds": order.rounds,
        "patience": order.patience,
        "threads": order.threads,
        **{part: str(folder / file) for part, file in _FILES.items()},
    }
    (folder / ORDER).write_text(json.dumps(asked, indent=2), encoding="utf-8")


_FILES = {
    "train": TRAIN,
    "valid": VALID,
    "sample": SAMPLE,
    "model": MODEL,
    "result": RESULT,
    "scores": SCORES,
}


def _write_rows(path: Path, order: TrainingOrder, rows: Examples | Floats) -> None:
    import polars as pl  # noqa: PLC0415 - a quarter of a second

    vectors = rows.vectors if isinstance(rows, Examples) else rows
    columns = {name: vectors[:, i] for i, name in enumerate(order.features)}
    if isinstance(rows, Examples):
        columns[LABEL] = rows.labels
    pl.DataFrame(columns).write_parquet(path)


def _read(path: Path, most: int) -> bytes:
    """Return a file of the program's; a link out of the folder is none of its files."""
    if path.is_symlink() or not path.is_file():
        raise _wrong(path.name, "the command did not write it")
    if path.stat().st_size > most:
        raise _wrong(path.name, f"it has {path.stat().st_size} bytes, at most {most} are taken")
    return path.read_bytes()


def _read_result(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(_read(path, RESULT_BYTES_MAX))
    except ValueError:
        raise _wrong(path.name, "it is no JSON") from None
    if not isinstance(result, dict) or not result.keys() <= set(_RESULT_KEYS):
        raise _wrong(path.name, f"expected an object with some of {', '.join(_RESULT_KEYS)}")
    for key in ("metrics", "importance"):
        values = result.get(key, {})
        if not (isinstance(values, dict) and all(map(_is_number, values.values()))):
            raise _wrong(path.name, f"{key!r} must be an object of finite numbers")
    bound = result.get("bound", [0, 0])
    if not (isinstance(bound, list) and len(bound) == 2 and all(map(_is_number, bound))):  # noqa: PLR2004
        raise _wrong(path.name, "'bound' must be [absolute, relative]")
    for key, kind in (("column", int), ("output", str), ("link", dict), ("trainer", str)):
        if not isinstance(result.get(key, kind()), kind):
            raise _wrong(path.name, f"{key!r} must be of type {kind.__name__}")
    return result


def _read_scores(path: Path, rows: int) -> Floats:
    import polars as pl  # noqa: PLC0415

    try:
        frame = pl.read_parquet(_read(path, MODEL_BYTES_MAX))
        scores = frame.cast(pl.Float64).to_numpy()
    except MlpdError:
        raise
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _wrong(path.name, f"it can't be read as numbers: {error}") from None
    if scores.shape[0] != rows or not scores.shape[1]:
        raise _wrong(path.name, f"it is {list(scores.shape)}, expected one row for each of {rows}")
    return np.ascontiguousarray(scores)


def _importance(result: Mapping[str, Any], features: tuple[str, ...]) -> dict[str, float]:
    told = result.get("importance", {})
    if unknown := told.keys() - set(features):
        raise _wrong(RESULT, f"'importance' names {sorted(unknown)[:5]}, which are no features")
    total = math.fsum(map(abs, told.values())) or 1.0
    shares = {name: abs(told.get(name, 0.0)) / total for name in features}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(file: str, problem: str) -> DefinitionError:
    return DefinitionError(
        f"the command's {file} can't be used: {problem}",
        code="command_result",
        hint="docs/paths/plugins.md describes the files; the run's log holds what it printed.",
    )
