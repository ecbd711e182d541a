"""Attacks: find a small perturbation that changes the prediction.

    deepfool              a small perturbation across the nearest linearized boundary; l2, linf
    fgsm, pgd             a perturbation of at most epsilon, up the cross-entropy; l2 and linf
    minimal_fgsm          FGSM with each example's smallest epsilon
    fgsm_success_curve    whether FGSM fools, for many epsilons at once
    carlini_wagner_l2     a small perturbation in l2, by optimization
    ddn                   a small perturbation in l2, by a radius that follows the boundary
    fmn                   the same for l1, l2 and linf
    superdeepfool         a small perturbation in l2, normal to the boundary that it crosses
    apgd                  a perturbation of at most epsilon, by Auto-PGD; l1, l2 and linf
    fab                   a small perturbation, by steps to the linearized boundary; l1, l2 and linf
    square                a perturbation of at most epsilon, by random search; l1, l2 and linf
    autoattack            these three in turn: the strongest evaluation within epsilon

Each is called as `attack(logits_fn, inputs, labels, *, options)`, may be compiled with its options
fixed, and attacks every example as if it were alone. Inputs that are misclassified already need no
perturbation and get none.
"""

from dd_jax.attacks._auto_pgd import apgd
from dd_jax.attacks._autoattack import AutoAttackResult, attack_names, autoattack
from dd_jax.attacks._carlini_wagner import carlini_wagner_l2
from dd_jax.attacks._ddn import ddn
from dd_jax.attacks._deepfool import deepfool
from dd_jax.attacks._fab import fab
from dd_jax.attacks._fmn import fmn
from dd_jax.attacks._gradient_sign import fgsm, fgsm_success_curve, minimal_fgsm, pgd
from dd_jax.attacks._square import square
from dd_jax.attacks._superdeepfool import superdeepfool

__all__ = [
    "AutoAttackResult",
    "apgd",
    "attack_names",
    "autoattack",
    "carlini_wagner_l2",
    "ddn",
    "deepfool",
    "fab",
    "fgsm",
    "fgsm_success_curve",
    "fmn",
    "minimal_fgsm",
    "pgd",
    "square",
    "superdeepfool",
]
