"""Runs in Feast's environment: makes a repository, applies it and fills its online store.

python feast_fill.py REPOSITORY FEATURES_PARQUET ONLINE_STORE_JSON
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import pandas as pd  # type: ignore[import-untyped, unused-ignore]  # the peer's, not ours
import yaml  # type: ignore[import-untyped, import-not-found, unused-ignore]
from feast import (  # type: ignore[import-not-found, unused-ignore]
    Entity,
    FeatureService,
    FeatureStore,
    FeatureView,
    Field,
    FileSource,
    ValueType,
)
from feast.types import Float64  # type: ignore[import-not-found, unused-ignore]

repository, features, online_store = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
settings = {
    "project": "bench",
    "registry": str(repository / "registry.db"),
    "provider": "local",
    "online_store": online_store,
    "entity_key_serialization_version": 3,
}
(repository / "feature_store.yaml").write_text(yaml.safe_dump(settings), "utf-8")
frame = pd.read_parquet(features)
names = [name for name in frame.columns if name not in ("driver", "event_time")]

driver = Entity(name="driver", join_keys=["driver"], value_type=ValueType.INT64)
view = FeatureView(
    name="drivers",
    entities=[driver],
    schema=[Field(name=name, dtype=Float64) for name in names],
    source=FileSource(path=features, timestamp_field="event_time"),
    ttl=timedelta(days=3650),
)
store = FeatureStore(repo_path=str(repository))
store.apply([driver, view, FeatureService(name="bench", features=[view])])
store.write_to_online_store("drivers", frame)
