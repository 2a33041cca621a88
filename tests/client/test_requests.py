"""Requests and answers as values: what is sent, and what an answer means."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgpack
import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.client import requests as r
from mlpd.client.connection import build_head, parse_head
from mlpd.core.address import Address, parse_address
from mlpd.core.errors import (
    ConfigurationError,
    ConflictError,
    InternalError,
    InvalidRequestError,
    MlpdError,
    NotFoundError,
    OverloadedError,
    StorageFullError,
    UnavailableError,
    ValidationError,
    error_classes,
)


def body_of(request: r.Request) -> Any:
    assert request.body is not None
    return msgpack.unpackb(request.body)


def test_arrays_of_every_kind_become_lists() -> None:
    times = np.array(["2013-01-01T00:00:00", "NaT"], "datetime64[s]")
    data = {
        "i": np.arange(2, dtype=np.int32),
        "f": np.array([0.5, np.inf]),
        "t": times,
        "s": np.array(["a", "b"]),
        "b": np.array([True, False]),
        "l": (1, None),
        "o": np.array(["x", None], object),
    }
    request = r.batch("v1", "events", "clicks", data=data, fields={"all_or_nothing": None})
    assert body_of(request) == {
        "columns": {
            "i": [0, 1],
            "f": [0.5, float("inf")],
            "t": [1_356_998_400_000_000, None],
            "s": ["a", "b"],
            "b": [True, False],
            "l": [1, None],
            "o": ["x", None],
        }
    }


def test_rows_may_hold_numpy_scalars_and_aware_times() -> None:
    moment = datetime(2013, 1, 1, 1, tzinfo=timezone(timedelta(hours=1)))
    rows = ({"t": moment, "x": np.float32(0.5), "n": np.int64(3)},)
    request = r.batch("v1", "events", "clicks", data=rows, fields={})
    assert body_of(request) == {"rows": [{"t": 1_356_998_400_000_000, "x": 0.5, "n": 3}]}


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (datetime(2013, 1, 1), "naive_time"),
        (object(), "wrong_type"),
        ({1, 2}, "wrong_type"),
        (2**70, "wrong_type"),
    ],
    ids=["naive", "object", "set", "huge"],
)
def test_what_cannot_be_sent_is_refused_here(value: Any, code: str) -> None:
    with pytest.raises(ValidationError) as caught:
        r.pack({"x": value})
    assert caught.value.code == code


def test_a_frame_goes_as_arrow_with_its_options_in_the_query() -> None:
    frame = pl.DataFrame({"user": ["a"]})
    request = r.batch("v1", "events", "clicks", data=frame, fields={"all_or_nothing": True})
    assert request.path == "/v1/events/clicks?all_or_nothing=true"
    assert request.content_type == r.ARROW
    assert request.body is not None
    assert pl.read_ipc_stream(request.body).equals(frame)


@given(name=st.text(min_size=1))
def test_names_are_quoted_whole(name: str) -> None:
    if name.encode("utf-8", "ignore").decode() != name:
        return
    path = r.build_path(("v1", "models", name), {"a": name, "none": None})
    assert path.isascii()
    assert path.partition("?")[0].count("/") == 3
    assert not set(path) & set(" \r\n#")


def test_query_values_have_text_forms() -> None:
    at = datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)
    query = {"on": True, "names": ["a", "b"], "at": at, "n": 5}
    assert r.build_path(("x",), query) == "/x?on=true&names=a%2Cb&at=1000000&n=5"


def test_every_batch_of_events_may_be_repeated() -> None:
    plain = r.call("POST", "v1", "events", fields={}, repeatable=False)
    first, second = (r.with_idempotency_key(plain, None) for _ in range(2))
    assert first.repeatable
    assert first.headers["Idempotency-Key"] != second.headers["Idempotency-Key"]
    assert r.with_idempotency_key(plain, "mine").headers["Idempotency-Key"] == "mine"


@pytest.mark.parametrize("cls", [*error_classes().values()], ids=lambda c: c.__name__)
def test_errors_come_back_with_their_status_code_and_hint(cls: type[MlpdError]) -> None:
    error = cls("it failed", code="some_code", hint="do this", details={"a": 1})
    body = json.dumps({"error": error.to_dict()}).encode()
    found = r.read_error(r.Answer(cls.status, {}, body))
    assert found.to_dict() == error.to_dict()
    assert found.status == cls.status
    assert isinstance(found, MlpdError)


@pytest.mark.parametrize(
    ("status", "body", "cls", "code"),
    [
        (404, b'{"error": "no model"}', NotFoundError, "http_404"),
        (405, b'{"error": {"code": "x"}}', InvalidRequestError, "x"),
        (409, b'{"error": {"code": "c", "details": null}}', ConflictError, "c"),
        (502, b"<html>bad gateway</html>", InternalError, "http_502"),
        (507, b"", StorageFullError, "http_507"),
        (503, b"[1]", UnavailableError, "http_503"),
        (503, b'{"error": {"details": {"retry_after_s": 0.1}}}', OverloadedError, "http_503"),
    ],
)
def test_foreign_errors_are_read_as_well(
    status: int, body: bytes, cls: type[MlpdError], code: str
) -> None:
    found = r.read_error(r.Answer(status, {"retry-after": "2"}, body))
    assert (type(found), found.code) == (cls, code)
    assert found.details["retry_after_s"] in (2.0, 0.1)


def test_answers_are_read_by_their_media_type() -> None:
    def read(kind: str, body: bytes) -> Any:
        return r.read_answer(r.Answer(200, {"content-type": kind}, body))

    assert read("application/msgpack", msgpack.packb({"a": 1})) == {"a": 1}
    assert read("application/json; charset=utf-8", b'{"a": NaN}')["a"] != 0
    assert read("text/plain", "ä".encode()) == "ä"
    frame = pl.DataFrame({"a": [1]})
    assert read(r.ARROW, r.arrow_bytes(frame)).equals(frame)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://127.0.0.1:8700", Address("127.0.0.1", 8700)),
        ("http://localhost", Address("localhost", 80)),
        ("http://[::1]:8700/", Address("::1", 8700)),
        ("unix:/run/mlpd.sock", Address("localhost", 0, "/run/mlpd.sock")),
        ("unix:///run/mlpd.sock", Address("localhost", 0, "/run/mlpd.sock")),
    ],
)
def test_urls(url: str, address: Address) -> None:
    assert parse_address(url) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "url",
    ["", "127.0.0.1:8700", "https://x", "http://", "http://x:port", "http://x/path", "unix:x"],
)
def test_wrong_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_address(url)
    assert caught.value.code == "invalid_url"


def test_a_head_is_what_http_asks_for() -> None:
    request = r.Request("POST", "/v1/x?a=b", b"12", headers={"Idempotency-Key": "k"})
    head = build_head(Address("::1", 8700), request, "x-mlpd-by: me\r\n").decode()
    first, *lines, blank, end = head.split("\r\n")
    assert (first, blank, end) == ("POST /v1/x?a=b HTTP/1.1", "", "")
    assert set(lines) == {
        *("Host: [::1]:8700", "x-mlpd-by: me", "Accept: application/msgpack"),
        *("Content-Type: application/msgpack", "Content-Length: 2", "Idempotency-Key: k"),
    }


@pytest.mark.parametrize("value", ["a\r\nX: y", "ä", "\x00"])
def test_a_header_cannot_be_smuggled_in(value: str) -> None:
    request = r.Request("GET", "/", headers={"Idempotency-Key": value})
    with pytest.raises(MlpdError) as caught:
        build_head(Address("localhost", 1), request, "")
    assert caught.value.code == "invalid_header"


def test_heads_of_answers_are_read() -> None:
    assert parse_head(b"HTTP/1.1 200 OK\r\nContent-Length:  5 \r\nX-A: b:c") == (
        200,
        {"content-length": "5", "x-a": "b:c"},
    )
    with pytest.raises(InternalError):
        parse_head(b"SSH-2.0-OpenSSH_9")


def test_importing_the_client_imports_neither_aiohttp_nor_polars() -> None:
    code = (
        "import sys, mlpd.client; print([m for m in ('aiohttp', 'polars', 'mlpd.daemon') "
        "if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.strip() == "[]"
