"""XLA's settings for a CPU: the fastest ones under which it computes rightly.

    import dd_jax
    dd_jax.xla.set_flags()              # before JAX computes anything

`train.py`, `evaluate.py` and the benchmarks do so. Whether XLA computes rightly is what
`dd_jax.xla.canary` says.
"""

import os
from typing import NamedTuple

from dd_jax.xla import canary

FLAG = "--xla_cpu_experimental_ynn_fusion_type"
"""Which operations XLA hands to its YNNPACK kernels, a list; with an empty one, none."""
CANDIDATES = ((), (f"{FLAG}=",))
"""Sets of flags, fastest first as measured (benchmarks/README.md): XLA's own choice, and nothing
handed to YNNPACK.

On jaxlib 0.10.2 the first computes wrongly, on 0.12.0.1 it is right and the faster one. No list
with "eltwise" is among them: it computes wrongly on both, and "dot" and "reduce" on 0.10.2.
"""


class Settings(NamedTuple):
    """What was done: the flags added to XLA_FLAGS, the canary's failures under the result, and a
    sentence, "" if all is plain.
    """

    added: tuple[str, ...]
    failures: tuple[str, ...]
    sentence: str


def set_flags() -> Settings:
    """Adds to XLA_FLAGS the first of CANDIDATES under which the canary passes, and says which.

    Has an effect before JAX's first computation, and on CPUs only; elsewhere the flag is read and
    not used. A value that the user has set for the flag stays, and so do XLA_FLAGS that name a
    file; where the canary fails under them the sentence says so. Where the canary cannot be run,
    nothing is added. Takes a few seconds where the canary has not run yet under these flags, and
    nothing later. Nothing is done where JAX_PLATFORMS leaves CPUs out.
    """
    present = os.environ.get("XLA_FLAGS", "")
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms.split(","):
        return Settings((), (), "")
    if _jax_has_started():
        return Settings(
            (),
            (),
            "JAX has started already, so XLA_FLAGS stay as they are; apply them before it "
            "computes.",
        )
    # XLA takes it for a file of flags.
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
    return f"XLA on the CPU: {' '.join(added)}, as without it the canary fails." if added else ""


def _sentence_of_failures(flags: str, failures: tuple[str, ...] | None) -> str:
    if failures is None:
        return (
            "Whether XLA computes rightly on this CPU could not be seen, as no process could be "
            "started for it or it was ended; "
            f"XLA_FLAGS stay as they are, {flags!r}."
        )
    return (
        f"XLA computes wrongly on this CPU with XLA_FLAGS={flags!r} ({', '.join(failures)}; see "
        f"dd_jax.xla.canary): {canary.REMEDY}, "
        "or use another version of jaxlib."
    )


def _jax_has_started() -> bool:
    try:
        from jax._src import xla_bridge  # JAX has no public way to ask.

        return bool(xla_bridge.backends_are_initialized())
    except (ImportError, AttributeError):
        return False
