"""MLP on MNIST, the mean image subtracted, as in the paper's Table 2.

    python train.py --config configs/mnist_mlp.py --data_dir DIR

MNIST_TABLE
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.name = "mnist"
    config.reference.num_epochs = 10
    config.fine_tuning.learning_rate = 1e-3
    config.defense.correct_scale = 15.0
    return config
