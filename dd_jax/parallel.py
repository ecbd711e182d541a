"""Several devices and several hosts: the only module that knows pmap and processes.

Every process runs the same program. A step is a function of a replicated state and of one device's
share of the batch; what it adds up over its examples, `sum_over_devices` adds up over all of them.
Nothing else is communicated, so each device ends the loops of its attacks by itself.

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
SECONDS_FOR_THE_OTHERS = 3.0  # What those that fail together have to say why.


class Terminated(Exception):
    """The process was asked to end, and what it had done is saved."""


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes. Before JAX's first computation; without arguments SLURM, TPU pods
    and the like are recognized by `jax.distributed`.

    Args:
      coordinator: HOST:PORT of process 0, reachable from all.
      num_processes, process_id: how many there are, and which this is, counted from 0.

    Raises:
      ValueError: some but not all of the three are given, the coordinator is no HOST:PORT, or the
        number is out of range.
    """
    given = (coordinator, num_processes, process_id)
    if any(x is None for x in given) and any(x is not None for x in given):
        raise ValueError(
            "Give all of --coordinator HOST:PORT, --num_processes N and --process_id I, or none of "
            "them."
        )
    if coordinator is not None and not 0 <= process_id < num_processes:
        raise ValueError(f"process_id is {process_id}; it must be within 0..{num_processes - 1}.")
    if coordinator is not None and not _is_host_and_port(coordinator):
        raise ValueError(
            f"--coordinator is {coordinator!r}; it must be HOST:PORT of process 0, such as "
            f"10.0.0.1:1234."
        )
    if hasattr(jax.config, "jax_enable_preemption_service"):
        # It would keep SIGTERM from all but `Termination`.
        jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(*given)
    # All wait for all here: a process that fails later finds none that waits for its devices.
    jax.devices()


def _is_host_and_port(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdecimal() and 0 < int(port) < 2**16


def is_one_of_several() -> bool:
    """Whether `initialize` was called, so that this process's end concerns others."""
    return jax.distributed.is_initialized()


def end_process(code: int) -> None:
    """Ends this process without waiting for the others, which Python's own way does for minutes,
    nor for its `finally`s.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if is_primary():  # The others cannot go on without it, and may have something to say before.
        time.sleep(SECONDS_FOR_THE_OTHERS)
    os._exit(code)


def is_primary() -> bool:
    """Whether this process is the one that writes logs and reports."""
    return jax.process_index() == 0


def num_devices() -> int:
    """Devices of all processes together."""
    return jax.device_count()


def my_share() -> tuple[int, int]:
    """(which, of how many): the share of every batch that this process reads."""
    return jax.process_index(), jax.process_count()


def wait_for_all(name: str) -> None:
    """Returns once every process has come to the point of that name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_of_us(flag: bool) -> bool:
    """Whether it is so for any process; all of them ask together."""
    return bool(np.any(of_all([float(flag)])))


def of_all(numbers: Sequence[float]) -> np.ndarray:
    """What every process says, float32 (processes, numbers); all of them ask together, and wait for
    their devices.
    """
    mine = np.array(numbers, np.float32)
    return (
        mine[None]
        if jax.process_count() == 1
        else np.asarray(multihost_utils.process_allgather(mine))
    )


def replicate(tree: Any) -> Any:
    """Arrays on every device of this process, as `on_all_devices` takes and returns states."""
    return jax.device_put(
        tree, NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec())
    )


def as_global(tree: Any) -> Any:
    """Replicated arrays as arrays of all processes, for checkpoints; nothing is copied. One
    process: as they are.
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
    """This process's examples of a batch that all processes know whole: the first of each
    `process_count`, and so on.

    A batch that does not divide is filled up first, see `fill_up`.
    """
    index, count = my_share()
    return {name: values[index::count] for name, values in fill_up(batch, count).items()}


def fill_up(batch: Mapping[str, np.ndarray], multiple: int) -> dict[str, np.ndarray]:
    """Adds examples until their number is a multiple: copies of the first, with mask 0, so that
    they count for nothing.

    (A copy and not zeros: what a loss makes of zeros need not be finite.) An empty batch:
    ValueError.
    """
    size = len(batch["mask"])
    if not size:
        raise ValueError("A batch must have at least one example.")
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
    """Sums over all devices of all processes, within a function that `on_all_devices` runs."""
    return lax.psum(tree, AXIS)


def on_all_devices(
    function: Callable, *, donate_state: bool = False, split_into: int = 1
) -> Callable:
    """Compiles `function(state, batch, *others)` for all devices: each has the state, the others,
    and a share of the batch.

    Args:
      function: returns what is the same on every device, because it passed `sum_over_devices` or
        depends on the state alone.
      donate_state: the state's memory becomes that of the result.
      split_into: every device's share is a multiple of this.

    Returns:
      The compiled function of this process's share of the batch, a mapping of arrays with "mask"
      among them, of any number of examples. Where they do not divide among its devices, they are
      filled up with masked ones.
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
    """Compiles two programs for all devices of all processes, for measurements: `attack(shared,
    batch) -> found`, and `judge(shared, batch, found) -> (sums, rows)`.

    Each device has `shared` and a share of the batch, and what an attack finds stays on it. The
    sums are added up over all devices, and the rows (arrays with an axis of examples, or None) put
    back together. Every process gives the whole batch, of any size, and gets the same; where the
    batch does not divide among the devices, masked examples at its end are added, and are among the
    rows.
    """
    mapped = _sums_and_rows(attack, judge)

    def call(shared: Any, batch: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
        _, count = my_share()
        sums, rows = mapped(shared, share_of(fill_up(batch, count * jax.local_device_count())))
        # Gathered as (process, row of its share, ...); its shares are interleaved.
        if count > 1 and rows is not None:
            gathered = multihost_utils.process_allgather(rows)
            rows = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), gathered)
        return sums, rows

    return call


def sums_over_shares(attack: Callable, judge: Callable) -> Callable:
    """As `sums_and_rows`, of batches that each process reads its own share of; the rows come
    process by process.
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
    """The sum of function(part) over equal parts of a batch, one after the other: the memory of one
    part is enough.
    """
    if parts == 1:
        return function(batch)
    split = {name: x.reshape(parts, -1, *x.shape[1:]) for name, x in batch.items()}
    first = {name: x[0] for name, x in split.items()}
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, first))
    add = lambda total, part: (jax.tree.map(jnp.add, total, function(part)), None)
    return lax.scan(add, zeros, split)[0]


class Termination:
    """Whether this process was asked to end (SIGTERM), to be looked at between steps; a context
    manager.

    Outside of it SIGTERM ends the process at once. Of several processes any may be asked: see
    `of_all`.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> "Termination":
        # Python lets no other thread listen.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def asked_for(self) -> bool:
        """Whether this process was asked since it entered."""
        return self._asked
