"""Wire formats and shapes: what goes in comes out, and hostile input ends in a named error."""

import contextlib
import json
import math
from typing import Any

import msgpack
import numpy as np
import pytest
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.config import ServerConfig
from mlpd.core.errors import ForbiddenError, InvalidRequestError, ValidationError
from mlpd.core.media import JSON, MSGPACK
from mlpd.http.api import describe_routes
from mlpd.http.security import HostGuard
from mlpd.http.shapes import Field, Shape, rows_of_columns
from mlpd.http.wire import accepted, decode, encode

SHAPES = [r.body for r in describe_routes() if r.body is not None]
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)


@given(value=values, kind=st.sampled_from([JSON, MSGPACK]))
def test_values_come_out_as_they_went_in(value: Any, kind: str) -> None:
    assert same(decode(encode(value, kind), kind), value)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, float) and isinstance(right, float):
        return left == right or (math.isnan(left) and math.isnan(right))
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    return type(left) is type(right) and left == right


@given(
    body=st.binary(max_size=200), kind=st.sampled_from([JSON, MSGPACK, "application/octet-stream"])
)
def test_any_bytes_decode_or_are_refused(body: bytes, kind: str) -> None:
    with contextlib.suppress(InvalidRequestError):
        decode(body, kind)


@given(shape=st.sampled_from(SHAPES), data=st.data())
def test_any_value_has_a_shape_or_is_refused(shape: Shape, data: st.DataObject) -> None:
    keys = st.sampled_from([*shape.fields, "nonsense", b"bytes"])
    value = data.draw(values | st.dictionaries(keys, values, max_size=5))
    with contextlib.suppress(InvalidRequestError):
        assert shape.read(value).keys() == shape.fields.keys()


@pytest.mark.parametrize(
    "body",
    [
        b"\xdd\xff\xff\xff\xff",  # a list of 4 billion
        b"\xdf\xff\xff\xff\xff",  # a map of 4 billion
        b"\xc6\xff\xff\xff\xff",  # 4 GB of bytes
        b"\xdb\xff\xff\xff\xff",  # 4 GB of text
        b"\xc9\xff\xff\xff\xff\x01",  # 4 GB of extension
        b"\xd6\xff\x00\x00\x00\x01",  # a timestamp
        b"\x91" * 100_000 + b"\xc0",  # deep nesting
        b"\x81\x01\x02",  # an integer key
        b"\x81\x91\x01\x02",  # a list as key
        b"\xc1",
        b"\x01\x02",  # two values
    ],
    ids=lambda body: body[:6].hex(),
)
def test_hostile_msgpack_is_malformed(body: bytes) -> None:
    with pytest.raises(ValidationError) as caught:
        decode(body, MSGPACK)
    assert caught.value.code == "malformed_body"


def test_a_number_of_a_million_digits_is_malformed() -> None:
    with pytest.raises(ValidationError):
        decode(b"1" * 1_000_000, JSON)


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", JSON),
        ("*/*", JSON),
        ("application/msgpack", MSGPACK),
        ("application/x-msgpack, */*", MSGPACK),
        ("text/html", JSON),
    ],
)
def test_the_accept_header_chooses(accept: str, kind: str) -> None:
    assert accepted(make_mocked_request("GET", "/", headers={"Accept": accept})) == kind


def test_query_parameters_are_typed() -> None:
    shape = Shape(
        {
            "n": Field("integer", "."),
            "on": Field("flag", "."),
            "at": Field("time", "."),
            "names": Field("texts", "."),
            "text": Field("text", ".", choices=("a", "b")),
        }
    )
    query = {"n": "-5", "on": "true", "at": "1970-01-01T00:00:01Z", "names": "a,b", "text": "a"}
    assert shape.read_query(query) == {
        "n": -5,
        "on": True,
        "at": 1_000_000,
        "names": ["a", "b"],
        "text": "a",
    }
    assert shape.read_query({"at": "17"})["at"] == 17
    for wrong in (
        {"n": "five"},
        {"n": "9" * 99},
        {"on": "maybe"},
        {"at": "soon"},
        {"text": "c"},
        {"x": ""},
    ):
        with pytest.raises(InvalidRequestError):
            shape.read_query(wrong)


@given(rows=st.lists(st.fixed_dictionaries({"a": st.integers(), "b": st.text()}), min_size=1))
def test_columns_become_the_rows_that_they_were(rows: list[dict[str, Any]]) -> None:
    columns = {name: [row[name] for row in rows] for name in ("a", "b")}
    assert rows_of_columns("x", columns) == rows


OWN = "127.0.0.1:8700"
GUARD = HostGuard(ServerConfig(allowed_hosts=("ml.example",)))


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Host": OWN}, None),
        ({"Host": "localhost"}, None),
        ({"Host": "[::1]:8700"}, None),
        ({"Host": "ml.example"}, None),
        ({"Host": OWN, "Origin": f"http://{OWN}"}, None),
        ({"Host": OWN, "Sec-Fetch-Site": "same-origin"}, None),
        ({}, "foreign_host"),
        ({"Host": ""}, "foreign_host"),
        ({"Host": "evil.example"}, "foreign_host"),
        ({"Host": "127.0.0.1.evil.example"}, "foreign_host"),
        ({"Host": "evil.example@127.0.0.1"}, "foreign_host"),
        ({"Host": "["}, "foreign_host"),
        ({"Host": OWN, "Origin": "http://127.0.0.1:9999"}, "foreign_origin"),
        ({"Host": OWN, "Origin": "http://localhost:8700"}, "foreign_origin"),
        ({"Host": OWN, "Origin": "null"}, "foreign_origin"),
        ({"Host": OWN, "Origin": "http://["}, "foreign_origin"),
        ({"Host": OWN, "Sec-Fetch-Site": "cross-site"}, "foreign_origin"),
    ],
    ids=str,
)
def test_the_guard(method: str, headers: dict[str, str], code: str | None) -> None:
    request = make_mocked_request(method, "/", headers=headers)
    if code is None:
        GUARD.check(request)
        return
    with pytest.raises(ForbiddenError) as caught:
        GUARD.check(request)
    assert caught.value.code == code


def test_encoding_takes_numpy_and_refuses_the_unknown() -> None:
    value = {"a": np.arange(3), "b": np.float64(0.5), "c": b"\x01"}
    assert json.loads(encode(value, JSON)) == {"a": [0, 1, 2], "b": 0.5, "c": "0x01"}
    assert msgpack.unpackb(encode(value, MSGPACK)) == {"a": [0, 1, 2], "b": 0.5, "c": b"\x01"}
    with pytest.raises(TypeError):
        encode({"a": object()}, JSON)
