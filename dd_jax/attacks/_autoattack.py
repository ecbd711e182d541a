"""AutoAttack (Croce and Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of
Diverse Parameter-free Attacks", ICML 2020; l1: "Mind the box", ICML 2021): one attack after
another, each on the examples that no attack before it has fooled.

    standard    apgd_ce, apgd_dlr_targeted, fab_targeted, square
    plus        apgd_ce and apgd_dlr with 5 restarts, fab with 5 restarts, square,
                apgd_dlr_targeted, fab_targeted
    rand        apgd_ce, apgd_dlr, both with the mean of 20 gradients, for nets that draw random
                numbers

100 steps each, 9 targets (l1 in "standard": apgd_ce with 5 restarts, apgd_dlr_targeted with 5
targets), Square Attack with 5000 queries: the constants of the authors' code. What differs from it
stands in the modules of the parts. In l1, "plus" and "rand" use the larger radii of "standard",
too, and FAB's random starts are sparse.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dd_jax.attacks import _auto_pgd, _fab, _square
from dd_jax.attacks._arguments import SizeOrSizes
from dd_jax.attacks._restarts import (
    Found,
    Net,
    Problem,
    RandomLogitsFn,
    asked_again,
    prepare,
    where_rows,
)
from dd_jax.norms import Bounds, LpNorm, lp_norm
from dd_jax.types import LogitsFn, RandomKeys

Version = Literal["standard", "plus", "rand"]
VERSIONS: tuple[str, ...] = get_args(Version)
NUM_STEPS, NUM_TARGETS, NUM_QUERIES = 100, 9, 5000
NUM_RESTARTS, NUM_TARGETS_L1, NUM_GRADIENT_SAMPLES = 5, 5, 20
ROUNDING = 8
"""Units of precision by which a perturbation may exceed the ball."""


class AutoAttackResult(NamedTuple):
    """What AutoAttack found, example by example.

    is_robust: no attack has fooled the net, and it is right without one.
    fallen_to: the place in `attack_names` of the attack that fooled it; -1 where none did; -2 where
      the net is wrong already.
    perturbation: with which it was fooled; zero elsewhere.
    num_queries: how often the attacks asked the net about the example, with or without its
      gradient.
    """

    is_robust: Bool[Array, " batch"]
    fallen_to: Int[Array, " batch"]
    perturbation: Float[Array, "batch ..."]
    num_queries: Int[Array, " batch"]


class Setting(NamedTuple):
    """What all parts share."""

    norm: LpNorm
    bounds: Bounds | None
    channel_axis: int


PartFn = Callable[[Net, Problem, Bool[Array, " batch"]], Found]


def attack_names(version: Version = "standard") -> tuple[str, ...]:
    """The names of a version's attacks, in their order. ValueError for an unknown version.

    >>> from dd_jax.attacks import attack_names
    >>> attack_names("standard")
    ('apgd_ce', 'apgd_dlr_targeted', 'fab_targeted', 'square')
    """
    if version not in VERSIONS:
        raise ValueError(
            f"version is {version!r}; it must be one of {', '.join(map(repr, VERSIONS))}."
        )
    return {
        "standard": ("apgd_ce", "apgd_dlr_targeted", "fab_targeted", "square"),
        "plus": ("apgd_ce", "apgd_dlr", "fab", "square", "apgd_dlr_targeted", "fab_targeted"),
        "rand": ("apgd_ce", "apgd_dlr"),
    }[version]


def autoattack(
    logits_fn: LogitsFn | RandomLogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"] | None = None,
    *,
    norm: LpNorm,
    epsilon: SizeOrSizes,
    bounds: Bounds | None = (0.0, 1.0),
    version: Version = "standard",
    key: RandomKeys | None = None,
    channel_axis: int = -1,
) -> AutoAttackResult:
    """AutoAttack on one batch: which examples withstand all attacks.

    An example that has fallen leaves at once and costs nothing more ("rand" takes all steps for
    all). For a whole data set, `dd_jax.evaluation.robust_accuracy` runs one attack on all examples
    before the next one begins, asks the net again apart from the attack, and can be resumed.

    Args:
      logits_fn: maps (batch, ...) inputs to (batch, classes) logits, row by row. "rand":
        `logits_fn(inputs, key)`, which sees one row at a time with a key of its own.
      inputs: (batch, height, width, channels), (batch, height, width) or (batch, components),
        floating, within the bounds.
      labels: the true classes. None: the predicted ones.
      norm: "linf", "l2" or "l1".
      epsilon: the radius of the ball, in the units of the inputs; one number, or one per example.
      bounds: (lower, upper), numbers or arrays that broadcast to one example, with or without a
        leading axis of size 1. None: no bounds.
      version: "standard", "plus" or "rand".
      key: one random key, or one per example, (batch,). With one for all, the draws of an example
        depend on its place in the batch. None: key 0.
      channel_axis: where the channels of inputs with four axes are; 1 for (batch, channels, height,
        width).

    Returns:
      AutoAttackResult(is_robust, fallen_to, perturbation, num_queries). What counts as fooled is
      what the net says of inputs + perturbation after the attack. ||perturbation||_p does not
      exceed epsilon.

    Edges: with fewer than 4 classes simpler losses take the place of targeted DLR's, and a warning
    says so. A batch may be empty. Results do not depend on the rest of the batch. Gradients do not
    flow through the result. Compile it with `jax.jit`; four attacks take a while to compile.

    Raises:
      ValueError: at trace time, for shapes, types or options that make no sense.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import dd_jax
    >>> weights = jnp.array([[1.0, -1.0, 0.0], [3.0, 0.5, -1.0]])
    >>> net = lambda x, key: x @ weights + 0.01 * jax.random.normal(key, (3,))
    >>> inputs, labels = jnp.array([[0.9, 0.8], [0.2, 0.1]]), jnp.array([0, 0])
    >>> found = dd_jax.attacks.autoattack(
    ...     net, inputs, labels, norm="linf", epsilon=0.15, bounds=None, version="rand"
    ... )
    >>> found.is_robust.tolist(), found.fallen_to.tolist()
    ([True, False], [-1, 0])
    """
    setting = Setting(norm, bounds, channel_axis)
    options: dict[str, Any] = dict(norm=norm, epsilon=epsilon, bounds=bounds, key=key)
    names = attack_names(version)
    is_random = version == "rand"
    net, problem, right = prepare(logits_fn, inputs, labels, **options, is_random=is_random)
    none = jnp.zeros_like(problem.labels)
    found = AutoAttackResult(right, jnp.where(right, -1, -2), jnp.zeros_like(problem.inputs), none)
    for number, name in enumerate(names):
        attack = part(name, version, setting, net, problem)
        found = one_after_another(net, problem, setting.norm, attack, number, found)
    return found


def attack_by(
    name: str,
    logits_fn: LogitsFn | RandomLogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    *,
    norm: LpNorm,
    epsilon: SizeOrSizes,
    bounds: Bounds | None,
    version: Version,
    key: RandomKeys | None,
    channel_axis: int = -1,
) -> Found:
    """One of AutoAttack's attacks by its name, with the options that it has in that version."""
    options: dict[str, Any] = dict(norm=norm, epsilon=epsilon, bounds=bounds, key=key)
    net, problem, right = prepare(logits_fn, inputs, labels, **options, is_random=version == "rand")
    attack = part(name, version, Setting(norm, bounds, channel_axis), net, problem)
    return attack(net, problem, right)


def one_after_another(
    net: Net,
    problem: Problem,
    norm: LpNorm,
    attack: PartFn,
    number: int,
    before: AutoAttackResult,
) -> AutoAttackResult:
    """Runs one attack on the examples that are left, and asks the net what came of it."""
    found = attack(net, problem, before.is_robust)
    slack = 1 + ROUNDING * float(jnp.finfo(problem.inputs.dtype).eps)
    inside = lp_norm(found.perturbation, norm) <= slack * problem.epsilon
    falls = inside & asked_again(net, problem, found, before.is_robust).success & before.is_robust
    return AutoAttackResult(
        before.is_robust & ~falls,
        jnp.where(falls, number, before.fallen_to),
        where_rows(falls, found.perturbation, before.perturbation),
        before.num_queries + found.num_queries,
    )


def part(name: str, version: Version, setting: Setting, net: Net, problem: Problem) -> PartFn:
    """The attack of that name, with its options."""
    norm, bounds, channel_axis = setting
    in_l1 = norm == "l1" and version == "standard"
    restarts = NUM_RESTARTS if version == "plus" or in_l1 else 1
    if name == "square":
        rules: Any = _square.make_rules(
            problem, norm, bounds, NUM_QUERIES, channel_axis=channel_axis
        )
        return partial(_with_rules, _square.search, rules)
    if name.startswith("fab"):
        is_targeted = name == "fab_targeted"
        fab_counts = (NUM_STEPS, NUM_TARGETS, 1 if is_targeted else NUM_RESTARTS)
        rules = _fab.make_rules(net, norm, bounds, *fab_counts, is_targeted=is_targeted)
        return partial(_with_rules, _fab.search, rules)
    loss: Any = name.removeprefix("apgd_")
    is_targeted = loss == "dlr_targeted"
    targets, samples = NUM_TARGETS_L1 if in_l1 else NUM_TARGETS, 1
    if version == "rand":
        samples = NUM_GRADIENT_SAMPLES
    counts = (NUM_STEPS, targets, 1 if is_targeted else restarts, samples)
    rules = _auto_pgd.make_rules(net, norm, bounds, loss, *counts)
    return partial(_with_rules, _auto_pgd.ascend, rules)


def _with_rules(
    run: Callable[..., Found], rules: Any, net: Net, problem: Problem, active: Bool[Array, " batch"]
) -> Found:
    return run(net, problem, rules, active)
