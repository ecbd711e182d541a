"""Deep Defense with its penalty and its solver by name, alone and together with FGSM's examples.

    deep_defense        L(x) + lambda * penalty(x)
    deep_defense_fgsm   L(x) + lambda * penalty(x) + b L(x + D)    D: FGSM's; supplement, section 2

with L the cross-entropy, lambda = penalty_weight and b = fgsm_weight.
"""

import inspect
from functools import partial
from typing import Any

from jaxtyping import Array, Float, Int

from dd_jax import attacks, deep_defense
from dd_jax._margin import Gradient
from dd_jax.defenses._adversarial_training import fgsm_examples_loss
from dd_jax.defenses._cross_entropy import Losses, check_not_negative
from dd_jax.norms import Norm
from dd_jax.penalties import PENALTIES, PenaltyFn
from dd_jax.types import LogitsFn, RandomKeys, Solver

SOLVERS = ("deepfool", "ddn", "fmn", "superdeepfool")


def deep_defense_loss(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    key: RandomKeys | None = None,
    *,
    penalty_weight: float = 15.0,
    penalty: str = "exponential",
    correct_scale: float | None = None,
    wrong_scale: float | None = None,
    norm: Norm = "l2",
    solver: str = "deepfool",
    gradient: Gradient = "through_iterates",
    num_steps: int = 5,
    overshoot: float = 0.02,
    num_candidates: int | None = None,
    class_chunk_size: int | None = None,
    gradient_offset: float = 0.0,
) -> Losses:
    """The training loss of Deep Defense, cross_entropy + penalty_weight * penalty (Yan, Guo, Zhang,
    NeurIPS 2018).

    It is `dd_jax.deep_defense_loss` with two arguments by name: `penalty`, one of
    `dd_jax.penalties.PENALTIES`, and `solver`, "deepfool" or another attack of `dd_jax.attacks`
    ("ddn", "fmn", "superdeepfool"), which has its own defaults, and needs
    gradient="at_boundary". The scales' defaults are the penalty's own. num_steps, overshoot,
    num_candidates, class_chunk_size and gradient_offset are DeepFool's alone. Metrics as there. The
    key is not used. ValueError for an unknown name, for a solver that does not measure in `norm`,
    and as there.
    """
    options: dict[str, Any] = dict(penalty_fn=named_penalty(penalty), norm=norm)
    options |= dict(solver=named_solver(solver, norm))
    options |= dict(penalty_weight=penalty_weight, gradient=gradient)
    options |= dict(correct_scale=correct_scale, wrong_scale=wrong_scale)
    options |= dict(num_steps=num_steps, overshoot=overshoot, gradient_offset=gradient_offset)
    options |= dict(num_candidates=num_candidates, class_chunk_size=class_chunk_size)
    return deep_defense.deep_defense_loss(logits_fn, inputs, labels, **options)


def deep_defense_fgsm_loss(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    key: RandomKeys | None = None,
    *,
    fgsm_weight: float = 0.5,
    epsilon: float = 0.1,
    **options: Any,
) -> Losses:
    """Deep Defense's loss plus fgsm_weight * L(x + D), D being FGSM's perturbation (supplement,
    section 2).

    Other options as in `deep_defense_loss`. Metrics: those of both. The key is not used. ValueError
    for a negative fgsm_weight.
    """
    check_not_negative(fgsm_weight=fgsm_weight)
    defended, metrics = deep_defense_loss(logits_fn, inputs, labels, **options)
    adversarial, more = fgsm_examples_loss(logits_fn, inputs, labels, epsilon)
    return defended + fgsm_weight * adversarial, metrics | more


def named_penalty(name: str, **scales: float) -> PenaltyFn:
    """A penalty of `dd_jax.penalties` with these scales; ValueError for an unknown name or a
    negative scale.
    """
    if name not in PENALTIES:
        raise ValueError(f"There is no penalty {name!r}; choose one of {', '.join(PENALTIES)}.")
    check_not_negative(**scales)
    return partial(PENALTIES[name], **scales) if scales else PENALTIES[name]


def named_solver(name: str, norm: Norm) -> Solver | None:
    """An attack of `dd_jax.attacks` that finds short perturbations in this norm; None for DeepFool,
    the margin's own.

    ValueError for an unknown name, and for an attack that is for l2 alone where the norm is
    another.
    """
    if name not in SOLVERS:
        raise ValueError(f"There is no solver {name!r}; choose one of {', '.join(SOLVERS)}.")
    if name == "deepfool":
        return None
    solver = getattr(attacks, name)
    if "norm" in inspect.signature(solver).parameters:
        return partial(solver, norm=norm)
    if norm != "l2":
        raise ValueError(
            f"The solver {name!r} is for norm 'l2', and norm is {norm!r}; choose the solver "
            "deepfool or fmn, or the norm 'l2'."
        )
    return solver
