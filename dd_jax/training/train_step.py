"""The training state, the training step and the loop around it.

A run is a pure function of its configuration: the batch and the random key of a step depend on the
seed and on the step's number alone, and the state holds arrays only. So a run that was killed and
resumes from its latest checkpoint ends with bitwise the same weights as an uninterrupted one.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dd_jax import parallel
from dd_jax.data import Batch
from dd_jax.defenses import BoundDefense, is_plain
from dd_jax.training.optimizer import average_of
from dd_jax.types import LogitsFn

DEFENSE_STREAM = 1  # Folded into a step's key, so that a defense does not draw the net's masks.


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
    """A Flax net with its weights, as a function from inputs to logits: all that the core sees of
    it.

    With a `dropout_key`, dropout is on, and the key determines its mask, the same one at every
    call. Batch normalization always uses its stored statistics. `compute_dtype`: of weights and
    activations within the net; inputs and logits keep the inputs' dtype, so that bfloat16 leaves
    the arithmetic of perturbations in float32.
    """
    variables = (
        {"params": params, "batch_stats": batch_stats} if batch_stats else {"params": params}
    )
    options: dict[str, Any] = {}
    if dropout_key is not None:
        options = dict(train=True, rngs={"dropout": dropout_key})
    apply_fn: Callable[..., Any] = partial(model.apply, **options)
    if compute_dtype == jnp.float32:
        return lambda inputs: apply_fn(variables, inputs)
    narrow = jax.tree.map(lambda x: x.astype(compute_dtype), variables)
    return lambda inputs: apply_fn(narrow, inputs.astype(compute_dtype)).astype(inputs.dtype)


def initial_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    seed: int,
) -> TrainState:
    """A state at step 0 with newly drawn weights."""
    variables = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, *image_shape), jnp.float32))
    return fresh_state(optimizer, variables["params"], variables.get("batch_stats", {}))


def fresh_state(
    optimizer: optax.GradientTransformation, params: Any, batch_stats: Any
) -> TrainState:
    """A state at step 0 with given weights."""
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))


def averaged(state: TrainState) -> TrainState:
    """The same state with the average of its parameters in their place, where the optimizer keeps
    one (`make_optimizer(average_decay=...)`); otherwise, and before the first step, unchanged.

    Batch statistics are not averaged: they stay those of the last step.
    """
    return state._replace(params=average_of(state.opt_state, state.params))


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    defense: BoundDefense,
    *,
    accumulation_steps: int = 1,
    compute_dtype: Any = jnp.float32,
    update_batch_stats: bool = False,
    parallel_mode: parallel.Mode = "auto",
) -> Callable[[TrainState, Batch, PRNGKeyArray], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """A `train_step(state, batch, key) -> (state, metrics)`, compiled for all devices.

    batch: this process's share, {"image": (batch, ...) inputs, "label": (batch,), "mask":
    (batch,)}. The loss is the mean over all processes' examples with mask 1, whatever the number of
    devices. Metrics are means over the same examples: "loss" and what the defense reports. Every
    device takes its examples in `accumulation_steps` equal parts, one after the other, and adds up
    their gradients: the memory of one part is enough. `compute_dtype` as in `make_logits_fn`. The
    state, see `parallel.replicate`, is consumed.

    A defense gets one random key per example, which depends on the key, on the step and on the
    example's place in the whole batch, not on how the batch is divided.

    update_batch_stats: train batch normalization. Each part of each device is normalized by its own
    mean and variance, filled-up examples included, through which the gradient flows; the net is
    called with train=True and update_batch_stats=True, and must update its statistics then. The new
    statistics are the mean of those of all parts, weighted by their numbers of examples with mask
    1. So the result depends on how a batch is divided. False: the stored statistics are used, and
    left as they are, as in all attacks.

    parallel_mode: how the step is compiled for all devices, see `dd_jax.parallel`.

    ValueError for update_batch_stats with a defense other than "clean" or "parseval", whose attacks
    need the stored statistics, or with a net that has none.
    """
    if update_batch_stats and not is_plain(defense):
        raise ValueError(
            "update_batch_stats is for the defenses clean and parseval alone: the others attack "
            "the net, which then must not change. Train batch normalization first."
        )
    sums_of = _sums_and_new_batch_stats if update_batch_stats else _sums
    objective = partial(sums_of, model, defense, compute_dtype)

    def train_step(
        state: TrainState, batch: Batch, key: PRNGKeyArray
    ) -> tuple[TrainState, dict[str, Array]]:
        step_key = jax.random.fold_in(key, state.step)
        gradient_of = lambda part: jax.grad(objective, has_aux=True)(
            state.params, state.batch_stats, part, step_key
        )
        gradient, sums = parallel.sum_over_devices(
            parallel.summed_in_parts(gradient_of, batch, accumulation_steps)
        )
        examples = jnp.maximum(sums.pop("examples"), 1)
        gradient, means = jax.tree.map(lambda x: x / examples, (gradient, sums))
        change = means.pop("batch_stats_change", None)
        return _updated(optimizer, defense, state, gradient, change), means

    options: dict[str, Any] = dict(donate_state=True, mode=parallel_mode)
    options["split_into"] = accumulation_steps
    compiled = parallel.on_all_devices(train_step, **options)
    return lambda state, batch, key: compiled(state, parallel.numbered(batch), key)


def _sums(
    model: nn.Module,
    defense: BoundDefense,
    compute_dtype: Any,
    params: Any,
    batch_stats: Any,
    part: Batch,
    step_key: PRNGKeyArray,
) -> tuple[Array, dict[str, Array]]:
    """The sum of the losses over a part's examples with mask 1, and all sums by name."""
    logits_fn = make_logits_fn(model, params, batch_stats, step_key, compute_dtype=compute_dtype)
    key_of = partial(jax.random.fold_in, jax.random.fold_in(step_key, DEFENSE_STREAM))
    keys = jax.vmap(key_of)(part["number"])
    loss, details = defense.loss_fn(logits_fn, part["image"], part["label"], keys)
    return _masked_sums(loss, details, part["mask"])


def _sums_and_new_batch_stats(
    model: nn.Module,
    defense: BoundDefense,
    compute_dtype: Any,
    params: Any,
    batch_stats: Any,
    part: Batch,
    step_key: PRNGKeyArray,
) -> tuple[Array, dict[str, Any]]:
    """The same with batch normalization in training, and "batch_stats_change": how the statistics
    change, times the number of examples.
    """
    if not batch_stats:
        raise ValueError(
            "update_batch_stats is True, and the net has no batch normalization: leave it False."
        )
    narrow = jax.tree.map(lambda x: x.astype(compute_dtype), params)
    logits, updated = model.apply(
        {"params": narrow, "batch_stats": batch_stats},
        part["image"].astype(compute_dtype),
        train=True,
        update_batch_stats=True,
        mutable=["batch_stats"],
        rngs={"dropout": step_key},
    )
    logits = logits.astype(part["image"].dtype)
    loss, details = defense.loss_fn(lambda _: logits, part["image"], part["label"], step_key)
    total, sums = _masked_sums(loss, details, part["mask"])
    change = jax.tree.map(
        lambda new, old: (new.astype(old.dtype) - old) * sums["examples"],
        updated["batch_stats"],
        batch_stats,
    )
    return total, sums | {"batch_stats_change": change}


def _updated(
    optimizer: optax.GradientTransformation,
    defense: BoundDefense,
    state: TrainState,
    gradient: Any,
    batch_stats_change: Any,
) -> TrainState:
    """The state after an update; a `batch_stats_change` of None leaves the statistics alone."""
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = defense.retract(optax.apply_updates(state.params, updates))
    batch_stats = state.batch_stats
    if batch_stats_change is not None:
        batch_stats = jax.tree.map(jnp.add, batch_stats, batch_stats_change)
    return TrainState(state.step + 1, params, batch_stats, opt_state)


def _masked_sums(
    loss: Float[Array, " batch"],
    details: Mapping[str, Float[Array, " batch"]],
    mask: Float[Array, " batch"],
) -> tuple[Array, dict[str, Array]]:
    sums = {name: jnp.sum(values * mask) for name, values in {"loss": loss, **details}.items()}
    return sums["loss"], sums | {"examples": jnp.sum(mask)}


def fit(
    state: TrainState,
    train_step: Callable,
    batch_of_step: Callable[[int], Batch],
    *,
    num_steps: int,
    seed: int,
    log_every: int = 50,
) -> Iterator[tuple[TrainState, int, dict[str, float] | None]]:
    """Trains from the state's own step to `num_steps`, and yields `(state, step, means)` after
    every step.

    `means` are the metrics averaged over the last `log_every` steps, and None at the steps between.
    The caller saves, logs and shows progress. A yielded state is consumed by the next step. Raises
    DivergenceError when the loss is not finite.
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
                    f"{step + 1}: lower the learning rate or the penalty's weight."
                )
            recent = []
        yield state, step + 1, means
