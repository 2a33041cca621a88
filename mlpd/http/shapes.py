"""Shapes of bodies and query parameters: what a route takes, checked as it is read.

The same shapes make up /openapi.json, so what is documented is what is enforced.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from mlpd.core.errors import InvalidRequestError, ValidationError
from mlpd.core.time import parse_time

Kind = Literal[
    "any",
    "text",
    "integer",
    "number",
    "flag",
    "time",
    "object",
    "texts",
    "rows",
    "columns",
    "table",
]
"""What a field holds.

`time`: RFC 3339 text with an offset, or microseconds UTC; read as microseconds.  `rows`: a list of
objects.  `columns`: an object of lists of equal length.  `table`: either; read as rows.
"""

Rows = list[dict[str, Any]]

_INTEGER_DIGITS_MAX = 20


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a body or one query parameter; `choices` are the texts that it may hold."""

    kind: Kind
    doc: str
    required: bool = False
    choices: tuple[str, ...] = ()

    def read(self, name: str, value: Any) -> Any:
        """Return the value in its checked form; raises ValidationError(code="wrong_type" ...)."""
        checked = _READERS[self.kind](f"field {name!r}", value)
        if self.choices and checked not in self.choices:
            raise ValidationError(
                f"{name!r} is {checked!r}",
                code="unknown_choice",
                hint=f"One of: {', '.join(self.choices)}.",
            )
        return checked

    def parse(self, name: str, text: str) -> Any:
        """Return the value of a query parameter."""
        return self.read(name, _PARSERS.get(self.kind, str)(text))

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema of the field; null stands for absent where that is allowed."""
        schema = _SCHEMAS[self.kind]
        if self.choices:
            schema = {"enum": list(self.choices)}
        if schema and not self.required:
            schema = {"anyOf": [schema, {"type": "null"}]}
        return {**schema, "description": self.doc}


@dataclass(frozen=True, slots=True)
class Shape:
    """An object with known fields; anything else in it is an error that names those."""

    fields: Mapping[str, Field]

    def read(self, value: Any) -> dict[str, Any]:
        """Return every field by name, None for those that are absent or null.

        Raises ValidationError: `malformed_body`, `unknown_field`, `missing_field`, `wrong_type`.
        """
        if not isinstance(value, dict):
            found = "nothing" if value is None else f"a {type(value).__name__}"
            raise ValidationError(
                f"the body is {found}, expected an object", code="malformed_body", hint=self._known
            )
        if not value.keys() <= self.fields.keys():
            unknown = next(name for name in value if name not in self.fields)
            raise ValidationError(
                f"the body has the unknown field {unknown!r}",
                code="unknown_field",
                hint=self._known,
            )
        return {name: self._read_field(name, field, value) for name, field in self.fields.items()}

    def read_query(self, query: Mapping[str, str]) -> dict[str, Any]:
        """Return every query parameter by name, None for absent ones."""
        for name in query:
            if name not in self.fields:
                raise InvalidRequestError(
                    f"there is no query parameter {name!r}",
                    code="unknown_parameter",
                    hint=self._known,
                )
        found = {n: f.parse(n, query[n]) for n, f in self.fields.items() if n in query}
        return {name: self._read_field(name, field, found) for name, field in self.fields.items()}

    def schema(self, *, closed: bool = True) -> dict[str, Any]:
        """Return the JSON Schema of the object; `closed` shapes take no other fields."""
        required = [name for name, field in self.fields.items() if field.required]
        return {
            "type": "object",
            "properties": {name: field.schema() for name, field in self.fields.items()},
            **({"required": required} if required else {}),
            "additionalProperties": not closed,
        }

    @property
    def _known(self) -> str:
        return f"Known: {', '.join(self.fields)}." if self.fields else "None is known here."

    def _read_field(self, name: str, field: Field, values: Mapping[str, Any]) -> Any:
        value = values.get(name)
        if value is not None:
            return field.read(name, value)
        if field.required:
            raise ValidationError(
                f"{name!r} is missing: {field.doc}", code="missing_field", hint=self._known
            )
        return None


NOTHING = Shape(MappingProxyType({}))
"""The shape of a query without parameters."""


def read_rows(what: str, value: Any) -> Rows:
    """Return a list of objects with text keys; about 0.1 us per key."""
    if not isinstance(value, list):
        raise _wrong(what, "a list of objects", value)
    for index, row in enumerate(value):
        # msgpack admits byte strings as keys.
        if not isinstance(row, dict) or not all(type(key) is str for key in row):
            raise ValidationError(
                f"row {index} of {what} is not an object with text keys",
                code="wrong_type",
                hint="Send each row as an object: name to value.",
                details={"index": index},
            )
    return value


def rows_of_columns(what: str, columns: Mapping[str, list[Any]]) -> Rows:
    """Return the rows of columns of equal length."""
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValidationError(
            f"the columns of {what} have unequal lengths: {lengths}",
            code="unequal_columns",
            hint="Send one value per row in each column; null where there is none.",
        )
    names = list(columns)
    return [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _read_columns(what: str, value: Any) -> dict[str, list[Any]]:
    if not isinstance(value, dict):
        raise _wrong(what, "an object of lists", value)
    for name, values in value.items():
        if not isinstance(name, str) or not isinstance(values, list):
            raise _wrong(f"column {name!r} of {what}", "a list", values)
    return value


def _read_table(what: str, value: Any) -> Rows:
    if isinstance(value, dict):
        return rows_of_columns(what, _read_columns(what, value))
    return read_rows(what, value)


def _read_texts(what: str, value: Any) -> list[str]:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise _wrong(what, "a list of texts", value)


def _of_type(expected: str, *types: type) -> Callable[[str, Any], Any]:
    def read(what: str, value: Any) -> Any:
        if isinstance(value, types) and (types == (bool,) or not isinstance(value, bool)):
            return value
        raise _wrong(what, expected, value)

    return read


def _wrong(what: str, expected: str, value: Any) -> ValidationError:
    return ValidationError(
        f"{what} takes {expected}, got {type(value).__name__} {repr(value)[:60]}",
        code="wrong_type",
        hint="/openapi.json shows every field.",
    )


def _parse_integer(text: str) -> Any:
    sign = text.startswith("-")
    digits = text[sign:]
    return int(text) if digits.isdecimal() and len(digits) < _INTEGER_DIGITS_MAX else text


def _parse_flag(text: str) -> Any:
    return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)


_READERS: Mapping[Kind, Callable[[str, Any], Any]] = {
    "any": lambda _, value: value,
    "text": _of_type("a text", str),
    "integer": _of_type("an integer", int),
    "number": _of_type("a number", int, float),
    "flag": _of_type("true or false", bool),
    "time": lambda what, value: parse_time(value, what),
    "object": _of_type("an object", dict),
    "texts": _read_texts,
    "rows": read_rows,
    "columns": _read_columns,
    "table": _read_table,
}
_PARSERS: Mapping[Kind, Callable[[str], Any]] = {
    "integer": _parse_integer,
    "flag": _parse_flag,
    "time": _parse_integer,
    "texts": lambda text: text.split(","),
}
_ROWS: dict[str, Any] = {"type": "array", "items": {"type": "object"}}
_COLUMNS: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "array"}}
_SCHEMAS: Mapping[Kind, dict[str, Any]] = {
    "any": {},
    "text": {"type": "string"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "flag": {"type": "boolean"},
    "time": {"type": ["string", "integer"]},
    "object": {"type": "object"},
    "texts": {"type": "array", "items": {"type": "string"}},
    "rows": _ROWS,
    "columns": _COLUMNS,
    "table": {"oneOf": [_ROWS, _COLUMNS]},
}
