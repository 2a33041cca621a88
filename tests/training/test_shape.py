import lightgbm
import numpy as np
import pytest

from mlpd.training.shape import gain_importance


def train(**params: float) -> str:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(600, 4))
    data = lightgbm.Dataset(rows, rows[:, 2] * 3 + rows[:, 0], feature_name=["a", "b", "c", "d"])
    quiet = {"verbose": -1, "num_threads": 1, "objective": "l2"}
    return lightgbm.train(quiet | params, data, 10).model_to_string()


def test_shares_are_lightgbms_gains_by_name_largest_first() -> None:
    text = train()
    gains = lightgbm.Booster(model_str=text).feature_importance("gain")
    expected = dict(zip("abcd", gains / gains.sum(), strict=True))
    found = gain_importance(text)
    assert found == pytest.approx(expected, rel=1e-6)  # LightGBM reads gains as float32
    assert list(found)[:2] == ["c", "a"]
    assert sorted(found.values(), reverse=True) == list(found.values())


def test_a_model_of_stumps_gives_every_feature_zero() -> None:
    assert gain_importance(train(min_data_in_leaf=600)) == dict.fromkeys("abcd", 0.0)
