"""Deep Defense in a training loop with Flax NNX: `python examples/with_nnx.py`.

Trains a small net on scikit-learn's digits, then fine-tunes it with the penalty, and prints the
test accuracy and the mean relative size of DeepFool's perturbations (rho_2) of both nets.
"""

import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import dd_jax


class Net(nnx.Module):
    """One hidden layer; logits of 10 classes."""

    def __init__(self, rngs):
        self.hidden, self.out = nnx.Linear(64, 64, rngs=rngs), nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        return self.out(nnx.relu(self.hidden(images)))


def cross_entropy_loss(net, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(net(images), labels).mean()


def defended_loss(net, images, labels):
    penalty = dd_jax.regularizer(net, images, labels, correct_scale=10.0)  # a net is a logits_fn
    return cross_entropy_loss(net, images, labels) + 10.0 * penalty.mean()


def train(loss, net, images, labels, *, learning_rate, num_steps):
    optimizer = nnx.Optimizer(net, optax.adam(learning_rate), wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer):
        optimizer.update(net, nnx.grad(loss)(net, images, labels))

    for _ in range(num_steps):
        step(net, optimizer)


@nnx.jit
def measure(net, images, labels):
    accuracy = jnp.mean(jnp.argmax(net(images), axis=1) == labels)
    perturbation = dd_jax.deepfool(net, images).perturbation
    sizes = jnp.linalg.norm(perturbation, axis=1) / jnp.linalg.norm(images, axis=1)
    return accuracy, sizes.mean()


def main():
    dd_jax.xla.set_flags()  # before JAX computes: right numbers on CPUs
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
    training, test = (images[360:], labels[360:]), (images[:360], labels[:360])
    net = Net(nnx.Rngs(0))
    found = {}
    for name, loss, learning_rate, num_steps in (
        ("reference", cross_entropy_loss, 1e-2, 150),
        ("defended", defended_loss, 5e-3, 100),
    ):
        train(loss, net, *training, learning_rate=learning_rate, num_steps=num_steps)
        accuracy, rho = found[name] = [float(figure) for figure in measure(net, *test)]
        print(f"{name:10s} accuracy {accuracy:.1%}, rho_2 {rho:.3f}")
    return found


if __name__ == "__main__":
    main()
