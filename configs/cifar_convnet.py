"""ConvNet on CIFAR-10, contrast-normalized and whitened, as in the paper's Table 3.

    python train.py --config configs/cifar_convnet.py --data_dir DIR

The whole run was not made yet; benchmarks/README.md has the speed of its steps.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.name = "convnet"
    config.data.name = "cifar10"
    config.data.flip = True
    config.reference.num_epochs = 40
    config.reference.learning_rate = 0.02
    config.fine_tuning.num_epochs = 50
    config.fine_tuning.max_gradient_norm = 10.0
    # What the paper attacks whitened images with.
    config.evaluation.pgd_epsilon = 0.01
    config.evaluation.pgd_step_size = 0.001
    config.evaluation.curve_max_epsilon = 0.05
    return config
