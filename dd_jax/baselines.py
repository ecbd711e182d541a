"""The training losses that are compared, under one signature.

A defense is `loss_fn(logits_fn, inputs, labels) -> (loss per example, metrics per example)`; `make_loss` gives the one
that a name and its options stand for. Training differs in nothing else.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dd_jax.deep_defense import deep_defense_loss
from dd_jax.types import LogitsFn

LossFn = Callable[..., tuple[Float[Array, " batch"], dict[str, Float[Array, " batch"]]]]


def plain_loss(
    logits_fn: LogitsFn, inputs: Float[Array, "batch ..."], labels: Int[Array, " batch"]
) -> tuple[Float[Array, " batch"], dict[str, Float[Array, " batch"]]]:
    """Cross-entropy per example, -log softmax(logits)[label], and the metrics "cross_entropy" and "correct"."""
    logits = logits_fn(inputs)
    cross_entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]
    correct = (jnp.argmax(logits, axis=-1) == labels).astype(logits.dtype)
    return cross_entropy, {"cross_entropy": cross_entropy, "correct": correct}


LOSSES: dict[str, LossFn] = {"clean": plain_loss, "deep_defense": deep_defense_loss}


def make_loss(name: str, **options: Any) -> LossFn:
    """The loss of a defense, with its options fixed. ValueError for an unknown name."""
    if name not in LOSSES:
        raise ValueError(f"There is no defense {name!r}; choose one of {', '.join(LOSSES)}.")
    return partial(LOSSES[name], **options)
