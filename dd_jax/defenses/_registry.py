"""The defenses by name: one entry each."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from dd_jax.defenses._adversarial_training import (
    adversarial_deepfool_loss,
    adversarial_fgsm_loss,
    adversarial_pgd_loss,
)
from dd_jax.defenses._amm import amm_loss
from dd_jax.defenses._cross_entropy import Losses, plain_loss
from dd_jax.defenses._deep_defense import deep_defense_fgsm_loss, deep_defense_loss
from dd_jax.defenses._mma import mma_loss
from dd_jax.defenses._parseval import parseval_retraction
from dd_jax.defenses._trades import trades_loss

LossFn = Callable[..., Losses]


class Defense(NamedTuple):
    """An entry of the registry: a training loss, its options, and how it is shown.

    loss: `loss(logits_fn, inputs, labels, key, **options) -> (loss per example, metrics per
    example)`. The key is a JAX random key that differs from step to step.
    options: the names of the keyword options that the loss and the retraction take.
    swept: the option that the paper's Figure 6 varies, None if there is none; swept_symbol: its
    symbol in plots, where dollars enclose mathematics.
    label: the defense's name in plots and legends.
    retract: `retract(params, **options) -> params`, applied after every update; None: nothing is.
    """

    loss: LossFn
    options: tuple[str, ...] = ()
    swept: str | None = None
    swept_symbol: str = ""
    label: str = ""
    retract: Callable[..., Any] | None = None


class BoundDefense(NamedTuple):
    """A defense with its options fixed: `loss_fn(logits_fn, inputs, labels, key)`, and
    `retract(params)`, applied after every update.
    """

    loss_fn: LossFn
    retract: Callable[[Any], Any]


_DEEPFOOL = ("num_steps", "overshoot", "num_candidates", "class_chunk_size")
_DEEP_DEFENSE: tuple[str, ...]
_DEEP_DEFENSE = ("penalty_weight", "penalty", "correct_scale", "wrong_scale", "norm", "solver")
_DEEP_DEFENSE += ("gradient", "gradient_offset", *_DEEPFOOL)
_AMM: tuple[str, ...]
_AMM = ("penalty_weight", "penalty", "absolute_correct_scale", "absolute_wrong_scale")
_AMM += ("aggregation", "worst_fraction", "gradient", "gradient_offset", *_DEEPFOOL)
_ATTACK = ("attack_norm", "num_attack_steps", "relative_step_size")
_EPSILON: dict[str, Any] = dict(swept="epsilon", swept_symbol=r"$\epsilon$")

DEFENSES: dict[str, Defense] = {
    "clean": Defense(plain_loss, label="Clean"),
    "parseval": Defense(
        plain_loss, options=("beta",), label="Parseval", retract=parseval_retraction
    ),
    "adversarial_deepfool": Defense(
        adversarial_deepfool_loss,
        options=("mixing_weight", "norm", *_DEEPFOOL),
        label="Adv. Train I (DeepFool)",
    ),
    "adversarial_fgsm": Defense(
        adversarial_fgsm_loss,
        options=("fgsm_weight", "epsilon"),
        label="Adv. Train II (FGSM)",
        **_EPSILON,
    ),
    "deep_defense": Defense(
        deep_defense_loss,
        options=_DEEP_DEFENSE,
        swept="correct_scale",
        swept_symbol="$c$",
        label="Deep Defense",
    ),
    "deep_defense_fgsm": Defense(
        deep_defense_fgsm_loss,
        options=("fgsm_weight", "epsilon", *_DEEP_DEFENSE),
        label="Deep Defense + FGSM",
        **_EPSILON,
    ),
    "adversarial_pgd": Defense(
        adversarial_pgd_loss,
        options=("epsilon", *_ATTACK),
        label="Adv. Train (PGD)",
        **_EPSILON,
    ),
    "trades": Defense(
        trades_loss,
        options=("kl_weight", "epsilon", *_ATTACK),
        swept="kl_weight",
        swept_symbol=r"$\beta$",
        label="TRADES",
    ),
    "mma": Defense(
        mma_loss,
        options=("max_margin", "clean_weight", "num_bisections", *_ATTACK),
        swept="max_margin",
        swept_symbol=r"$d_{\max}$",
        label="MMA",
    ),
    "amm": Defense(
        amm_loss,
        options=_AMM,
        swept="absolute_correct_scale",
        swept_symbol="$c$",
        label="AMM",
    ),
}
NAMES: tuple[str, ...] = tuple(DEFENSES)


def option_names(name: str) -> frozenset[str]:
    """The options that a defense takes. ValueError for an unknown name."""
    if name not in DEFENSES:
        raise ValueError(f"There is no defense {name!r}; choose one of {', '.join(DEFENSES)}.")
    return frozenset(DEFENSES[name].options)


def make_defense(name: str, **options: Any) -> BoundDefense:
    """A defense with its options fixed. ValueError for an unknown name, or an option that it does
    not take.
    """
    taken = option_names(name)
    unknown = sorted(options.keys() - taken)
    if unknown:
        raise ValueError(
            f"The defense {name!r} takes no {', '.join(unknown)}; it takes {sorted(taken)}."
        )
    loss, retract = DEFENSES[name].loss, DEFENSES[name].retract
    if retract is None:
        return BoundDefense(partial(loss, **options), lambda params: params)
    of_retraction = options.keys() & inspect.signature(retract).parameters.keys()
    retract = partial(retract, **{name: options.pop(name) for name in of_retraction})
    return BoundDefense(partial(loss, **options), retract)


def is_plain(defense: BoundDefense) -> bool:
    """Whether a defense's loss is the cross-entropy at the inputs alone."""
    return getattr(defense.loss_fn, "func", defense.loss_fn) is plain_loss
