"""Network in Network on CIFAR-10, contrast-normalized and whitened, as in the paper's Table 3.

    python train.py --config configs/cifar_nin.py --data_dir DIR

The reference net gives, on CIFAR-10 (JPEG copy), all 10,000 test images, C&W the first 500, seed 0, after
three minutes on one NVIDIA H200 with other processes on it (in brackets: the paper's, on the original):

    accuracy   rho_2            l_2           rho_inf        l_2 C&W           acc. PGD
      78.77%  0.0379  0.227 (0.300)  0.0113 (0.0105)  0.200 (0.410)  13.74% (34.41%)

Deep Defense was not run with these options. With wrong_scale 30 (and lambda 30, c 60, l2) the net became
constant: single wrong images of large rho had penalties of 1e17. benchmarks/reproduction/ has two other
defenses. On 2 CPU cores a plain step of 100 images takes about a second, one of Deep Defense ten.
"""

from configs import cifar_convnet


def get_config():
    config = cifar_convnet.get_config()
    config.model.name = "nin"
    config.reference.learning_rate = 0.1
    config.reference.max_gradient_norm = 1.0
    config.reference.center_on = 50
    config.defense.wrong_scale = 5.0
    config.fine_tuning.num_epochs = 5
    return config
