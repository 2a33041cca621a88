"""From LightGBM's training to the protocol's answer: the whole serving path, to the bit."""

import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Any

import lightgbm
import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray

from mlpd.core.columns import DType
from mlpd.core.convert import column_of
from mlpd.core.errors import DeadlineExceededError, NotFoundError, ValidationError
from mlpd.core.vector import Vectorizer
from mlpd.serving.batcher import Batcher
from mlpd.serving.infer import prepare, run
from mlpd.serving.oip import build_response
from mlpd.serving.oip_binary import Blobs
from mlpd.serving.oip_metadata import (
    error_document,
    index_entry,
    model_config,
    model_metadata,
    model_statistics,
    server_metadata,
)
from mlpd.serving.package import GoldenRows, ModelPackage, Signature
from mlpd.serving.pool import SessionPool
from mlpd.serving.predictor import ServedModel
from mlpd.serving.sessions import Session
from mlpd.training.exporter import export_model

Floats = NDArray[np.float64]
ROWS = 1500
CARRIERS = ["UA", "AA", "B6", "DL", "ü"]


@dataclasses.dataclass(frozen=True)
class Trained:
    booster: lightgbm.Booster
    package: ModelPackage
    vectors: Floats
    carriers: list[str]
    delays: list[float]


@pytest.fixture(scope="module", params=[1, 3])
def trained(request: pytest.FixtureRequest) -> Trained:
    rng = np.random.default_rng(11)
    carriers = rng.choice(CARRIERS, ROWS).tolist()
    delays = rng.normal(size=ROWS).round(3).tolist()
    columns = {
        "carrier": column_of(DType.STRING, carriers),
        "delay": column_of(DType.FLOAT64, delays),
    }
    vectorizer = Vectorizer.fit(columns, ["carrier"])
    vectors = vectorizer.vectorize(columns)
    latent = vectors[:, 1] + (vectors[:, 0] % 2) + rng.normal(size=ROWS)
    outputs: int = request.param
    label = np.digitize(latent, [0.5] if outputs == 1 else [0.0, 1.0])
    params: dict[str, Any] = {"objective": "binary", "sigmoid": 1.3}
    if outputs > 1:
        params = {"objective": "multiclass", "num_class": outputs}
    data = lightgbm.Dataset(vectors, label, categorical_feature=[0])
    quiet = {"verbosity": -1, "num_threads": 1, "min_data_per_group": 1, "cat_smooth": 1}
    text = lightgbm.train(params | quiet, data, num_boost_round=20).model_to_string()
    exported = export_model(text)
    package = ModelPackage(
        name="risk",
        version=3,
        digest=f"sha256:{outputs}",
        onnx=exported.onnx,
        signature=Signature.of_vectors(vectorizer, exported.outputs),
        link=exported.link,
        metadata={"service": "flight_risk"},
    )
    raw = Session(package).run(vectors[:16])
    score = Session(package).score(raw)
    golden = GoldenRows({"features": vectors[:16]}, {"raw_score": raw, "score": score})
    package = dataclasses.replace(package, golden=golden)
    return Trained(lightgbm.Booster(model_str=text), package, vectors, carriers, delays)


@pytest_asyncio.fixture
async def served(trained: Trained) -> AsyncIterator[ServedModel]:
    pool, batcher = SessionPool(), Batcher()
    yield ServedModel(await pool.load(trained.package), batcher)
    await batcher.close()
    await pool.close()


async def infer(
    served: ServedModel, document: Any, *, deadline_s: float | None = None
) -> dict[str, Any]:
    prepared = prepare(served.package, document, Blobs())
    outputs = await run(served, prepared, deadline_s=deadline_s)
    return build_response(prepared.request, served.package, outputs)[0]


async def test_scores_equal_lightgbms_predict_to_the_bit(
    served: ServedModel, trained: Trained
) -> None:
    for raw_score in (False, True):
        expected = trained.booster.predict(trained.vectors, raw_score=raw_score, num_threads=1)
        reply = await served.predict(trained.vectors)
        got = reply.raw if raw_score else reply.score
        assert got.tobytes() == np.ascontiguousarray(expected).reshape(ROWS, -1).tobytes()
        one = await served.predict(trained.vectors[7:8])
        assert (one.raw if raw_score else one.score).tobytes() == got[7:8].tobytes()


async def test_vectors_and_named_features_give_the_same_answer(
    served: ServedModel, trained: Trained
) -> None:
    count = 40
    width = trained.vectors.shape[1]
    vectors = trained.vectors[:count]
    carriers, delays = trained.carriers[:count], trained.delays[:count]
    bodies: list[dict[str, Any]] = [
        {"inputs": [_tensor("features", "FP64", [count, width], vectors.ravel().tolist())]},
        {"inputs": [_tensor("features", "FP64", [count, width], vectors.tolist())]},
        {
            "inputs": [
                _tensor("delay", "FP64", [count], delays),
                _tensor("carrier", "BYTES", [count, 1], carriers),
            ]
        },
    ]
    outputs = [{"name": "score"}, {"name": "raw_score"}]
    answers = [
        await infer(served, json.loads(json.dumps({**body, "outputs": outputs}))) for body in bodies
    ]
    assert answers[0] == answers[1] == answers[2]
    expected = await served.predict(vectors)
    found = [np.array(output["data"]).reshape(output["shape"]) for output in answers[0]["outputs"]]
    assert found[0].tobytes() == expected.score.tobytes()
    assert found[1].tobytes() == expected.raw.tobytes()


async def test_a_request_that_has_expired_runs_nothing(
    served: ServedModel, trained: Trained
) -> None:
    width = trained.vectors.shape[1]
    body = {"inputs": [_tensor("features", "FP64", [1, width], [0.0] * width)]}
    before = served.session.statistics.execution_count
    with pytest.raises(DeadlineExceededError):
        await infer(served, body, deadline_s=0.0)
    with pytest.raises(DeadlineExceededError):
        await infer(served, {**body, "parameters": {"timeout": 1_000_000}}, deadline_s=0.0)
    assert served.session.statistics.execution_count == before
    await infer(served, {**body, "parameters": {"timeout": 10_000_000}})
    with pytest.raises(ValidationError, match="no output"):
        await infer(served, {**body, "outputs": [{"name": "y"}]})
    assert served.session.statistics.execution_count == before + 1


async def test_metadata_config_and_statistics_have_the_protocols_form(
    served: ServedModel, trained: Trained
) -> None:
    package = served.package
    outputs = package.signature.outputs[0].shape[1]
    await served.predict(trained.vectors[:2])
    metadata = json.loads(json.dumps(model_metadata(package, [10, 3])))
    assert metadata["versions"] == ["3", "10"]
    assert metadata["inputs"] == [{"name": "features", "datatype": "FP64", "shape": [-1, 2]}]
    assert metadata["outputs"] == [{"name": "score", "datatype": "FP64", "shape": [-1, outputs]}]
    assert sorted(metadata["parameters"]["features"][0]["categories"]) == sorted(CARRIERS)
    assert metadata["parameters"]["service"] == "flight_risk"
    config = json.loads(json.dumps(model_config(package, [3])))
    assert config["max_batch_size"] == 256
    assert config["input"] == [{"name": "features", "data_type": "TYPE_FP64", "dims": [2]}]
    assert config["output"] == [{"name": "score", "data_type": "TYPE_FP64", "dims": [outputs]}]
    assert {"version_policy", "dynamic_batching", "instance_group"} <= config.keys()
    (stats,) = json.loads(json.dumps(model_statistics([(package, served.session.statistics)])))[
        "model_stats"
    ]
    assert (stats["name"], stats["version"], stats["inference_count"]) == ("risk", "3", 2)
    assert list(stats["inference_stats"]) == [
        *("success", "fail", "queue", "compute_input", "compute_infer", "compute_output"),
        *("cache_hit", "cache_miss"),
    ]
    assert stats["inference_stats"]["success"]["ns"] > 0
    assert stats["batch_stats"][0]["batch_size"] == 2
    assert stats["batch_stats"][0]["compute_infer"]["count"] == 1


def test_the_server_advertises_what_it_serves() -> None:
    metadata = server_metadata("1.2.3")
    assert (metadata["name"], metadata["version"]) == ("mlpd", "1.2.3")
    assert "binary_tensor_data" in metadata["extensions"]


def test_index_entries_and_errors_have_the_protocols_form() -> None:
    assert index_entry("risk", 3, ready=False, reason="loading") == {
        "name": "risk",
        "version": "3",
        "state": "UNAVAILABLE",
        "reason": "loading",
    }
    assert index_entry("risk", 3, ready=True)["state"] == "READY"
    assert error_document(NotFoundError("unknown model 'x'")) == {"error": "unknown model 'x'"}
    assert error_document(NotFoundError("a", hint="b.")) == {"error": "a. b."}


def _tensor(name: str, datatype: str, shape: list[int], data: list[Any]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}
