"""All that dd_jax does about XLA, JAX's compiler, through one door.

    set_flags             the fastest XLA flags under which XLA computes rightly on this CPU
    warn_once             a warning, once, where it computes wrongly
    closure_convert       a function as a pure function of the arrays that it closes over
    evaluate              a traced function, with faster derivatives of the same values
    max_pool, avg_pool    pooling with the derivatives that Deep Defense needs

DD_JAX_REWRITE=0 in the environment switches all replacements off, and so does `rewrite=False` where
a function takes it.
"""

from dd_jax.xla.canary import warn_once
from dd_jax.xla.closure_convert import ApplyFn, Closure, closure_convert, rows_are_interchangeable
from dd_jax.xla.flags import Settings, set_flags
from dd_jax.xla.pooling import avg_pool, max_pool
from dd_jax.xla.rewrite import evaluate, operations

__all__ = [
    "ApplyFn",
    "Closure",
    "Settings",
    "avg_pool",
    "closure_convert",
    "evaluate",
    "max_pool",
    "operations",
    "rows_are_interchangeable",
    "set_flags",
    "warn_once",
]
