"""Deep Defense in JAX: train classifiers to withstand adversarial examples, and measure how well
they do.

    deepfool            the smallest perturbation that changes a prediction, l2 and linf
    signed_margin       its size relative to the input, differentiable in the weights
    regularizer         Deep Defense's penalty
    deep_defense_loss   cross-entropy plus the penalty

Every function is called as `f(logits_fn, inputs, labels, *, options)`; this package imports JAX and
nothing else.
"""

from dd_jax.attacks._deepfool import deepfool
from dd_jax.deep_defense import deep_defense_loss, regularizer, signed_margin
from dd_jax.types import AttackResult, LogitsFn

__all__ = [
    "AttackResult",
    "LogitsFn",
    "deep_defense_loss",
    "deepfool",
    "regularizer",
    "signed_margin",
]
