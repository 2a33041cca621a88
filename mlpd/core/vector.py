"""Feature values to the float64 vectors that a model reads: one meaning in training and serving."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column, DType, height
from mlpd.core.errors import ValidationError

NAN = math.nan
"""The one NaN of every vector: the quiet NaN 0x7ff8000000000000."""
MAX_CATEGORIES = 10_000
"""Categories kept per feature, the most frequent ones; the others read as unseen."""

Category = str | int
_CATEGORICAL = (DType.STRING, DType.INT64, DType.BOOL)
_INTEGER = (int, np.integer, np.bool_)
_NUMBER = (float, np.floating, *_INTEGER)
_PYTHON: dict[DType, tuple[type, ...]] = {
    DType.BOOL: (bool, *_INTEGER),
    DType.INT64: _INTEGER,
    DType.FLOAT32: _NUMBER,
    DType.FLOAT64: _NUMBER,
    DType.STRING: (str,),
    DType.TIMESTAMP: _INTEGER,
}


@dataclass(frozen=True, slots=True)
class CategoricalEncoder:
    """The categories of one feature, frozen into a model version: the code is the position.

    Null and unseen read as NaN.  LightGBM treats NaN, negative and unseen codes alike, in training
    (one bin for all of them) and in prediction (never a member of a split's set), so NaN, which
    already means missing in every other feature, is the one that needs no second rule.

    >>> encoder = CategoricalEncoder(("UA", "AA"))
    >>> [encoder.code(x) for x in ("AA", "UA", "ZZ", None)]
    [1.0, 0.0, nan, nan]
    """

    categories: tuple[Category, ...]
    _codes: dict[Category, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        codes = {category: float(code) for code, category in enumerate(self.categories)}
        object.__setattr__(self, "_codes", codes)
        kinds = {type(category) for category in self.categories}
        if len(codes) < len(self.categories) or not (kinds <= {str} or kinds <= {int}):
            raise ValidationError(
                "the categories of a feature must differ and be all strings or all integers",
                code="wrong_categories",
                hint="use the encoder that training froze into the version",
            )

    @classmethod
    def fit(cls, column: Column, max_categories: int = MAX_CATEGORIES) -> "CategoricalEncoder":
        """Return the encoder of a column's valid values, most frequent first, ties by value."""
        counts: Counter[Category] = Counter(column.values[column.mask()].tolist())
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        kind = str if column.dtype is DType.STRING else int
        return cls(tuple(kind(category) for category, _ in ranked[:max_categories]))

    def encode(self, column: Column) -> NDArray[np.float64]:
        """Return the codes of a column; about 60 ns per value."""
        codes = map(self._codes.get, column.values.tolist(), repeat(NAN))
        found = np.fromiter(codes, np.float64, len(column))
        if column.valid is not None:
            found[~column.valid] = NAN
        return found

    def code(self, value: Category | None) -> float:
        """Return the code of one value: the same as `encode`, for the row path."""
        return NAN if value is None else self._codes.get(value, NAN)


@dataclass(frozen=True, slots=True)
class VectorFeature:
    """One element of the vector; `encoder` is None for a number."""

    name: str
    dtype: DType
    encoder: CategoricalEncoder | None = None

    def __post_init__(self) -> None:
        _check_dtype(self.name, self.dtype, categorical=self.encoder is not None)

    def read(self, column: Column) -> NDArray[np.float64]:
        """Return a column as vector elements; raises ValidationError (`wrong_type`)."""
        matches = self.encoder is None and column.dtype.is_numeric
        if not matches and column.dtype is not self.dtype:
            raise _wrong_type(self, column.dtype)
        if self.encoder is not None:
            return self.encoder.encode(column)
        found = _canonical(column.values.astype(np.float64))
        if column.valid is not None:
            found[~column.valid] = NAN
        return found

    def read_one(self, value: Any) -> float:
        """Return one value as vector element: the same as `read`; raises ValidationError."""
        if value is None:
            return NAN
        if not isinstance(value, _PYTHON[self.dtype]):
            raise _wrong_type(self, type(value).__name__)
        return self.read_exact(value)

    @property
    def read_exact(self) -> Callable[[Any], float]:
        """What turns a value of the type `_PYTHON[dtype][0]` into a vector element."""
        return float if self.encoder is None else self.encoder.code


@dataclass(frozen=True, slots=True)
class Vectorizer:
    """The vector of a model version: its features in order, with their frozen categories.

    A null or unseen category and a null or NaN number become NAN, booleans 0 or 1, integers and
    timestamps (microseconds) the nearest double: exact up to 2**53.
    """

    features: tuple[VectorFeature, ...]
    _readers: list[tuple[str, type, Callable[[Any], float], VectorFeature]] = field(
        init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        readers = [(f.name, _PYTHON[f.dtype][0], f.read_exact, f) for f in self.features]
        object.__setattr__(self, "_readers", readers)

    @classmethod
    def fit(cls, columns: Mapping[str, Column], categorical: Sequence[str] = ()) -> "Vectorizer":
        """Return the vectorizer of training columns, in their order.

        Raises ValidationError: `not_a_number` for text outside `categorical`, `missing_feature`
        for a name in `categorical` that isn't a column.
        """
        for name in categorical:
            _column(columns, name)
        return cls(tuple(_fit(n, column, n in categorical) for n, column in columns.items()))

    @property
    def names(self) -> tuple[str, ...]:
        """Feature names in vector order."""
        return tuple(feature.name for feature in self.features)

    @property
    def categorical(self) -> tuple[int, ...]:
        """Positions of the categorical features in the vector."""
        return tuple(i for i, feature in enumerate(self.features) if feature.encoder is not None)

    def vectorize(
        self, columns: Mapping[str, Column], *, order: Literal["C", "F"] = "C"
    ) -> NDArray[np.float64]:
        """Return float64 [n, F] from columns by name; others are ignored.

        `order`: "C" for prediction, "F" for training (LightGBM takes it without a copy).
        Raises ValidationError: `missing_feature`, `wrong_type`.
        """
        found = np.empty((height(columns), len(self.features)), np.float64, order)
        for i, feature in enumerate(self.features):
            found[:, i] = feature.read(_column(columns, feature.name))
        return found

    def vectorize_rows(self, rows: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
        """Return float64 [n, F] from Python values by name, None for null; for a few rows.

        The same bits as `vectorize`, a tenth of its cost for one row (5 us for 20 features).
        Raises ValidationError: `missing_feature`, `wrong_type`.
        """
        values: list[float] = []
        for row in rows:
            for name, exact, read, feature in self._readers:
                if name not in row:
                    raise _missing(name)
                value = row[name]
                # Exact types, nearly all values, skip the checks: 8 us become 5.
                values.append(read(value) if type(value) is exact else feature.read_one(value))
        return _canonical(np.array(values, np.float64)).reshape(len(rows), len(self.features))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: `{"features": [{"name", "dtype"[, "categories"]}, ...]}`."""
        documents = []
        for feature in self.features:
            document: dict[str, Any] = {"name": feature.name, "dtype": str(feature.dtype)}
            if feature.encoder is not None:
                document["categories"] = list(feature.encoder.categories)
            documents.append(document)
        return {"features": documents}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Vectorizer":
        """Return the vectorizer that `to_dict` wrote."""
        return cls(tuple(_feature(entry) for entry in document["features"]))


def _fit(name: str, column: Column, categorical: bool) -> VectorFeature:
    _check_dtype(name, column.dtype, categorical=categorical)
    encoder = CategoricalEncoder.fit(column) if categorical else None
    return VectorFeature(name, column.dtype, encoder)


def _check_dtype(name: str, dtype: DType, *, categorical: bool) -> None:
    if categorical and dtype not in _CATEGORICAL:
        problem, hint = "can't be categorical", "Use a string, int64 or bool feature."
    elif not categorical and not dtype.is_numeric:
        problem, hint = "is no number", "Name it under `categorical`, or leave it out."
    else:
        return
    raise ValidationError(f"feature {name!r} ({dtype}) {problem}", code="not_a_number", hint=hint)


def _feature(entry: Mapping[str, Any]) -> VectorFeature:
    name, categories = entry["name"], entry.get("categories")
    encoder = None if categories is None else CategoricalEncoder(tuple(categories))
    return VectorFeature(name, DType.parse(entry["dtype"], f"feature {name!r}"), encoder)


def _canonical(found: NDArray[np.float64]) -> NDArray[np.float64]:
    found[np.isnan(found)] = NAN
    return found


def _column(columns: Mapping[str, Column], name: str) -> Column:
    if name not in columns:
        raise _missing(name)
    return columns[name]


def _missing(name: str) -> ValidationError:
    return ValidationError(
        f"the vector needs feature {name!r}, which isn't there",
        code="missing_feature",
        hint="Give every feature of the model; null where there is no value.",
        details={"feature": name},
    )


def _wrong_type(feature: VectorFeature, found: str) -> ValidationError:
    return ValidationError(
        f"feature {feature.name!r} is {found}, expected {feature.dtype}",
        code="wrong_type",
        hint="Send the type that the feature service declares.",
        details={"feature": feature.name},
    )
