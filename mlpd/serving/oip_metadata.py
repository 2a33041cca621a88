"""Open Inference Protocol v2: what the server says of itself and its models, as JSON values."""

from collections.abc import Iterable
from typing import Any

from mlpd.core.errors import MlpdError
from mlpd.serving.jobs import BATCH_ROWS, PRIORITIES, USUAL_PRIORITY
from mlpd.serving.package import RAW_SCORE, ModelPackage, TensorSpec
from mlpd.serving.statistics import ModelStatistics

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "parameters",
    "schedule_policy",
    "statistics",
)
"""What is served beyond the core protocol."""

TRACE_SETTINGS = {
    "trace_level": ["OFF"],
    "trace_rate": "0",
    "trace_count": "0",
    "log_frequency": "0",
    "trace_file": "",
    "trace_mode": "triton",
}
"""Nothing is traced."""

LOG_SETTINGS = {
    "log_file": "",
    "log_info": True,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}
"""The log goes to standard error."""

PLATFORM = "onnxruntime_onnx"


def server_metadata(version: str) -> dict[str, Any]:
    """Return the body of GET /v2; `version` is mlpd's own."""
    return {"name": "mlpd", "version": version, "extensions": list(EXTENSIONS)}


def model_metadata(package: ModelPackage, versions: Iterable[int]) -> dict[str, Any]:
    """Return the body of GET /v2/models/M; `versions` are those that are loaded.

    `parameters` of a trained model has its features in vector order, each with its type and, if
    categorical, the categories whose positions are the codes.
    """
    parameters = dict(package.metadata)
    vectorizer = package.signature.vectorizer
    if vectorizer is not None:
        parameters |= vectorizer.to_dict()
        parameters["optional_outputs"] = [RAW_SCORE]
    return {
        "name": package.name,
        "versions": [str(version) for version in sorted(versions)],
        "platform": PLATFORM,
        "inputs": [spec.to_dict() for spec in package.signature.inputs],
        "outputs": [spec.to_dict() for spec in package.signature.outputs],
        "parameters": parameters,
    }


def model_config(package: ModelPackage, versions: Iterable[int]) -> dict[str, Any]:
    """Return the body of GET /v2/models/M/config.

    A user's ONNX file has max_batch_size 0 and whole shapes: its requests are never merged.  More
    rows than max_batch_size are welcome: they are run in parts.
    """
    batching = {
        "dynamic_batching": {
            "preferred_batch_size": [BATCH_ROWS],
            "max_queue_delay_microseconds": 0,
            "priority_levels": len(PRIORITIES),
            "default_priority_level": USUAL_PRIORITY,
        }
    }
    signature, trained = package.signature, package.trained
    return {
        "name": package.name,
        "platform": PLATFORM,
        "backend": "onnxruntime",
        "version_policy": {"specific": {"versions": sorted(versions)}},
        "max_batch_size": BATCH_ROWS if trained else 0,
        "input": [_config_tensor(spec, batched=trained) for spec in signature.inputs],
        "output": [_config_tensor(spec, batched=trained) for spec in signature.outputs],
        **(batching if trained else {}),
        "instance_group": [{"name": f"{package.name}_0", "kind": "KIND_CPU", "count": 1}],
    }


def model_statistics(
    models: Iterable[tuple[ModelPackage, ModelStatistics]],
) -> dict[str, Any]:
    """Return the body of GET /v2/models/.../stats."""
    return {
        "model_stats": [
            {"name": package.name, "version": str(package.version), **statistics.to_dict()}
            for package, statistics in models
        ]
    }


def index_entry(name: str, version: int, *, ready: bool, reason: str = "") -> dict[str, str]:
    """Return one element of the answer to POST /v2/repository/index."""
    state = "READY" if ready else "UNAVAILABLE"
    return {"name": name, "version": str(version), "state": state, "reason": reason}


def error_document(error: MlpdError) -> dict[str, str]:
    """Return an error as the protocol writes it: one text, with the next step."""
    return {"error": f"{error.message}. {error.hint}" if error.hint else error.message}


def _config_tensor(spec: TensorSpec, *, batched: bool) -> dict[str, Any]:
    data_type = "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}"
    dims = spec.shape[1:] if batched else spec.shape
    return {"name": spec.name, "data_type": data_type, "dims": list(dims)}
