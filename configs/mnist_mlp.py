"""MLP on MNIST, the mean image subtracted, as in the paper's Table 2.

    python train.py --config configs/mnist_mlp.py --data_dir DIR

Half a minute for the reference net and three for Deep Defense on one CPU core (jax 0.10.2,
XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=, seed 0, 10,000 test images, C&W the first 1,000,
units of 1/255; for the last four `python evaluate.py --workdir runs/mnist_mlp
--config.evaluation.carlini_wagner_examples=1000`; in brackets: the paper's):

                  accuracy   rho_2            l_2          rho_inf        l_2 C&W           acc. PGD             PASS
    reference       98.21%  0.1485  1.081 (0.810)  0.0620 (0.0540)  1.206 (0.840)    1.67% (1.19%)  0.8570 (0.8534)
    deep_defense    98.56%  0.3149  2.272 (1.640)  0.1810 (0.1530)  2.184 (1.580)  75.44% (33.18%)  0.7640 (0.8181)

AutoAttack on the first 1,000 leaves 24.0% of the reference's and 79.4% of Deep Defense's in the l2
ball of 1.5, 20.7% and 88.2% in the linf ball of 0.1 (benchmarks/reproduce_autoattack.py).

DeepFool and C&W fooled the nets on all images, FGSM the reference on all and Deep Defense's on
99.93%, by the forward pass that checks them. The options were chosen on held-out training images:
benchmarks/reproduction/ has the search, the other defenses and more seeds. With rate
1e-3, 5 epochs, lambda 15 and c 15 it was 98.26%, l_2 1.708, rho_inf 0.1140, C&W 1.811, PGD 35.15%.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.name = "mnist"
    config.reference.num_epochs = 10
    config.fine_tuning.num_epochs = 10
    config.fine_tuning.learning_rate = 2e-2
    config.fine_tuning.schedule = "cosine"
    config.fine_tuning.max_gradient_norm = 10.0
    config.defense.penalty_weight = 30.0
    config.defense.correct_scale = 8.0
    return config
