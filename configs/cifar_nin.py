"""Network in Network on CIFAR-10, contrast-normalised and whitened, as in the paper's Table 3.

    python train.py --config configs/cifar_nin.py --data_dir DIR

The whole run was not made yet (a plain step of 100 images takes about a second on 2 CPU cores, one of Deep Defense ten).
150 + 10 steps on the CIFAR-10 JPEG copy, seed 0: cross-entropy 2.306 -> 2.228 in the reference's training; Deep Defense's loss
51 -> 38, with the gradient bounded, without which it diverges from a net this poor.

    python train.py --config configs/cifar_nin.py --data_dir DIR --config.reference.max_steps=150 \
        --config.fine_tuning.max_steps=10 --config.data.train_limit=20000 --config.data.test_limit=100
"""

from configs import cifar_convnet


def get_config():
    config = cifar_convnet.get_config()
    config.model.name = "nin"
    config.reference.learning_rate = 0.1
    config.reference.max_gradient_norm = 1.0
    return config
