"""LeNet on MNIST, the mean image subtracted, as in the paper's Table 2.

    python train.py --config configs/mnist_lenet.py --data_dir DIR

29 minutes on 2 CPU cores with other work beside (jax 0.10.2 with the XLA flag that dd_jax set before the canary, under which
DeepFool was right; seed 0, 10,000 test images, l_2 in units of 1/255; in brackets: the
paper's):

                  accuracy   rho_2            l_2  DeepFool success
    reference       99.20%  0.2098  1.515 (1.480)           100.00%
    deep_defense    99.19%  0.3067  2.213 (2.050)           100.00%
"""

from configs import mnist_mlp


def get_config():
    config = mnist_mlp.get_config()
    config.model.name = "lenet"
    return config
