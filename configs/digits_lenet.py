"""LeNet on scikit-learn's digits, enlarged to 28x28: no download.

    python train.py --config configs/digits_lenet.py

The whole run was not measured yet.
"""

from configs import digits_mlp


def get_config():
    config = digits_mlp.get_config()
    config.model.name = "lenet"
    config.reference.learning_rate = 0.01  # At the MLP's rate it diverges.
    return config
