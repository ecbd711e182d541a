"""The optimizer: SGD with momentum, its schedules, and the average of the weights."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int


def halved_at_four_fifths(rate: float, num_steps: int) -> optax.Schedule:
    """The authors' schedule for fine-tuning: the rate is halved once, at 80 % of the steps."""
    return optax.piecewise_constant_schedule(rate, {int(0.8 * num_steps): 0.5})


def cosine(rate: float, num_steps: int) -> optax.Schedule:
    """The rate falls to zero along half a cosine; for training from scratch."""
    return optax.cosine_decay_schedule(rate, max(num_steps, 1))


SCHEDULES: dict[str, Callable[[float, int], optax.Schedule]] = {
    "halved_at_four_fifths": halved_at_four_fifths,
    "cosine": cosine,
}


class AverageState(NamedTuple):
    """The average of the parameters after every update so far, and how many there were."""

    count: Int[Array, ""]  # type: ignore[assignment]  # in place of a tuple's method
    average: Any


def make_optimizer(
    schedule: optax.Schedule,
    *,
    momentum: float,
    weight_decay: float,
    max_gradient_norm: float = 0.0,
    average_decay: float = 0.0,
) -> optax.GradientTransformation:
    """SGD with momentum; weight decay is added to the gradient, on all parameters, as PyTorch and
    the authors do.

    A gradient of the loss that is longer than `max_gradient_norm` is shortened to it first (0:
    never, as the authors). Deep Defense needs that where the reference net is poor: the penalty
    grows exponentially with the distance of a misclassified image from its class.

    `average_decay`: with a value above 0 the optimizer's state also keeps the average of the
    parameters, see `average_parameters`; 0: it does not. ValueError unless within 0..1, 1 excluded.
    """
    if not 0 <= average_decay < 1:
        raise ValueError(f"average_decay is {average_decay}; it must be 0 or more and less than 1.")
    clip = optax.clip_by_global_norm(max_gradient_norm) if max_gradient_norm else optax.identity()
    decay, sgd = optax.add_decayed_weights(weight_decay), optax.sgd(schedule, momentum=momentum)
    average = [average_parameters(average_decay)] if average_decay else []
    return optax.chain(clip, decay, sgd, *average)


def average_parameters(decay: float) -> optax.GradientTransformation:
    """Keeps the exponential moving average of the parameters after every update; it changes no
    update. It must be the last of a chain.

        average = sum_i decay^(n - i) params_i / sum_i decay^(n - i),    i = 1, ..., n

    params_i are the parameters after the i-th update. The first ones, before any update, have no
    weight. Parseval's retraction comes after the optimizer: the average is of the parameters before
    it.
    """

    def init(params: Any) -> AverageState:
        return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: AverageState, params: Any = None) -> tuple[Any, AverageState]:
        count = state.count + 1
        # As expm1: with a decay near 1, 1 - decay^n in float32 is mostly rounding.
        share = (1 - decay) / -jnp.expm1(math.log(decay) * count.astype(jnp.float32))
        move = lambda average, new: average + share.astype(average.dtype) * (new - average)
        moved = jax.tree.map(move, state.average, optax.apply_updates(params, updates))
        return updates, AverageState(count, moved)

    return optax.GradientTransformation(init, update)


def average_of(opt_state: optax.OptState, params: Any) -> Any:
    """The average that an optimizer's state keeps; `params` where it keeps none, or has made no
    update yet.
    """
    is_average = lambda node: isinstance(node, AverageState)
    for node in filter(is_average, jax.tree.leaves(opt_state, is_leaf=is_average)):
        choose = lambda average, now, kept=node: jnp.where(kept.count > 0, average, now)
        return jax.tree.map(choose, node.average, params)
    return params
