"""Deep Defense in a training loop with Haiku: `python examples/with_haiku.py`.

Trains a small net on scikit-learn's digits, then fine-tunes it with the penalty, and prints the
test accuracy and the mean relative size of DeepFool's perturbations (rho_2) of both nets.
"""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import dd_jax

NET = hk.without_apply_rng(
    hk.transform(lambda images: hk.nets.MLP([64, 10])(images))  # logits of 10 classes
)


def cross_entropy_loss(params, images, labels):
    logits = NET.apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def defended_loss(params, images, labels):
    logits_fn = functools.partial(NET.apply, params)  # from images to logits
    penalty = dd_jax.regularizer(logits_fn, images, labels, correct_scale=10.0)
    return cross_entropy_loss(params, images, labels) + 10.0 * penalty.mean()


def train(loss, params, images, labels, *, learning_rate, num_steps):
    optimizer = optax.adam(learning_rate)

    @jax.jit
    def step(params, state):
        gradient = jax.grad(loss)(params, images, labels)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(num_steps):
        params, state = step(params, state)
    return params


@jax.jit
def measure(params, images, labels):
    logits_fn = functools.partial(NET.apply, params)
    accuracy = jnp.mean(jnp.argmax(logits_fn(images), axis=1) == labels)
    perturbation = dd_jax.deepfool(logits_fn, images).perturbation
    sizes = jnp.linalg.norm(perturbation, axis=1) / jnp.linalg.norm(images, axis=1)
    return accuracy, sizes.mean()


def main():
    dd_jax.xla.set_flags()  # before JAX computes: right numbers on CPUs
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
    training, test = (images[360:], labels[360:]), (images[:360], labels[:360])
    params = NET.init(jax.random.key(0), images[:1])
    reference = train(cross_entropy_loss, params, *training, learning_rate=1e-2, num_steps=150)
    defended = train(defended_loss, reference, *training, learning_rate=5e-3, num_steps=100)
    found = {}
    for name, params in (("reference", reference), ("defended", defended)):
        accuracy, rho = found[name] = [float(figure) for figure in measure(params, *test)]
        print(f"{name:10s} accuracy {accuracy:.1%}, rho_2 {rho:.3f}")
    return found


if __name__ == "__main__":
    main()
