"""LeNet on MNIST, the mean image subtracted, as in the paper's Table 2.

    python train.py --config configs/mnist_lenet.py --data_dir DIR

The whole run was not measured yet. One epoch of fine-tuning instead of five, on 2 CPU cores (jax 0.10.2, seed 0, the first
1,000 test images, l_2 in units of 1/255; in brackets: the paper's, after five):

    python train.py --config configs/mnist_lenet.py --data_dir DIR --config.fine_tuning.num_epochs=1 --config.data.test_limit=1000

                  accuracy   rho_2            l_2  DeepFool success
    reference       99.10%  0.2101  1.531 (1.480)           100.00%
    deep_defense    99.10%  0.2761  2.009 (2.050)           100.00%
"""

from configs import mnist_mlp


def get_config():
    config = mnist_mlp.get_config()
    config.model.name = "lenet"
    return config
