"""The defenses that are compared, by name: each is a training loss, and Parseval training also a
step after every update.

    clean                  L(x)                                    L: cross-entropy
    parseval               L(x), and W <- (1 + beta) W - beta W W^T W after every update
    adversarial_deepfool   (1 - a) L(x) + a L(x + D)               D: DeepFool's; Adv. Train I
    adversarial_fgsm       (1 - b) L(x) + b L(x + D)               D: FGSM's; Adv. Train II
    deep_defense           L(x) + lambda * penalty(x)
    deep_defense_fgsm      L(x) + lambda * penalty(x) + b L(x + D) D: FGSM's; supplement, sec. 2
    adversarial_pgd        L(x + D)                                D: PGD's, from a random start
    trades                 L(x) + k KL(f(x) || f(x + D))           D: up that divergence
    mma                    w L(x) + (1 - w) L(x + D)               D: the shortest; up to a margin
    amm                    L(x) + lambda * penalty(x)              of the batch's worst, absolute

with a = mixing_weight, b = fgsm_weight, k = kl_weight and w = clean_weight. No gradient flows
through D: it is an example like any other.

A loss is `loss(logits_fn, inputs, labels, key, **options) -> (loss per example, metrics per
example)`. Training differs in nothing else. A new defense is a loss and an entry in `DEFENSES`:

    DEFENSES["mine"] = Defense(my_loss, options=("strength",), swept="strength",
                               swept_symbol="$s$", label="Mine")
"""

from dd_jax.defenses._cross_entropy import Losses, plain_loss
from dd_jax.defenses._parseval import parseval_retraction
from dd_jax.defenses._registry import (
    DEFENSES,
    NAMES,
    BoundDefense,
    Defense,
    LossFn,
    is_plain,
    make_defense,
    option_names,
)

__all__ = [
    "DEFENSES",
    "NAMES",
    "BoundDefense",
    "Defense",
    "LossFn",
    "Losses",
    "is_plain",
    "make_defense",
    "option_names",
    "parseval_retraction",
    "plain_loss",
]
