"""The vocabulary that every part of the core shares."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

LogitsFn = Callable[[Float[Array, "batch ..."]], Float[Array, "batch classes"]]
"""Maps a batch of inputs to a batch of logits, each row by itself.

It is all that the core knows of a model. Gradients flow into whatever it closes over. Rows must not
depend on one another (batch normalization on stored statistics) nor on where in the batch they
stand; a `logits_fn` that draws random numbers per row (dropout) is recognized and kept at its batch
size, see `dd_jax.xla.closure_convert`.
"""

Scalar = float | Float[Array, ""]
"""A number, fixed or traced (the value of a schedule)."""


class AttackResult(NamedTuple):
    """What an attack found, example by example.

    perturbation: what to add to the inputs, in their space and shape.
    success: whether the perturbed input is classified as the attack wanted.
    num_steps: steps taken until success; the limit where there was none; 0 where none was needed.
    """

    perturbation: Float[Array, "batch ..."]
    success: Bool[Array, " batch"]
    num_steps: Int[Array, " batch"]


Solver = Callable[..., AttackResult]
"""An attack as `solver(logits_fn, inputs, labels) -> AttackResult`, such as `dd_jax.deepfool`.

It looks for a small perturbation that leaves the class `labels`, and gives a zero perturbation
where the input is classified otherwise already. Fix its options with `functools.partial`.
"""
