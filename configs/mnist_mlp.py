"""MLP on MNIST, the mean image subtracted, as in the paper's Table 2.

    python train.py --config configs/mnist_mlp.py --data_dir DIR

A few minutes on 2 CPU cores (jax 0.10.2, XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=, seed 0,
10,000 test images, C&W the first 500, units of 1/255; `python evaluate.py --workdir runs/mnist_mlp`
for the last four; in brackets: the paper's):

                  accuracy   rho_2            l_2          rho_inf        l_2 C&W           acc. PGD             PASS
    reference       98.22%  0.1485  1.081 (0.810)  0.0619 (0.0540)  1.218 (0.840)    1.68% (1.19%)  0.8569 (0.8534)
    deep_defense    98.26%  0.2358  1.708 (1.640)  0.1140 (0.1530)  1.811 (1.580)  35.15% (33.18%)  0.7968 (0.8181)

DeepFool, FGSM and C&W fooled the nets on all images, by the forward pass that checks them.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.name = "mnist"
    config.reference.num_epochs = 10
    config.fine_tuning.learning_rate = 1e-3
    config.defense.correct_scale = 15.0
    return config
