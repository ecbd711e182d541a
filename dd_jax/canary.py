"""Whether JAX computes rightly on this CPU: tiny programs that are known to be compiled wrongly somewhere.

Each is reduced from a wrong figure that was seen, and is compared with NumPy in float64.

    row_products     jit(vmap(r -> sum((M @ r)^2))) over more than 32,768 rows is wrong on jaxlib 0.10.2 (jax issue 39103)
    pairs            log1p(x) - log1p(-x) is 0 for 4,096 numbers and more where --xla_cpu_experimental_ynn_fusion_type holds
                     "eltwise", on jaxlib 0.10.2 and 0.12.0.1 (expm1 alike); arctanh is such a difference: C&W fooled nothing
    high_rank_sum    the sum of a product over one of seven axes ends the process on jaxlib 0.10.2

`python -m dd_jax.canary` runs them all and prints those that are right.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import platform
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

VARIABLE = "DD_JAX_CANARY"
TOLERANCE = 1e-4  # Relative to the largest number; what was wrong was wrong by 2e-2 or more.
SECONDS = 120.0  # After which a check counts as failed.
REMEDY = (
    "call dd_jax.xla_settings.apply() before JAX computes anything, or set XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= "
    "(with nothing behind the equals sign)"
)
NOT_OF_THE_COMPILER = "--xla_force_host_platform_device_count"  # Of the flags, what changes no program.
_warned = threading.Event()


class Program(NamedTuple):
    """A program, its arguments and its right result. `is_fatal`: where it goes wrong, it ends the process."""

    run: Callable
    arguments: tuple[np.ndarray, ...]
    right: np.ndarray
    is_fatal: bool = False


def programs() -> dict[str, Program]:
    """All programs by name, with their arguments in float32 and their results in float64."""
    random = np.random.default_rng(0)
    draw = lambda *shape: random.standard_normal(shape).astype(np.float32)
    matrix, rows = draw(3, 3), draw(40_000, 3)
    x = random.uniform(-0.96, 0.96, 4096).astype(np.float32)
    first, second = draw(3, 1, 2, 2, 8, 8, 8), draw(3, 1, 2, 2, 8, 8, 8)
    wide = lambda *arrays: tuple(array.astype(np.float64) for array in arrays)
    exact_matrix, exact_rows, exact_x = wide(matrix, rows, x)

    def row_products(matrix: jax.Array, rows: jax.Array) -> jax.Array:
        return jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(rows)

    def pairs(x: jax.Array) -> jax.Array:
        return jnp.log1p(x) - jnp.log1p(-x)

    sums_of_squares = np.sum((exact_rows @ exact_matrix.T) ** 2, axis=1)
    return {
        "row_products": Program(row_products, (matrix, rows), sums_of_squares),
        "pairs": Program(pairs, (x,), np.log1p(exact_x) - np.log1p(-exact_x)),
        "high_rank_sum": Program(
            lambda a, b: jnp.sum(a * b, axis=3),
            (first, second),
            np.sum(np.prod(wide(first, second), axis=0), axis=3),
            True,
        ),
    }


def is_right(program: Program) -> bool:
    """Whether this process computes a program rightly on its first CPU; False where it raises."""
    try:
        arguments = jax.device_put(program.arguments, jax.local_devices(backend="cpu")[0])
        found = np.asarray(jax.jit(program.run)(*arguments), np.float64)
    except Exception:  # Whatever it is, it is no right result.
        return False
    return bool(np.max(np.abs(found - program.right)) <= TOLERANCE * np.max(np.abs(program.right)))


def failures_here() -> tuple[str, ...]:
    """The programs that this process computes wrongly on the CPU, without those that could end it. Within 0.3 s or so."""
    return tuple(name for name, program in programs().items() if not program.is_fatal and not is_right(program))


def failures_under(flags: str) -> tuple[str, ...]:
    """The programs that are computed wrongly on this CPU under these XLA_FLAGS, in a process of its own.

    All of them where that process ends early, as it does for a flag that XLA does not know. Kept in a file by the version of
    jaxlib, the flags, the CPU and these programs, so that it takes its two or three seconds once.
    """
    key, known = _key(flags), _read()
    if key not in known:
        found = _failures_in_new_process(flags)
        _write(_read() | {key: found})
        return tuple(found)
    return tuple(known[key])


def _failures_in_new_process(flags: str) -> list[str]:
    package = str(pathlib.Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    changed = {"XLA_FLAGS": flags, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-c", "from dd_jax import canary; canary.main()"]
    options = dict(env=os.environ | changed, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS)
    try:
        said = subprocess.run(command, **options).stdout.split()
    except (subprocess.TimeoutExpired, OSError):
        said = []
    return [name for name in programs() if name not in said]


def warn_once() -> None:
    """Warns, once in a process, where its JAX computes on the CPU and does so wrongly; never raises.

    The first call of an attack or of the penalty comes here. (When dd_jax is imported it is too early: the flags are not final,
    and JAX must not be started.) DD_JAX_CANARY=0 in the environment switches it off.
    """
    if _warned.is_set():
        return
    _warned.set()
    if os.environ.get(VARIABLE) == "0":
        return
    found: list[str] = []

    def look() -> None:
        if jax.default_backend() == "cpu":
            found.extend(failures_here())

    # Within a thread of its own no trace, precision or device that the caller works with is in force.
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    if found:
        warnings.warn(
            f"jaxlib {metadata.version('jaxlib')} computes some programs wrongly on this CPU with its present XLA flags "
            f"({', '.join(found)}; see dd_jax.canary): {REMEDY}.",
            RuntimeWarning,
            stacklevel=2,
        )


def cache_file() -> pathlib.Path:
    """Where results are kept: dd_jax/canary.json in the user's cache directory."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(root) / "dd_jax" / "canary.json"


def _key(flags: str) -> str:
    source = hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()[:16]
    relevant = [flag for flag in flags.split() if not flag.startswith(NOT_OF_THE_COMPILER)]
    return json.dumps([metadata.version("jaxlib"), " ".join(relevant), _cpu(), source])


def _cpu() -> str:
    """The CPU's model, and a fingerprint of what it can do: XLA compiles for both."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    of = {name: next((line for line in lines if line.startswith(name)), "") for name in ("model name", "flags")}
    model = of["model name"].partition(":")[2].strip() or platform.processor() or platform.machine()
    return f"{model} {hashlib.sha256(of['flags'].encode()).hexdigest()[:16]}"


def _read() -> dict[str, list[str]]:
    """What is kept; nothing where there is no file, or it is damaged."""
    try:
        known = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    is_list = lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value)
    return {key: value for key, value in known.items() if is_list(value)} if isinstance(known, dict) else {}


def _write(known: Mapping[str, list[str]]) -> None:
    """Keeps results, whole or not at all; where that cannot be done they are computed again next time."""
    path = cache_file()
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(known, indent=1))
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()


def main() -> None:
    """Prints the names of the programs that are computed rightly, each at once: the next one may end the process."""
    for name, program in programs().items():
        if is_right(program):
            print(name, flush=True)


if __name__ == "__main__":
    main()
