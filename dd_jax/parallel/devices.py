"""Runs a function on all devices, each with a share of the batch; see `dd_jax.parallel`."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dd_jax.parallel.processes import my_share

AXIS = "devices"
Mode = Literal["auto", "pmap", "shard_map"]
"""How a step is compiled for all devices; see `dd_jax.parallel`."""
MODES = get_args(Mode)
Batch = Mapping[str, np.ndarray]


def num_devices() -> int:
    """The number of devices of all processes."""
    return jax.device_count()


def _resolved(mode: Mode) -> Mode:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}.")
    if mode != "auto":
        return mode
    return "shard_map" if jax.process_count() > 1 else "pmap"


def _mesh() -> Mesh:
    """All devices in the order of their processes, so that a process's share is contiguous."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), (AXIS,))


def _local_mesh() -> Mesh:
    return Mesh(np.array(jax.local_devices()), (AXIS,))


def replicate(tree: Any) -> Any:
    """Copies arrays to every device of all processes, as `on_all_devices` needs its state.

    Every process gives the same values. Leaves that are there already are not copied.
    """
    everywhere = NamedSharding(_mesh(), PartitionSpec())
    return jax.tree.map(partial(_replicated, everywhere), tree)


def _replicated(everywhere: NamedSharding, leaf: Any) -> jax.Array:
    if isinstance(leaf, jax.Array) and leaf.sharding == everywhere:
        return leaf
    if everywhere.is_fully_addressable:
        return jax.device_put(leaf, everywhere)
    if _is_key(leaf):
        data = _replicated(everywhere, jax.random.key_data(leaf))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = leaf.addressable_data(0)
    here = jax.device_put(leaf, NamedSharding(_local_mesh(), PartitionSpec()))
    return _rewrapped(here, everywhere)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _rewrapped(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """A replicated array with the same memory, of all processes or of this one alone."""
    parts = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)


def _of_this_process(tree: Any) -> Any:
    """Replicated arrays of all processes as arrays of this process's devices, for pmap. Copies
    nothing.
    """
    here = NamedSharding(_local_mesh(), PartitionSpec())

    def leave(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        if _is_key(leaf):
            data = _rewrapped(jax.random.key_data(leaf), here)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return _rewrapped(leaf, here)

    return jax.tree.map(leave, tree)


def share_of(batch: Batch) -> dict[str, np.ndarray]:
    """This process's examples of a batch that all processes have: every `process_count`-th one.

    `fill_up` first fills up a batch whose size is not a multiple of the number of processes.
    """
    index, count = my_share()
    return {name: values[index::count] for name, values in fill_up(batch, count).items()}


def numbered(batch: Batch) -> dict[str, np.ndarray]:
    """This process's share of a batch with "number", the place of each example in the whole batch.

    What has it already keeps it, such as a share of a numbered batch. Other shares follow one
    another, process by process.
    """
    size, (index, _) = len(batch["mask"]), my_share()
    return {"number": np.arange(index * size, (index + 1) * size, dtype=np.int32), **batch}


def fill_up(batch: Batch, multiple: int) -> dict[str, np.ndarray]:
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
    function: Callable,
    *,
    donate_state: bool = False,
    split_into: int = 1,
    mode: Mode = "auto",
) -> Callable:
    """Compiles `function(state, batch, *others)` for all devices.

    Each device gets the state, the others, and a share of the batch.

    Args:
      function: its results must be equal on every device: they come from `sum_over_devices` or
        depend on the state alone.
      donate_state: reuse the state's memory for the result.
      split_into: the size of every device's share is a multiple of this.
      mode: how it is compiled, see `dd_jax.parallel`; it changes no result.

    Returns:
      The compiled function. Its batch is this process's share, a mapping of arrays that includes
      "mask", with any number of examples (the same number in all processes). Masked examples fill
      it up to a multiple of the number of devices. Its results are replicated, see `replicate`.
    """
    by_pmap, donated = _resolved(mode) == "pmap", (0,) if donate_state else ()
    compiled = cache(partial(_by_pmap if by_pmap else _by_shard_map, function, donated))

    def call(state: Any, batch: Batch, *others: Any) -> Any:
        if not by_pmap:
            (state, others), whole = replicate((state, others)), _divided(batch, split_into)
            return compiled(len(others))(state, whole, *others)
        state, others = _of_this_process((state, others))
        results = compiled(len(others))(state, _spread(batch, split_into), *others)
        return results if jax.process_count() == 1 else replicate(results)

    return call


def _by_pmap(function: Callable, donated: tuple[int, ...], num_others: int) -> Callable:
    in_axes = (None, 0, *[None] * num_others)
    return jax.pmap(function, AXIS, in_axes=in_axes, out_axes=None, donate_argnums=donated)


def _by_shard_map(function: Callable, donated: tuple[int, ...], num_others: int) -> Callable:
    specs = (_ALL, _SPLIT, *[_ALL] * num_others)
    return jax.jit(_on_mesh(function, specs, _ALL), donate_argnums=donated)


_ALL, _SPLIT = PartitionSpec(), PartitionSpec(AXIS)


def _on_mesh(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    # The attacks' loops end on each device by itself; the check of varying axes knows none such.
    return jax.shard_map(
        function, mesh=_mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def sums_and_rows(attack: Callable, judge: Callable, *, mode: Mode = "auto") -> Callable:
    """Compiles the two programs of a measurement for all devices of all processes.

    They are `attack(shared, batch) -> found` and `judge(shared, batch, found) -> (sums, rows)`.
    Each device gets `shared` and a share of the batch, and keeps what its attack found. The sums
    are added over all devices. The rows (arrays with an axis of examples, or None) are gathered.
    Every process passes the same whole batch, of any size, and gets the same results. Masked
    examples at its end fill it up to a multiple of the number of devices; the rows include them.
    `mode`: how they are compiled, see `dd_jax.parallel`; it changes no result.
    """
    mapped = _sums_and_rows(attack, judge, mode)

    def call(shared: Any, batch: Batch) -> tuple[Any, Any]:
        _, count = my_share()
        sums, rows = mapped(shared, share_of(fill_up(batch, count * jax.local_device_count())))
        # The gathered rows are (process, row of its share, ...), and the shares are interleaved.
        if count > 1:
            rows = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), rows)
        return sums, rows

    return call


def sums_over_shares(attack: Callable, judge: Callable, *, mode: Mode = "auto") -> Callable:
    """`sums_and_rows` for batches of which each process reads its own share.

    The rows are ordered by process.
    """
    mapped = _sums_and_rows(attack, judge, mode)

    def call(shared: Any, batch: Batch) -> tuple[Any, Any]:
        sums, rows = mapped(shared, batch)
        _, count = my_share()
        if count > 1:
            rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
        return sums, rows

    return call


def _sums_and_rows(attack: Callable, judge: Callable, mode: Mode) -> Callable:
    """A function to the sums and the rows, which are (process, row of its share, ...) where there
    are several processes.
    """

    def summed(shared: Any, batch: Mapping[str, jax.Array], found: Any) -> tuple[Any, Any]:
        sums, rows = judge(shared, batch, found)
        return sum_over_devices(sums), rows

    by_pmap = _resolved(mode) == "pmap"
    return _measured_by_pmap(attack, summed) if by_pmap else _measured_on_mesh(attack, summed)


def _measured_by_pmap(attack: Callable, summed: Callable) -> Callable:
    mapped_attack = jax.pmap(attack, AXIS, in_axes=(None, 0))
    mapped_judge = jax.pmap(summed, AXIS, in_axes=(None, 0, 0), out_axes=(None, 0))

    def call(shared: Any, batch: Batch) -> tuple[Any, Any]:
        spread, shared = _spread(batch, 1), _of_this_process(shared)
        sums, rows = mapped_judge(shared, spread, mapped_attack(shared, spread))
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
        if jax.process_count() > 1 and rows is not None:
            rows = multihost_utils.process_allgather(rows)
        return sums, rows

    return call


def _measured_on_mesh(attack: Callable, summed: Callable) -> Callable:
    # What an attack found has any shapes, so that each device's gets an axis in front.
    attack_one = lambda shared, batch: jax.tree.map(lambda x: x[None], attack(shared, batch))
    judge_one = lambda shared, batch, found: summed(
        shared, batch, jax.tree.map(lambda x: x[0], found)
    )
    mapped_attack = jax.jit(_on_mesh(attack_one, (_ALL, _SPLIT), _SPLIT))
    mapped_judge = jax.jit(_on_mesh(judge_one, (_ALL, _SPLIT, _SPLIT), (_ALL, _SPLIT)))

    def call(shared: Any, batch: Batch) -> tuple[Any, Any]:
        shared, whole = replicate(shared), _divided(batch, 1)
        sums, rows = mapped_judge(shared, whole, mapped_attack(shared, whole))
        _, count = my_share()
        if count > 1 and rows is not None:
            rows = multihost_utils.process_allgather(rows, tiled=True)
            rows = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), rows)
        return sums, rows

    return call


def _spread(batch: Batch, split_into: int) -> dict[str, np.ndarray]:
    """This process's share with an axis of its devices, for pmap."""
    count = jax.local_device_count()
    return {
        name: x.reshape(count, -1, *x.shape[1:])
        for name, x in fill_up(batch, count * split_into).items()
    }


def _divided(batch: Batch, split_into: int) -> dict[str, jax.Array]:
    """The batch of all processes, divided among all devices; each process gives its share."""
    split = NamedSharding(_mesh(), _SPLIT)
    filled = fill_up(batch, jax.local_device_count() * split_into)
    make = jax.make_array_from_process_local_data
    return {name: make(split, np.ascontiguousarray(x)) for name, x in filled.items()}


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
