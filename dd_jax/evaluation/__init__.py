"""Measures a net on a data set: an `Evaluator`, and the measurements that it knows.

evaluator = evaluation.Evaluator(apply_fn, data.in_memory(images, labels))
evaluator.measure(variables, names=("deepfool", "fgsm", "pgd"))
"""

from dd_jax.evaluation.autoattack import AutoAttack, robust_accuracy
from dd_jax.evaluation.evaluate import NAMES, Evaluator
from dd_jax.evaluation.measurements import MEASUREMENTS, Settings
from dd_jax.evaluation.metrics import Summary, remarks
from dd_jax.evaluation.programs import ApplyFn, in_two_programs

__all__ = [
    "MEASUREMENTS",
    "NAMES",
    "ApplyFn",
    "AutoAttack",
    "Evaluator",
    "Settings",
    "Summary",
    "in_two_programs",
    "remarks",
    "robust_accuracy",
]
