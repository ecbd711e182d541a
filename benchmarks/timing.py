"""Timing, counting and the machine's own speed: what the benchmarks share."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dd_jax.xla import rewrite


def timed(call: Callable[[], Any], *, seconds: float = 4.0, least: int = 3) -> float:
    """The median time of a call whose result is waited for, over at least `least` calls and about
    `seconds`.
    """
    jax.block_until_ready(call())
    times, start = [], time.perf_counter()
    while len(times) < least or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def compiled(function: Callable, *arguments: Any) -> tuple[Callable, float]:
    """The compiled function, and the seconds that tracing and compiling took."""
    start = time.perf_counter()
    result = jax.jit(function).lower(*arguments).compile()
    return result, time.perf_counter() - start


def matrix_rate() -> float:
    """Operations per second of a 2000 x 2000 float32 matrix product, here and now."""
    a = jnp.asarray(np.random.default_rng(0).standard_normal((2000, 2000)), jnp.float32)
    product, _ = compiled(lambda a: a @ a, a)
    return 2 * 2000**3 / timed(lambda: product(a), seconds=1.0, least=5)


def operations(function: Callable, *arguments: Any) -> float:
    """Floating-point operations of a function's convolutions and matrix products, counted in its
    trace.
    """
    return rewrite.operations(jax.make_jaxpr(function)(*arguments).jaxpr)
