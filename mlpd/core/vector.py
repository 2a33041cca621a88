"""Feature values to the float64 vectors that a model reads: one meaning in training and serving."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
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
_REALS = (DType.FLOAT32, DType.FLOAT64)


@dataclass(frozen=True, slots=True)
class CategoricalEncoder:
    """The categories of one feature, frozen into a model version: the code is the position.

    Null and unseen read as NaN.  LightGBM treats NaN, negative and unseen codes alike, in training
    (one bin for all of them) and in prediction (never a member of a split's set), so NaN, which
    already means missing in every other feature, is the one that needs no second rule.

    >>> encoder = CategoricalEncoder(("UA", "AA"))
    >>> encoder.codes(["AA", "UA", "ZZ"]).tolist()
    [1.0, 0.0, nan]
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
        found = self.codes(column.values.tolist())
        if column.valid is not None:
            found[~column.valid] = NAN
        return found

    def codes(self, values: Sequence[Category]) -> NDArray[np.float64]:
        """Return the codes of values that aren't null."""
        return np.fromiter(map(self._codes.get, values, repeat(NAN)), np.float64, len(values))


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
        self.check(column.dtype)
        if self.encoder is not None:
            return self.encoder.encode(column)
        found = _canonical(column.values.astype(np.float64))
        if column.valid is not None:
            found[~column.valid] = NAN
        return found

    def check(self, dtype: DType) -> None:
        """Raise ValidationError (`wrong_type`) unless columns of `dtype` can be read."""
        matches = self.encoder is None and dtype.is_numeric
        if not matches and dtype is not self.dtype:
            raise _wrong_type(self, dtype)


@dataclass(frozen=True, slots=True)
class Vectorizer:
    """The vector of a model version: its features in order, with their frozen categories.

    A null or unseen category and a null or NaN number become NAN, booleans 0 or 1, integers and
    timestamps (microseconds) the nearest double: exact up to 2**53.
    """

    features: tuple[VectorFeature, ...]

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

    def place(self, rows: Mapping[str, int], dtypes: Sequence[DType]) -> "PlacedVectorizer":
        """Return the vectorizer of blocks whose row `rows[name]` holds a feature, of `dtypes[row]`.

        Raises ValidationError: `missing_feature`, `wrong_type`.
        """
        for feature in self.features:
            if feature.name not in rows:
                raise _missing(feature.name)
            feature.check(dtypes[rows[feature.name]])
        return PlacedVectorizer(self.features, [rows[name] for name in self.names], dtypes)

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


class PlacedVectorizer:
    """A vectorizer for blocks: every feature's place found once; the same bits as for columns.

    A block's numbers are 8-byte words, int64 [k, n]: integers, 0 or 1, or the bits of a float64.
    """

    def __init__(
        self, features: Sequence[VectorFeature], rows: Sequence[int], dtypes: Sequence[DType]
    ) -> None:
        places = list(enumerate(zip(features, rows, strict=True)))
        numbers = [(i, row) for i, (feature, row) in places if feature.encoder is None]
        self._rows = np.array(rows, np.int64)
        self._reals = _pairs([(i, row) for i, row in numbers if dtypes[row] in _REALS])
        self._integers = _pairs([(i, row) for i, row in numbers if dtypes[row] not in _REALS])
        self._encoded = [(i, row, f.encoder) for i, (f, row) in places if f.encoder is not None]

    def vectorize(
        self,
        words: NDArray[np.int64],
        valid: NDArray[np.bool_],
        texts: Mapping[int, NDArray[Any]],
    ) -> NDArray[np.float64]:
        """Return float64 [n, F] from a block; `texts`: the values of text features by row.

        10 us for one row of 40 features.
        """
        found = np.empty((len(self._rows), words.shape[1]))
        for (places, rows), numbers in (
            (self._reals, words.view(np.float64)),
            (self._integers, words),
        ):
            found[places] = numbers[rows]
        for place, row, encoder in self._encoded:
            found[place] = encoder.codes(texts.get(row, words[row]).tolist())
        found[~valid[self._rows] | np.isnan(found)] = NAN
        return np.ascontiguousarray(found.T)


def _pairs(pairs: list[tuple[int, int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    places, rows = np.array(pairs, np.int64).reshape(-1, 2).T
    return places, rows


def _fit(name: str, column: Column, categorical: bool) -> VectorFeature:
    _check_dtype(name, column.dtype, categorical=categorical)
    encoder = CategoricalEncoder.fit(column) if categorical else None
    return VectorFeature(name, column.dtype, encoder)


def _check_dtype(name: str, dtype: DType, *, categorical: bool) -> None:
    if categorical and dtype not in _CATEGORICAL:
        problem, hint = "can't be categorical", "Use a string, int64 or bool feature."
    elif not categorical and not dtype.is_numeric:
        problem, hint = "is no number", "Leave it out."
        if dtype is DType.STRING:
            hint = "Name it under `categorical`, or leave it out."
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
