"""Deep Defense in a training loop with plain functions: `python examples/plain_functions.py`.

Trains a small net on scikit-learn's digits, then fine-tunes it with the penalty, and prints the
test accuracy and the mean relative size of DeepFool's perturbations (rho_2) of both nets.
"""

import functools

import jax
import jax.numpy as jnp
from sklearn.datasets import load_digits

import dd_jax


def apply_net(params, images):
    """One hidden layer; logits of 10 classes."""
    hidden = jax.nn.relu(images @ params["hidden"] + params["hidden_bias"])
    return hidden @ params["out"] + params["out_bias"]


def initial_params(key):
    for_hidden, for_out = jax.random.split(key)
    return {
        "hidden": jax.random.normal(for_hidden, (64, 64)) * (2 / 64) ** 0.5,
        "hidden_bias": jnp.zeros(64),
        "out": jax.random.normal(for_out, (64, 10)) * (1 / 64) ** 0.5,
        "out_bias": jnp.zeros(10),
    }


def cross_entropy_loss(params, images, labels):
    log_probabilities = jax.nn.log_softmax(apply_net(params, images))
    return -jnp.take_along_axis(log_probabilities, labels[:, None], axis=1).mean()


def defended_loss(params, images, labels):
    logits_fn = functools.partial(apply_net, params)  # from images to logits
    penalty = dd_jax.regularizer(logits_fn, images, labels, correct_scale=10.0)
    return cross_entropy_loss(params, images, labels) + 10.0 * penalty.mean()


def train(loss, params, images, labels, *, learning_rate, num_steps):
    """Gradient descent with momentum 0.9."""

    @jax.jit
    def step(params, velocity):
        gradient = jax.grad(loss)(params, images, labels)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradient)
        return jax.tree.map(lambda p, v: p - learning_rate * v, params, velocity), velocity

    velocity = jax.tree.map(jnp.zeros_like, params)
    for _ in range(num_steps):
        params, velocity = step(params, velocity)
    return params


@jax.jit
def measure(params, images, labels):
    logits_fn = functools.partial(apply_net, params)
    accuracy = jnp.mean(jnp.argmax(logits_fn(images), axis=1) == labels)
    perturbation = dd_jax.deepfool(logits_fn, images).perturbation
    sizes = jnp.linalg.norm(perturbation, axis=1) / jnp.linalg.norm(images, axis=1)
    return accuracy, sizes.mean()


def main():
    dd_jax.xla.set_flags()  # before JAX computes: right numbers on CPUs
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
    training, test = (images[360:], labels[360:]), (images[:360], labels[:360])
    params = initial_params(jax.random.key(0))
    reference = train(cross_entropy_loss, params, *training, learning_rate=1e-1, num_steps=150)
    defended = train(defended_loss, reference, *training, learning_rate=2e-2, num_steps=100)
    found = {}
    for name, params in (("reference", reference), ("defended", defended)):
        accuracy, rho = found[name] = [float(figure) for figure in measure(params, *test)]
        print(f"{name:10s} accuracy {accuracy:.1%}, rho_2 {rho:.3f}")
    return found


if __name__ == "__main__":
    main()
