"""The processes of a run on several machines: they join, agree and end together."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from dd_jax.parallel import _watch

Result = TypeVar("Result")
SECONDS_FOR_THE_OTHERS = 3.0  # Time for other processes to print why they fail.
# After which JAX itself takes a silent process for lost. JAX's own value is 100.
SECONDS_WITHOUT_HEARTBEAT = 45
_watches: list[_watch.Watch] = []  # One, where there are several processes at known addresses.


class Terminated(Exception):
    """The process was asked to end, and its progress is saved."""


class OthersFailedError(Exception):
    """Another process has failed, and this one has not."""


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Connects to the other processes. Call it before JAX's first computation.

    With a coordinator, this process notices at once when another one is gone, and ends with a
    sentence and exit code 1. Without arguments `jax.distributed` detects the environment, such as
    SLURM or a TPU pod; then JAX notices it within 45 seconds.

    Args:
      coordinator: HOST:PORT of process 0, reachable from all processes.
      num_processes, process_id: the number of processes, and the index of this one, from 0.

    Raises:
      ValueError: some but not all of the three are given, the coordinator is not HOST:PORT or has a
        port that is taken, or the index is out of range.
    """
    if coordinator is None or num_processes is None or process_id is None:
        if (coordinator, num_processes, process_id) != (None, None, None):
            raise ValueError(
                "Give all of --coordinator HOST:PORT, --num_processes N and --process_id I, or "
                "none of them."
            )
        address = {}
    else:
        _check_given(coordinator, num_processes, process_id)
        address = _watched(coordinator, num_processes, process_id)
    if hasattr(jax.config, "jax_enable_preemption_service"):
        # The service handles SIGTERM itself; `Termination` would not see it.
        jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(heartbeat_timeout_seconds=SECONDS_WITHOUT_HEARTBEAT, **address)
    # All processes wait for each other here, so that none waits for the devices of one that fails
    # later.
    jax.devices()
    for watch in _watches:
        watch.arm()


def _check_given(coordinator: str, num_processes: int, process_id: int) -> None:
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id is {process_id}; it must be within 0..{num_processes - 1}. Give each "
            f"process its own index."
        )
    if not _is_host_and_port(coordinator):
        raise ValueError(
            f"--coordinator is {coordinator!r}; it must be HOST:PORT of process 0. Give for "
            f"example 10.0.0.1:1234."
        )


def _is_host_and_port(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdecimal() and 0 < int(port) < 2**16


def _watched(coordinator: str, num_processes: int, process_id: int) -> dict[str, Any]:
    """The arguments of `jax.distributed.initialize` with which its connections are watched."""
    host, _, port = coordinator.rpartition(":")
    options: dict[str, Any] = dict(num_processes=num_processes, process_id=process_id)
    if process_id == 0:
        own = f"127.0.0.1:{_watch.free_port()}"
        target, num_others = ("127.0.0.1", int(own.rpartition(":")[2])), num_processes - 1
        options["coordinator_bind_address"] = own
    else:
        target, num_others = (host.strip("[]"), int(port)), 1
    watch = _watch.Watch(target, num_others, is_primary=process_id == 0)
    try:
        listening = watch.listen(int(port) if process_id == 0 else 0)
    except OSError as error:
        raise ValueError(
            f"--coordinator is {coordinator!r}, and process 0 cannot have that port "
            f"({error.strerror}); give another one."
        ) from error
    _watches.append(watch)
    options["coordinator_address"] = own if process_id == 0 else f"127.0.0.1:{listening}"
    return options


def is_one_of_several() -> bool:
    """Whether `initialize` was called, so that the end of this process affects others."""
    return jax.distributed.is_initialized()


def end_process(code: int) -> None:
    """Ends this process without waiting for the others, and without its `finally` blocks.

    A normal exit of Python would wait for the others for minutes.
    """
    finish()
    sys.stdout.flush()
    sys.stderr.flush()
    if is_primary():  # The others end with this one; they may print their errors first.
        time.sleep(SECONDS_FOR_THE_OTHERS)
    os._exit(code)


def finish() -> None:
    """Says that this process has done its work, so that it no longer matters to it when others
    end.
    """
    for watch in _watches:
        watch.disarm()


def wait_for_the_watch() -> None:
    """Waits for as long as it takes to notice that another process is gone, which ends this one.

    For a failure that may come of that: a collective operation that another process has left.
    """
    if _watches:  # Process 0 notices and ends, then the others notice that it has.
        time.sleep(2 * _watch.SECONDS_OF_GRACE + 1)


def is_primary() -> bool:
    """Whether this process writes the logs and reports."""
    return jax.process_index() == 0


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


def in_all_processes(
    function: Callable[[], Result], errors: tuple[type[Exception], ...] = (ValueError, OSError)
) -> Result:
    """What `function` returns, once it has succeeded in all processes; none continues where it
    fails for another. It must not wait for other processes unless it cannot fail before.

    Raises:
      One of `errors`: this process's own. OthersFailedError where only others failed.
    """
    error: Exception | None = None
    try:
        result = function()
    except errors as own:
        error = own
    if any_of_us(error is not None) or error is not None:
        raise error or OthersFailedError("Another process cannot begin; what it says tells why.")
    return result


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
