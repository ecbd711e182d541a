"""What RobustBench's checkpoints do not say about themselves.

RobustBench (Croce et al. 2021) saves a model as DATA_SET/THREAT_MODEL/NAME.pt and keeps in its code
how the model normalizes its inputs. `UNSTORED` has this for the models on CIFAR-10 and CIFAR-100
whose files lack it; the files of all others need nothing or hold it.
"""

import os
import pathlib
from collections.abc import Collection
from typing import Any

from dd_jax.models import NORMALIZATIONS, Normalization
from dd_jax.pretrained.layouts import num_classes, own_normalization, with_normalization
from dd_jax.pretrained.state_dicts import MU

_CIFAR10, _CENTERED = NORMALIZATIONS["cifar10"], NORMALIZATIONS["centered"]
_AUGUSTIN = Normalization(
    (0.4913997551666284, 0.48215855929893703, 0.4465309133731618),
    (0.24703225141799082, 0.24348516474564, 0.26158783926049628),
)
_CIFAR100 = Normalization(
    (0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
    (0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
)

UNSTORED: dict[int, dict[str, Normalization]] = {
    10: {
        "Augustin2020Adversarial": _AUGUSTIN,
        "Augustin2020Adversarial_34_10": _AUGUSTIN,
        "Augustin2020Adversarial_34_10_extra": _AUGUSTIN,
        "Chen2020Efficient": _CIFAR10,
        "Engstrom2019Robustness": Normalization(_CIFAR10.mean, (0.2023, 0.1994, 0.2010)),
        "Hendrycks2019Using": _CENTERED,
        "Hendrycks2020AugMix_WRN": _CENTERED,
        "Huang2022Revisiting_WRN-A4": _CIFAR10,
        "Kireev2021Effectiveness_AugMixNoJSD": _CIFAR10,
        "Kireev2021Effectiveness_Gauss50percent": _CIFAR10,
        "Kireev2021Effectiveness_RLAT": _CIFAR10,
        "Kireev2021Effectiveness_RLATAugMix": _CIFAR10,
        "Kireev2021Effectiveness_RLATAugMixNoJSD": _CIFAR10,
        "Pang2020Boosting": _CIFAR10,
        "Rice2020Overfitting": _CIFAR10,
        "Rony2019Decoupling": Normalization((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
        "Wong2020Fast": _CIFAR10,
    },
    100: {
        "Chen2020Efficient": Normalization((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        "Hendrycks2019Using": _CENTERED,
        "Hendrycks2020AugMix_WRN": _CENTERED,
        "Rice2020Overfitting": _CIFAR100,
        "Wu2020Adversarial": _CIFAR100,
    },
}
"""From the number of classes and RobustBench's name of a model to the normalization of its inputs.
"""
STANDARDIZING = ("Ding2020MMA",)
"""Models whose nets standardize every image instead; their files look like those of nets that do
not.
"""


def unstored(path: str | os.PathLike, num_classes: int) -> Normalization | None:
    """The normalization of the model that has the name of the file; None for other files."""
    return UNSTORED.get(num_classes, {}).get(pathlib.Path(path).stem)


def is_standardizing(path: str | os.PathLike) -> bool:
    """Whether the file has the name of a model that standardizes every image."""
    return pathlib.Path(path).stem in STANDARDIZING


def completed(
    path: str | os.PathLike, name: str, variables: dict[str, Any], entries: Collection[str]
) -> dict[str, Any]:
    """The variables of the net `name` that were read from the entries of a file, with the
    normalization that the file lacks, if it has the name of a model of RobustBench.
    """
    if MU in entries or own_normalization(variables) is None:
        return variables
    found = unstored(path, num_classes(name, variables))
    return variables if found is None else with_normalization(variables, found)
