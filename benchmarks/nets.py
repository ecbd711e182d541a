"""The nets that are measured: trained briefly on real data, or read from files."""

import pathlib
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dd_jax import configuration, experiment, initialisation, pretrained, runs, training

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = {"mlp": "mnist_mlp", "lenet": "mnist_lenet", "convnet": "cifar_convnet", "nin": "cifar_nin"}
TRAINING_STEPS = {"mlp": 1200, "lenet": 1200, "convnet": 600, "nin": 300}
TRAIN_LIMIT = {"nin": 10000}  # What it sees in its few steps; the others, which are quicker, get all images.
NIN_BATCH, NIN_RATE = 32, 0.03

Net = Callable[[Any, jax.Array], jax.Array]


def load(
    name: str, data_dir: str, workdir: pathlib.Path, weights: pathlib.Path | None = None
) -> tuple[Net, Any, jax.Array, jax.Array]:
    """A net as (apply_fn, params), and 1000 training images and their labels, preprocessed as its configuration says.

    With `weights`, a folder of NAME.npz files of PyTorch-named arrays (each name as it is or after "param/"), the net is read
    from there; otherwise trained, once per workdir.
    """
    overrides = [f"--config.data.dir={data_dir}", f"--config.reference.max_steps={TRAINING_STEPS[name]}"]
    overrides += [f"--config.data.train_limit={TRAIN_LIMIT.get(name, 0)}"]
    config = configuration.read(str(ROOT / "configs" / f"{CONFIGS[name]}.py"), overrides)
    parts = experiment.build(config, workdir / name)
    inputs, labels = jnp.asarray(parts.feed.train_inputs[:1000]), jnp.asarray(parts.feed.data.train_labels[:1000])
    if weights is not None:
        with np.load(weights / f"{name}.npz") as arrays:
            named = {key.removeprefix("param/"): arrays[key] for key in arrays.files}
        params = pretrained.from_torch(
            name, {key: value for key, value in named.items() if "/" not in key and "." in key}
        )
    elif name == "nin":
        params = trained_nin(parts, workdir / name / "params.npz")
    else:
        configuration.claim_directory(config, workdir / name)
        params = runs.reference_state(parts).params
    apply_fn = lambda params, x: training.make_logits_fn(parts.model, params, {})(x)
    return apply_fn, jax.tree.map(jnp.asarray, params), inputs, labels


def trained_nin(parts: experiment.Experiment, path: pathlib.Path) -> Any:
    """NIN's parameters after a short training without dropout: SGD with momentum, a bounded gradient, batches of 32."""
    if path.exists():
        with np.load(path) as arrays:
            return flax.traverse_util.unflatten_dict(dict(arrays), sep="/")
    path.parent.mkdir(parents=True, exist_ok=True)
    model, images, labels = parts.model, parts.feed.train_inputs, parts.feed.data.train_labels
    params = initialisation.centred(model, model.init(jax.random.key(0), images[:1])["params"], images[:50])
    schedule = optax.warmup_cosine_decay_schedule(NIN_RATE / 10, NIN_RATE, 10, TRAINING_STEPS["nin"])
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(schedule, momentum=0.9))

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params, x, y)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    random, state = np.random.default_rng(0), optimizer.init(params)
    for number in range(1, TRAINING_STEPS["nin"] + 1):
        chosen = random.integers(0, len(labels), NIN_BATCH)
        params, state, value = step(params, state, images[chosen], labels[chosen])
        if number % 50 == 0:
            print(f"nin: step {number}, cross-entropy {value:.3f}", flush=True)
    np.savez(path, **flax.traverse_util.flatten_dict(params, sep="/"))
    return params
