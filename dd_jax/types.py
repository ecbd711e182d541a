"""The types that all parts of the core share."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int, Key, UInt32

LogitsFn = Callable[[Float[Array, "batch ..."]], Float[Array, "batch classes"]]
"""Maps a batch of inputs to a batch of logits, row by row.

It is all that the core knows of a model. Gradients flow into whatever it closes over. A row must
not depend on the other rows (run batch normalization on its stored statistics) nor on its place in
the batch. An exception is a `logits_fn` that draws random numbers per row (dropout): the core
recognizes it and calls it with whole batches only, see `dd_jax.xla.closure_convert`.
"""

RandomKeys = Key[Array, "*batch"] | UInt32[Array, "*batch words"]
"""One random key, or one per example, (batch,).

With one for all, what an example draws depends on its place in the batch; with its own, it does
not.
"""

Scalar = float | Float[Array, ""]
"""A number, fixed or traced (such as the value of a schedule)."""


class AttackResult(NamedTuple):
    """The result of an attack, example by example.

    perturbation: to be added to the inputs; in their space and shape.
    success: whether the perturbed input is classified as the attack wanted.
    num_steps: the steps until success; without success the limit; 0 if no step was needed.
    """

    perturbation: Float[Array, "batch ..."]
    success: Bool[Array, " batch"]
    num_steps: Int[Array, " batch"]


Solver = Callable[..., AttackResult]
"""An attack as `solver(logits_fn, inputs, labels) -> AttackResult`, such as `dd_jax.deepfool`.

It searches for a small perturbation with which the prediction is not `labels`. An input that is
classified differently already gets a zero perturbation. It calls the net with the whole batch, its
rows in their order. Fix its options with `functools.partial`.
"""
