"""Runs steps on several devices and hosts. No other module uses pmap or processes.

Every process runs the same program. A step is a function of a replicated state and one device's
share of the batch. It sums over its examples, and `sum_over_devices` sums over all devices. Nothing
else is communicated, so each device ends the loops of its attacks independently.

    step = parallel.on_all_devices(step, donate_state=True)
    state = parallel.replicate(state)
    state, sums = step(state, batch, key)    # batch: this process's share, of any size
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "devices"
SECONDS_FOR_THE_OTHERS = 3.0  # Time for other processes to print why they fail.


class Terminated(Exception):
    """The process was asked to end, and its progress is saved."""


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Connects to the other processes. Call it before JAX's first computation.

    Without arguments `jax.distributed` detects the environment, such as SLURM or a TPU pod.

    Args:
      coordinator: HOST:PORT of process 0, reachable from all processes.
      num_processes, process_id: the number of processes, and the index of this one, from 0.

    Raises:
      ValueError: some but not all of the three are given, the coordinator is not HOST:PORT, or the
        index is out of range.
    """
    given = (coordinator, num_processes, process_id)
    if any(x is None for x in given) and any(x is not None for x in given):
        raise ValueError(
            "Give all of --coordinator HOST:PORT, --num_processes N and --process_id I, or none of "
            "them."
        )
    if coordinator is not None and not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id is {process_id}; it must be within 0..{num_processes - 1}. Give each "
            f"process its own index."
        )
    if coordinator is not None and not _is_host_and_port(coordinator):
        raise ValueError(
            f"--coordinator is {coordinator!r}; it must be HOST:PORT of process 0. Give for "
            f"example 10.0.0.1:1234."
        )
    if hasattr(jax.config, "jax_enable_preemption_service"):
        # The service handles SIGTERM itself; `Termination` would not see it.
        jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(*given)
    # All processes wait for each other here, so that none waits for the devices of one that fails
    # later.
    jax.devices()


def _is_host_and_port(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdecimal() and 0 < int(port) < 2**16


def is_one_of_several() -> bool:
    """Whether `initialize` was called, so that the end of this process affects others."""
    return jax.distributed.is_initialized()


def end_process(code: int) -> None:
    """Ends this process without waiting for the others, and without its `finally` blocks.

    A normal exit of Python would wait for the others for minutes.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if is_primary():  # The others end with this one; they may print their errors first.
        time.sleep(SECONDS_FOR_THE_OTHERS)
    os._exit(code)


def is_primary() -> bool:
    """Whether this process writes the logs and reports."""
    return jax.process_index() == 0


def num_devices() -> int:
    """The number of devices of all processes."""
    return jax.device_count()


def my_share() -> tuple[int, int]:
    """(index, count): the share of every batch that this process reads."""
    return jax.process_index(), jax.process_count()


def wait_for_all(name: str) -> None:
    """Returns once every process has called it with this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_of_us(flag: bool) -> bool:
    """Whether the flag is true in any process. All processes must call it together."""
    return bool(np.any(of_all([float(flag)])))


def of_all(numbers: Sequence[float]) -> np.ndarray:
    """The numbers of all processes, float32 (processes, numbers).

    All processes must call it together, and wait for their devices.
    """
    mine = np.array(numbers, np.float32)
    return (
        mine[None]
        if jax.process_count() == 1
        else np.asarray(multihost_utils.process_allgather(mine))
    )


def replicate(tree: Any) -> Any:
    """Copies arrays to every device of this process, as `on_all_devices` needs its state."""
    return jax.device_put(
        tree, NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec())
    )


def as_global(tree: Any) -> Any:
    """Turns replicated arrays into arrays of all processes, for checkpoints. Copies nothing.

    With one process it returns them unchanged.
    """
    if jax.process_count() == 1:
        return tree
    everywhere = NamedSharding(Mesh(np.array(jax.devices()), (AXIS,)), PartitionSpec())

    def join(x: jax.Array) -> jax.Array:
        return jax.make_array_from_single_device_arrays(
            x.shape, everywhere, [s.data for s in x.addressable_shards]
        )

    return jax.tree.map(join, tree)


def share_of(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """This process's examples of a batch that all processes have: every `process_count`-th one.

    `fill_up` first fills up a batch whose size is not a multiple of the number of processes.
    """
    index, count = my_share()
    return {name: values[index::count] for name, values in fill_up(batch, count).items()}


def fill_up(batch: Mapping[str, np.ndarray], multiple: int) -> dict[str, np.ndarray]:
    """Adds examples until their number is a multiple of `multiple`.

    They are copies of the first example with mask 0, so they do not count. They are not zeros,
    because a loss of zeros may be infinite. Raises ValueError for an empty batch.
    """
    size = len(batch["mask"])
    if not size:
        raise ValueError("A batch must have at least one example, and this one is empty; skip it.")
    missing = -size % multiple
    if not missing:
        return dict(batch)
    filled = {
        name: np.concatenate([x, np.repeat(x[:1], missing, axis=0)]) for name, x in batch.items()
    }
    return filled | {
        "mask": np.concatenate([batch["mask"], np.zeros(missing, batch["mask"].dtype)])
    }


def sum_over_devices(tree: Any) -> Any:
    """Sums over all devices of all processes, inside a function that `on_all_devices` runs."""
    return lax.psum(tree, AXIS)


def on_all_devices(
    function: Callable, *, donate_state: bool = False, split_into: int = 1
) -> Callable:
    """Compiles `function(state, batch, *others)` for all devices.

    Each device gets the state, the others, and a share of the batch.

    Args:
      function: its results must be equal on every device: they come from `sum_over_devices` or
        depend on the state alone.
      donate_state: reuse the state's memory for the result.
      split_into: the size of every device's share is a multiple of this.

    Returns:
      The compiled function. Its batch is this process's share, a mapping of arrays that includes
      "mask", with any number of examples. Masked examples fill it up to a multiple of the number
      of devices.
    """
    mapped: dict[int, Callable] = {}

    def call(state: Any, batch: Mapping[str, np.ndarray], *others: Any) -> Any:
        if len(others) not in mapped:
            mapped[len(others)] = jax.pmap(
                function,
                AXIS,
                in_axes=(None, 0, *(None for _ in others)),
                out_axes=None,
                donate_argnums=(0,) if donate_state else (),
            )
        return mapped[len(others)](state, _spread(batch, split_into), *others)

    return call


def sums_and_rows(attack: Callable, judge: Callable) -> Callable:
    """Compiles the two programs of a measurement for all devices of all processes.

    They are `attack(shared, batch) -> found` and `judge(shared, batch, found) -> (sums, rows)`.
    Each device gets `shared` and a share of the batch, and keeps what its attack found. The sums
    are added over all devices. The rows (arrays with an axis of examples, or None) are gathered.
    Every process passes the same whole batch, of any size, and gets the same results. Masked
    examples at its end fill it up to a multiple of the number of devices; the rows include them.
    """
    mapped = _sums_and_rows(attack, judge)

    def call(shared: Any, batch: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
        _, count = my_share()
        sums, rows = mapped(shared, share_of(fill_up(batch, count * jax.local_device_count())))
        # The gathered rows are (process, row of its share, ...), and the shares are interleaved.
        if count > 1 and rows is not None:
            gathered = multihost_utils.process_allgather(rows)
            rows = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), gathered)
        return sums, rows

    return call


def sums_over_shares(attack: Callable, judge: Callable) -> Callable:
    """`sums_and_rows` for batches of which each process reads its own share.

    The rows are ordered by process.
    """
    mapped = _sums_and_rows(attack, judge)

    def call(shared: Any, batch: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
        sums, rows = mapped(shared, batch)
        if jax.process_count() > 1 and rows is not None:
            gathered = multihost_utils.process_allgather(rows)
            rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), gathered)
        return sums, rows

    return call


def _sums_and_rows(attack: Callable, judge: Callable) -> Callable:
    def summed(shared: Any, batch: Mapping[str, jax.Array], found: Any) -> tuple[Any, Any]:
        sums, rows = judge(shared, batch, found)
        return sum_over_devices(sums), rows

    mapped_attack = jax.pmap(attack, AXIS, in_axes=(None, 0))
    mapped_judge = jax.pmap(summed, AXIS, in_axes=(None, 0, 0), out_axes=(None, 0))

    def call(shared: Any, batch: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
        spread = _spread(batch, 1)
        sums, rows = mapped_judge(shared, spread, mapped_attack(shared, spread))
        return sums, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)

    return call


def _spread(batch: Mapping[str, np.ndarray], split_into: int) -> dict[str, np.ndarray]:
    count = jax.local_device_count()
    return {
        name: x.reshape(count, -1, *x.shape[1:])
        for name, x in fill_up(batch, count * split_into).items()
    }


def summed_in_parts(
    function: Callable[[Mapping[str, jax.Array]], Any], batch: Mapping[str, jax.Array], parts: int
) -> Any:
    """The sum of function(part) over equal parts of a batch.

    The parts are computed one after the other, with the memory of one part.
    """
    if parts == 1:
        return function(batch)
    split = {name: x.reshape(parts, -1, *x.shape[1:]) for name, x in batch.items()}
    first = {name: x[0] for name, x in split.items()}
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, first))
    add = lambda total, part: (jax.tree.map(jnp.add, total, function(part)), None)
    return lax.scan(add, zeros, split)[0]


class Termination:
    """A context manager that records whether this process was asked to end (SIGTERM).

    Check `asked_for` between steps. Outside of the context SIGTERM ends the process at once. Any of
    several processes may be asked: see `of_all`.

    Not Orbax's `reached_preemption`: it is always False without `jax.distributed`, that is, in a
    single process.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> "Termination":
        # Python allows signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def asked_for(self) -> bool:
        """Whether this process was asked to end since the context was entered."""
        return self._asked
