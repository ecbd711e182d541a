"""AutoAttack beside torchattacks' parts and adversarial-library's Auto-PGD, on the same nets and
images.

    python benchmarks/autoattack.py --weights DIR [--nets mlp lenet] [--norms linf l2]
        [--num_images 1000] [--epsilons 0.1 1.5] [--apgd] [--growth] [--out FILE]

DIR holds the nets and images as benchmarks/nets.py writes them. All take images in [0, 1]: MNIST's
nets subtract the mean image inside; whitened inputs of CIFAR-10's are rescaled from their range to
[0, 1], epsilon is in these units. Prints the robust accuracy after each attack of either library, on
how many images the two agree, and the seconds of each attack; ours without the compilation, which
is timed apart. Both run on the same cores, one after the other.

torchattacks' own AutoAttack takes 10 steps where the authors' code takes 100, so its parts are run
here, with 100 steps, each on the images that are left, as the authors' code does. They are
optional: `pip install torch torchattacks adv-lib`.

--apgd compares Auto-PGD alone with adversarial-library's, which also has l1.
--growth measures how our time grows with the share of images that withstand, by epsilon.
"""

import argparse
import json
import pathlib
import sys
import tempfile
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
from dd_jax.attacks import apgd  # noqa: E402
from dd_jax.data import in_memory  # noqa: E402
from dd_jax.evaluation.autoattack import AutoAttack  # noqa: E402
from dd_jax.evaluation.autoattack_programs import Setting  # noqa: E402
from dd_jax.pretrained import from_torch  # noqa: E402

try:
    import torch
    import torchattacks
except ImportError:
    torch = torchattacks = None

THEIR_NORMS = {"linf": "Linf", "l2": "L2"}
BATCH_SIZE = 250  # Of the others; that of the authors' code.
OUR_BATCH_SIZE = 500  # A turn of the work queue has a quarter of it.


def load(name: str, weights: pathlib.Path, mnist: pathlib.Path, num_images: int) -> dict:
    """Images in [0, 1], labels, the offset and the factor that make inputs of them, and the weights
    under PyTorch's names.
    """
    with np.load(weights / f"{name}.npz") as arrays:
        inputs = arrays["input/images"][:num_images]
        labels = arrays["input/labels"][:num_images].astype(np.int32)
        params = {key[6:]: arrays[key] for key in arrays.files if key.startswith("param/")}
    offset, factor = np.float32(inputs.min()), np.float32(np.ptp(inputs))
    if name in ("mlp", "lenet"):
        with np.load(mnist) as arrays:
            mean = arrays["train_images"].astype(np.float64).mean(0)[None, None] / 255
        offset, factor = -mean.astype(np.float32), np.float32(1)
    images = np.clip((inputs - offset) / factor, 0, 1).astype(np.float32)
    scale = {"offset": np.broadcast_to(offset, (1, *images.shape[1:])), "factor": factor}
    return {"images": images, "labels": labels, "params": params} | scale


def our_net(name: str, loaded: dict) -> Callable[[Any, jax.Array], jax.Array]:
    """`apply_fn(params, images)`, images (batch, height, width, channels) in [0, 1]."""
    net, offset = models.create(name), jnp.asarray(loaded["offset"].transpose(0, 2, 3, 1))
    return lambda params, x: net.apply({"params": params}, offset + loaded["factor"] * x)


def their_net(name: str, loaded: dict) -> Any:
    """The same in PyTorch, images (batch, channels, height, width)."""
    weights = {key: torch.tensor(array) for key, array in loaded["params"].items()}
    offset, factor = torch.tensor(np.array(loaded["offset"])), float(loaded["factor"])
    functional = torch.nn.functional
    relu, halved = functional.relu, partial(functional.avg_pool2d, kernel_size=2)
    pooled = partial(functional.max_pool2d, kernel_size=2)
    both = lambda key: (weights[f"{key}.weight"], weights[f"{key}.bias"])
    linear = lambda x, key: functional.linear(x, *both(key))
    conv = lambda x, key, padding=0: functional.conv2d(x, *both(key), padding=padding)

    def mlp(x: Any) -> Any:
        return linear(relu(linear(relu(linear(x.flatten(1), "fc1")), "fc2")), "fc3")

    def lenet(x: Any) -> Any:
        maps = pooled(conv(pooled(conv(x, "conv1")), "conv2"))
        return linear(relu(linear(maps.flatten(1), "fc1")), "fc2")

    def convnet(x: Any) -> Any:
        maps = halved(relu(conv(relu(pooled(conv(x, "conv1", 2))), "conv2", 2)))
        maps = relu(conv(halved(relu(conv(maps, "conv3", 2))), "conv4"))
        return conv(maps, "conv5").flatten(1)

    layers = {"mlp": mlp, "lenet": lenet, "convnet": convnet}[name]

    class Net(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return layers(offset + factor * x)

    return Net().eval()


def measure_ours(name: str, loaded: dict, setting: Setting) -> dict[str, Any]:
    """Which images withstand, the accuracy after each attack, and seconds, by attack."""
    apply_fn, params = our_net(name, loaded), from_torch(name, loaded["params"])
    params = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), params)
    examples = in_memory(loaded["images"].transpose(0, 2, 3, 1), loaded["labels"])
    attack = AutoAttack(apply_fn, examples, batch_size=OUR_BATCH_SIZE)
    start = time.perf_counter()
    attack.measure(params, setting._replace(epsilon=1e-9), limit=1, show_progress=False)
    compiling = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        flags = pathlib.Path(folder) / "flags.npz"
        start = time.perf_counter()
        found = attack.measure(params, setting, save_to=flags, show_progress=False)
        seconds = time.perf_counter() - start
        with np.load(flags) as saved:
            robust = saved["fallen_to"] == -1
    more = {"robust": robust, "seconds": seconds, "first_call": compiling}
    return found | more


def their_parts(net: Any, setting: Setting) -> dict[str, Any]:
    """torchattacks' attacks with the constants of the authors' code."""
    options = dict(norm=THEIR_NORMS[setting.norm], eps=setting.epsilon, n_restarts=1)
    return {
        "apgd_ce": torchattacks.APGD(net, **options, steps=100, loss="ce"),
        "apgd_dlr_targeted": torchattacks.APGDT(net, **options, steps=100, n_classes=10),
        "fab_targeted": torchattacks.FAB(
            net, **options, steps=100, multi_targeted=True, n_classes=10
        ),
        "square": torchattacks.Square(net, **options, n_queries=5000, resc_schedule=False),
    }


def measure_theirs(name: str, loaded: dict, setting: Setting) -> dict[str, Any]:
    """The same of torchattacks."""
    net = their_net(name, loaded)
    images, labels = torch.tensor(loaded["images"]), torch.tensor(loaded["labels"]).long()
    classes = lambda x: torch.cat([net(part).argmax(1) for part in x.split(BATCH_SIZE)])
    robust, after, seconds = (classes(images) == labels).numpy(), {}, {}
    for title, attack in their_parts(net, setting).items():
        start = time.perf_counter()
        left = np.flatnonzero(robust)
        for first in range(0, len(left), BATCH_SIZE):
            rows = left[first : first + BATCH_SIZE]
            adversarial = attack(images[rows], labels[rows])
            robust[rows] = (classes(adversarial) == labels[rows]).numpy()
        after[title], seconds[title] = float(robust.mean()), time.perf_counter() - start
        print(
            f"  torchattacks {title}: {after[title]:.2%} after {seconds[title]:.0f} s", flush=True
        )
    return {"robust": robust, "robust_after": after, "seconds": sum(seconds.values())}


def measure_apgd(name: str, loaded: dict, norm: str, epsilon: float) -> dict[str, Any]:
    """Robust accuracy under Auto-PGD (cross-entropy, 100 steps, one restart), ours and
    adversarial-library's.
    """
    from adv_lib.attacks import apgd as their_apgd

    apply_fn, params = our_net(name, loaded), from_torch(name, loaded["params"])
    logits_fn = partial(apply_fn, jax.tree.map(jnp.asarray, params))
    inputs, labels = loaded["images"].transpose(0, 2, 3, 1), jnp.asarray(loaded["labels"])
    options = dict(norm=norm, epsilon=epsilon, bounds=(0.0, 1.0))
    found = jax.jit(partial(apgd, logits_fn, **options))(jnp.asarray(inputs), labels)
    ours = np.asarray(jax.jit(logits_fn)(inputs + found.perturbation).argmax(-1) == labels)
    net, their_labels = their_net(name, loaded), torch.tensor(loaded["labels"]).long()
    order = {"l1": 1, "l2": 2, "linf": float("inf")}[norm]
    larger = dict(loss_function="ce", use_large_reps=norm == "l1")
    adversarial = their_apgd(
        net, torch.tensor(loaded["images"]), their_labels, eps=epsilon, norm=order, **larger
    )
    theirs = (net(adversarial).argmax(1) == their_labels).numpy()
    return {"ours": ours, "theirs": theirs}


def compared(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Two robust accuracies, and on how many images they agree."""
    agree = np.mean(ours == theirs)
    return f"{ours.mean():.2%} and {theirs.mean():.2%}; the same for {agree:.2%} of the images"


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=pathlib.Path, required=True)
    mnist = ROOT.parent / "shared" / "data" / "mnist.npz"
    parser.add_argument("--mnist", type=pathlib.Path, default=mnist, help="for the mean image")
    parser.add_argument("--nets", nargs="+", default=["lenet"], choices=["mlp", "lenet", "convnet"])
    parser.add_argument("--norms", nargs="+", default=["linf"], choices=["linf", "l2", "l1"])
    parser.add_argument("--epsilons", nargs="+", type=float, default=[0.1])
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--apgd", action="store_true")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    results = []
    for name in arguments.nets:
        loaded = load(name, arguments.weights, arguments.mnist, arguments.num_images)
        for norm, epsilon in zip(arguments.norms, arguments.epsilons, strict=True):
            title = f"{name}, {norm} {epsilon}, {arguments.num_images} images"
            if arguments.apgd:
                both = measure_apgd(name, loaded, norm, epsilon)
                print(f"{title}: Auto-PGD, ours and theirs: {compared(**both)}", flush=True)
                continue
            setting = Setting(norm, epsilon)
            for scale in (0.5, 1.0, 1.5, 2.0, 3.0) if arguments.growth else ():
                found = measure_ours(name, loaded, setting._replace(epsilon=scale * epsilon))
                print(
                    f"{name}, {norm} {scale * epsilon:g}: robust {found['robust_accuracy']:.2%}, "
                    f"{found['num_queries']:.0f} queries per image, {found['seconds']:.0f} s",
                    flush=True,
                )
            if arguments.growth:
                continue
            ours = measure_ours(name, loaded, setting)
            print(f"{title}: ours {ours['robust_after']}, {ours['seconds']:.0f} s", flush=True)
            result = {"net": name, "norm": norm, "epsilon": epsilon, "ours": ours}
            if torchattacks is not None and norm in THEIR_NORMS:
                theirs = measure_theirs(name, loaded, setting)
                faster = theirs["seconds"] / ours["seconds"]
                print(f"{title}: {compared(ours['robust'], theirs['robust'])}")
                print(
                    f"{title}: {ours['seconds']:.0f} s and {theirs['seconds']:.0f} s: {faster:.1f} "
                    f"times as fast (first call, with compilation: {ours['first_call']:.0f} s)",
                    flush=True,
                )
                result["theirs"] = theirs
            results.append(result)
    if arguments.out:
        as_list = lambda x: x.tolist() if isinstance(x, np.ndarray) else str(x)
        arguments.out.write_text(json.dumps(results, indent=1, default=as_list))


if __name__ == "__main__":
    main()
