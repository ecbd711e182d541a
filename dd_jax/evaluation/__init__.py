"""Measures a net on a data set; see `dd_jax.evaluation.evaluate`."""

from dd_jax.evaluation.evaluate import (
    NAMES,
    ApplyFn,
    fgsm_accuracy,
    half_epsilon,
    in_two_programs,
    measure,
)
from dd_jax.evaluation.measurements import MEASUREMENTS, Settings
from dd_jax.evaluation.metrics import Summary, remarks

__all__ = [
    "MEASUREMENTS",
    "ApplyFn",
    "NAMES",
    "Settings",
    "Summary",
    "fgsm_accuracy",
    "half_epsilon",
    "in_two_programs",
    "measure",
    "remarks",
]
