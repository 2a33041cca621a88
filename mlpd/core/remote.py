"""Errors of other processes: from the body of an answer back to the class that was raised there."""

import json
from collections.abc import Mapping
from typing import Any

from mlpd.core.errors import (
    ConflictError,
    DeadlineExceededError,
    ForbiddenError,
    InternalError,
    InvalidRequestError,
    MisdirectedError,
    MlpdError,
    NotFoundError,
    OverloadedError,
    StorageFullError,
    TooLargeError,
    UnauthorizedError,
    UnavailableError,
)


def error_of(status: int, body: bytes, retry_after: str = "") -> MlpdError:
    """Return the error of an answer, in the class of its status, with its code and hint.

    `retry_after`: that header, whose seconds go into the details.  An answer that isn't ours has
    the code `http_STATUS`.
    """
    shape = _error_shape(status, body)
    error = _class_of(status, shape["details"])(
        shape["message"], code=shape["code"], hint=shape["hint"], details=shape["details"]
    )
    if retry_after.isdecimal():
        error.details.setdefault("retry_after_s", float(retry_after))
    return error


def _error_shape(status: int, body: bytes) -> dict[str, Any]:
    """Return code, message, hint and details; also of answers that aren't ours."""
    try:
        found = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        found = body[:200].decode("utf-8", "replace")
    if not isinstance(found, dict):
        found = {"message": str(found)}
    details = found.get("details")
    return {
        "code": str(found.get("code", f"http_{status}")),
        "message": str(found.get("message", f"the daemon answered {status}")),
        "hint": str(found.get("hint", "")),
        "details": details if isinstance(details, dict) else {},
    }


_CLASSES: Mapping[int, type[MlpdError]] = {
    error.status: error
    for error in (
        *(InvalidRequestError, UnauthorizedError, ForbiddenError, NotFoundError, ConflictError),
        *(TooLargeError, MisdirectedError, DeadlineExceededError, StorageFullError),
        *(InternalError, UnavailableError),
    )
}


def _class_of(status: int, details: Mapping[str, Any]) -> type[MlpdError]:
    if status == OverloadedError.status and "retry_after_s" in details:
        return OverloadedError
    client_error = status < InternalError.status
    return _CLASSES.get(status, InvalidRequestError if client_error else InternalError)
