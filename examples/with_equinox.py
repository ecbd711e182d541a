"""Deep Defense in a training loop with Equinox: `python examples/with_equinox.py`.

Trains a small net on scikit-learn's digits, then fine-tunes it with the penalty, and prints the
test accuracy and the mean relative size of DeepFool's perturbations (rho_2) of both nets.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import dd_jax


class Net(eqx.Module):
    """One hidden layer; logits of 10 classes, of one image."""

    hidden: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self, key):
        for_hidden, for_out = jax.random.split(key)
        self.hidden = eqx.nn.Linear(64, 64, key=for_hidden)
        self.out = eqx.nn.Linear(64, 10, key=for_out)

    def __call__(self, image):
        return self.out(jax.nn.relu(self.hidden(image)))


def cross_entropy_loss(net, images, labels):
    logits = jax.vmap(net)(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def defended_loss(net, images, labels):
    logits_fn = jax.vmap(net)  # from a batch of images to a batch of logits
    penalty = dd_jax.regularizer(logits_fn, images, labels, correct_scale=10.0)
    return cross_entropy_loss(net, images, labels) + 10.0 * penalty.mean()


def train(loss, net, images, labels, *, learning_rate, num_steps):
    optimizer = optax.adam(learning_rate)

    @eqx.filter_jit
    def step(net, state):
        gradient = eqx.filter_grad(loss)(net, images, labels)
        updates, state = optimizer.update(gradient, state)
        return eqx.apply_updates(net, updates), state

    state = optimizer.init(eqx.filter(net, eqx.is_inexact_array))
    for _ in range(num_steps):
        net, state = step(net, state)
    return net


@eqx.filter_jit
def measure(net, images, labels):
    logits_fn = jax.vmap(net)
    accuracy = jnp.mean(jnp.argmax(logits_fn(images), axis=1) == labels)
    perturbation = dd_jax.deepfool(logits_fn, images).perturbation
    sizes = jnp.linalg.norm(perturbation, axis=1) / jnp.linalg.norm(images, axis=1)
    return accuracy, sizes.mean()


def main():
    dd_jax.xla.set_flags()  # before JAX computes: right numbers on CPUs
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
    training, test = (images[360:], labels[360:]), (images[:360], labels[:360])
    net = Net(jax.random.key(0))
    reference = train(cross_entropy_loss, net, *training, learning_rate=1e-2, num_steps=150)
    defended = train(defended_loss, reference, *training, learning_rate=5e-3, num_steps=100)
    found = {}
    for name, net in (("reference", reference), ("defended", defended)):
        accuracy, rho = found[name] = [float(figure) for figure in measure(net, *test)]
        print(f"{name:10s} accuracy {accuracy:.1%}, rho_2 {rho:.3f}")
    return found


if __name__ == "__main__":
    main()
