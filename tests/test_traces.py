"""A net is traced once for each number of rows, whatever is computed with it."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from test_deepfool import INPUTS, NET

import dd_jax
from dd_jax import attacks

LABELS = jnp.argmax(NET(INPUTS), axis=1) * (jnp.arange(9) % 2)
AT_BOUNDARY = dict(gradient="at_boundary")
CALLS = {
    "deepfool": dd_jax.deepfool,
    "deepfool in parts": partial(dd_jax.deepfool, class_chunk_size=1, bounds=(-9.0, 9.0)),
    "signed_margin": dd_jax.signed_margin,
    "signed_margin at_boundary": partial(dd_jax.signed_margin, **AT_BOUNDARY),
    "signed_margin with a solver": partial(
        dd_jax.signed_margin, solver=dd_jax.deepfool, **AT_BOUNDARY
    ),
    "regularizer": dd_jax.regularizer,
    "deep_defense_loss": dd_jax.deep_defense_loss,
    "deep_defense_loss at_boundary": partial(dd_jax.deep_defense_loss, **AT_BOUNDARY),
    "fgsm": partial(attacks.fgsm, epsilon=0.1),
    "pgd": partial(attacks.pgd, epsilon=0.1, step_size=0.02, key=jax.random.key(0)),
    "minimal_fgsm": partial(attacks.minimal_fgsm, max_epsilon=1.0),
    "fgsm_success_curve": partial(attacks.fgsm_success_curve, epsilons=(0.1, 0.2)),
    "carlini_wagner_l2": partial(attacks.carlini_wagner_l2, bounds=(-9.0, 9.0)),
}
DIFFERENTIABLE = [name for name in CALLS if "margin" in name or "loss" in name] + ["regularizer"]
QUEUED = {"fgsm_success_curve", "minimal_fgsm"}  # All others run on the queue, in three sizes.


def sizes_traced(name, differentiate):
    """The number of rows at every call of the net while the function is compiled."""
    sizes = []

    def logits_fn(scale, x):
        sizes.append(x.shape[0])
        return scale * NET(x)

    def run(scale, inputs, labels):
        return CALLS[name](partial(logits_fn, scale), inputs, labels)

    def total(scale, inputs, labels):
        return sum(leaf.sum() for leaf in jax.tree.leaves(run(scale, inputs, labels)))

    jax.jit(jax.grad(total) if differentiate else run).lower(1.0, INPUTS, LABELS)
    return sizes


@pytest.mark.parametrize(
    "name, differentiate",
    [(name, False) for name in CALLS] + [(name, True) for name in DIFFERENTIABLE],
)
def test_a_net_is_traced_once_for_each_number_of_rows(name, differentiate, short_turns):
    sizes = sizes_traced(name, differentiate)
    assert len(sizes) == len(set(sizes)), f"traced for {sizes} rows"
    assert set(sizes) == ({9} if name in QUEUED else {9, 3, 1})


def test_weights_of_a_callable_object_may_change_between_calls():
    """JAX keeps traces by the function's identity; ours are of one call."""

    class Net:
        weights = jnp.array([[1.0, -1.0], [3.0, 0.5]])

        def __call__(self, x):
            return x @ self.weights

    net, x, labels = Net(), jnp.array([[2.0, -1.0]]), jnp.array([0])
    before = dd_jax.deepfool(net, x).perturbation
    net.weights = 2 * net.weights.at[0, 0].set(-7.0)
    fresh = Net()
    fresh.weights = net.weights
    after = dd_jax.deepfool(net, x).perturbation
    assert (after == dd_jax.deepfool(fresh, x).perturbation).all() and (after != before).any()

    def loss(weights):
        net.weights = weights
        return dd_jax.regularizer(net, x, labels).sum()

    first, second = jax.grad(loss)(Net.weights), jax.grad(loss)(Net.weights)
    assert (first == second).all()
