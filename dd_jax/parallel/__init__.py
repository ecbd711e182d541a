"""Runs steps on several devices and hosts. No other module knows of pmap, meshes or processes.

Every process runs the same program. A step is a function of a replicated state and one device's
share of the batch. It sums over its examples, and `sum_over_devices` sums over all devices. Nothing
else is communicated, so each device ends the loops of its attacks independently.

    step = parallel.on_all_devices(step, donate_state=True)
    state = parallel.replicate(state)
    state, sums = step(state, batch, key)    # batch: this process's share, of any size

A step is compiled in one of two ways, the `mode`, with bitwise the same results:

    "pmap"        jax.pmap over this process's devices
    "shard_map"   jax.jit of jax.shard_map over a mesh of the devices of all processes
    "auto"        shard_map where there are several processes, pmap otherwise

In both, states are replicated arrays of all processes, as checkpoints need them.
"""

from dd_jax.parallel.devices import (
    MODES,
    Mode,
    fill_up,
    num_devices,
    numbered,
    on_all_devices,
    replicate,
    share_of,
    sum_over_devices,
    summed_in_parts,
    sums_and_rows,
    sums_over_shares,
)
from dd_jax.parallel.processes import (
    OthersFailedError,
    Terminated,
    Termination,
    any_of_us,
    end_process,
    finish,
    in_all_processes,
    initialize,
    is_one_of_several,
    is_primary,
    my_share,
    of_all,
    wait_for_all,
    wait_for_the_watch,
)

__all__ = [
    "MODES",
    "Mode",
    "OthersFailedError",
    "Terminated",
    "Termination",
    "any_of_us",
    "end_process",
    "fill_up",
    "finish",
    "in_all_processes",
    "initialize",
    "is_one_of_several",
    "is_primary",
    "my_share",
    "num_devices",
    "numbered",
    "of_all",
    "on_all_devices",
    "replicate",
    "share_of",
    "sum_over_devices",
    "summed_in_parts",
    "sums_and_rows",
    "sums_over_shares",
    "wait_for_all",
    "wait_for_the_watch",
]
