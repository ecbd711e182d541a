"""The forms that a convolution from few channels and its input gradient may have, beside one another.

    python benchmarks/convolutions.py [--batch 100]

Microseconds of the processor per image, each form jitted alone. "wide": one plain convolution, or what
more channels would have; "few": the form of dd_jax/xla/convolution.py for few channels.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dd_jax import xla  # noqa: E402

FLAGS_ADDED = xla.set_flags()  # Before JAX starts, as train.py does.

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from dd_jax.xla import convolution  # noqa: E402

SECONDS, REPEATS = 0.3, 3
FEW = 4


class Case(NamedTuple):
    """Images of `size` x `size` pixels, and a kernel of `across` x `across` with a margin of zeros."""

    size: int
    inputs: int
    outputs: int
    across: int
    margin: int


CASES = {
    "LeNet's first": Case(28, 1, 20, 5, 0),
    "28 x 28 x 1 to 32, 3 x 3": Case(28, 1, 32, 3, 1),
    "28 x 28 x 1 to 64, 3 x 3": Case(28, 1, 64, 3, 1),
    "ConvNet's first": Case(32, 3, 32, 5, 2),
    "32 x 32 x 3 to 16, 3 x 3": Case(32, 3, 16, 3, 1),
    "32 x 32 x 3 to 64, 3 x 3": Case(32, 3, 64, 3, 1),
    "NIN's first": Case(32, 3, 192, 5, 2),
}


def processor_time(function: Callable, *arguments: Any) -> float:
    """Seconds of the processor of one call: the least mean of several rounds."""
    call = jax.jit(function)
    jax.block_until_ready(call(*arguments))
    means = []
    for _ in range(REPEATS):
        begin, before, count = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - begin < SECONDS:
            jax.block_until_ready(call(*arguments))
            count += 1
        means.append((time.process_time() - before) / count)
    return min(means)


def measure(case: Case, batch: int) -> list[float]:
    """Microseconds per image of the convolution, wide and in blocks, and of its input gradient, wide
    and by pixels.
    """
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    padding = ((case.margin, case.margin),) * 2
    images = draw(batch, case.size, case.size, case.inputs)
    kernel = draw(case.across, case.across, case.inputs, case.outputs)
    rows = case.size + 2 * case.margin - case.across + 1
    cotangent = draw(batch, rows, rows, case.outputs)
    times = []
    for function, x in (
        (convolution.convolution, images),
        (convolution.input_gradient, cotangent),
    ):
        for few_inputs, most_outputs in ((0, 0), (FEW, case.outputs)):
            convolution.FEW_INPUTS = few_inputs
            convolution.MOST_OUTPUTS_IN_BLOCKS = most_outputs
            form = lambda x, kernel, function=function: function(x, kernel, padding)
            times.append(processor_time(form, x, kernel) / batch * 1e6)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=100)
    batch = parser.parse_args().batch
    print(f"jax {jax.__version__}, {jax.default_backend()}, batch {batch}; {FLAGS_ADDED.sentence}")
    print("| from few channels | wide | few (rows) | gradient wide | few (pixels) |")
    print("| --- | --- | --- | --- | --- |")
    for name, case in CASES.items():
        figures = " | ".join(f"{microseconds:.0f}" for microseconds in measure(case, batch))
        print(f"| {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
