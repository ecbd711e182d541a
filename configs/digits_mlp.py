"""MLP on scikit-learn's digits, enlarged to 28x28: no download, the quickest way to see Deep Defense work.

    python train.py --config configs/digits_mlp.py
"""

from configs import default


def get_config():
    config = default.get_config()
    config.fine_tuning.num_epochs = 30
    config.fine_tuning.learning_rate = 2e-3
    config.defense.correct_scale = 10.0
    return config
