"""Attacks."""

from dd_jax.attacks.carlini_wagner import carlini_wagner_l2
from dd_jax.attacks.gradient import fgsm, fgsm_success_curve, minimal_fgsm, pgd

__all__ = ["carlini_wagner_l2", "fgsm", "fgsm_success_curve", "minimal_fgsm", "pgd"]
