"""What a plain `pip install dd_jax` can do: the penalty and its gradient, an attack, and an
evaluation of arrays, held against the closed form on an affine net.
"""

import importlib.util
import pathlib
import time

begun = time.perf_counter()
import dd_jax  # noqa: E402

print(f"import dd_jax: {time.perf_counter() - begun:.1f} s", flush=True)
here = pathlib.Path(__file__).parent.parent
assert here not in pathlib.Path(dd_jax.__file__).parents, "the checkout was imported"
for optional in ("flax", "optax", "orbax", "tensorflow_datasets", "matplotlib", "tqdm", "cv2"):
    assert importlib.util.find_spec(optional) is None, f"{optional} is installed"
dd_jax.xla.set_flags()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from dd_jax import data, evaluation  # noqa: E402

random = np.random.default_rng(0)
weights = jnp.asarray(random.normal(size=(6, 2)), jnp.float32)
inputs = random.normal(size=(50, 6)).astype(np.float32)
logits = np.asarray(inputs @ weights)
labels, slope = logits.argmax(1), np.linalg.norm(weights[:, 0] - weights[:, 1])
distance = np.abs(logits[:, 0] - logits[:, 1]) / slope


@jax.jit
def attack(inputs):
    """DeepFool's perturbations."""
    return dd_jax.deepfool(lambda x: x @ weights, inputs, labels)


found = attack(inputs)
assert found.success.all()
sizes = np.linalg.norm(found.perturbation, axis=1)
np.testing.assert_allclose(sizes, 1.02 * distance, rtol=1e-4)


def penalty(weights):
    """Deep Defense's, the mean over the inputs."""
    return dd_jax.regularizer(lambda x: x @ weights, inputs, labels, correct_scale=5.0).mean()


relative = 1.02 * distance / np.linalg.norm(inputs, axis=1)
np.testing.assert_allclose(penalty(weights), np.exp(-5 * relative).mean(), rtol=1e-4)
assert np.isfinite(jax.grad(penalty)(weights)).all()

evaluator = evaluation.Evaluator(lambda weights, x: x @ weights, data.in_memory(inputs, labels))
figures = evaluator.measure(weights, names=("deepfool", "fgsm", "pgd"))
assert figures["accuracy"] == 1 and figures["num_examples"] == 50
np.testing.assert_allclose(figures["rho_l2"], relative.mean(), rtol=1e-4)
print("The penalty, its gradient, DeepFool and an evaluation: as the closed form says.")
