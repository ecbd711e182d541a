"""Caffe's AlexNet on ImageNet, Caffe's inputs and weights, as in the paper's Table 3.

    python train.py --config configs/imagenet_alexnet.py --data_dir DIR \\
        --config.reference.source=bvlc_alexnet.caffemodel

Data, hardware and what was not run: as for configs/imagenet_resnet18.py. torchvision's AlexNet is
--config.model.name=alexnet_torchvision. l_2 in units of 1/255; the paper: reference 0.29, Deep
Defense 0.45.
"""

from configs import imagenet_resnet18


def get_config():
    config = imagenet_resnet18.get_config()
    config.model.name = "alexnet"
    return config
