"""The training state, the training step and the loop around it.

A run is a pure function of its configuration: the batch of step s and the random key of step s
depend on the seed and on s alone, and the state holds arrays only. So a run that was killed and
goes on from its latest checkpoint ends bitwise where an uninterrupted one ends.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dd_jax import parallel
from dd_jax.defenses import Defense
from dd_jax.types import LogitsFn

Batch = Mapping[str, np.ndarray | Array]  # NumPy arrays, which are tracers within jit.


class TrainState(NamedTuple):
    """All that training changes, arrays only. `batch_stats` is empty for nets without batch
    normalization.
    """

    step: Int[Array, ""]
    params: Any
    batch_stats: Any
    opt_state: optax.OptState


class DivergenceError(ValueError):
    """The loss is no longer a number."""


def make_logits_fn(
    model: nn.Module,
    params: Any,
    batch_stats: Any,
    dropout_key: PRNGKeyArray | None = None,
    *,
    compute_dtype: Any = jnp.float32,
) -> LogitsFn:
    """The one seam between Flax and the core: a net with its weights, as a function from inputs to
    logits.

    With a `dropout_key` the net is thinned by the mask that the key stands for, the same one at
    every call. Batch normalization runs on its stored statistics in any case. `compute_dtype`: of
    weights and activations within the net; inputs and logits keep the inputs' dtype, so that
    bfloat16 leaves the arithmetic of perturbations in float32.
    """
    variables = (
        {"params": params, "batch_stats": batch_stats} if batch_stats else {"params": params}
    )
    options = {} if dropout_key is None else {"train": True, "rngs": {"dropout": dropout_key}}
    if compute_dtype == jnp.float32:
        return lambda inputs: model.apply(variables, inputs, **options)
    narrow = jax.tree.map(lambda x: x.astype(compute_dtype), variables)
    return lambda inputs: model.apply(narrow, inputs.astype(compute_dtype), **options).astype(
        inputs.dtype
    )


def halved_at_four_fifths(rate: float, num_steps: int) -> optax.Schedule:
    """The authors' schedule for fine-tuning: the rate is halved once, at 80 % of the steps."""
    return optax.piecewise_constant_schedule(rate, {int(0.8 * num_steps): 0.5})


def cosine(rate: float, num_steps: int) -> optax.Schedule:
    """From the rate to zero along half a cosine, for training from scratch."""
    return optax.cosine_decay_schedule(rate, max(num_steps, 1))


SCHEDULES: dict[str, Callable[[float, int], optax.Schedule]] = {
    "halved_at_four_fifths": halved_at_four_fifths,
    "cosine": cosine,
}


def make_optimizer(
    schedule: optax.Schedule,
    *,
    momentum: float,
    weight_decay: float,
    max_gradient_norm: float = 0.0,
) -> optax.GradientTransformation:
    """SGD with momentum; weight decay is added to the gradient, on all parameters, as PyTorch and
    the authors do.

    A gradient of the loss longer than `max_gradient_norm` is shortened to it first (0: never, as
    the authors). Deep Defense needs that where the reference net is poor: the penalty grows
    exponentially with what a misclassified image is off by.
    """
    clip = optax.clip_by_global_norm(max_gradient_norm) if max_gradient_norm else optax.identity()
    return optax.chain(
        clip, optax.add_decayed_weights(weight_decay), optax.sgd(schedule, momentum=momentum)
    )


def initial_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    seed: int,
) -> TrainState:
    """A state with freshly drawn weights."""
    variables = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, *image_shape), jnp.float32))
    return fresh_state(optimizer, variables["params"], variables.get("batch_stats", {}))


def fresh_state(
    optimizer: optax.GradientTransformation, params: Any, batch_stats: Any
) -> TrainState:
    """A state at step 0 with given weights."""
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    defense: Defense,
    *,
    accumulation_steps: int = 1,
    compute_dtype: Any = jnp.float32,
) -> Callable[[TrainState, Batch, PRNGKeyArray], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """A `train_step(state, batch, key) -> (state, metrics)`, compiled for all devices.

    batch: this process's share, {"image": (batch, ...) inputs, "label": (batch,), "mask":
    (batch,)}; the loss is the mean over all processes' examples with mask 1, whatever the number of
    devices. Metrics are means over the same examples: "loss" and what the defense reports. Every
    device takes its examples in `accumulation_steps` equal parts, one after the other, and adds up
    their gradients: the memory of one part is enough. `compute_dtype` as in `make_logits_fn`. The
    state, see `parallel.replicate`, is consumed.
    """

    def train_step(
        state: TrainState, batch: Batch, key: PRNGKeyArray
    ) -> tuple[TrainState, dict[str, Array]]:
        dropout_key = jax.random.fold_in(key, state.step)

        def objective(params: Any, part: Batch) -> tuple[Array, dict[str, Array]]:
            logits_fn = make_logits_fn(
                model, params, state.batch_stats, dropout_key, compute_dtype=compute_dtype
            )
            loss, details = defense.loss_fn(logits_fn, part["image"], part["label"])
            sums = {
                name: jnp.sum(values * part["mask"])
                for name, values in {"loss": loss, **details}.items()
            }
            return sums["loss"], sums | {"examples": jnp.sum(part["mask"])}

        gradient_of = lambda part: jax.grad(objective, has_aux=True)(state.params, part)
        gradient, sums = parallel.sum_over_devices(
            parallel.summed_in_parts(gradient_of, batch, accumulation_steps)
        )
        examples = jnp.maximum(sums.pop("examples"), 1)
        gradient, means = jax.tree.map(lambda x: x / examples, (gradient, sums))
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = defense.retract(optax.apply_updates(state.params, updates))
        return TrainState(state.step + 1, params, state.batch_stats, opt_state), means

    return parallel.on_all_devices(train_step, donate_state=True, split_into=accumulation_steps)


def fit(
    state: TrainState,
    train_step: Callable,
    batch_of_step: Callable[[int], Batch],
    *,
    num_steps: int,
    seed: int,
    log_every: int = 50,
) -> Iterator[tuple[TrainState, int, dict[str, float] | None]]:
    """Trains from the state's own step to `num_steps`, yielding `(state, step, means)` after every
    step.

    `means` are the metrics averaged over the last `log_every` steps, None between. The caller
    saves, logs and shows progress. A yielded state is consumed by the next step. DivergenceError
    when the loss is not finite.
    """
    key = jax.random.key(seed)
    recent: list[dict[str, Array]] = []
    for step in range(int(state.step), num_steps):
        state, measured = train_step(state, batch_of_step(step), key)
        recent.append(measured)
        means = None
        if (step + 1) % log_every == 0 or step + 1 == num_steps:
            fetched = jax.device_get(recent)
            means = {name: float(np.mean([part[name] for part in fetched])) for name in fetched[0]}
            if not np.isfinite(means["loss"]):
                raise DivergenceError(
                    f"The loss is not finite between steps {step + 1 - len(recent)} and "
                    f"{step + 1}: "
                    "lower the learning rate or the penalty's weight."
                )
            recent = []
        yield state, step + 1, means
