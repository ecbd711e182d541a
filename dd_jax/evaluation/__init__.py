"""Measures a net on a data set: an `Evaluator`, and the measurements that it knows.

evaluator = evaluation.Evaluator(apply_fn, data.in_memory(images, labels))
evaluator.measure(variables, names=("deepfool", "fgsm", "pgd"))
"""

from dd_jax.evaluation.evaluate import NAMES, ApplyFn, Evaluator, in_two_programs
from dd_jax.evaluation.measurements import MEASUREMENTS, Settings
from dd_jax.evaluation.metrics import Summary, remarks

__all__ = [
    "MEASUREMENTS",
    "NAMES",
    "ApplyFn",
    "Evaluator",
    "Settings",
    "Summary",
    "in_two_programs",
    "remarks",
]
