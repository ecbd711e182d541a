"""The training step as the authors' code organizes it, in PyTorch: what `benchmarks/speed.py` is
compared with.

    python benchmarks/nets.py --data_dir DIR --export runs/weights            # the nets and images that speed.py measures
    python benchmarks/authors.py --weights runs/weights [--nets mlp lenet convnet nin] [--batches 20
    100] [--device cuda]
    python benchmarks/authors.py --check GOLDEN_DIR                           # does it compute what their code does?

Needs PyTorch and NumPy, not dd_jax. Written anew after a description of
ZiangYan/deepdefense.pytorch; nothing is copied. A step is the loss below and its gradient in the
weights:

    loss = mean(cross-entropy) + lambda mean(penalty),  penalty = exp(-c rho) where right, exp(d rho) where wrong

with rho = ||D|| / ||x|| and D from DeepFool: at most 5 steps, away from the prediction where it is
right, towards the label where it is wrong. The whole batch takes every step, masked, until its
slowest example has stopped. Every step computes the gradients of all K logits at once, by a second
net that runs the first one backwards, layer by layer, and the penalty is differentiated through all
iterates: about (3 K + 5) F per step, F being one forward pass. `eps` is added to a gradient before
its norm is taken, and for a wrong example whose prediction changes on the way the logit difference
is taken against the prediction one step earlier: their code does both.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

BATCHES = {"mlp": (100,), "lenet": (100,), "convnet": (100,), "nin": (20,)}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
EPS = {"mlp": 5e-6, "lenet": 5e-6, "convnet": 1e-5, "nin": 1e-5}
TOLERANCE = 1e-4

Params = dict[str, Tensor]
Reverse = Callable[
    [Tensor], Tensor
]  # From the gradients in a layer's output to those in its input, (classes * batch, ...).
Layer = Callable[[Params, Tensor], tuple[Tensor, Reverse]]


class Settings(NamedTuple):
    """The step's constants; defaults are the authors'."""

    penalty_weight: float = 15.0  # lambda
    correct_scale: float = 25.0  # c
    wrong_scale: float = 5.0  # d
    num_steps: int = 5
    overshoot: float = 0.02
    eps: float = 5e-6


class Found(NamedTuple):
    """DeepFool's result: the overshot perturbations, and the steps until an example was fooled, or
    all of them.
    """

    perturbation: Tensor
    num_steps: Tensor
    is_right: Tensor


def linear(name: str) -> Layer:
    def layer(params: Params, x: Tensor) -> tuple[Tensor, Reverse]:
        weight = params[f"{name}.weight"]
        return F.linear(x, weight, params[f"{name}.bias"]), lambda gradient: gradient @ weight

    return layer


def conv(name: str, padding: int = 0) -> Layer:
    def layer(params: Params, x: Tensor) -> tuple[Tensor, Reverse]:
        weight = params[f"{name}.weight"]
        result = F.conv2d(x, weight, params[f"{name}.bias"], padding=padding)
        return result, lambda gradient: F.conv_transpose2d(gradient, weight, padding=padding)

    return layer


def relu(_: Params, x: Tensor) -> tuple[Tensor, Reverse]:
    mask = (x > 0).to(x.dtype)
    return F.relu(x), lambda gradient: (gradient.unflatten(0, (-1, len(mask))) * mask).flatten(0, 1)


def max_pool(_: Params, x: Tensor) -> tuple[Tensor, Reverse]:
    result, places = F.max_pool2d(x, 2, return_indices=True)

    def reverse(gradient: Tensor) -> Tensor:
        return F.max_unpool2d(
            gradient,
            places.repeat(len(gradient) // len(places), 1, 1, 1),
            2,
            output_size=x.shape[2:],
        )

    return result, reverse


def avg_pool(window: int) -> Layer:
    def layer(_: Params, x: Tensor) -> tuple[Tensor, Reverse]:
        return F.avg_pool2d(
            x, window
        ), lambda gradient: F.interpolate(gradient, scale_factor=window) / window**2

    return layer


def flatten(_: Params, x: Tensor) -> tuple[Tensor, Reverse]:
    return x.flatten(1), lambda gradient: gradient.reshape(len(gradient), *x.shape[1:])


NETS: dict[str, list[Layer]] = {
    "mlp": [flatten, linear("fc1"), relu, linear("fc2"), relu, linear("fc3")],
    "lenet": [
        conv("conv1"),
        max_pool,
        conv("conv2"),
        max_pool,
        flatten,
        linear("fc1"),
        relu,
        linear("fc2"),
    ],
    "convnet": [
        *(
            conv("conv1", 2),
            max_pool,
            relu,
            conv("conv2", 2),
            relu,
            avg_pool(2),
            conv("conv3", 2),
            relu,
            avg_pool(2),
        ),
        *(conv("conv4"), relu, conv("conv5"), flatten),
    ],
    "nin": [
        *(conv("conv1", 2), relu, conv("cccp1"), relu, conv("cccp2"), relu, max_pool),
        *(conv("conv2", 2), relu, conv("cccp3"), relu, conv("cccp4"), relu, avg_pool(2)),
        *(conv("conv3", 1), relu, conv("cccp5"), relu, conv("cccp6"), avg_pool(8), flatten),
    ],
}


def logits_of(layers: list[Layer], params: Params, x: Tensor) -> Tensor:
    """(batch, classes)."""
    for layer in layers:
        x, _ = layer(params, x)
    return x


def class_gradients(layers: list[Layer], params: Params, x: Tensor) -> tuple[Tensor, Tensor]:
    """The logits (batch, classes) at x and the gradients of all of them in x, (batch, classes,
    ...), both differentiable.
    """
    batch, reverses = len(x), []
    for layer in layers:
        x, reverse = layer(params, x)
        reverses.append(reverse)
    classes = x.shape[1]
    gradients = torch.eye(classes, dtype=x.dtype, device=x.device).repeat_interleave(batch, 0)
    for reverse in reversed(reverses):
        gradients = reverse(gradients)
    return x, gradients.unflatten(0, (classes, batch)).transpose(0, 1)


def deepfool(
    layers: list[Layer], params: Params, images: Tensor, labels: Tensor, clean: Tensor, s: Settings
) -> Found:
    """DeepFool on the whole batch until its slowest example has stopped, differentiable through
    every iterate.
    """
    rows, as_images = (
        torch.arange(len(images), device=images.device),
        (-1,) + (1,) * (images.ndim - 1),
    )
    is_right = clean.argmax(1) == labels
    is_label = F.one_hot(labels, clean.shape[1]).bool()
    allowed = torch.where(is_right[:, None], ~is_label, is_label)
    total, active = torch.zeros_like(images), torch.ones_like(is_right)
    num_steps, source = torch.full_like(labels, s.num_steps), labels
    for step in range(s.num_steps):
        logits, gradients = class_gradients(layers, params, images + total)
        previous, source = source, torch.where(is_right, labels, logits.detach().argmax(1))
        differences = logits - logits[rows, previous if step else source][:, None]
        towards = gradients - gradients[rows, source][:, None]
        sizes = (towards + s.eps).flatten(2).norm(dim=2)
        target = torch.where(allowed, differences.abs() / sizes, torch.inf).argmin(1)
        length = differences[rows, target].abs() / sizes[rows, target] ** 2
        moved = length.view(as_images) * towards[rows, target]
        total = total + torch.where(active.view(as_images), moved, 0)
        with torch.no_grad():
            after = logits_of(layers, params, images + (1 + s.overshoot) * total).argmax(1)
            has_arrived = (after == labels) != is_right
            num_steps = torch.where(active & has_arrived, step + 1, num_steps)
            active = active & ~has_arrived
        if not active.any():
            break
    return Found((1 + s.overshoot) * total, num_steps, is_right)


def training_loss(
    layers: list[Layer], params: Params, images: Tensor, labels: Tensor, s: Settings
) -> tuple[Tensor, Found]:
    """The loss of a batch, to be differentiated in the parameters, and what DeepFool found."""
    clean = logits_of(layers, params, images)
    found = deepfool(layers, params, images, labels, clean.detach(), s)
    rho = found.perturbation.flatten(1).norm(dim=1) / images.flatten(1).norm(dim=1)
    penalties = torch.where(found.is_right, -s.correct_scale * rho, s.wrong_scale * rho).exp()
    return F.cross_entropy(clean, labels) + s.penalty_weight * penalties.mean(), found


def step(
    layers: list[Layer], params: Params, images: Tensor, labels: Tensor, s: Settings
) -> tuple[Tensor, Found, tuple[Tensor, ...]]:
    """The loss, what DeepFool found, and the loss's gradient in all parameters."""
    loss, found = training_loss(layers, params, images, labels, s)
    return loss.detach(), found, torch.autograd.grad(loss, list(params.values()))


def read(
    path: pathlib.Path, device: str, dtype: torch.dtype, layout: str = "contiguous"
) -> tuple[Params, Tensor, Tensor]:
    """Parameters, images (NCHW) and labels of a NAME.npz as `benchmarks/nets.py` writes it."""
    with np.load(path) as arrays:
        held = {
            key: torch.from_numpy(arrays[key])
            for key in arrays.files
            if key.startswith(("param/", "input/"))
        }

    def placed(array: Tensor) -> Tensor:
        given = dict(memory_format=LAYOUTS[layout]) if array.ndim == 4 else {}
        return array.to(device, dtype).contiguous(**given)

    params = {
        key.removeprefix("param/"): placed(array).requires_grad_()
        for key, array in held.items()
        if key.startswith("param/")
    }
    return params, placed(held["input/images"]), held["input/labels"].to(device).long()


def check(folder: pathlib.Path) -> bool:
    """Compares with the figures of the authors' code in a folder of NAME.npz, in float64; whether
    all agree.
    """
    agrees = True
    for name, layers in NETS.items():
        with np.load(folder / f"{name}.npz") as arrays:
            theirs = {
                key: arrays[key]
                for key in arrays.files
                if key.startswith(("hyper/", "loss/", "grad/", "deepfool/"))
            }
        hyper = {
            key: theirs[f"hyper/{key}"].item()
            for key in ("lambda", "c", "d", "max_iter", "overshoot", "eps")
        }
        params, images, labels = read(folder / f"{name}.npz", "cpu", torch.float64)
        loss, found, gradients = step(layers, params, images, labels, Settings(*hyper.values()))
        size = lambda x: np.linalg.norm(np.reshape(x, (len(x), -1)), axis=1)
        wanted = theirs["deepfool/perturbation"]
        errors = {"loss": abs(loss.item() / theirs["loss/total"].item() - 1)}
        errors["perturbation"] = (
            size(found.perturbation.detach().numpy() - wanted) / size(wanted)
        ).max()
        pairs = [
            (gradient.numpy(), theirs[f"grad/total/{key}"])
            for key, gradient in zip(params, gradients, strict=True)
        ]
        errors["gradient"] = max(
            np.linalg.norm(ours - wanted) / np.linalg.norm(wanted) for ours, wanted in pairs
        )
        same_steps = np.array_equal(found.num_steps.numpy(), theirs["deepfool/iterations"])
        agrees &= max(errors.values()) < TOLERANCE and same_steps
        listed = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
        print(
            f"{name}: largest relative errors: {listed}; the numbers of steps "
            f"{'agree' if same_steps else 'differ'}"
        )
    return agrees


def timed(
    call: Callable[[], Any], wait: Callable[[], None], seconds: float, least: int
) -> tuple[float, int]:
    """The median time of a call over at least `least` calls and about `seconds`, one before them
    not counted; the number.
    """
    call()
    wait()
    times, start = [], time.perf_counter()
    while len(times) < least or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - before)
    return statistics.median(times), len(times)


def measure(name: str, batch: int, layout: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One net's step at one batch size and in one layout of memory."""
    device = arguments.device
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    params, images, labels = read(arguments.weights / f"{name}.npz", device, torch.float32, layout)
    if batch > len(images):
        sys.exit(f"error: {name}.npz has {len(images)} images; --batches must not be above.")
    run = partial(step, NETS[name], params, images[:batch], labels[:batch], Settings(eps=EPS[name]))
    loss, found, _ = run()
    seconds, calls = timed(run, wait, arguments.seconds, arguments.least)
    return {
        "net": name,
        "batch": batch,
        "layout": layout,
        "seconds": seconds,
        "images_per_second": batch / seconds,
        "calls": calls,
        "loss": loss.item(),
        "deepfool_steps": found.num_steps.double().mean().item(),
        "steps_of_the_slowest": found.num_steps.max().item(),
        "accuracy": found.is_right.double().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--check", type=pathlib.Path, metavar="GOLDEN_DIR", help="compare with the authors' figures"
    )
    what.add_argument(
        "--weights", type=pathlib.Path, help="a folder of NAME.npz, see benchmarks/nets.py"
    )
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--batches", nargs="+", type=int, help="default: 100, NIN 20")
    parser.add_argument(
        "--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="of images in memory"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument(
        "--tf32",
        action="store_true",
        help="let an NVIDIA card round the factors of products to 10 bits",
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="how long each measurement takes, about"
    )
    parser.add_argument("--least", type=int, default=3, help="and how many calls at least")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("runs/benchmark/authors.json")
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = arguments.tf32
    if arguments.check:
        sys.exit(
            0 if check(arguments.check) else "error: this is not what the authors' code computes."
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    is_cuda = arguments.device.startswith("cuda")
    device = (
        torch.cuda.get_device_name()
        if is_cuda
        else f"cpu, {arguments.threads} of {os.cpu_count()} threads"
    )
    everything = {"device": device, "torch": torch.__version__, "tf32": arguments.tf32, "steps": []}
    print(f"{device}, torch {torch.__version__}, tf32 {arguments.tf32}")
    print(
        "net      batch  layout         s per step  images/s  calls  DeepFool steps  of the "
        "slowest  loss"
    )
    for name in arguments.nets:
        layouts = (
            arguments.layouts
            if any(layer is max_pool for layer in NETS[name])
            else arguments.layouts[:1]
        )
        for batch in arguments.batches or BATCHES[name]:
            for layout in layouts:
                row = measure(name, batch, layout, arguments)
                everything["steps"].append(row)
                # Kept, should the next be too much.
                arguments.out.write_text(json.dumps(everything, indent=2) + "\n")
                print(
                    f"{name:8} {batch:5}  {layout:13} {row['seconds']:11.4f} "
                    f"{row['images_per_second']:9.1f}"
                    f" {row['calls']:6} {row['deepfool_steps']:15.2f} "
                    f"{row['steps_of_the_slowest']:15} {row['loss']:5.3f}",
                    flush=True,
                )
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
