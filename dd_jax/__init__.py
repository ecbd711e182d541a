"""Deep Defense in JAX: train classifiers to withstand adversarial examples, and measure how well
they do.

    regularizer         Deep Defense's penalty
    deep_defense_loss   cross-entropy plus the penalty
    signed_margin       the relative size of the perturbation that changes a prediction,
                        differentiable in the weights
    deepfool            that perturbation, small in l2 or linf
    attacks             other attacks: FGSM, PGD, C&W and more
    penalties           other penalties of a margin
    xla                 flags under which XLA computes right numbers; rewrites of slow operations

Every function is called as `f(logits_fn, inputs, labels, *, options)`. This package imports JAX and
no other framework.
"""

from dd_jax import attacks, penalties, xla
from dd_jax.attacks._deepfool import deepfool
from dd_jax.deep_defense import deep_defense_loss, regularizer, signed_margin
from dd_jax.types import AttackResult, LogitsFn, Solver

__version__ = "0.1.0"

__all__ = [
    "AttackResult",
    "LogitsFn",
    "Solver",
    "attacks",
    "deep_defense_loss",
    "deepfool",
    "penalties",
    "regularizer",
    "signed_margin",
    "xla",
]
