"""How fast the Deep Defense step and DeepFool are, beside the floor, a plain step and foolbox.

    python benchmarks/speed.py --data_dir DIR [--nets mlp lenet convnet nin]
        [--parts step deepfool growth third_party] [--weights DIR] [--batches 20 100] [--out FILE]
        [--seconds 4]

Every net is first trained briefly on real data (kept in --workdir, so that a second run starts at
once): the numbers of DeepFool steps are then those of training. With --weights they are read from
DIR/NAME.npz (PyTorch-named arrays) instead, and without --data_dir so are the images, as
benchmarks/nets.py writes them. Each net is measured in a process of its own, so that its peak
memory is its own. Prints tables and writes everything as JSON, with device and versions. foolbox is
optional: `pip install foolbox`. A flag that XLA_FLAGS holds already stays as it is. Each call is timed
for --seconds. Where JAX has a compilation cache, "compiled in" is the time of a second run's reading.
benchmarks/authors.py measures the authors' step on the same nets.

The floor is (K + 8) F per DeepFool step taken, F being the operations of one forward pass and K the
number of classes, at the rate of a 2000 x 2000 float32 matrix product on this machine at this
moment; `of floor` is that time over the one measured.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from dd_jax import xla  # noqa: E402

FLAGS_ADDED = xla.set_flags()  # Before JAX starts, as train.py does.

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import nets  # noqa: E402
import numpy as np  # noqa: E402
import third_party  # noqa: E402
from nets import CONFIGS, Net  # noqa: E402
from timing import compiled, matrix_rate, operations, timed  # noqa: E402

import dd_jax  # noqa: E402

BATCHES = {"mlp": (100,), "lenet": (100,), "convnet": (100,), "nin": (20, 100)}
FOOLBOX_IMAGES = {"mlp": 100, "lenet": 100, "convnet": 100, "nin": 20}
OVERSHOOTS = (0.02, 0.005)
PARTS = ("step", "deepfool", "growth", "third_party")
GROWTH_NETS = ("mlp", "lenet")
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "foolbox")


def measure_step(
    apply_fn: Net, params: Any, inputs: jax.Array, labels: jax.Array, rate: float, length: float
) -> dict[str, Any]:
    """The training step (loss and gradient), beside a plain cross-entropy step and the floor; each
    is timed for `length` seconds.
    """
    batch = inputs.shape[0]

    def deep_defense(params: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss, metrics = dd_jax.deep_defense_loss(partial(apply_fn, params), x, y)
        return loss.mean(), metrics["num_steps"].mean()

    def plain(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return -jnp.take_along_axis(
            jax.nn.log_softmax(apply_fn(params, x)), y[:, None], axis=-1
        ).mean()

    step, compile_seconds = compiled(
        jax.value_and_grad(deep_defense, has_aux=True), params, inputs, labels
    )
    plain_step, _ = compiled(jax.value_and_grad(plain), params, inputs, labels)
    (loss, num_steps), _ = step(params, inputs, labels)
    seconds = timed(lambda: step(params, inputs, labels), seconds=length)
    plain_seconds = timed(lambda: plain_step(params, inputs, labels), seconds=length)
    forward = operations(apply_fn, params, inputs)
    classes = jax.eval_shape(apply_fn, params, inputs).shape[1]
    return {
        "batch": batch,
        "seconds": seconds,
        "images_per_second": batch / seconds,
        "plain_steps": seconds / plain_seconds,
        "loss": float(loss),
        "deepfool_steps": float(num_steps),
        "forward_megaflops_per_image": forward / batch / 1e6,
        "of_floor": float(num_steps) * (classes + 8) * forward / rate / seconds,
        "compile_seconds": compile_seconds,
        "temporary_megabytes": step.memory_analysis().temp_size_in_bytes / 1e6,
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def measure_deepfool(
    apply_fn: Net, params: Any, inputs: jax.Array, length: float
) -> list[dict[str, Any]]:
    """DeepFool alone, 50 steps from the predicted class, within the images' range; foolbox's on the
    same net beside it.

    At each of OVERSHOOTS: foolbox overshoots every step as it goes, dd_jax the whole sum at the
    end.
    """
    logits_fn = jax.jit(partial(apply_fn, params))
    bounds = float(inputs.min()), float(inputs.max())
    labels = jnp.argmax(logits_fn(inputs), axis=-1)
    try:
        import foolbox
    except ImportError:
        foolbox = None

    def row(
        library: str, overshoot: float, perturb: Callable[[], jax.Array], **timing: Any
    ) -> dict[str, Any]:
        perturbation = perturb()
        sizes = jnp.linalg.norm(perturbation.reshape(len(inputs), -1), axis=1)
        fooled = jnp.argmax(logits_fn(inputs + perturbation), axis=-1) != labels
        rate = len(inputs) / timed(perturb, **timing)
        figures = {
            "images_per_second": rate,
            "l2": float(sizes.mean()),
            "success": float(fooled.mean()),
        }
        return {"library": library, "overshoot": overshoot, "num_images": len(inputs)} | figures

    def ours(overshoot: float) -> dict[str, Any]:
        options = {"num_steps": 50, "overshoot": overshoot, "bounds": bounds}
        attack, _ = compiled(
            lambda x: dd_jax.deepfool(partial(apply_fn, params), x, **options), inputs
        )
        return row("dd_jax", overshoot, lambda: attack(inputs).perturbation, seconds=length)

    def theirs(overshoot: float) -> dict[str, Any]:
        model = foolbox.JAXModel(logits_fn, bounds=bounds)
        attack = foolbox.attacks.L2DeepFoolAttack(steps=50, candidates=10, overshoot=overshoot)
        run = lambda: attack.run(model, inputs, foolbox.criteria.Misclassification(labels)) - inputs
        return row("foolbox", overshoot, run, seconds=0.0, least=1)

    libraries = (ours, theirs) if foolbox else (ours,)
    return [measure(overshoot) for overshoot in OVERSHOOTS for measure in libraries]


def measure_growth(
    apply_fn: Net, params: Any, inputs: jax.Array, labels: jax.Array
) -> dict[str, dict[int, float]]:
    """How a step's seconds grow with the batch, the classes and the limit of steps; its memory with
    the classes at once.
    """

    def gradient(net: Net, x: jax.Array, y: jax.Array, **options: Any) -> Any:
        loss = lambda params: dd_jax.deep_defense_loss(partial(net, params), x, y, **options)[
            0
        ].mean()
        return compiled(jax.grad(loss), params)[0]

    def seconds(*arguments: Any, **options: Any) -> float:
        step = gradient(*arguments, **options)
        return timed(lambda: step(params), seconds=1.0)

    def with_classes(classes: int) -> tuple[Net, jax.Array, jax.Array]:
        mixing = jnp.asarray(
            np.random.default_rng(0).standard_normal((10, classes)) / np.sqrt(10), jnp.float32
        )
        net = lambda params, x: apply_fn(params, x) @ mixing
        return net, x, jnp.argmax(net(params, x), axis=-1)

    def megabytes(at_once: int) -> float:
        step = gradient(*with_classes(100), class_chunk_size=at_once)
        return step.memory_analysis().temp_size_in_bytes / 1e6

    x, y = inputs[:100], labels[:100]
    return {
        "seconds by batch": {
            batch: seconds(apply_fn, inputs[:batch], labels[:batch]) for batch in (1, 10, 100, 1000)
        },
        "seconds by classes": {
            classes: seconds(*with_classes(classes)) for classes in (2, 10, 100)
        },
        "seconds by num_steps": {
            limit: seconds(apply_fn, x, y, num_steps=limit) for limit in (1, 5, 50)
        },
        "MB by class_chunk_size, of 100 classes": {
            at_once: megabytes(at_once) for at_once in (10, 33, 99)
        },
    }


def measure_net(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything about one net."""
    apply_fn, params, inputs, labels = nets.load(
        name, arguments.data_dir, arguments.workdir, arguments.weights
    )
    parts, batches, rate = arguments.parts, arguments.batches or BATCHES[name], matrix_rate()
    accuracy = jnp.mean(jnp.argmax(jax.jit(apply_fn)(params, inputs), axis=-1) == labels)
    device = f"{jax.devices()[0].device_kind} ({jax.default_backend()}), {os.cpu_count()} cores"
    result: dict[str, Any] = {
        "net": name,
        "device": device,
        "matrix_gflops": rate / 1e9,
        "accuracy": float(accuracy),
    }
    if "step" in parts:
        result["step"] = [
            measure_step(apply_fn, params, inputs[:b], labels[:b], rate, arguments.seconds)
            for b in batches
        ]
    if "deepfool" in parts:
        images = inputs[: FOOLBOX_IMAGES[name]]
        result["deepfool"] = measure_deepfool(apply_fn, params, images, arguments.seconds)
    if "growth" in parts and name in GROWTH_NETS:
        result["growth"] = measure_growth(apply_fn, params, inputs, labels)
    if "third_party" in parts and name in third_party.NETS:
        result["third_party"] = third_party.measure(
            third_party.NETS[name], params, inputs[:100], labels[:100]
        )
    return result


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def tables(results: list[dict[str, Any]]) -> str:
    """What was measured, for a terminal."""
    lines = [
        f"{'training step':10} batch  images/s  of floor  plain steps  DeepFool steps  compiled in "
        f" peak memory  accuracy"
    ]
    for net in results:
        lines += [
            f"{net['net']:13} {s['batch']:5} {s['images_per_second']:9.1f} {s['of_floor']:9.2f} "
            f"{s['plain_steps']:12.1f}"
            f" {s['deepfool_steps']:15.2f} {s['compile_seconds']:10.1f} s "
            f"{s['peak_megabytes']:9.0f} MB"
            f" {net['accuracy']:9.1%}"
            for s in net.get("step", [])
        ]
    lines.append(f"\n{'DeepFool alone':16} overshoot  images  images/s     l2  success")
    lines += [
        f"{net['net'] + ' ' + row['library']:16} {row['overshoot']:9} {row['num_images']:7}"
        f" {row['images_per_second']:9.1f} {row['l2']:6.4f} {row['success']:8.1%}"
        for net in results
        for row in net.get("deepfool", [])
    ]
    for net in results:
        if both := net.get("third_party"):
            ours, theirs = both["dd_jax"], both["straightforward"]
            lines.append(
                f"{net['net']} of plain Flax layers, batch {both['batch']}: {ours['seconds']:.3f} "
                f"s and "
                f"{ours['temporary_megabytes']:.0f} MB per step; straightforward "
                f"{theirs['seconds']:.3f} s and "
                f"{theirs['temporary_megabytes']:.0f} MB; losses {ours['loss']:.6f} and "
                f"{theirs['loss']:.6f}"
            )
    for net in results:
        for growth, values in net.get("growth", {}).items():
            lines.append(
                f"{net['net']}, {growth}: "
                + ", ".join(f"{n}: {value:.3g}" for n, value in values.items())
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/benchmark"))
    parser.add_argument("--nets", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("runs/benchmark/speed.json")
    )
    parser.add_argument("--weights", type=pathlib.Path)
    parser.add_argument(
        "--batches", nargs="+", type=int, help="of the part step; at most 1000 images each"
    )
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--this_process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.this_process:
        (name,) = arguments.nets
        arguments.out.write_text(json.dumps(measure_net(name, arguments)))
        return
    results = []
    for name in arguments.nets:
        part = arguments.out.with_suffix(f".{name}")
        command = [
            sys.executable,
            __file__,
            "--this_process",
            "--nets",
            name,
            "--data_dir",
            arguments.data_dir,
        ]
        command += [
            "--workdir",
            str(arguments.workdir),
            "--out",
            str(part),
            "--parts",
            *arguments.parts,
            "--seconds",
            str(arguments.seconds),
        ]
        command += ["--weights", str(arguments.weights)] if arguments.weights else []
        command += ["--batches", *map(str, arguments.batches)] if arguments.batches else []
        subprocess.run(command, check=True)
        results.append(json.loads(part.read_text()))
        part.unlink()
        everything = {
            "device": results[0][
                "device"
            ],  # As the child says: here JAX must not start, as it would take the card's memory.
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
            "packages": {package: version_of(package) for package in PACKAGES},
            "nets": results,
        }
        # After every net, should the next one fail.
        arguments.out.write_text(json.dumps(everything, indent=2) + "\n")
    print(
        f"\n{everything['device']}, jaxlib {everything['packages']['jaxlib']}, XLA_FLAGS "
        f"{everything['xla_flags']!r}"
    )
    print(f"{tables(results)}\nwritten to {arguments.out}")


if __name__ == "__main__":
    main()
