"""DeepFool and Deep Defense's penalty as plainly and slowly as they can be written: what `dd_jax`
is compared with.

A Python loop over the steps, every example in every step, all class gradients by `jax.jacrev`, and
no derivative rule: gradients are plain autodiff through all of it. Not safe where gradients vanish.
"""

import jax
import jax.numpy as jnp


def steps(
    logits_fn,
    inputs,
    labels,
    *,
    norm="l2",
    num_steps=5,
    overshoot=0.02,
    num_candidates=None,
    gradient_offset=0.0,
    stale_source=False,
):
    """Returns (sum of steps, number of steps, success), away from the label where it is predicted,
    else towards it.

    `stale_source` repeats a slip of the authors' code: from the second step on, the logit
    difference is taken against the class that was the source one step earlier, the gradient
    difference against the current one.
    """
    row, trailing = jnp.arange(len(labels)), tuple(range(1, inputs.ndim))
    column = lambda values: values.reshape((-1,) + (1,) * len(trailing))
    clean = logits_fn(inputs)
    classes = jnp.arange(clean.shape[1])[None]
    right = jnp.argmax(clean, axis=1) == labels
    rank = jnp.argsort(jnp.argsort(-clean, axis=1), axis=1)
    candidate = rank < (num_candidates or clean.shape[1])

    total = jnp.zeros_like(inputs)
    active, count = jnp.ones(len(labels), bool), jnp.full(len(labels), num_steps)
    source = None
    for step in range(num_steps):
        logits = logits_fn(inputs + total)
        # (classes, batch, ...)
        jacobian = jax.jacrev(lambda x: logits_fn(x).sum(axis=0))(inputs + total)
        previous, source = source, jnp.where(right, labels, jnp.argmax(logits, axis=1))
        # Who has arrived may have no step left to take, but takes part in all of this.
        if step > 0:
            source = jnp.where(active, source, previous)
        of_logits = source if step == 0 else jnp.where(stale_source, previous, source)
        differences = logits - logits[row, of_logits][:, None]
        gradients = jnp.moveaxis(jacobian, 0, 1) - jacobian[source, row][:, None]

        allowed = jnp.where(
            right[:, None], candidate & (classes != source[:, None]), classes == labels[:, None]
        )
        sizes = jax.vmap(lambda w: _dual_norm(w + gradient_offset, norm, trailing), 1, 1)(gradients)
        target = jnp.argmin(jnp.where(allowed, jnp.abs(differences) / sizes, jnp.inf), axis=1)

        difference, gradient = differences[row, target], gradients[row, target]
        size = _dual_norm(gradient + gradient_offset, norm, trailing)
        direction = jnp.sign(gradient) if norm == "linf" else gradient / column(size)
        total = total + jnp.where(column(active), column(jnp.abs(difference) / size) * direction, 0)

        reached = jnp.argmax(logits_fn(inputs + (1 + overshoot) * total), axis=1) == labels
        count = jnp.where(active & (reached != right), step + 1, count)
        active = active & (reached == right)
    return total, count, ~active


def signed_margin(logits_fn, inputs, labels, *, norm="l2", overshoot=0.02, **options):
    """+-||D|| / ||x||, differentiable by plain autodiff."""
    total, _, _ = steps(logits_fn, inputs, labels, norm=norm, overshoot=overshoot, **options)
    trailing = tuple(range(1, inputs.ndim))
    size = _norm((1 + overshoot) * total, norm, trailing) / _norm(inputs, norm, trailing)
    right = jnp.argmax(logits_fn(inputs), axis=1) == labels
    return jnp.where(right, size, -size)


def regularizer(logits_fn, inputs, labels, *, correct_scale=25.0, wrong_scale=5.0, **options):
    """exp(-c m) where right, exp(-d m) where wrong."""
    margin = signed_margin(logits_fn, inputs, labels, **options)
    right = jnp.argmax(logits_fn(inputs), axis=1) == labels
    return jnp.where(right, jnp.exp(-correct_scale * margin), jnp.exp(-wrong_scale * margin))


def _norm(x, norm, axes):
    return jnp.abs(x).max(axis=axes) if norm == "linf" else jnp.sqrt((x * x).sum(axis=axes))


def _dual_norm(w, norm, axes):
    return jnp.abs(w).sum(axis=axes) if norm == "linf" else jnp.sqrt((w * w).sum(axis=axes))
