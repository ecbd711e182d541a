"""XLA settings that make the library faster on a CPU; `train.py` and `evaluate.py` apply them.

    import dd_jax.xla_settings
    dd_jax.xla_settings.apply()       # before JAX computes anything

On a 2-core AMD EPYC they make a ConvNet's Deep Defense step about twice as fast (benchmarks/README.md).
"""

import importlib.metadata
import os

FLAGS = {
    # Which operations XLA hands to its YNNPACK kernels. The default also hands over convolutions one by one, which is slower
    # for few channels, and not those that have elementwise neighbours, which is where it pays.
    "--xla_cpu_experimental_ynn_fusion_type": "dot,eltwise,reduce",
}
KNOWN_VERSIONS = (
    "0.10.2",
)  # Of jaxlib. XLA aborts the process on a flag that it does not know, so this is a list, not a range.


def flags_to_add(jaxlib_version: str, present: str) -> list[str]:
    """The flags that may be added to `present`, the user's own XLA_FLAGS; none for a version that is not known to take them."""
    if jaxlib_version not in KNOWN_VERSIONS:
        return []
    return [f"{name}={value}" for name, value in FLAGS.items() if name not in present]


def apply() -> list[str]:
    """Adds the flags to XLA_FLAGS and returns those added.

    Only flags that the installed jaxlib is known to accept, and never over one that the user has set. Has an effect if called
    before JAX's first computation, and on CPU only; elsewhere the flags are read and not used.
    """
    present = os.environ.get("XLA_FLAGS", "")
    added = flags_to_add(importlib.metadata.version("jaxlib"), present)
    if added:
        os.environ["XLA_FLAGS"] = " ".join([present, *added]).strip()
    return added
