"""Attacks: how little, and in which direction, an input must change for the net to change its mind.

    fgsm, pgd             a perturbation of at most epsilon, up the cross-entropy; l2 and linf
    minimal_fgsm          FGSM with each example's smallest epsilon
    fgsm_success_curve    whether FGSM fools, for many epsilons at once
    carlini_wagner_l2     the smallest perturbation in l2, by optimisation

Each is called as `attack(logits_fn, inputs, labels, *, options)`, may be compiled with its options fixed, and attacks every
example as if it were alone. Inputs that are misclassified already need no perturbation and get none. DeepFool is
`dd_jax.deepfool`; the name `dd_jax.attacks.deepfool` is its module's.
"""

from dd_jax.attacks.carlini_wagner import carlini_wagner_l2
from dd_jax.attacks.gradient import fgsm, fgsm_success_curve, minimal_fgsm, pgd

__all__ = ["carlini_wagner_l2", "fgsm", "fgsm_success_curve", "minimal_fgsm", "pgd"]
