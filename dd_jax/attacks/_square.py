"""Square Attack (Andriushchenko, Croce, Flammarion, Hein, "Square Attack: a query-efficient
black-box adversarial attack via random search", ECCV 2020), l1, l2 and linf. It uses no gradients.

From stripes (linf) or tiles (l1, l2) of random signs, each of N queries changes D within a square
at a random place, and keeps the change if it lowers the margin z_y - max_{i != y} z_i or fools. The
square covers a share p of the image's pixels, where p is halved after 10, 50, 200, 500, 1000, 2000,
4000, 6000 and 8000 queries from p = 0.8.

linf: in each channel, D is epsilon or -epsilon throughout the square.
l1, l2: with A the square, A' another one of the same size, e(A) a pattern of two pyramids of
opposite sign with ||e||_2 = 1, and in each of c channels

    D_A'  = 0
    D_A   = b (e(A) s + D_A / ||D_A||_p) / ||...||_p,    s a random sign,
    b^p   = max(epsilon^p - ||D||_p^p, 0) / c + ||D on A and A' together||_p^p

so that the attack moves the norm of A' to A. (l1: times c, as in the authors' code.) Then D is
scaled to ||D||_2 = epsilon and clipped to the bounds, or projected to the l1 ball and the bounds.

What differs from the authors' code: every example has a square of its own, not one for the whole
batch, and it may touch the lower and the right edge. Fooling means another class, a tie does not.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from dd_jax.attacks._arguments import SizeOrSizes
from dd_jax.attacks._minimum_norm import fools_at, rival_difference
from dd_jax.attacks._queue import work_off
from dd_jax.attacks._restarts import (
    Found,
    Net,
    Problem,
    asked_again,
    checked_count,
    folded,
    on_sphere,
    prepare,
    where_rows,
)
from dd_jax.attacks._square_windows import (
    Layout,
    Windows,
    image_layout,
    make_windows,
    mask_of,
    pattern_at,
    random_place,
)
from dd_jax.norms import (
    Bounds,
    LpNorm,
    per_example,
    project_within,
    stay_within,
)
from dd_jax.types import AttackResult, LogitsFn, RandomKeys

HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
SHARE = 0.8
TINY = 1e-12
"""Added to norms before a division, as in the authors' code."""


class Rules(NamedTuple):
    """What is the same for all examples."""

    norm: LpNorm
    bounds: Bounds | None
    num_queries: int
    layout: Layout
    windows: Windows


class Path(NamedTuple):
    """How far the search is with each example."""

    perturbation: Float[Array, "batch ..."]
    margin: Float[Array, " batch"]  # the smallest
    num_queries: Int[Array, " batch"]
    success: Bool[Array, " batch"]


def square(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"] | None = None,
    *,
    epsilon: SizeOrSizes,
    norm: LpNorm = "linf",
    num_queries: int = 5000,
    share: float = SHARE,
    channel_axis: int = -1,
    bounds: Bounds | None = None,
    key: RandomKeys | None = None,
) -> AttackResult:
    """Square Attack in the lp ball of radius epsilon: a random search, described above.

    Args:
      logits_fn: maps (batch, ...) inputs to (batch, classes) logits, row by row. Its gradient is
        not used.
      inputs: (batch, height, width, channels), (batch, height, width), or (batch, components),
        whose squares are intervals; floating, within the bounds, if there are any.
      labels: the classes to leave. None: the predicted ones.
      epsilon: the radius, in the units of the inputs, 0 or more; one number, or one per example.
      norm: "linf", "l2" or "l1".
      num_queries: N, after the starting point.
      share: p at first, more than 0 and at most 1.
      channel_axis: where the channels of (batch, ...) inputs with four axes are; 1 for
        (batch, channels, height, width).
      bounds: (lower, upper), numbers or arrays that broadcast to one example, with or without a
        leading axis of size 1: inputs + perturbation stays within. None: no bounds.
      key: one random key, or one per example, (batch,). With one for all, the draws of an example
        depend on its place in the batch. None: key 0.

    Returns:
      AttackResult(perturbation, success, num_steps). perturbation: the first that fools; where none
      does, the one of the smallest margin. success: whether the net does not classify
      inputs + perturbation as the label says. num_steps: the queries, the starting point included.
      ||perturbation||_p does not exceed epsilon, not even by rounding.

    Edges: what is misclassified already is done: zero perturbation, success, zero queries. Results
    do not depend on the rest of the batch. Gradients do not flow through the result.

    Raises:
      ValueError: at trace time, for shapes, types or options that make no sense.

    >>> import jax.numpy as jnp
    >>> import dd_jax
    >>> weights = jnp.array([[1.0, -1.0], [3.0, 0.5]])
    >>> found = dd_jax.attacks.square(
    ...     lambda x: x @ weights, jnp.array([[2.0, -1.0]]), epsilon=0.5, num_queries=100
    ... )
    >>> bool(found.success[0]), bool(jnp.abs(found.perturbation).max() <= 0.5)
    (True, True)
    """
    options: dict[str, Any] = dict(norm=norm, epsilon=epsilon, bounds=bounds, key=key)
    net, problem, right = prepare(logits_fn, inputs, labels, **options)
    rules = make_rules(problem, norm, bounds, num_queries, share, channel_axis)
    return asked_again(net, problem, search(net, problem, rules, right), right)


def make_rules(
    problem: Problem,
    norm: LpNorm,
    bounds: Bounds | None,
    num_queries: int,
    share: float = SHARE,
    channel_axis: int = -1,
) -> Rules:
    """Checks the options of `square` and puts them together."""
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; it must be more than 0 and at most 1.")
    layout = image_layout(problem.inputs.shape, channel_axis)
    shares = [share / 2**i for i in range(len(HALVED_AFTER) + 1)]
    windows = make_windows(layout, shares, 1 if norm == "linf" else 3)
    return Rules(norm, bounds, checked_count("num_queries", num_queries), layout, windows)


def search(net: Net, problem: Problem, rules: Rules, active: Bool[Array, " batch"]) -> Found:
    """Runs the random search for the examples that are active."""
    path = Path(
        jnp.zeros_like(problem.inputs),
        jnp.full_like(problem.epsilon, jnp.inf),
        jnp.zeros_like(problem.labels),
        jnp.zeros_like(active),
    )

    def left(path: Path) -> Int[Array, " batch"]:
        count = rules.num_queries + 1 - path.num_queries
        return jnp.where(active & ~path.success, count, 0)

    start = starting_point(problem, rules)
    path = path._replace(perturbation=where_rows(active, start, path.perturbation))
    path = work_off(partial(take_turn, net, rules), problem, path, net.turns, left)
    return Found(path.perturbation, path.success, path.num_queries)


def take_turn(net: Net, rules: Rules, problem: Problem, before: Path) -> Path:
    """One query about each of some examples; the first is about the starting point."""
    is_first = before.num_queries == 0
    candidate = where_rows(is_first, before.perturbation, propose(problem, before, rules))
    logits = net.on_rows(problem.inputs + candidate, problem.keys, before.num_queries + 1)
    margin = -rival_difference(logits, problem.labels).astype(before.margin.dtype)
    fools = fools_at(logits, problem.labels)
    better = (margin < before.margin) | fools
    return Path(
        where_rows(better, candidate, before.perturbation),
        jnp.where(better, margin, before.margin),
        before.num_queries + 1,
        fools,
    )


def random_signs(bits: UInt32[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """-1 or 1, by the last bit."""
    return jnp.where(bits & 1 > 0, 1, -1).astype(dtype)


def starting_point(problem: Problem, rules: Rules) -> Float[Array, "batch ..."]:
    """Stripes, one pixel wide, or tiles, of random signs."""
    layout, tiles, dtype = rules.layout, rules.windows.tiles, problem.inputs.dtype
    height, width, channels = layout[2:]
    keys = folded(problem.keys, jnp.zeros_like(problem.labels))
    draw = lambda *shape: jax.vmap(lambda key: jax.random.bits(key, shape, jnp.uint32))(keys)
    if rules.norm == "linf":
        bits = draw(*((1, width) if width > 1 else (height, 1)), channels)
        image = jnp.broadcast_to(
            random_signs(bits, dtype), (len(problem.inputs), height, width, channels)
        )
    else:
        bits = draw(len(tiles), channels + 1)
        signs, turned = random_signs(bits[..., :-1], dtype), (bits[..., -1] & 1).astype(dtype)
        oriented = jnp.stack([1 - turned, turned], axis=-1)
        image = jnp.einsum(
            "ntc,nto,tohw->nhwc", signs, oriented, jnp.asarray(tiles, dtype), precision="highest"
        )
    return fitted(layout.from_image(image), problem, rules)


def propose(problem: Problem, path: Path, rules: Rules) -> Float[Array, "rows ..."]:
    """The next perturbation to try for each row."""
    layout, windows, dtype = rules.layout, rules.windows, problem.inputs.dtype
    bits = jax.vmap(lambda key: jax.random.bits(key, (6 + layout.channels,), jnp.uint32))(
        folded(problem.keys, path.num_queries)
    )
    size = number_of_halvings(path.num_queries - 1)  # The starting point is not counted.
    place = random_place(windows, layout, size, bits[:, :3])
    signs = random_signs(bits[:, None, None, 6:], dtype)
    image, mask = layout.to_image(path.perturbation), mask_of(windows, layout, place)
    if rules.norm == "linf":
        image = jnp.where(mask, per_example(problem.epsilon, image) * signs, image)
        return stay_within(layout.from_image(image), problem.inputs, rules.bounds)
    pattern = signs * pattern_at(windows, layout, place, dtype)
    other_mask = mask_of(windows, layout, random_place(windows, layout, size, bits[:, 3:6]))
    image = with_moved_norm(image, pattern, mask, other_mask, problem.epsilon, rules.norm)
    return fitted(layout.from_image(image), problem, rules)


def number_of_halvings(num_queries: Int[Array, " rows"]) -> Int[Array, " rows"]:
    """How often p has been halved after so many queries."""
    passed = num_queries[:, None] > jnp.asarray(HALVED_AFTER)[None]
    return jnp.sum(passed, axis=1).astype(jnp.int32)


def with_moved_norm(
    image: Float[Array, "rows height width channels"],
    pattern: Float[Array, "rows height width channels"],
    mask: Bool[Array, "rows height width 1"],
    other_mask: Bool[Array, "rows height width 1"],
    epsilon: Float[Array, " rows"],
    norm: LpNorm,
) -> Float[Array, "rows height width channels"]:
    """D with its norm on the other square moved to this one."""
    power, channels = (1 if norm == "l1" else 2), image.shape[-1]
    raised = lambda x, axes: jnp.sum(jnp.abs(x) ** power, axis=axes, keepdims=True)
    size = lambda x: raised(x, (1, 2)) ** (1 / power) + TINY  # of each channel
    unused = jnp.maximum(per_example(epsilon, image) ** power - raised(image, (1, 2, 3)), 0)
    windows = raised(jnp.where(mask | other_mask, image, 0), (1, 2, 3))
    budget = (unused / channels + windows) ** (1 / power) * (channels if norm == "l1" else 1)
    here = jnp.where(mask, image, 0)
    changed = pattern + here / size(here)
    return jnp.where(mask, changed / size(changed) * budget, jnp.where(other_mask, 0, image))


def fitted(
    perturbation: Float[Array, "rows ..."], problem: Problem, rules: Rules
) -> Float[Array, "rows ..."]:
    """Scaled to the ball's surface, and brought within the bounds."""
    inputs, epsilon, bounds = problem.inputs, problem.epsilon, rules.bounds
    if rules.norm == "l1":
        return project_within(perturbation, epsilon, inputs, bounds)
    if rules.norm == "l2":
        return on_sphere(perturbation, epsilon, inputs, bounds)
    return stay_within(per_example(epsilon, inputs) * jnp.sign(perturbation), inputs, bounds)
