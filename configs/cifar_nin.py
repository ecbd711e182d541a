"""Network in Network on CIFAR-10, contrast-normalised and whitened, as in the paper's Table 3.

    python train.py --config configs/cifar_nin.py --data_dir DIR
"""

from configs import cifar_convnet


def get_config():
    config = cifar_convnet.get_config()
    config.model.name = "nin"
    return config
