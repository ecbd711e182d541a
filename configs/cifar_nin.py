"""Network in Network on CIFAR-10, contrast-normalized and whitened, as in the paper's Table 3.

    python train.py --config configs/cifar_nin.py --data_dir DIR

The whole run was not made yet (a plain step of 100 images takes about a second on 2 CPU cores, one
of Deep Defense ten). 120 steps of the reference's training on the CIFAR-10 JPEG copy, seed 0:
cross-entropy 1.88 and 29 % of the training images right (2 cores of an Intel Xeon, jax 0.10.2).

    python train.py --config configs/cifar_nin.py --data_dir DIR --config.reference.max_steps=120 \
        --config.fine_tuning.max_steps=1 --config.data.train_limit=20000 --config.data.test_limit=20
"""

from configs import cifar_convnet


def get_config():
    config = cifar_convnet.get_config()
    config.model.name = "nin"
    config.reference.learning_rate = 0.1
    config.reference.max_gradient_norm = 1.0
    config.reference.center_on = 50
    return config
