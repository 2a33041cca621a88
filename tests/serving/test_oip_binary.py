"""Tensors as bytes after the JSON: every datatype, every way to get them wrong."""

import contextlib
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.serving.datatypes import DATATYPES
from mlpd.serving.oip import parse_request
from mlpd.serving.oip_binary import Blobs, read_values, write_values
from mlpd.serving.oip_tensors import build_tensor, parse_tensor

ARRAYS = st.sampled_from(sorted(DATATYPES)).flatmap(
    lambda datatype: st.tuples(
        st.just(datatype),
        stn.arrays(
            DATATYPES[datatype],
            stn.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3),
            elements=st.text() if datatype == "BYTES" else None,
        ),
    )
)


def read(data: bytes, shape: tuple[int, ...], datatype: str) -> NDArray[Any]:
    return read_values(memoryview(data), shape, datatype, "input 'x'")


@given(st.lists(ARRAYS, min_size=1, max_size=4))
def test_tensors_survive_as_bytes_one_after_the_other(
    arrays: list[tuple[str, NDArray[Any]]],
) -> None:
    built = [build_tensor(str(i), v, t, binary=True) for i, (t, v) in enumerate(arrays)]
    blobs = Blobs(b"".join(data for _, data in built))
    for i, ((datatype, sent), (document, data)) in enumerate(zip(arrays, built, strict=True)):
        assert document["parameters"] == {"binary_data_size": len(data)}
        name, got = parse_tensor(document, blobs)
        assert (name, got.datatype, got.values.dtype) == (str(i), datatype, sent.dtype)
        assert got.values.shape == sent.shape
        if datatype == "BYTES":
            assert got.values.tolist() == sent.tolist()
        else:
            assert got.values.tobytes() == np.ascontiguousarray(sent).tobytes()
            assert got.values.flags.aligned
            assert got.values.flags.c_contiguous
    blobs.check_empty()


def test_the_bytes_are_little_endian_and_texts_have_their_length() -> None:
    assert write_values(np.array([1, -2], np.int16)) == b"\x01\x00\xfe\xff"
    assert write_values(np.array([1, 2], ">u4")) == b"\x01\x00\x00\x00\x02\x00\x00\x00"
    texts = np.array(["ü", "", b"\xff"], object)
    assert write_values(texts) == b"\x02\0\0\0\xc3\xbc\0\0\0\0\x01\0\0\0\xff"
    assert read(b"\x02\0\0\0\xc3\xbc\0\0\0\0", (2,), "BYTES").tolist() == ["ü", ""]
    assert math.isnan(read(np.float16(math.nan).tobytes(), (1,), "FP16")[0])


@pytest.mark.parametrize(
    ("data", "shape", "datatype", "code", "message"),
    [
        (b"\0" * 7, (1,), "FP64", "wrong_count", r"has 7 bytes, but its shape \[1\] takes 8"),
        (b"\0" * 16, (1,), "FP64", "wrong_count", "takes 8"),
        (b"", (2**31,) * 8, "INT8", "wrong_count", "has 0 bytes"),
        (b"\0\1\2", (3,), "BOOL", "wrong_value", "got 2 at index 2"),
        (b"\0\0\0\0", (2,), "BYTES", "wrong_count", "has 1 values"),
        (b"\0\0\0\0" * 3, (2,), "BYTES", "wrong_count", "has more than 2 values"),
        (b"\0\0\0\0" * 100_000, (2,), "BYTES", "wrong_count", "has more than 2 values"),
        (b"\5\0\0\0abc", (1,), "BYTES", "wrong_value", "cut off in value 0"),
        (b"\0\0\0\0\5\0", (2,), "BYTES", "wrong_value", "cut off in value 1"),
        (b"\xff\xff\xff\xffabc", (1,), "BYTES", "wrong_value", "cut off in value 0"),
        (b"\1\0\0\0\xff", (1,), "BYTES", "wrong_value", "no UTF-8 at index 0"),
    ],
)
def test_bytes_that_are_not_the_tensor_are_explained(
    data: bytes, shape: tuple[int, ...], datatype: str, code: str, message: str
) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        read(data, shape, datatype)
    assert caught.value.code == code


@pytest.mark.parametrize("size", [9, -1, 2**70, True, "8", 1.0])
def test_a_size_that_the_body_hasnt_is_explained(size: Any) -> None:
    with pytest.raises(ValidationError, match="but 8 bytes are left") as caught:
        Blobs(b"\0" * 8).take(size, "input 'x'")
    assert caught.value.code == "invalid_tensor"


def test_bytes_that_belong_to_no_input_are_refused() -> None:
    document = {
        "inputs": [
            {
                "name": "x",
                "datatype": "INT8",
                "shape": [1],
                "parameters": {"binary_data_size": 1},
            }
        ]
    }
    assert parse_request(document, Blobs(b"\7")).inputs["x"].values.tolist() == [7]
    with pytest.raises(ValidationError, match="1 bytes of the body belong to no input"):
        parse_request(document, Blobs(b"\7\7"))


@given(st.binary(max_size=40), st.sampled_from(sorted(DATATYPES)), st.integers(0, 5))
def test_any_bytes_are_read_or_refused(data: bytes, datatype: str, count: int) -> None:
    with contextlib.suppress(ValidationError):
        assert read(data, (count,), datatype).shape == (count,)
