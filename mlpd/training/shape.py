"""What shapes a model's scores: the gain that each feature brought, by name."""

import numpy as np

from mlpd.training.trees import parse_model


def gain_importance(model_text: str) -> dict[str, float]:
    """Return each feature's share of the total gain, largest first, ties by vector order.

    Every feature of the model has an entry; the shares add up to 1, or are all 0 for a model of
    stumps.  Gains are LightGBM's `importance_type="gain"`, from the six digits of the text.
    """
    model = parse_model(model_text)
    gains = np.zeros(len(model.feature_names))
    for tree in model.trees:
        np.add.at(gains, tree.split_feature, np.maximum(tree.split_gain, 0.0))
    shares = gains / (gains.sum() or 1.0)
    order = np.argsort(-shares, kind="stable")
    return {model.feature_names[i]: float(shares[i]) for i in order}
