"""Robust accuracy over epsilon, from the figures measured of a net.

    robust accuracy(epsilon) = share of examples for which no perturbation up to epsilon was found

One run of a minimum-norm attack gives it for all epsilons (`dd_jax.evaluation` keeps the size of
every example's perturbation), AutoAttack for one. Both are upper bounds of the true accuracy, and
AutoAttack's is usually the lower one. What is misclassified without a perturbation is never robust.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

NORMS = ("l2", "linf", "l1")
"""In the order of figures and tables."""
CURVE_NAMES = {"ddn_curve": "DDN", "fmn_linf_curve": "FMN", "fmn_l1_curve": "FMN"}
"""The names of curves among the figures, and their attacks."""
AUTOATTACK, STANDARD = "autoattack", "standard"
"""The name of AutoAttack's results among the figures, and the version that needs no mention."""


class Curve(NamedTuple):
    """The sizes of the smallest perturbations that were found.

    attack: its name. sizes: ascending, of the examples that are classified rightly and that the
    attack fools, in the units of the inputs. All other examples that are classified rightly are
    robust at all epsilons.
    """

    attack: str
    norm: str
    num_examples: int
    num_misclassified: int
    sizes: np.ndarray


class Point(NamedTuple):
    """AutoAttack's result at one epsilon, in the units of the inputs."""

    norm: str
    epsilon: float
    version: str
    robust_accuracy: float
    num_examples: int


def curves(measured: Mapping[str, Any]) -> dict[str, Curve]:
    """The curves among a net's figures by norm, in the order of NORMS."""
    found = {
        measured[name]["norm"]: Curve(attack, **_fields(Curve, measured[name]))
        for name, attack in CURVE_NAMES.items()
        if measured.get(name) is not None
    }
    return {norm: found[norm] for norm in NORMS if norm in found}


def points(measured: Mapping[str, Any]) -> list[Point]:
    """AutoAttack's results among a net's figures, in their order."""
    return in_order(Point(**_fields(Point, entry)) for entry in measured.get(AUTOATTACK) or ())


def in_order(found: Iterable[Point]) -> list[Point]:
    """Points by norm (as in NORMS), epsilon and version, the standard one first."""
    key = lambda point: (NORMS.index(point.norm), point.epsilon, point.version != STANDARD)
    return sorted(found, key=key)


def _fields(kind: Any, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: np.asarray(entry[name], float) if name == "sizes" else entry[name]
        for name in kind._fields
        if name in entry
    }


def with_points(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of two measurements of one net. The later ones replace the earlier ones, except
    that AutoAttack's results in other norms, at other epsilons and of other versions are kept.
    """
    key = lambda entry: tuple(entry[name] for name in ("norm", "epsilon", "version"))
    both = [*(before.get(AUTOATTACK) or ()), *(now.get(AUTOATTACK) or ())]
    entries = list({key(entry): entry for entry in both}.values())
    return {**before, **now} | ({AUTOATTACK: entries} if entries else {})


def robust_accuracy(curve: Curve, epsilons: ArrayLike) -> np.ndarray:
    """The share, 0 to 1, of examples that are robust at each epsilon (units of the inputs)."""
    fallen = curve.num_misclassified + np.searchsorted(curve.sizes, epsilons, side="right")
    return 1 - fallen / curve.num_examples


def median_size(curve: Curve) -> float | None:
    """The smallest epsilon at which at least half of the examples are not robust; 0 if it is so
    without an attack, None if it is so nowhere.
    """
    missing = (curve.num_examples + 1) // 2 - curve.num_misclassified
    if missing <= 0:
        return 0.0
    return float(curve.sizes[missing - 1]) if missing <= len(curve.sizes) else None


def line(curve: Curve, most_steps: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """The curve from epsilon 0 to the largest size that was found, to be drawn: epsilons and robust
    accuracies at the corners of a stair. Beyond `most_steps` sizes, some are left out, evenly.
    """
    last = len(curve.sizes) - 1
    shown = np.unique(np.linspace(0, last, min(most_steps, last + 1)).round().astype(int))
    at = np.concatenate([[0.0], curve.sizes[shown]])
    after = robust_accuracy(curve, at)
    before = np.concatenate([[after[0]], after[:-1]])
    return np.repeat(at, 2), np.stack([before, after], axis=1).reshape(-1)


def round_epsilons(largest: float, count: int) -> list[float]:
    """About `count` evenly spaced round numbers, from one step above 0 to at most `largest`."""
    if not (np.isfinite(largest) and largest > 0):
        return []
    power = 10.0 ** np.floor(np.log10(largest / count))
    steps: Sequence[float] = [power * factor for factor in (1, 2, 2.5, 5, 10)]
    step = next(step for step in steps if step * count >= largest * (1 - 1e-9))
    number = int(largest / step * (1 + 1e-9))
    return [float(f"{step * i:.10g}") for i in range(1, number + 1)]
