"""Sets XLA's flags for CPUs: the fastest flags with which XLA computes correctly.

    import dd_jax
    dd_jax.xla.set_flags()              # before JAX computes anything

`train.py`, `evaluate.py` and the benchmarks call it. `dd_jax.xla.canary` checks whether XLA
computes correctly.
"""

import os
from typing import NamedTuple

from dd_jax.xla import canary

FLAG = "--xla_cpu_experimental_ynn_fusion_type"
"""The list of operations that XLA hands to its YNNPACK kernels. An empty list means none."""
CANDIDATES = ((), (f"{FLAG}=",))
"""Sets of flags, the fastest first (measured in benchmarks/README.md): XLA's own choice, and no
YNNPACK.

XLA's own choice computes wrongly on jaxlib 0.10.2; on 0.12.0.1 it is correct and the faster one.
Lists with "eltwise" are left out because they compute wrongly on both versions, and lists with
"dot" or "reduce" because they do on 0.10.2.
"""


class Settings(NamedTuple):
    """The flags that were added to XLA_FLAGS, the canary's failures with the resulting flags, and
    a sentence for the user ("" if there is nothing to say).
    """

    added: tuple[str, ...]
    failures: tuple[str, ...]
    sentence: str


def set_flags() -> Settings:
    """Adds to XLA_FLAGS the first of CANDIDATES with which the canary passes, and returns what it
    did.

    Call it before JAX's first computation; later calls change nothing. The flag affects CPUs only;
    other platforms ignore it. The first call with new flags takes a few seconds, later calls use
    the canary's cache.

    XLA_FLAGS stay unchanged if the user has set the flag or named a file of flags; if the canary
    fails with them, the sentence says so. They also stay unchanged if the canary cannot be run or
    if JAX_PLATFORMS excludes CPUs.
    """
    present = os.environ.get("XLA_FLAGS", "")
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms.split(","):
        return Settings((), (), "")
    if _jax_has_started():
        return Settings(
            (),
            (),
            "JAX has started already, so XLA_FLAGS stay unchanged; call "
            "dd_jax.xla.set_flags() before JAX computes anything.",
        )
    # XLA reads a value without leading dashes as the name of a file of flags.
    is_file = bool(present.strip()) and not present.strip().startswith("--")
    candidates = ((),) if FLAG in present or is_file else CANDIDATES
    under_present = None
    for added in candidates:
        flags = " ".join([present, *added]).strip()
        failures = canary.failures_under(flags)
        if failures == ():
            if added:
                os.environ["XLA_FLAGS"] = flags
            return Settings(added, (), _sentence_of_choice(added))
        under_present = under_present if added else failures
    return Settings((), under_present or (), _sentence_of_failures(present, under_present))


def _sentence_of_choice(added: tuple[str, ...]) -> str:
    flags = " ".join(added)
    return f"XLA on the CPU: {flags}, because the canary fails without it." if added else ""


def _sentence_of_failures(flags: str, failures: tuple[str, ...] | None) -> str:
    if failures is None:
        return (
            "The check whether XLA computes correctly on this CPU gave no verdict, because its "
            f"process could not be started or was ended; XLA_FLAGS stay unchanged, {flags!r}."
        )
    return (
        f"XLA computes wrongly on this CPU with XLA_FLAGS={flags!r} ({', '.join(failures)}; see "
        f"dd_jax.xla.canary): {canary.REMEDY}, or use another version of jaxlib."
    )


def _jax_has_started() -> bool:
    try:
        from jax._src import xla_bridge  # JAX has no public function for this.

        return bool(xla_bridge.backends_are_initialized())
    except (ImportError, AttributeError):
        return False
