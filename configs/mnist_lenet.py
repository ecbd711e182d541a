"""LeNet on MNIST, the mean image subtracted, as in the paper's Table 2.

    python train.py --config configs/mnist_lenet.py --data_dir DIR

The whole run was not measured yet.
"""

from configs import mnist_mlp


def get_config():
    config = mnist_mlp.get_config()
    config.model.name = "lenet"
    return config
