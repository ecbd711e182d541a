"""Everything in dd_jax that concerns XLA, JAX's compiler.

    set_flags                   chooses the fastest XLA flags that compute correctly on this CPU
    Settings                    what `set_flags` did
    warn_once                   warns once if XLA computes wrongly on this CPU
    Traces                      traces a `logits_fn` once for each number of rows
    closure_convert             turns a `logits_fn` into an `ApplyFn`, a pure function of a
                                `Closure`: the arrays that it closes over
    rows_are_interchangeable    whether a net may see the rows of a batch in any order
    evaluate                    runs a traced function with faster derivatives of the same values
    operations                  counts the floating-point operations of a traced function
    max_pool, avg_pool          pooling with the derivatives that Deep Defense needs

The off switch: DD_JAX_REWRITE=0 in the environment leaves every operation of a net to JAX. So does
`rewrite=False` in the functions that take it: `deepfool`, `signed_margin`, `regularizer` and
`deep_defense_loss`. `rewrite=True` overrides the environment.
"""

from dd_jax.xla.canary import warn_once
from dd_jax.xla.closure_convert import (
    ApplyFn,
    Closure,
    Traces,
    closure_convert,
    rows_are_interchangeable,
)
from dd_jax.xla.flags import Settings, set_flags
from dd_jax.xla.pooling import avg_pool, max_pool
from dd_jax.xla.rewrite import evaluate, operations

__all__ = [
    "ApplyFn",
    "Closure",
    "Settings",
    "Traces",
    "avg_pool",
    "closure_convert",
    "evaluate",
    "max_pool",
    "operations",
    "rows_are_interchangeable",
    "set_flags",
    "warn_once",
]
