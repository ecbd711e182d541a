"""Checks whether JAX computes correctly on this CPU, with small programs that some versions
miscompile.

Each program was reduced from a wrong result in practice. Its result is compared with NumPy's in
float64.

    row_products     jit(vmap(r -> sum((M @ r)^2))) over more than 32,768 rows is wrong on jaxlib
                     0.10.2 (jax issue 39103)
    pairs            log1p(x) - log1p(-x) is 0 for 4,096 numbers and more if
                     --xla_cpu_experimental_ynn_fusion_type contains "eltwise", on jaxlib 0.10.2
                     and 0.12.0.1 (expm1 is affected too); arctanh is such a difference, and with
                     it C&W fooled no image
    high_rank_sum    the sum of a product over one of seven axes crashes the process on jaxlib
                     0.10.2

`python -m dd_jax.xla.canary` runs all programs and prints the names of the correct ones.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

VARIABLE = "DD_JAX_CANARY"
TOLERANCE = 1e-4  # Relative to the largest number; the errors seen were 2e-2 or more.
SECONDS = 60.0  # Time limit of a new process.
REMEDY = (
    "call dd_jax.xla.set_flags() before JAX computes anything, or set "
    "XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= "
    "(with nothing after the equals sign)"
)
BEGUN = "begun"  # A new process prints it once XLA has accepted the flags.
# Signals of a miscompiled program. SIGKILL is none of them: it has other causes, such as memory.
CRASHES = ("SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV")
# This flag does not change how programs are compiled.
NOT_OF_THE_COMPILER = "--xla_force_host_platform_device_count"
_warned = threading.Event()


class Program(NamedTuple):
    """A program, its float32 arguments and its correct result in float64.

    `is_fatal`: a miscompiled version of it crashes the process.
    """

    run: Callable
    arguments: tuple[np.ndarray, ...]
    right: np.ndarray
    is_fatal: bool = False


def programs() -> dict[str, Program]:
    """All programs by name."""
    random = np.random.default_rng(0)
    return {
        "row_products": _row_products(random),
        "pairs": _pairs(random),
        "high_rank_sum": _high_rank_sum(random),
    }


def _row_products(random: np.random.Generator) -> Program:
    matrix, rows = _normal(random, 3, 3), _normal(random, 40_000, 3)
    run = lambda matrix, rows: jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(rows)
    products = rows.astype(np.float64) @ matrix.astype(np.float64).T
    return Program(run, (matrix, rows), np.sum(products**2, axis=1))


def _pairs(random: np.random.Generator) -> Program:
    x = random.uniform(-0.96, 0.96, 4096).astype(np.float32)
    exact = x.astype(np.float64)
    run = lambda x: jnp.log1p(x) - jnp.log1p(-x)
    return Program(run, (x,), np.log1p(exact) - np.log1p(-exact))


def _high_rank_sum(random: np.random.Generator) -> Program:
    shape = (3, 1, 2, 2, 8, 8, 8)
    first, second = _normal(random, *shape), _normal(random, *shape)
    exact = np.sum(first.astype(np.float64) * second.astype(np.float64), axis=3)
    return Program(lambda a, b: jnp.sum(a * b, axis=3), (first, second), exact, is_fatal=True)


def _normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


def is_right(program: Program) -> bool:
    """Whether this process computes a program correctly on its first CPU.

    Raises whatever JAX raises.
    """
    arguments = jax.device_put(program.arguments, jax.local_devices(backend="cpu")[0])
    found = np.asarray(jax.jit(program.run)(*arguments), np.float64)
    return bool(np.max(np.abs(found - program.right)) <= TOLERANCE * np.max(np.abs(program.right)))


def failures_here() -> tuple[str, ...]:
    """The names of the programs that this process computes wrongly on the CPU. Takes about 0.3 s.

    Programs that could crash the process are not run. A program that raises does not count as
    wrong: it gave no result, for example because a transfer guard forbids it.
    """
    wrong = []
    for name, program in programs().items():
        with contextlib.suppress(Exception):
            if not program.is_fatal and not is_right(program):
                wrong.append(name)
    return tuple(wrong)


def failures_under(flags: str) -> tuple[str, ...] | None:
    """The names of the programs that a new process computes wrongly on this CPU with these
    XLA_FLAGS.

    Returns all names if XLA rejects the flags, and None if there is no verdict: the process could
    not be started, or ended for an unrelated reason. A verdict is cached in `cache_file`, under the
    version of jaxlib, the flags, the CPU and the programs, so the two or three seconds are spent
    once.
    """
    key, known = _key(flags), _read()
    if key in known:
        return tuple(known[key])
    found = _failures_in_new_process(flags)
    if found is None:
        return None
    _write(_read() | {key: found})
    return tuple(found)


def _failures_in_new_process(flags: str) -> list[str] | None:
    # JAX's own settings are removed: with JAX_DISABLE_JIT=1, for example, nothing is compiled that
    # could be wrong.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    changed = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    # The new process must import the jaxlib and dd_jax of this process, not a dd_jax in the working
    # directory.
    program = "import sys; sys.path[:] = sys.argv[1:]; from dd_jax.xla import canary; canary.main()"
    command = [sys.executable or "", "-P", "-c", program, *sys.path]
    options: dict[str, Any] = dict(env=kept | changed, stdin=subprocess.DEVNULL)
    options |= dict(capture_output=True, timeout=SECONDS)
    try:
        done = subprocess.run(command, **options)
        said, complaint = done.stdout.decode().split(), done.stderr.decode(errors="replace")
        ended_itself = done.returncode == 0 or -done.returncode in _crash_numbers()
    except subprocess.TimeoutExpired as late:  # high_rank_sum never ends on some CPUs.
        said, complaint, ended_itself = (late.stdout or b"").decode().split(), "", True
    except OSError:
        return None
    is_refused = BEGUN not in said and "XLA_FLAGS" in complaint
    if not is_refused and not (BEGUN in said and ended_itself):
        return None
    return [name for name in programs() if name not in said]


def _crash_numbers() -> set[int]:
    return {int(getattr(signal, name)) for name in CRASHES if hasattr(signal, name)}


def warn_once() -> None:
    """Warns once per process if JAX computes on the CPU and computes wrongly. Never raises.

    The first call of an attack or of the penalty calls this function. The import of dd_jax would be
    too early: the flags may still change, and an import must not start JAX. DD_JAX_CANARY=0 in the
    environment switches the check off.
    """
    if _warned.is_set():
        return
    _warned.set()
    if os.environ.get(VARIABLE) == "0":
        return
    found: list[str] = []

    def look() -> None:
        # If there is no backend, the caller's own computation raises right after this.
        with contextlib.suppress(Exception):
            if jax.default_backend() == "cpu":
                found.extend(failures_here())

    # The caller's trace, precision and default device do not apply in a new thread.
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    if found:
        warnings.warn(
            f"jaxlib {metadata.version('jaxlib')} computes some programs wrongly on this CPU with "
            f"the current XLA flags ({', '.join(found)}; see dd_jax.xla.canary): {REMEDY}.",
            RuntimeWarning,
            stacklevel=2,
        )


def cache_file() -> pathlib.Path:
    """The file that caches verdicts: dd_jax/canary.json in the user's cache directory."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(root) / "dd_jax" / "canary.json"


def _key(flags: str) -> str:
    source = hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()[:16]
    relevant = [flag for flag in flags.split() if not flag.startswith(NOT_OF_THE_COMPILER)]
    return json.dumps([metadata.version("jaxlib"), " ".join(relevant), _cpu(), source])


def _cpu() -> str:
    """The CPU's model and a hash of its feature flags: XLA compiles for both."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    of = {
        name: next((line for line in lines if line.startswith(name)), "")
        for name in ("model name", "flags")
    }
    model = of["model name"].partition(":")[2].strip() or platform.processor() or platform.machine()
    return f"{model} {hashlib.sha256(of['flags'].encode()).hexdigest()[:16]}"


def _read() -> dict[str, list[str]]:
    """The cached verdicts; an empty dictionary if the file is missing or damaged."""
    try:
        known = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    is_list = lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value)
    return (
        {key: value for key, value in known.items() if is_list(value)}
        if isinstance(known, dict)
        else {}
    )


def _write(known: Mapping[str, list[str]]) -> None:
    """Writes the cache in one step. If that fails, the verdicts are computed again next time."""
    path = cache_file()
    partial = path.with_name(f"{path.name}.{os.urandom(8).hex()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(known, indent=1))
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()


def main() -> None:
    """Prints the name of each program that is computed correctly, at once: the next program may
    crash the process.
    """
    # An expected crash must not leave a core file behind.
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    # XLA reads its flags here, and ends the process if it does not know one.
    jax.local_devices(backend="cpu")
    print(BEGUN, flush=True)
    for name, program in programs().items():
        with contextlib.suppress(Exception):  # A program without a result is not correct.
            if is_right(program):
                print(name, flush=True)


if __name__ == "__main__":
    main()
