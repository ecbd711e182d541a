"""LeNet on MNIST, the mean image subtracted, as in the paper's Table 2.

    python train.py --config configs/mnist_lenet.py --data_dir DIR

An hour on 2 CPU cores with much other work beside (jax 0.10.2,
XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=, seed 0, 10,000 test images, l_2 in units of
1/255; in brackets: the paper's):

                  accuracy   rho_2            l_2  DeepFool success
    reference       99.24%  0.2104  1.520 (1.480)           100.00%
    deep_defense    99.12%  0.3068  2.214 (2.050)           100.00%
"""

from configs import mnist_mlp


def get_config():
    config = mnist_mlp.get_config()
    config.model.name = "lenet"
    # What the figures above were measured with; MLP's own were searched for, these were not yet.
    config.fine_tuning.num_epochs = 5
    config.fine_tuning.learning_rate = 1e-3
    config.fine_tuning.schedule = "halved_at_four_fifths"
    config.fine_tuning.max_gradient_norm = 0.0
    config.defense.penalty_weight = 15.0
    config.defense.correct_scale = 15.0
    return config
