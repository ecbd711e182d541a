"""The first trials of the search, which were set by hand: every defense's first four, the third and the
fourth after the first two had been tried on the MLP, and more on CIFAR-10's nets.
"""

from collections.abc import Sequence
from typing import Any

Settings = dict[str, Any]

RATE, EPOCHS = "fine_tuning.learning_rate", "fine_tuning.num_epochs"
SCHEDULE = "fine_tuning.schedule"
CIFAR_10_NETS = ("convnet", "nin")
# CIFAR-10's numbers are MNIST's times these: its epsilons, as its PGD's, are a tenth, and rho of its
# reference nets, which c and d multiply, is a quarter to a seventh.
ON_CIFAR_10 = {
    "defense.epsilon": 0.1,
    "defense.correct_scale": 6.0,
    "defense.wrong_scale": 6.0,
}
_PENALTY = ("penalty_weight", "correct_scale", "wrong_scale", "norm")
_NAMES: dict[str, tuple[str, ...]] = {
    "clean": (),
    "parseval": ("beta",),
    "adversarial_deepfool": ("mixing_weight", "norm"),
    "adversarial_fgsm": ("fgsm_weight", "epsilon"),
    "deep_defense": _PENALTY,
    "deep_defense_fgsm": (*_PENALTY, "fgsm_weight", "epsilon"),
}
"""Each defense's own options, in the order of the rows below."""

# Rate, epochs and schedule of every defense's first four, and their own options, in MNIST's units.
_TRAININGS = (
    (1e-3, 5, "halved_at_four_fifths"),
    (5e-3, 10, "cosine"),
    (1e-2, 10, "cosine"),
    (5e-3, 10, "cosine"),
)
_FIRST: dict[str, tuple[tuple[Any, ...], ...]] = {
    "clean": ((), (), (), ()),
    "parseval": ((1e-4,), (1e-3,), (1e-5,), (3e-5,)),
    "adversarial_deepfool": ((0.5, "l2"), (0.2, "l2"), (0.05, "l2"), (0.05, "linf")),
    "adversarial_fgsm": ((0.5, 0.1), (0.7, 0.15), (0.2, 0.1), (0.3, 0.05)),
    "deep_defense": (
        (15.0, 15.0, 5.0, "l2"),
        (30.0, 10.0, 5.0, "l2"),
        (60.0, 8.0, 5.0, "l2"),
        (15.0, 20.0, 5.0, "linf"),
    ),
    "deep_defense_fgsm": (
        (15.0, 15.0, 5.0, "l2", 0.5, 0.1),
        (30.0, 10.0, 5.0, "l2", 0.5, 0.15),
        (60.0, 8.0, 5.0, "l2", 0.5, 0.2),
        (15.0, 20.0, 5.0, "linf", 0.5, 0.1),
    ),
}
_AVERAGED = 3  # The one of clean fine-tuning that has the average of the weights.

# CIFAR-10's further ones, in the units of its inputs: rate, epochs, own options; the schedule is cosine.
# Of the first four, d was too large in l2 (single wrong images of large rho had penalties of 1e17, and two
# nets became constant), Parseval's beta was too large, and the others had accuracy to spare. The last two of
# each (adversarial_fgsm's last one) were set after the others here had been tried.
_PENALTIES = (
    (5e-3, 10, 30.0, 30.0, 8.0, "l2"),
    (5e-3, 10, 60.0, 30.0, 8.0, "l2"),
    (5e-3, 10, 30.0, 120.0, 30.0, "linf"),
    (5e-3, 10, 60.0, 80.0, 30.0, "linf"),
    (1e-2, 10, 30.0, 80.0, 20.0, "linf"),
    (2e-2, 10, 30.0, 80.0, 20.0, "linf"),
    (1.5e-2, 10, 60.0, 60.0, 15.0, "linf"),
)
_FURTHER: dict[str, tuple[tuple[Any, ...], ...]] = {
    "clean": (
        (1e-2, 20),
        (2e-2, 20),
        (1e-3, 10),
        (2e-2, 10),
        (5e-2, 10),
        (5e-2, 20),
        (3e-2, 10),
    ),
    "parseval": (
        (5e-3, 10, 1e-6),
        (5e-3, 10, 3e-6),
        (1e-2, 20, 1e-6),
        (5e-3, 10, 3e-7),
        (1e-2, 10, 3e-6),
        (2e-2, 10, 1e-6),
        (5e-2, 10, 3e-7),
    ),
    "adversarial_deepfool": (
        (5e-3, 10, 0.3, "l2"),
        (1e-2, 20, 0.2, "l2"),
        (1e-2, 10, 0.3, "l2"),
        (5e-3, 10, 0.2, "linf"),
        (1e-2, 10, 0.2, "l2"),
        (2e-2, 10, 0.2, "l2"),
        (2e-2, 10, 0.3, "l2"),
    ),
    "adversarial_fgsm": (
        (1e-2, 10, 0.3, 0.01),
        (1e-2, 20, 0.3, 0.01),
        (1e-2, 20, 0.5, 0.01),
        (1e-2, 20, 0.2, 0.015),
        (5e-3, 10, 0.3, 0.012),
        (1e-2, 10, 0.5, 0.008),
        (2e-2, 20, 0.3, 0.012),
    ),
    "deep_defense": _PENALTIES,
    "deep_defense_fgsm": tuple((*row, 0.5, 0.01) for row in _PENALTIES),
}


def beginnings(net: str, defense: str) -> list[Settings]:
    """The settings of a defense's first trials, in the units of the net's inputs."""
    first = [
        _training(*training) | scaled(net, _own(defense, row))
        for training, row in zip(_TRAININGS, _FIRST[defense], strict=True)
    ]
    if defense == "clean":
        first[_AVERAGED] |= {"fine_tuning.average_decay": 0.999}
    if net not in CIFAR_10_NETS:
        return first
    return first + [
        _training(rate, epochs, "cosine") | _own(defense, row)
        for rate, epochs, *row in _FURTHER[defense]
    ]


def scaled(net: str, settings: Settings) -> Settings:
    """MNIST's settings in the units of a net's inputs."""
    factors = ON_CIFAR_10 if net in CIFAR_10_NETS else {}
    numbers = {n: settings[n] * factor for n, factor in factors.items() if n in settings}
    return settings | {name: float(f"{value:.3g}") for name, value in numbers.items()}


def _training(rate: float, epochs: int, schedule: str) -> Settings:
    return {
        RATE: rate,
        EPOCHS: epochs,
        SCHEDULE: schedule,
        "fine_tuning.weight_decay": 5e-4,
        "fine_tuning.average_decay": 0.0,
    }


def _own(defense: str, row: Sequence[Any]) -> Settings:
    return {f"defense.{name}": x for name, x in zip(_NAMES[defense], row, strict=True)}
