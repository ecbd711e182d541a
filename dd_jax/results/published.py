"""The paper's figures (supplement, Tables 2 to 4), to be printed beside measured figures.

l_2 under DeepFool and under C&W, rho_inf under FGSM, accuracy under PGD (l_inf, epsilon 0.1 on
MNIST, 0.01 on CIFAR-10) and PASS, in the input spaces that `dd_jax.data` describes.
"""

from typing import NamedTuple


class Figures(NamedTuple):
    """One row of the paper's tables. Higher is more robust, except for PASS. None: not reported."""

    l2_deepfool: float
    rho_linf_fgsm: float
    l2_carlini_wagner: float | None = None
    accuracy_pgd: float | None = None
    similarity_pass: float | None = None


TABLE: dict[tuple[str, str], dict[str, Figures]] = {
    ("mnist", "mlp"): {
        "reference": Figures(0.81, 5.40e-2, 0.84, 0.0119, 0.8534),
        "parseval": Figures(0.80, 5.78e-2, 0.83, 0.0118, 0.8542),
        "adversarial_deepfool": Figures(1.17, 9.46e-2, 1.17, 0.0411, 0.8280),
        "deep_defense": Figures(1.64, 1.53e-1, 1.58, 0.3318, 0.8181),
    },
    ("mnist", "lenet"): {
        "reference": Figures(1.48, 1.29e-1, 1.40, 0.2617, 0.9074),
        "parseval": Figures(1.50, 1.50e-1, 1.58, 0.2306, 0.8981),
        "adversarial_deepfool": Figures(1.90, 2.05e-1, 1.71, 0.5067, 0.8810),
        "deep_defense": Figures(2.05, 2.36e-1, 1.84, 0.6454, 0.8760),
    },
    ("cifar10", "convnet"): {
        "reference": Figures(0.18, 5.27e-3, 0.29, 0.2134),
        "parseval": Figures(0.24, 8.02e-3, 0.33, 0.2791),
        "adversarial_deepfool": Figures(0.21, 6.37e-3, 0.31, 0.2708),
        "deep_defense": Figures(0.36, 1.58e-2, 0.47, 0.4505),
    },
    ("cifar10", "nin"): {
        "reference": Figures(0.30, 1.05e-2, 0.41, 0.3441),
        "parseval": Figures(0.31, 1.07e-2, 0.41, 0.3659),
        "adversarial_deepfool": Figures(0.37, 1.76e-2, 0.48, 0.4551),
        "deep_defense": Figures(0.40, 2.15e-2, 0.50, 0.5107),
    },
    ("imagenet2012", "alexnet"): {
        "reference": Figures(0.29, 5.46e-4),
        "deep_defense": Figures(0.45, 8.70e-4),
    },
    ("imagenet2012", "resnet18"): {
        "reference": Figures(0.69, 6.96e-4),
        "deep_defense": Figures(1.03, 1.08e-3),
    },
}


INPUT_SPACES = {
    ("mnist", "mlp"): "mean_image",
    ("mnist", "lenet"): "mean_image",
    ("cifar10", "convnet"): "contrast_whiten",
    ("cifar10", "nin"): "contrast_whiten",
    ("imagenet2012", "alexnet"): "caffe",
    ("imagenet2012", "resnet18"): "torchvision",
}
PGD_EPSILONS = {"mnist": 0.1, "cifar10": 0.01}


def lookup(
    data_name: str,
    model_name: str,
    method: str,
    *,
    input_space: str,
    pgd_epsilon: float | None = None,
) -> Figures | None:
    """The paper's row for a method on a net and a data set; None if the paper has none.

    Sizes of perturbations can only be compared within one input space, so the result is None for
    another input space than the paper's. It has no accuracy under PGD for another epsilon.
    """
    row = TABLE.get((data_name, model_name), {}).get(method)
    if row is None or input_space != INPUT_SPACES[data_name, model_name]:
        return None
    return row if pgd_epsilon == PGD_EPSILONS.get(data_name) else row._replace(accuracy_pgd=None)
