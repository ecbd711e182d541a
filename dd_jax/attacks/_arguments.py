"""The checks of arguments, and the first forward pass, that all attacks share."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dd_jax.norms import Norm, check_norm, is_known
from dd_jax.types import LogitsFn, Scalar
from dd_jax.xla import canary
from dd_jax.xla.closure_convert import Traces

SizeOrSizes = Scalar | Float[Array, " batch"]


def check_arguments(
    inputs: Array, labels: Array | None, norm: Norm = "l2", num_steps: int = 1
) -> None:
    """Raises ValueError, at trace time, for wrong shapes, types and options.

    Every public function calls this first.
    """
    canary.warn_once()
    check_norm(norm)
    if inputs.ndim < 2 or not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise ValueError(
            f"inputs must be a floating batch of shape (batch, ...); got "
            f"{inputs.dtype}{list(inputs.shape)}. "
            "Convert images to floats, and keep the batch axis also for a single example."
        )
    _check_sharding(inputs)
    if labels is not None and (
        labels.shape != inputs.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer)
    ):
        raise ValueError(
            f"labels must be integers of shape {inputs.shape[:1]}, one class per example; got "
            f"{labels.dtype}"
            f"{list(labels.shape)}. Pass class numbers, not one-hot rows."
        )
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1.")


def _check_sharding(inputs: Array) -> None:
    kind = jax.typeof(inputs)
    if any(spec := kind.sharding.spec):
        raise ValueError(
            f"inputs are sharded over explicit axes of a mesh, {spec}; make the mesh with "
            "axis_types=jax.sharding.AxisType.Auto, or shard the batch with jax.shard_map."
        )
    if getattr(getattr(kind, "manual_axis_type", kind), "varying", None) or getattr(
        kind, "vma", None
    ):
        raise ValueError(
            "inputs are inside a jax.shard_map that checks varying axes; give it check_vma=False."
        )


def trace(logits_fn: LogitsFn, inputs: Float[Array, "batch ..."]) -> Traces:
    """The net, traced for the whole batch.

    ValueError unless it returns floating logits, one row per example, of at least two classes.
    """
    traces = Traces(logits_fn, inputs)
    logits = traces.output(inputs.shape[0])
    if not hasattr(logits, "ndim"):
        raise ValueError(
            f"logits_fn must return one array, the logits; it returned a {type(logits).__name__}. "
            "Leave out everything else that the net returns, such as its updated state."
        )
    if logits.ndim != 2 or logits.shape[0] != inputs.shape[0] or logits.shape[1] < 2:
        raise ValueError(
            f"logits_fn must return logits of shape ({inputs.shape[0]}, classes) with at least 2 "
            f"classes for inputs of shape {inputs.shape}; it returned {logits.shape}. Flatten the "
            "output and keep the batch axis first."
        )
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(
            f"logits_fn must return floating logits; it returned {logits.dtype}. Return the "
            "logits, not class numbers, which have no gradient."
        )
    return traces


def labels_to_leave(
    traces: Traces, inputs: Float[Array, "batch ..."], labels: Array | None
) -> tuple[Float[Array, "batch classes"], Int[Array, " batch"], Bool[Array, " batch"]]:
    """Returns the clean logits, without a gradient; the labels, or the predicted classes if labels
    is None; and which examples are classified as these labels say.
    """
    logits = lax.stop_gradient(traces.logits(inputs))
    predicted = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    labels = predicted if labels is None else jnp.asarray(labels, jnp.int32)
    return logits, labels, predicted == labels


def one_per_example(
    name: str, size: SizeOrSizes, inputs: Float[Array, "batch ..."]
) -> Float[Array, " batch"]:
    """Broadcasts one size, or one per example, to one per example.

    ValueError, with the name of the argument, for other shapes and for negative sizes.
    """
    sizes = jnp.asarray(size, inputs.dtype)
    if sizes.ndim != 0 and sizes.shape != inputs.shape[:1]:
        raise ValueError(
            f"{name} must be one number, or one per example: {inputs.shape[:1]}; got shape "
            f"{sizes.shape}."
        )
    if is_known(lambda: jnp.any(~(jnp.asarray(size) >= 0))):
        raise ValueError(f"{name} is {size}; it must be 0 or more.")
    return lax.stop_gradient(jnp.broadcast_to(sizes, inputs.shape[:1]))
