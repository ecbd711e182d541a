"""Nets of plain Flax layers, as users bring them, with our penalty and with the straightforward one
side by side.

The straightforward version is the one that the tests compare with: a Python loop over the steps,
all examples and all class gradients in each of them, and plain autodiff through it all. Same
weights, images and limit of steps.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from timing import compiled, timed

import dd_jax

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import reference  # noqa: E402

PENALTY_WEIGHT = 15.0


class PlainLeNet(nn.Module):
    """`dd_jax.models.LeNet` with Flax's own pooling: takes its parameters."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, 28, 28, 1) to (batch, 10)."""
        x = nn.max_pool(nn.Conv(20, (5, 5), padding="VALID", name="conv1")(x), (2, 2), (2, 2))
        x = nn.max_pool(nn.Conv(50, (5, 5), padding="VALID", name="conv2")(x), (2, 2), (2, 2))
        return nn.Dense(10, name="fc2")(
            nn.relu(nn.Dense(500, name="fc1")(x.reshape(x.shape[0], -1)))
        )


class PlainConvNet(nn.Module):
    """`dd_jax.models.ConvNet` with Flax's own pooling: takes its parameters."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, 32, 32, 3) to (batch, 10)."""
        x = nn.relu(
            nn.max_pool(nn.Conv(32, (5, 5), padding="SAME", name="conv1")(x), (2, 2), (2, 2))
        )
        x = nn.avg_pool(
            nn.relu(nn.Conv(32, (5, 5), padding="SAME", name="conv2")(x)), (2, 2), (2, 2)
        )
        x = nn.avg_pool(
            nn.relu(nn.Conv(64, (5, 5), padding="SAME", name="conv3")(x)), (2, 2), (2, 2)
        )
        x = nn.relu(nn.Conv(64, (4, 4), padding="VALID", name="conv4")(x))
        return nn.Conv(10, (1, 1), name="conv5")(x).reshape(x.shape[0], -1)


NETS: dict[str, nn.Module] = {"lenet": PlainLeNet(), "convnet": PlainConvNet()}


def measure(
    net: nn.Module, params: Any, inputs: jax.Array, labels: jax.Array, *, num_steps: int = 5
) -> dict[str, Any]:
    """Seconds of the training step of a plain Flax net with our penalty and with the
    straightforward one.
    """
    apply_fn = lambda params, x: net.apply({"params": params}, x)

    def straightforward(
        logits_fn: Callable, x: jax.Array, y: jax.Array, **options: Any
    ) -> jax.Array:
        cross_entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits_fn(x)), y[:, None], axis=-1)[
            :, 0
        ]
        return cross_entropy + PENALTY_WEIGHT * reference.regularizer(logits_fn, x, y, **options)

    ours = lambda *arguments, **options: dd_jax.deep_defense_loss(
        *arguments, penalty_weight=PENALTY_WEIGHT, **options
    )[0]
    result: dict[str, Any] = {"batch": len(inputs), "num_steps": num_steps}
    for version, loss_fn in (("dd_jax", ours), ("straightforward", straightforward)):
        per_example = partial(loss_fn, num_steps=num_steps)
        loss = lambda params, x, y: per_example(partial(apply_fn, params), x, y).mean()  # noqa: B023
        step, compile_seconds = compiled(jax.value_and_grad(loss), params, inputs, labels)
        result[version] = {
            "loss": float(step(params, inputs, labels)[0]),
            "seconds": timed(lambda: step(params, inputs, labels)),  # noqa: B023
            "compile_seconds": compile_seconds,
            "temporary_megabytes": step.memory_analysis().temp_size_in_bytes / 1e6,
        }
    return result
