"""The fields of one object of the document, read one by one; errors name object and field."""

from collections.abc import Mapping
from typing import Any, TypeVar

from mlpd.core.columns import DType
from mlpd.core.errors import DefinitionError
from mlpd.core.names import check_identifier
from mlpd.core.time import parse_duration

T = TypeVar("T")


class Fields:
    """The fields of one object, taken one by one; what is left at the end is unknown."""

    def __init__(self, value: object, where: str) -> None:
        self.where = where
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise self.error("it must be an object with text keys")
        self._left: dict[str, Any] = dict(value)

    def take(self, field: str, default: Any = None) -> Any:
        """Return the field, or `default` when absent or null."""
        value = self._left.pop(field, None)
        return default if value is None else value

    def need(self, field: str) -> Any:
        """Return the field, which must be there."""
        value = self.take(field)
        if value is None:
            raise self.error(f"{field!r} is missing")
        return value

    def text(self, field: str) -> str:
        """Return a field that must be text."""
        return self.typed(field, self.need(field), str)

    def optional_text(self, field: str) -> str | None:
        """Return a field that must be text when it is there."""
        value = self.take(field)
        return None if value is None else self.typed(field, value, str)

    def typed(self, field: str, value: Any, kind: type[T]) -> T:
        """Return `value`, which must be of the type `kind` exactly."""
        if type(value) is not kind:
            raise self.error(f"{field!r} must be {kind.__name__}, got {value!r}")
        return value

    def mapping(self, field: str) -> dict[str, Any]:
        """Return a field that must be an object; absent is empty."""
        return Fields(self.take(field, {}), f"{self.where}: {field}").rest()

    def rest(self) -> dict[str, Any]:
        """Return all fields that were not taken yet."""
        left, self._left = self._left, {}
        return left

    def items(self, field: str, most: int) -> list[Any]:
        """Return a field that must be a list of at most `most` items; absent is empty."""
        value = self.take(field, [])
        if not isinstance(value, list | tuple):
            raise self.error(f"{field!r} must be a list, got {value!r:.60}")
        if len(value) > most:
            raise self.error(f"{field!r} has {len(value)} items; the limit is {most}")
        return list(value)

    def texts(self, field: str, most: int) -> list[str]:
        """Return a field that must be a list of texts; absent is empty."""
        value = self.items(field, most)
        for item in value:
            if not isinstance(item, str):
                raise self.error(f"{field!r} must hold texts, got {item!r:.60}")
        return value

    def duration(self, field: str) -> int | None:
        """Return a duration in microseconds, or None when absent."""
        value = self.take(field)
        return None if value is None else parse_duration(value, f"{self.where}: {field}")

    def choice(self, field: str, choices: tuple[str, ...], default: str | None = None) -> Any:
        """Return a field that must be one of `choices`."""
        value = self.take(field, default)
        if value not in choices:
            raise self.error(f"{field!r} must be one of {', '.join(choices)}; got {value!r}")
        return value

    def schema(self, field: str) -> dict[str, DType]:
        """Return a field that maps column names to types."""
        found = {}
        for name, dtype in self.mapping(field).items():
            check_identifier(name, f"{self.where}: column")
            found[name] = DType.parse(dtype, f"{self.where}: column {name!r}")
        return found

    def done(self) -> None:
        """Raise when a field is left that nobody asked for."""
        for field in self._left:
            raise self.error(f"unknown field {field!r}", hint="Check the spelling.")

    def error(self, reason: str, hint: str = "") -> DefinitionError:
        """Return an error that names the object."""
        return DefinitionError(f"{self.where}: {reason}", hint=hint)
