"""Whether JAX computes rightly on this CPU: tiny programs that are known to be compiled wrongly
somewhere.

Each is reduced from a wrong figure that was seen, and is compared with NumPy in float64.

    row_products     jit(vmap(r -> sum((M @ r)^2))) over more than 32,768 rows is wrong on jaxlib
                     0.10.2 (jax issue 39103)
    pairs            log1p(x) - log1p(-x) is 0 for 4,096 numbers and more where
                     --xla_cpu_experimental_ynn_fusion_type holds
                     "eltwise", on jaxlib 0.10.2 and 0.12.0.1 (expm1 alike); arctanh is such a
                     difference: C&W fooled nothing
    high_rank_sum    the sum of a product over one of seven axes ends the process on jaxlib 0.10.2

`python -m dd_jax.xla.canary` runs them all and prints those that are right.
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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

VARIABLE = "DD_JAX_CANARY"
TOLERANCE = 1e-4  # Relative to the largest number; what was wrong was wrong by 2e-2 or more.
SECONDS = 60.0  # After which a new process is ended.
REMEDY = (
    "call dd_jax.xla.set_flags() before JAX computes anything, or set "
    "XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= "
    "(with nothing behind the equals sign)"
)
BEGUN = "begun"  # What a new process says when XLA has taken its flags.
CRASHES = (
    "SIGABRT",
    "SIGBUS",
    "SIGFPE",
    "SIGILL",
    "SIGSEGV",
)  # What a wrong program dies of; SIGKILL has other reasons.
# Of the flags, what changes no program.
NOT_OF_THE_COMPILER = "--xla_force_host_platform_device_count"
_warned = threading.Event()


class Program(NamedTuple):
    """A program, its arguments and its right result. `is_fatal`: where it goes wrong, it ends the
    process.
    """

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
    """Whether this process computes a program rightly on its first CPU. Raises whatever JAX
    raises.
    """
    arguments = jax.device_put(program.arguments, jax.local_devices(backend="cpu")[0])
    found = np.asarray(jax.jit(program.run)(*arguments), np.float64)
    return bool(np.max(np.abs(found - program.right)) <= TOLERANCE * np.max(np.abs(program.right)))


def failures_here() -> tuple[str, ...]:
    """The programs that this process computes wrongly on the CPU, without those that could end it.
    Within 0.3 s or so.

    A program that raises is none of them: settings of JAX's such as a transfer guard forbid it, and
    no result is no wrong one.
    """
    wrong = []
    for name, program in programs().items():
        with contextlib.suppress(Exception):
            if not program.is_fatal and not is_right(program):
                wrong.append(name)
    return tuple(wrong)


def failures_under(flags: str) -> tuple[str, ...] | None:
    """The programs that are computed wrongly on this CPU under these XLA_FLAGS, in a process of its
    own.

    All of them where XLA refuses the flags. None where that cannot be said: no process can be
    started, or it ended for a reason of its own. What can be said is kept in a file by the version
    of jaxlib, the flags, the CPU and these programs, so that it takes its two or three seconds
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
    # JAX's own settings stay out: with JAX_DISABLE_JIT=1, for example, nothing is compiled that
    # could be wrong.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    changed = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    # The same modules as here: of this jaxlib, and no dd_jax that lies in the working directory by
    # chance.
    program = "import sys; sys.path[:] = sys.argv[1:]; from dd_jax.xla import canary; canary.main()"
    command = [sys.executable or "", "-P", "-c", program, *sys.path]
    options = dict(
        env=kept | changed, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS
    )
    try:
        done = subprocess.run(command, **options)
        said, complaint = done.stdout.decode().split(), done.stderr.decode(errors="replace")
        ended_itself = done.returncode == 0 or -done.returncode in _crash_numbers()
    except subprocess.TimeoutExpired as late:  # high_rank_sum goes on for ever on some CPUs.
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
    """Warns, once in a process, where its JAX computes on the CPU and does so wrongly; never
    raises.

    The first call of an attack or of the penalty comes here. (When dd_jax is imported it is too
    early: the flags are not final, and JAX must not be started.) DD_JAX_CANARY=0 in the environment
    switches it off.
    """
    if _warned.is_set():
        return
    _warned.set()
    if os.environ.get(VARIABLE) == "0":
        return
    found: list[str] = []

    def look() -> None:
        # Without a backend, the caller hears of it in a moment.
        with contextlib.suppress(Exception):
            if jax.default_backend() == "cpu":
                found.extend(failures_here())

    # Within a thread of its own no trace, precision or device that the caller works with is in
    # force.
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    if found:
        warnings.warn(
            f"jaxlib {metadata.version('jaxlib')} computes some programs wrongly on this CPU with "
            f"its present XLA flags "
            f"({', '.join(found)}; see dd_jax.xla.canary): {REMEDY}.",
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
    of = {
        name: next((line for line in lines if line.startswith(name)), "")
        for name in ("model name", "flags")
    }
    model = of["model name"].partition(":")[2].strip() or platform.processor() or platform.machine()
    return f"{model} {hashlib.sha256(of['flags'].encode()).hexdigest()[:16]}"


def _read() -> dict[str, list[str]]:
    """What is kept; nothing where there is no file, or it is damaged."""
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
    """Keeps results, whole or not at all; where that cannot be done they are computed again next
    time.
    """
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
    """Prints the names of the programs that are computed rightly, each at once: the next one may
    end the process.
    """
    # A crash that is expected leaves no core file behind.
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    # XLA reads its flags here, and ends the process if it does not know them.
    jax.local_devices(backend="cpu")
    print(BEGUN, flush=True)
    for name, program in programs().items():
        with contextlib.suppress(Exception):  # No result is no right one.
            if is_right(program):
                print(name, flush=True)


if __name__ == "__main__":
    main()
