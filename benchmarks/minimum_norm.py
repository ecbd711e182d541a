"""DDN, FMN and SuperDeepFool beside adversarial-library's, on the same nets and images.

    python benchmarks/minimum_norm.py --weights DIR [--nets mlp lenet] [--num_images 200]
        [--num_steps 100] [--attacks ddn "fmn l1" ...] [--out FILE]

DIR holds the nets and images as benchmarks/nets.py writes them. Prints a table: the mean distance
of either library, the success that a separate forward pass finds, and the seconds of a second call
(adversarial-library's: of its only one). All images are attacked away from the predicted class, in
float32. They are rescaled to [0, 1], which is what adversarial-library expects; the distances are
in these units. adversarial-library is optional: `pip install adv-lib` (0.2.8 was used).

DDN and FMN take --num_steps steps in either library; adversarial-library's own default is 10 for
FMN. Its DDN rounds to 256 levels by default; that is switched off, as ours does not round.
"""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dd_jax import xla  # noqa: E402

xla.set_flags()  # Before JAX starts, as train.py does.

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from dd_jax import models  # noqa: E402
from dd_jax.attacks import ddn, fmn, superdeepfool  # noqa: E402
from dd_jax.pretrained import from_torch  # noqa: E402

try:
    import adv_lib.attacks as peer
    import torch
except ImportError:
    peer = torch = None

ORDERS = {"l1": 1, "l2": 2, "linf": np.inf}
ATTACKS = ("ddn", "fmn l1", "fmn l2", "fmn linf", "superdeepfool")
HEADER = ("attack", "net", "mean distance", "theirs", "success", "theirs", "seconds", "theirs")


def ours(name: str, num_steps: int) -> Callable:
    """Our attack of that name, with its options."""
    if name == "superdeepfool":
        return partial(superdeepfool, bounds=(0.0, 1.0))
    if name == "ddn":
        return partial(ddn, num_steps=num_steps, bounds=(0.0, 1.0))
    return partial(fmn, norm=name.split()[1], num_steps=num_steps, bounds=(0.0, 1.0))


def theirs(name: str, num_steps: int) -> Callable:
    """adversarial-library's attack of that name, with its options."""
    if name == "superdeepfool":
        return peer.sdf
    if name == "ddn":
        return partial(peer.ddn, steps=num_steps, levels=None)
    return partial(peer.fmn, norm=float(ORDERS[name.split()[1]]), steps=num_steps)


def torch_net(name: str, weights: dict[str, Any], low: float, width: float) -> Callable:
    """The net in PyTorch, for images (batch, channels, height, width) in [0, 1]."""
    functional = torch.nn.functional
    linear = lambda x, key: functional.linear(x, weights[f"{key}.weight"], weights[f"{key}.bias"])
    layer = lambda x, key: functional.max_pool2d(
        functional.conv2d(x, weights[f"{key}.weight"], weights[f"{key}.bias"]), 2
    )

    def lenet(x: Any) -> Any:
        maps = layer(layer(low + width * x, "conv1"), "conv2")
        return linear(functional.relu(linear(maps.flatten(1), "fc1")), "fc2")

    def mlp(x: Any) -> Any:
        hidden = functional.relu(linear((low + width * x).flatten(1), "fc1"))
        return linear(functional.relu(linear(hidden, "fc2")), "fc3")

    return {"lenet": lenet, "mlp": mlp}[name]


def sizes(perturbation: np.ndarray, name: str) -> np.ndarray:
    """The perturbations' lengths in the norm of the attack of that name, in float64."""
    flat = np.asarray(perturbation, np.float64).reshape(len(perturbation), -1)
    norm = name.split()[1] if " " in name else "l2"
    return np.linalg.norm(flat, ord=ORDERS[norm], axis=1)


def measure_ours(
    name: str, logits_fn: Callable, images: jax.Array, num_steps: int
) -> dict[str, Any]:
    """The distances, successes and seconds of our attack."""
    predict = jax.jit(lambda x: logits_fn(x).argmax(axis=1))
    labels = predict(images)
    attack = jax.jit(partial(ours(name, num_steps), logits_fn))
    jax.block_until_ready(attack(images, labels))
    start = time.perf_counter()
    found = jax.block_until_ready(attack(images, labels))
    seconds = time.perf_counter() - start
    adversarial = images + found.perturbation
    inside = np.clip(adversarial, -1e-6, 1 + 1e-6) == adversarial
    success = np.asarray(predict(adversarial) != labels)
    if not np.array_equal(success, found.success) or not np.all(inside):
        raise AssertionError(f"{name}: the attack reports what a separate forward pass denies.")
    distance = sizes(found.perturbation, name)
    return {"distance": distance, "success": success, "seconds": seconds}


def measure_theirs(name: str, net: Callable, images: Any, num_steps: int) -> dict[str, Any]:
    """The distances, successes and seconds of adversarial-library's attack."""
    with torch.no_grad():
        labels = net(images).argmax(dim=1)
    torch.manual_seed(0)
    start = time.perf_counter()
    adversarial = theirs(name, num_steps)(model=net, inputs=images, labels=labels).detach()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        success = (net(adversarial).argmax(dim=1) != labels).numpy()
    distance = sizes((adversarial - images).numpy(), name)
    return {"distance": distance, "success": success, "seconds": seconds}


def measure_net(net_name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All attacks on one net."""
    with np.load(arguments.weights / f"{net_name}.npz") as arrays:
        images = arrays["input/images"][: arguments.num_images]
        weights = {key[6:]: arrays[key] for key in arrays.files if key.startswith("param/")}
    low, width = float(images.min()), float(images.max() - images.min())
    images = np.clip((images - low) / width, 0, 1)
    net, params = models.create(net_name), from_torch(net_name, weights)
    params = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), params)
    logits_fn = lambda x: net.apply({"params": params}, low + width * x)
    results = []
    for name in arguments.attacks:
        result = {"attack": name, "net": net_name}
        inputs = jnp.asarray(images.transpose(0, 2, 3, 1))
        result["ours"] = measure_ours(name, logits_fn, inputs, arguments.num_steps)
        if peer is not None:
            of_torch = torch_net(net_name, jax.tree.map(torch.tensor, weights), low, width)
            inputs = torch.tensor(images)
            result["theirs"] = measure_theirs(name, of_torch, inputs, arguments.num_steps)
        summarize(result)
        results.append(result)
        print(row(result), flush=True)
    return results


def summarize(result: dict[str, Any]) -> None:
    """Replaces arrays by means; distances count where every attack of that name succeeds."""
    both = [result[whose] for whose in ("ours", "theirs") if whose in result]
    common = np.all([of["success"] for of in both], axis=0)
    for of in both:
        of["distance"] = float(of["distance"][common].mean())
        of["success"] = float(of["success"].mean())


def row(result: dict[str, Any]) -> str:
    """A line of the table."""
    pairs = [
        (f"{of[key]:{form}}" if (of := result.get(whose)) else "-")
        for key, form in (("distance", ".4f"), ("success", ".1%"), ("seconds", ".2f"))
        for whose in ("ours", "theirs")
    ]
    return f"| {' | '.join([result['attack'], result['net'], *pairs])} |"


def main() -> None:
    """Measures, prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=pathlib.Path, required=True)
    parser.add_argument("--nets", nargs="+", default=["mlp", "lenet"], choices=["mlp", "lenet"])
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=ATTACKS)
    parser.add_argument("--num_images", type=int, default=200)
    parser.add_argument("--num_steps", type=int, default=100)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    print(f"| {' | '.join(HEADER)} |\n|{' --- |' * len(HEADER)}", flush=True)
    results = [result for net in arguments.nets for result in measure_net(net, arguments)]
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
