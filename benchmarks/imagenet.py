"""What a Deep Defense step on ImageNet's nets costs: images per second and memory, by batch size
and number of candidates.

    python benchmarks/imagenet.py [--net resnet18] [--batches 1 4 16] [--candidates 2 5 10]
    [--images FOLDER] [--out FILE]

Weights are random (or read: --weights FILE), images are those of a folder of class directories, or
noise. So the number of DeepFool steps is not that of a trained net: it is fixed by --num_steps,
which counts as taken by every image that is not fooled earlier; the table says how many were taken,
and what one of them costs in forward passes. Each row runs in a process of its own. On an
accelerator the same command; --tf32 lets it round products to 10 bits.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
from functools import partial
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from dd_jax import xla  # noqa: E402

xla.set_flags()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from timing import compiled, matrix_rate, operations, timed  # noqa: E402

import dd_jax  # noqa: E402
from dd_jax import data, models, pretrained, training  # noqa: E402


def examples(net: str, folder: str, count: int) -> jax.Array:
    """Images in the net's input space."""
    preprocessing = data.Preprocessing("caffe" if net == "alexnet" else "torchvision")
    height = models.input_shape(net)[0]
    if not folder:
        return jax.random.normal(jax.random.key(0), (count, *models.input_shape(net)))
    images = data.open_images("image_folder", data_dir=folder).test
    with data.evaluation_stream(
        images, crop_size=height, batch_size=count, preprocessing=preprocessing
    ) as stream:
        return jnp.asarray(stream(0)["image"])


def measure(net: str, batch: int, candidates: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: the step of loss and gradient, beside a plain cross-entropy step."""
    model = models.create(net)
    inputs = examples(net, arguments.images, batch)
    if arguments.weights:
        variables = jax.tree.map(jnp.asarray, pretrained.load(arguments.weights, net))
    else:
        variables = jax.jit(model.init)(jax.random.key(0), inputs[:1])
    params, statistics = variables["params"], variables.get("batch_stats", {})
    logits_of = lambda params, x: training.make_logits_fn(model, params, statistics)(x)
    labels = jnp.argmax(jax.jit(logits_of)(params, inputs), axis=-1)
    options = dict(num_candidates=candidates, num_steps=arguments.num_steps)
    options["class_chunk_size"] = arguments.class_chunk_size or None

    def deep_defense(params: Any) -> tuple[jax.Array, jax.Array]:
        loss, metrics = dd_jax.deep_defense_loss(
            partial(logits_of, params), inputs, labels, **options
        )
        return loss.mean(), metrics["num_steps"].mean()

    def plain(params: Any) -> jax.Array:
        return -jnp.take_along_axis(
            jax.nn.log_softmax(logits_of(params, inputs)), labels[:, None], axis=-1
        ).mean()

    step, compile_seconds = compiled(jax.value_and_grad(deep_defense, has_aux=True), params)
    plain_step, _ = compiled(jax.value_and_grad(plain), params)
    num_steps = float(step(params)[0][1])
    seconds, plain_seconds = (
        timed(lambda: step(params), seconds=3, least=2),
        timed(lambda: plain_step(params), seconds=2),
    )
    floor = num_steps * (candidates + 8) * operations(logits_of, params, inputs) / matrix_rate()
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "net": net,
        "batch": batch,
        "candidates": candidates,
        "images_per_second": batch / seconds,
        "plain_images_per_second": batch / plain_seconds,
        "plain_steps": seconds / plain_seconds,
        "deepfool_steps": num_steps,
        "of_floor": floor / seconds,
        "compile_seconds": compile_seconds,
        "step_megabytes": step.memory_analysis().temp_size_in_bytes / 1e6,
        "peak_megabytes": memory.get(
            "peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1e3
        )
        / 1e6,
        "device": str(np.asarray(jax.devices())[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--net", choices=("resnet18", "alexnet", "alexnet_torchvision"), default="resnet18"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument(
        "--candidates", type=int, nargs="+", default=[2, 5, 10], help="at the middle batch size"
    )
    parser.add_argument("--num_steps", type=int, default=5)
    parser.add_argument("--class_chunk_size", type=int, default=0)
    parser.add_argument("--images", default="")
    parser.add_argument("--weights", default="")
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("runs/benchmark/imagenet.json")
    )
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if jax.default_backend() != "cpu":
        jax.config.update(
            "jax_default_matmul_precision", "tensorfloat32" if arguments.tf32 else "highest"
        )
    if arguments.row:
        batch, candidates = map(int, arguments.row.split(","))
        print(json.dumps(measure(arguments.net, batch, candidates, arguments)))
        return
    most, middle = max(arguments.candidates), sorted(arguments.batches)[len(arguments.batches) // 2]
    rows, results = (
        dict.fromkeys(
            [(b, most) for b in arguments.batches] + [(middle, c) for c in arguments.candidates]
        ),
        [],
    )
    for batch, candidates in rows:
        command = [sys.executable, *sys.argv, "--row", f"{batch},{candidates}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(row := json.loads(done.stdout.splitlines()[-1]))
        print(
            f"{row['net']} batch {batch:4} candidates {candidates:3}: "
            f"{row['images_per_second']:8.2f} images/s,"
            f" {row['plain_steps']:6.1f} plain steps, {row['deepfool_steps']:.2f} DeepFool steps, "
            f"{row['of_floor']:.2f} of floor,"
            f" compiled in {row['compile_seconds']:.0f} s, peak {row['peak_megabytes']:.0f} MB",
            flush=True,
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
