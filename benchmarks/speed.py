"""How fast the Deep Defense step and DeepFool are, beside the floor, a plain step and foolbox.

    python benchmarks/speed.py --data_dir DIR [--nets mlp lenet convnet nin] [--parts step deepfool growth] [--out FILE]

Every net is first trained briefly on real data (kept in --workdir, so a second run starts at once): the numbers of DeepFool
steps are then those of training. Each net is measured in a process of its own, so that its peak memory is its own. Prints a
table and writes everything as JSON, with device and versions. foolbox is optional: `pip install foolbox`.

The floor is (K + 8) F per DeepFool step taken, F being the operations of one forward pass and K the number of classes, at the
rate of a 2000 x 2000 float32 matrix product on this machine at this moment. `fraction` is the floor over the time measured.
"""

import argparse
import importlib.metadata
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dd_jax
from dd_jax import configuration, experiment, training, xla_settings

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = {"mlp": "mnist_mlp", "lenet": "mnist_lenet", "convnet": "cifar_convnet", "nin": "cifar_nin"}
TRAINING_STEPS = {"mlp": 1200, "lenet": 1200, "convnet": 1500, "nin": 150}
BATCHES = {"mlp": (100,), "lenet": (100,), "convnet": (100,), "nin": (20, 100)}
FOOLBOX_IMAGES = {"mlp": 100, "lenet": 100, "convnet": 100, "nin": 20}


def timed(call: Callable[[], Any], seconds: float = 4.0, least: int = 3) -> float:
    """The median time of a call whose result is waited for, over at least `least` calls and about `seconds`."""
    jax.block_until_ready(call())
    times, start = [], time.perf_counter()
    while len(times) < least or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def matrix_rate() -> float:
    """Operations per second of a 2000 x 2000 float32 matrix product."""
    a = jnp.asarray(np.random.default_rng(0).standard_normal((2000, 2000)), jnp.float32)
    product = jax.jit(lambda a: a @ a).lower(a).compile()
    return 2 * 2000**3 / timed(lambda: product(a), seconds=1.0, least=5)


def operations(function: Callable, *arguments: Any) -> float:
    """Floating-point operations of the convolutions and matrix products of a function, counted in its trace."""
    total = 0.0
    for equation in jax.make_jaxpr(function)(*arguments).jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            kernel, out = equation.invars[1].aval, equation.outvars[0].aval
            outputs = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * out.size * kernel.size / outputs
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval, equation.outvars[0].aval
            total += 2 * out.size * np.prod([left.shape[axis] for axis in contracted])
    return total


def compiled(function: Callable, *arguments: Any) -> tuple[Callable, float]:
    """The compiled function and the seconds that tracing and compiling took."""
    start = time.perf_counter()
    result = jax.jit(function).lower(*arguments).compile()
    return result, time.perf_counter() - start


def trained_net(name: str, data_dir: str, workdir: pathlib.Path) -> tuple[Callable, Any, np.ndarray, np.ndarray]:
    """A net trained briefly on real data, as (apply_fn, params), and the test images and labels."""
    limit = TRAINING_STEPS[name]
    overrides = [f"--config.data.dir={data_dir}", f"--config.reference.max_steps={limit}", "--config.data.test_limit=2000"]
    config = configuration.read(str(ROOT / "configs" / f"{CONFIGS[name]}.py"), overrides)
    folder = workdir / name
    parts = experiment.build(config, folder)
    configuration.claim_directory(config, folder)
    state = experiment.run_reference(parts)
    apply_fn = lambda params, x: training.make_logits_fn(parts.model, params, {})(x)
    return apply_fn, state.params, parts.test_inputs, parts.data.test_labels


def measure_step(apply_fn: Callable, params: Any, inputs: jax.Array, labels: jax.Array, rate: float) -> dict[str, Any]:
    """The training step: loss and gradient, beside a plain cross-entropy step and the floor."""
    batch = inputs.shape[0]

    def deep_defense(params: Any, x: jax.Array, y: jax.Array) -> Any:
        loss, metrics = dd_jax.deep_defense_loss(partial(apply_fn, params), x, y)
        return loss.mean(), metrics["num_steps"].mean()

    def plain(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return -jnp.take_along_axis(jax.nn.log_softmax(apply_fn(params, x)), y[:, None], axis=-1).mean()

    step, seconds_to_compile = compiled(jax.value_and_grad(deep_defense, has_aux=True), params, inputs, labels)
    plain_step, _ = compiled(jax.value_and_grad(plain), params, inputs, labels)
    (_, num_steps), _ = step(params, inputs, labels)
    time_of_step, time_of_plain = timed(lambda: step(params, inputs, labels)), timed(lambda: plain_step(params, inputs, labels))
    forward = operations(apply_fn, params, inputs)
    classes = jax.eval_shape(apply_fn, params, inputs).shape[1]
    floor = float(num_steps) * (classes + 8) * forward / rate
    return {
        "batch": batch,
        "seconds": time_of_step,
        "images_per_second": batch / time_of_step,
        "plain_steps": time_of_step / time_of_plain,
        "deepfool_steps": float(num_steps),
        "forward_operations_per_image": forward / batch,
        "fraction_of_floor": floor / time_of_step,
        "compile_seconds": seconds_to_compile,
        "temporary_megabytes": step.memory_analysis().temp_size_in_bytes / 1e6,
    }


def measure_deepfool(apply_fn: Callable, params: Any, inputs: jax.Array, labels: jax.Array, num_images: int) -> dict[str, Any]:
    """DeepFool alone, 50 steps from the predicted class, within the images' own range; foolbox beside it if installed."""
    x = inputs[:num_images]
    low, high = float(x.min()), float(x.max())
    logits_fn = partial(apply_fn, params)
    y = jnp.argmax(logits_fn(x), axis=-1)
    attack, _ = compiled(lambda x: dd_jax.deepfool(logits_fn, x, num_steps=50, overshoot=0.02, bounds=(low, high)), x)
    found = attack(x)
    size = lambda d: float(jnp.linalg.norm(d.reshape(num_images, -1), axis=1).mean())
    ours = {
        "images_per_second": num_images / timed(lambda: attack(x)),
        "l2": size(found.perturbation),
        "success": float(found.success.mean()),
        "deepfool_steps": float(found.num_steps.mean()),
    }
    try:
        import eagerpy
        import foolbox
    except ImportError:
        return {"num_images": num_images, "dd_jax": ours, "foolbox": None}
    model = foolbox.JAXModel(jax.jit(logits_fn), bounds=(low, high), preprocessing=None)
    theirs = foolbox.attacks.L2DeepFoolAttack(steps=50, candidates=10, overshoot=0.02)
    attack_once = lambda: theirs.run(eagerpy.astensor(x)._model if False else model, x, y)
    start = time.perf_counter()
    adversarial = jnp.asarray(attack_once())
    first = time.perf_counter() - start
    seconds = timed(attack_once, seconds=0.0, least=1) if first < 60 else first
    success = float((jnp.argmax(logits_fn(adversarial), axis=-1) != y).mean())
    return {
        "num_images": num_images,
        "dd_jax": ours,
        "foolbox": {"images_per_second": num_images / seconds, "l2": size(adversarial - x), "success": success},
    }


def measure_growth(apply_fn: Callable, params: Any, inputs: jax.Array, labels: jax.Array) -> dict[str, Any]:
    """How the step's time grows with the batch, the number of classes and DeepFool's step limit."""
    rng = np.random.default_rng(0)

    def seconds(apply_fn: Callable, params: Any, x: jax.Array, y: jax.Array, **options: Any) -> float:
        loss = lambda params: dd_jax.deep_defense_loss(partial(apply_fn, params), x, y, **options)[0].mean()
        return timed(jax.jit(jax.grad(loss)).lower(params).compile().__call__ and partial(jax.jit(jax.grad(loss)), params), 1.0)

    def widened(classes: int) -> Callable:
        mixing = jnp.asarray(rng.standard_normal((10, classes)) / np.sqrt(10), jnp.float32)
        return lambda params, x: apply_fn(params, x) @ mixing

    grown = {"batch": {}, "classes": {}, "num_steps": {}}
    for batch in (1, 10, 100, 1000):
        rows = np.arange(batch) % len(labels)
        grown["batch"][batch] = seconds(apply_fn, params, inputs[rows], labels[rows])
    for classes in (2, 10, 100):
        net = widened(classes)
        grown["classes"][classes] = seconds(net, params, inputs[:100], jnp.argmax(net(params, inputs[:100]), axis=-1))
    for num_steps in (1, 5, 50):
        grown["num_steps"][num_steps] = seconds(apply_fn, params, inputs[:100], labels[:100], num_steps=num_steps)
    return grown


def measure_net(name: str, parts: list[str], data_dir: str, workdir: pathlib.Path) -> dict[str, Any]:
    """Everything about one net; run in a process of its own."""
    apply_fn, params, images, targets = trained_net(name, data_dir, workdir)
    inputs, labels = jnp.asarray(images[:1000]), jnp.asarray(targets[:1000])
    rate = matrix_rate()
    result: dict[str, Any] = {"net": name, "gflops": rate / 1e9}
    if "step" in parts:
        result["steps"] = []
        for batch in BATCHES[name]:
            result["steps"].append(measure_step(apply_fn, params, inputs[:batch], labels[:batch], rate))
            result["peak_megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    if "deepfool" in parts:
        result["deepfool"] = measure_deepfool(apply_fn, params, inputs, labels, FOOLBOX_IMAGES[name])
    if "growth" in parts and name == "mlp":
        result["growth"] = measure_growth(apply_fn, params, inputs, labels)
    return result
