"""The one error tree: every error mlpd raises on purpose carries a stable code and a next step.

    MlpdError
    ├── InvalidRequestError     400  the request can't be understood or contradicts itself
    │   ├── ValidationError     400  a value has the wrong type, range, name or shape
    │   └── DefinitionError     400  a definition is wrong: names the object and the line
    ├── UnauthorizedError       401  no token, or an unknown one
    ├── ForbiddenError          403  a foreign Host or Origin, or a missing scope
    ├── NotFoundError           404  no such source, feature, route, model, run ...
    ├── ConflictError           409  the state moved on, or the name is taken
    ├── TooLargeError           413  a body, batch or value is over its limit
    ├── MisdirectedError        421  another shard owns the key, or the sender's map is old
    ├── OverloadedError         503  a bounded queue is full: retry after `retry_after_s`
    ├── DeadlineExceededError   504  the deadline passed before the work was done
    ├── StorageFullError        507  the disk is full or failing: reads go on
    ├── ConfigurationError           a setting is unknown or out of range (exit code 2)
    ├── UnavailableError        503  a missing extra, a port or data directory in use
    └── InternalError           500  a broken invariant: a bug in mlpd, always logged

A message names the thing, what was expected, and the hint says what to do.  `code` is
`snake_case`, stable across releases, and narrower than the class, such as `unknown_feature`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar


class MlpdError(Exception):
    """Root of all errors raised on purpose; `status` is the HTTP status it maps to."""

    default_code: ClassVar[str] = "error"
    status: ClassVar[int] = 500

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        hint: str = "",
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.hint = hint
        self.details: dict[str, Any] = dict(details or {})

    def to_dict(self) -> dict[str, Any]:
        """Return the wire shape `{"code", "message", "hint", "details"}`."""
        return {
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "details": self.details,
        }


class InvalidRequestError(MlpdError):
    """The request can't be understood or contradicts itself."""

    default_code = "invalid_request"
    status = 400


class ValidationError(InvalidRequestError):
    """A value has the wrong type, range, name or shape."""

    default_code = "validation"


class DefinitionError(InvalidRequestError):
    """A definition is wrong."""

    default_code = "definition"


class UnauthorizedError(MlpdError):
    """No token, or an unknown one."""

    default_code = "unauthorized"
    status = 401


class ForbiddenError(MlpdError):
    """A foreign Host or Origin, or a token without the route's scope."""

    default_code = "forbidden"
    status = 403


class NotFoundError(MlpdError):
    """The named thing does not exist."""

    default_code = "not_found"
    status = 404


class ConflictError(MlpdError):
    """The state has moved on since the caller looked, or the name is taken."""

    default_code = "conflict"
    status = 409


class TooLargeError(MlpdError):
    """A body, batch or value is over its limit."""

    default_code = "too_large"
    status = 413


class MisdirectedError(MlpdError):
    """Another shard owns the key, or the sender's map is old; nothing was stored.

    The details carry `epoch`, and for a key `slot`, `shard` and `url` of its owner.
    """

    default_code = "wrong_shard"
    status = 421


class OverloadedError(MlpdError):
    """A bounded queue is full; `retry_after_s` in the details says when to come back."""

    default_code = "overloaded"
    status = 503


class DeadlineExceededError(MlpdError):
    """The caller's deadline passed before the work was done; nothing was executed."""

    default_code = "deadline_exceeded"
    status = 504


class StorageFullError(MlpdError):
    """The disk is full or failing: reads go on, this write was not made."""

    default_code = "storage_full"
    status = 507


class ConfigurationError(MlpdError):
    """A setting is unknown or out of range; the process refuses to start."""

    default_code = "configuration"


class UnavailableError(MlpdError):
    """Something this needs isn't there: an extra, a free port, a free data directory."""

    default_code = "unavailable"
    status = 503


class InternalError(MlpdError):
    """A broken invariant: a bug in mlpd, never the caller's fault."""

    default_code = "internal"


def error_classes() -> dict[str, type[MlpdError]]:
    """Return every class of the tree by name (the client turns an answer back into its class)."""
    found: dict[str, type[MlpdError]] = {}
    queue: list[type[MlpdError]] = [MlpdError]
    while queue:
        cls = queue.pop()
        found[cls.__name__] = cls
        queue.extend(cls.__subclasses__())
    return found
