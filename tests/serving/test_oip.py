import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn
from numpy.typing import NDArray

from mlpd.core.columns import DType
from mlpd.core.errors import ValidationError
from mlpd.core.vector import CategoricalEncoder, VectorFeature, Vectorizer
from mlpd.serving.datatypes import DATATYPES
from mlpd.serving.oip import (
    InferRequest,
    build_response,
    check_outputs,
    features_of,
    named_inputs,
)
from mlpd.serving.oip import parse_request as parse
from mlpd.serving.oip_binary import Blobs
from mlpd.serving.oip_tensors import Tensor, build_tensor, rank_classes
from mlpd.serving.oip_tensors import parse_tensor as parse_one
from mlpd.serving.package import ModelPackage, Signature, TensorSpec

VECTORIZER = Vectorizer(
    (
        VectorFeature("carrier", DType.STRING, CategoricalEncoder(("UA", "AA"))),
        VectorFeature("hour", DType.INT64),
        VectorFeature("delay", DType.FLOAT64),
        VectorFeature("late", DType.BOOL),
        VectorFeature("gate", DType.INT64, CategoricalEncoder((7, 9))),
    )
)
TRAINED = ModelPackage(
    name="risk",
    version=3,
    digest="sha256:0",
    onnx=b"",
    signature=Signature.of_vectors(VECTORIZER, 1),
    link={"kind": "identity"},
)
USER = ModelPackage(
    name="user",
    version=1,
    digest="sha256:1",
    onnx=b"",
    signature=Signature(
        (TensorSpec("x", "FP32", (-1, 2)), TensorSpec("s", "BYTES", (-1,))),
        (TensorSpec("y", "FP32", (-1, 2)), TensorSpec("t", "BYTES", (-1,))),
    ),
)


def parse_request(document: object, blobs: bytes = b"") -> InferRequest:
    return parse(document, Blobs(blobs))


def parse_tensor(document: object, blobs: bytes = b"") -> tuple[str, Tensor]:
    return parse_one(document, Blobs(blobs))


def tensor(name: str, datatype: str, shape: list[int], data: list[Any], **rest: Any) -> Any:
    return {"name": name, "datatype": datatype, "shape": shape, "data": data, **rest}


def values(data: list[Any], datatype: str = "FP64", shape: Any = None) -> NDArray[Any]:
    shape = [len(data)] if shape is None else shape
    return parse_tensor(tensor("x", datatype, shape, data))[1].values


def by_feature(**changes: Any) -> dict[str, Any]:
    inputs = {
        "carrier": ("BYTES", ["AA", "ZZ"]),
        "hour": ("INT32", [7, 23]),
        "delay": ("FP32", [1.5, None]),
        "late": ("BOOL", [True, False]),
        "gate": ("INT64", [9, 8]),
        **changes,
    }
    return {"inputs": [tensor(n, t, [len(d)], d) for n, (t, d) in inputs.items() if d is not None]}


ARRAYS = st.sampled_from(sorted(DATATYPES)).flatmap(
    lambda datatype: st.tuples(
        st.just(datatype),
        stn.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3).flatmap(
            lambda shape: stn.arrays(
                DATATYPES[datatype], shape, elements=st.text() if datatype == "BYTES" else None
            )
        ),
    )
)


@given(ARRAYS, st.booleans())
def test_a_tensor_survives_json_flat_and_nested(
    array: tuple[str, NDArray[Any]], nested: bool
) -> None:
    datatype, sent = array
    document = json.loads(json.dumps(build_tensor("x", sent, datatype)[0]))
    if nested and sent.ndim:
        document["data"] = sent.tolist()
    name, got = parse_tensor(document)
    assert (name, got.datatype, got.values.shape) == ("x", datatype, sent.shape)
    assert got.values.dtype == sent.dtype
    if sent.dtype.kind == "f":
        sent = np.where(np.isnan(sent), sent.dtype.type(math.nan), sent)
        assert got.values.tobytes() == np.asarray(sent).tobytes()
    else:
        assert np.array_equal(got.values, sent)


def test_null_reads_as_nan_and_bare_nan_and_infinity_pass() -> None:
    data = json.loads("[null, NaN, Infinity, -Infinity, -0.0, 1]")
    got = values(data)
    assert np.isnan(got[:2]).all()
    assert got[2:].tolist() == [math.inf, -math.inf, -0.0, 1.0]
    assert math.copysign(1, got[4]) == -1
    assert values([math.inf, None], "FP16").dtype == np.float16


@pytest.mark.parametrize(
    ("datatype", "data", "index"),
    [
        ("FP64", [1.0, "2"], 1),
        ("FP64", [True], 0),
        ("FP64", [1, 10**400], 1),
        ("FP32", [0.0, 1e39], 1),
        ("FP16", [70000.0], 0),
        ("INT8", [127, 128], 1),
        ("UINT8", [0, -1], 1),
        ("UINT64", [2**64], 0),
        ("INT64", [1.0], 0),
        ("INT64", [1, None], 1),
        ("INT64", [1, math.nan], 1),
        ("BOOL", [math.nan], 0),
        ("INT32", [True], 0),
        ("BOOL", [True, 1], 1),
        ("BYTES", ["a", None], 1),
        ("BYTES", [1], 0),
        ("FP64", [1.0, [2.0]], 1),
    ],
)
def test_a_value_outside_its_datatype_is_named(datatype: str, data: list[Any], index: int) -> None:
    with pytest.raises(
        ValidationError, match=f"'x' takes {datatype}, got .* at index {index}"
    ) as e:
        values(data, datatype)
    assert (e.value.code, e.value.details) == ("wrong_value", {"index": index})


@pytest.mark.parametrize(
    ("shape", "data", "message"),
    [
        ([2, 3], [1, 2, 3, 4, 5], r"has 5 values, but its shape \[2, 3\] takes 6"),
        ([2], [], r"has 0 values, but its shape \[2\] takes 2"),
        ([2, 2], [[1, 2], [3]], r"has 1 elements at nesting depth 1, .* takes 2"),
        ([2, 2], [[1, 2], 3], r"has no list at nesting depth 1"),
        ([3], [[1, 2, 3]], r"has 1 elements at nesting depth 0, .* takes 3"),
        ([1, 3], [[[1, 2, 3]]], r"has 1 elements at nesting depth 1"),
        ([1], [[1.0]], r"got list"),
        ([10**12], [1], r"takes 1000000000000"),
    ],
)
def test_data_that_doesnt_fill_the_shape_is_explained(
    shape: list[int], data: list[Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        values(data, "FP64", shape)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("x", "not an object"),
        (tensor("", "FP64", [1], [1]), "has the name ''"),
        (tensor("x", "FP128", [1], [1]), "unknown datatype 'FP128'"),
        (tensor("x", "BF16", [1], [1]), "unknown datatype 'BF16'"),
        ({"name": "x", "shape": [1], "data": [1]}, "unknown datatype None"),
        (tensor("x", "FP64", [-1], [1]), r"shape \[-1\]"),
        (tensor("x", "FP64", [True], [1]), r"shape \[True\]"),
        (tensor("x", "FP64", [1] * 9, [1]), "shape"),
        ({"name": "x", "datatype": "FP64", "data": [1]}, "shape None"),
        ({"name": "x", "datatype": "FP64", "shape": [1]}, "has no data"),
        (tensor("x", "FP64", [1], {"0": 1}), "has no data"),  # type: ignore[arg-type]
        (tensor("x", "FP64", [1], [1], parameters={"binary_data_size": 8}), "two kinds"),
        (tensor("x", "FP64", [1], [], parameters={"shared_memory_region": "a"}), "shared memory"),
        (tensor("x", "FP64", [0, 2**31, 2**31], []), "sizes of at least 0"),
        (tensor("x", "FP64", [1], [1], parameters=[]), "parameters"),
    ],
)
def test_a_malformed_tensor_is_explained(document: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        parse_tensor(document)


def test_an_answer_echoes_the_id_and_gives_the_usual_outputs() -> None:
    request = parse_request({"id": "42", **by_feature()})
    outputs = {"score": np.array([[0.25], [math.nan]]), "raw_score": np.array([[1.0], [2.0]])}
    answer = json.loads(json.dumps(build_response(request, TRAINED, outputs)[0]))
    assert answer["outputs"][0].pop("data") == [0.25, pytest.approx(math.nan, nan_ok=True)]
    assert answer == {
        "model_name": "risk",
        "model_version": "3",
        "id": "42",
        "outputs": [{"name": "score", "datatype": "FP64", "shape": [2, 1]}],
    }


def test_outputs_come_as_asked_and_in_that_order() -> None:
    request = parse_request({**by_feature(), "outputs": [{"name": "raw_score"}, {"name": "score"}]})
    check_outputs(request, TRAINED)
    outputs = {"score": np.array([[0.5]]), "raw_score": np.array([[0.0]])}
    answer, _ = build_response(request, TRAINED, outputs)
    assert [output["name"] for output in answer["outputs"]] == ["raw_score", "score"]
    assert "id" not in answer


def test_an_unknown_output_is_refused_before_anything_runs() -> None:
    request = parse_request({**by_feature(), "outputs": [{"name": "probability"}]})
    with pytest.raises(ValidationError, match="it has score, raw_score"):
        check_outputs(request, TRAINED)
    with pytest.raises(ValidationError, match="it has y, t"):
        check_outputs(request, USER)


def test_classification_ranks_the_largest_with_ties_by_index() -> None:
    scores = np.array([[0.1, 0.7, 0.2], [0.5, 0.25, 0.5]])
    assert rank_classes(scores, 2).tolist() == [["0.7:1", "0.2:2"], ["0.5:0", "0.5:2"]]
    assert rank_classes(scores[0], 9).shape == (3,)
    request = parse_request(
        {**by_feature(), "outputs": [{"name": "score", "parameters": {"classification": 1}}]}
    )
    answer, _ = build_response(request, TRAINED, {"score": scores})
    assert answer["outputs"] == [tensor("score", "BYTES", [2, 1], ["0.7:1", "0.5:0"])]


def test_features_by_name_are_encoded_with_the_frozen_categories() -> None:
    features = features_of(parse_request(by_feature()), TRAINED)
    expected = [[1.0, 7.0, 1.5, 1.0, 1.0], [math.nan, 23.0, math.nan, 0.0, math.nan]]
    assert np.array_equal(features, np.array(expected), equal_nan=True)
    column = by_feature()
    for document in column["inputs"]:
        document["shape"].append(1)
    assert features_of(parse_request(column), TRAINED).tobytes() == features.tobytes()


def test_the_features_tensor_is_taken_as_it_is() -> None:
    data = [[1.0, 7, 1.5, 1, None], [0, 1, 2, 3, 4]]
    request = parse_request({"inputs": [tensor("features", "FP64", [2, 5], data)]})
    assert features_of(request, TRAINED).tolist()[1] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_model_whose_only_feature_is_called_features_takes_it_by_name() -> None:
    vectorizer = Vectorizer((VectorFeature("features", DType.INT64),))
    package = dataclasses.replace(TRAINED, signature=Signature.of_vectors(vectorizer, 1))
    request = parse_request({"inputs": [tensor("features", "INT64", [2], [5, 6])]})
    assert features_of(request, package).tolist() == [[5.0], [6.0]]


@pytest.mark.parametrize(
    ("document", "code", "message"),
    [
        (
            [tensor("features", "FP64", [1, 4], [0.0] * 4)],
            "wrong_shape",
            r"5\], got \[1, 4\]",
        ),
        ([tensor("features", "FP64", [5], [0.0] * 5)], "wrong_shape", r"got \[5\]"),
        ([tensor("features", "FP32", [1, 5], [0.0] * 5)], "wrong_datatype", "is FP64, got FP32"),
        ([tensor("feature", "FP64", [1, 5], [0.0] * 5)], "unknown_input", "no input 'feature'"),
        (by_feature(late=("BOOL", None))["inputs"], "missing_input", "needs input 'late'"),
        (by_feature(extra=("FP64", [1.0]))["inputs"], "unknown_input", "no input 'extra'"),
        (by_feature(hour=("INT64", [1]))["inputs"], "wrong_shape", r"\[1, 2\] rows"),
        (by_feature(carrier=("INT64", [1, 2]))["inputs"], "wrong_type", "'carrier' is int64"),
        (by_feature(delay=("BYTES", ["a", "b"]))["inputs"], "wrong_type", "'delay' is string"),
        (by_feature(gate=("FP64", [7.0, 9.0]))["inputs"], "wrong_type", "'gate' is float64"),
        (by_feature(gate=("UINT64", [7, 2**63]))["inputs"], "wrong_value", "over 2"),
    ],
)
def test_inputs_that_dont_fit_the_model_are_explained(
    document: list[Any], code: str, message: str
) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        features_of(parse_request({"inputs": document}), TRAINED)
    assert caught.value.code == code


def test_a_feature_tensor_has_one_value_per_row() -> None:
    document = by_feature()
    document["inputs"][1]["shape"] = [1, 2]
    with pytest.raises(ValidationError, match=r"expected \[n\] or \[n, 1\]"):
        features_of(parse_request(document), TRAINED)


def test_a_users_model_takes_its_own_tensors() -> None:
    inputs = [tensor("s", "BYTES", [1], ["ü"]), tensor("x", "FP32", [1, 2], [1, 0.1])]
    found = named_inputs(parse_request({"inputs": inputs}), USER)
    assert list(found) == ["x", "s"]
    assert found["x"].tolist() == [[1.0, float(np.float32(0.1))]]
    answer, _ = build_response(
        parse_request({"inputs": inputs}), USER, {"y": found["x"], "t": np.array([b"\xc3"], object)}
    )
    assert [output["datatype"] for output in answer["outputs"]] == ["FP32", "BYTES"]
    assert answer["outputs"][1]["data"] == ["\ufffd"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": None}, "`inputs` is a list"),
        ({"inputs": []}, "`inputs` is a list"),
        ({"inputs": [tensor("x", "FP64", [1], [1])] * 2}, "there twice"),
        ({"id": 7}, "`id` is a string"),
        ({"parameters": []}, "is an object"),
        ({"parameters": {"binary_data_output": 1}}, "`binary_data_output` .* true or false"),
        ({"parameters": {"timeout": "1s"}}, "`timeout` is a whole number"),
        ({"parameters": {"timeout": -1}}, "`timeout` is a whole number"),
        ({"parameters": {"priority": True}}, "`priority` is a whole number"),
        ({"outputs": {}}, "`outputs` is a list"),
        ({"outputs": ["score"]}, "an object with a `name`"),
        (
            {"outputs": [{"name": "score", "parameters": {"binary_data": "yes"}}]},
            "`binary_data` of output 'score'",
        ),
        (
            {"outputs": [{"name": "score", "parameters": {"shared_memory_region": "r"}}]},
            "shared memory",
        ),
        ({"outputs": [{"name": "score", "parameters": {"classification": 0}}]}, "from 1"),
    ],
)
def test_a_malformed_request_is_explained(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        parse_request({**by_feature(), **changes})


def test_a_body_that_is_no_object_is_explained() -> None:
    with pytest.raises(ValidationError, match="not a JSON object"):
        parse_request([1])


def test_unknown_parameters_are_ignored_and_the_timeout_is_read() -> None:
    parameters = {"timeout": 2500, "priority": 3, "anything": [1]}
    request = parse_request({**by_feature(), "parameters": parameters, "more": 1})
    assert request.timeout_us == 2500
    assert parse_request({**by_feature(), "parameters": {"timeout": 0}}).timeout_us is None
    outputs = [{"name": "score", "parameters": {"binary_data": False}}]
    assert parse_request({**by_feature(), "outputs": outputs}).outputs[0].classes is None
