"""The nets that are measured: trained briefly on real data, or read from files.

    python benchmarks/nets.py --data_dir DIR --export OUT [--nets mlp lenet convnet nin] [--workdir
    runs/benchmark]

trains them as benchmarks/speed.py does (those that it has trained already are taken from its
workdir) and writes OUT/NAME.npz: "param/NAME" arrays under PyTorch's names, "input/images" (1000,
channels, height, width) and "input/labels". With `--weights OUT`, speed.py and authors.py measure
the same nets on the same images, also where there is no data set. With `--random` instead of
`--data_dir DIR` they are untrained nets on noise, each image labeled as its net says: something to
run.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dd_jax import models, pretrained, training, xla  # noqa: E402
from dd_jax.experiment import build, configuration, runs  # noqa: E402
from dd_jax.models import data_dependent_init  # noqa: E402

CONFIGS = {
    "mlp": "mnist_mlp",
    "lenet": "mnist_lenet",
    "convnet": "cifar_convnet",
    "nin": "cifar_nin",
}
TRAINING_STEPS = {"mlp": 1200, "lenet": 1200, "convnet": 600, "nin": 300}
# What it sees in its few steps; the others, which are quicker, get all images.
TRAIN_LIMIT = {"nin": 10000}
NIN_BATCH, NIN_RATE = 32, 0.03
NUM_IMAGES = 1000
# Linear layers that read maps of several channels: (height, width, channels).
MAPS = {("lenet", "fc1"): (4, 4, 50)}

Net = Callable[[Any, jax.Array], jax.Array]


def load(
    name: str, data_dir: str, workdir: pathlib.Path, weights: pathlib.Path | None = None
) -> tuple[Net, Any, jax.Array, jax.Array]:
    """A net as (apply_fn, params), and 1000 training images and their labels, preprocessed as its
    configuration says.

    With `weights`, a folder of NAME.npz files of PyTorch-named arrays (each name as it is or after
    "param/"), the net is read from there; otherwise trained, once per workdir. Without `data_dir`
    the images of such a file, "input/images", are taken too.
    """
    arrays = read(weights / f"{name}.npz") if weights is not None else {}
    if "input/images" in arrays and not data_dir:
        model, images = (
            models.create(name),
            np.float32(arrays["input/images"]).transpose(0, 2, 3, 1),
        )
        params, labels = from_torch(name, arrays), arrays["input/labels"].astype(np.int32)
    else:
        overrides = [
            f"--config.data.dir={data_dir}",
            f"--config.reference.max_steps={TRAINING_STEPS[name]}",
        ]
        overrides += [f"--config.data.train_limit={TRAIN_LIMIT.get(name, 0)}"]
        config = configuration.read(str(ROOT / "configs" / f"{CONFIGS[name]}.py"), overrides)
        run = build.build_run(config, workdir / name)
        model = run.model
        images, labels = (
            run.feed.train_inputs[:NUM_IMAGES],
            run.feed.data.train_labels[:NUM_IMAGES],
        )
        if arrays:
            params = from_torch(name, arrays)
        elif name == "nin":
            params = trained_nin(run, workdir / name / "params.npz")
        else:
            configuration.claim_directory(config, workdir / name)
            params = runs.reference_state(run).params
    apply_fn = lambda params, x: training.make_logits_fn(model, params, {})(x)
    return apply_fn, jax.tree.map(jnp.asarray, params), jnp.asarray(images), jnp.asarray(labels)


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of a file."""
    with np.load(path) as arrays:
        return dict(arrays)


def from_torch(name: str, arrays: dict[str, np.ndarray]) -> Any:
    """The parameters among PyTorch-named arrays, which may begin with "param/"."""
    named = {key.removeprefix("param/"): array for key, array in arrays.items()}
    return pretrained.from_torch(
        name, {key: array for key, array in named.items() if "/" not in key and "." in key}
    )


def to_torch(name: str, params: Any) -> dict[str, np.ndarray]:
    """The parameters under PyTorch's names and in its layout; what `pretrained.from_torch` undoes."""
    named = {}
    for (layer, leaf), array in flax.traverse_util.flatten_dict(
        jax.tree.map(np.asarray, params)
    ).items():
        if (name, layer) in MAPS and leaf == "kernel":
            array = (
                array.reshape(*MAPS[name, layer], -1)
                .transpose(3, 2, 0, 1)
                .reshape(array.shape[1], -1)
            )
        elif leaf == "kernel":
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        named[f"{layer}.{'weight' if leaf == 'kernel' else leaf}"] = array
    return named


def drawn(name: str) -> tuple[Any, jax.Array, jax.Array]:
    """An untrained net's parameters, 1000 images of uniform noise within 0..1 and what the net says
    of them; seeded.
    """
    model = models.create(name)
    images = jax.random.uniform(jax.random.key(1), (NUM_IMAGES, *models.input_shape(name)))
    params = data_dependent_init.centered(
        model, model.init(jax.random.key(0), images[:1])["params"], images[:50]
    )
    logits = jnp.concatenate(
        [model.apply({"params": params}, part) for part in jnp.split(images, 10)]
    )
    return params, images, jnp.argmax(logits, axis=-1)


def export(
    name: str, params: Any, images: jax.Array, labels: jax.Array, folder: pathlib.Path
) -> pathlib.Path:
    """Writes a net and its images as NAME.npz, see the module's docstring; AssertionError unless it
    reads back the same.
    """
    arrays = {f"param/{key}": array for key, array in to_torch(name, params).items()}
    jax.tree.map(
        np.testing.assert_array_equal, from_torch(name, arrays), jax.tree.map(np.asarray, params)
    )
    inputs = {
        "input/images": np.asarray(images).transpose(0, 3, 1, 2),
        "input/labels": np.asarray(labels, np.int64),
    }
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"{name}.npz", **arrays, **inputs)
    return folder / f"{name}.npz"


def trained_nin(run: build.Run, path: pathlib.Path) -> Any:
    """NIN's parameters after a short training without dropout: SGD with momentum, a bounded
    gradient, batches of 32.
    """
    if path.exists():
        with np.load(path) as arrays:
            return flax.traverse_util.unflatten_dict(dict(arrays), sep="/")
    path.parent.mkdir(parents=True, exist_ok=True)
    model, images, labels = run.model, run.feed.train_inputs, run.feed.data.train_labels
    params = data_dependent_init.centered(
        model, model.init(jax.random.key(0), images[:1])["params"], images[:50]
    )
    schedule = optax.warmup_cosine_decay_schedule(
        NIN_RATE / 10, NIN_RATE, 10, TRAINING_STEPS["nin"]
    )
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data_dir")
    source.add_argument("--random", action="store_true")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/benchmark"))
    parser.add_argument("--nets", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--export", type=pathlib.Path, required=True)
    parser.add_argument(
        "--num_images",
        type=int,
        default=NUM_IMAGES,
        help=f"at most {NUM_IMAGES}; fewer are easier to send",
    )
    arguments = parser.parse_args()
    for name in arguments.nets:
        one = (
            drawn(name)
            if arguments.random
            else load(name, arguments.data_dir, arguments.workdir)[1:]
        )
        params, images, labels = one[0], *(array[: arguments.num_images] for array in one[1:])
        print(f"written to {export(name, params, images, labels, arguments.export)}", flush=True)


if __name__ == "__main__":
    xla.set_flags()
    main()
