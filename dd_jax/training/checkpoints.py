"""Saves and restores training states with Orbax, never losing the latest one.

A stage of a run has one folder. Saving is asynchronous and atomic: a run killed while saving
restores the checkpoint before. What is being saved may be donated to the next training step at
once: where Orbax still reads the state's own memory (on the CPU), JAX sees that it is in use and
lets the step write elsewhere.
"""

import asyncio
import contextlib
import logging
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import LatestN

from dd_jax import parallel

State = TypeVar("State")
LONGEST_WAIT = 60  # Seconds for the reads that are still on their way when one has failed.
# The latest, and the one before it in case the disk fills up while the latest is being written.
NUM_KEPT = 2

# Orbax reports every save at length, and what fails with a traceback beside the error it raises.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class DamagedCheckpointError(ValueError):
    """There are checkpoints, and none of them can be read."""


class UnsavedCheckpointError(ValueError):
    """A checkpoint cannot be written, for want of room or of permission."""


class Checkpoints:
    """The checkpoints of one stage in a folder, numbered by step. Use as a context manager, or call
    `close`.
    """

    def __init__(self, directory: pathlib.Path | str, *, read_only: bool = False):
        path = pathlib.Path(directory).resolve()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=LatestN(NUM_KEPT),
            create=not read_only,
            read_only=read_only,
            enable_async_checkpointing=True,
        )
        self._read_only, self._directory = read_only, path
        self._manager = ocp.CheckpointManager(path, options=options)
        self._open = contextlib.ExitStack()
        self._open.enter_context(_loops_that_finish())  # Saves run in the background.

    def latest(self) -> int | None:
        """The step of the latest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: State) -> None:
        """Saves a tree of arrays in the background. A step that is already there is left as it
        is.

        UnsavedCheckpointError where this cannot begin, or the save before has failed meanwhile.
        """
        with self._said_where_it_fails():
            if step != self.latest():
                self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

    def restore(self, like: State) -> State:
        """The latest state. `like` gives the tree, shapes and types.

        It is read as NumPy arrays, since the devices that it was saved from need not be here, and
        handed over as if it had just been made: what is compiled for it is what was compiled before
        the interruption.

        Where the latest is damaged, stderr says so, and it is the one before. What was damaged is
        moved into the folder DIRECTORY_damaged beside this one, since its step will be saved again.
        With `read_only` only the latest is read.

        Raises:
          FileNotFoundError: there is none.
          DamagedCheckpointError: none can be read; with `read_only`, the latest cannot.
        """
        directory = pathlib.Path(self._manager.directory)
        arrays = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            state, damaged[step] = self._read(step, arrays)
            if state is not None:
                del damaged[step]
                self._set_aside(directory, damaged)
                return jax.tree.map(jnp.asarray, state)
            if self._read_only:
                raise DamagedCheckpointError(
                    f"The checkpoint {directory / str(step)} is damaged ({damaged[step]}): rerun "
                    "train.py on its run directory, which makes it again."
                )
        if not damaged:
            raise FileNotFoundError(f"There is no checkpoint in {directory}.")
        step, reason = next(iter(damaged.items()))
        raise DamagedCheckpointError(
            f"None of the checkpoints in {directory} can be read (step {step}: {reason}): remove "
            "that folder, and train.py trains this stage from its beginning."
        )

    def _read(self, step: int, arrays: State) -> tuple[State | None, str]:
        """A state, None where it is damaged for any process, and what this one says of it."""
        state, reason = None, "another process cannot read it"
        try:
            state = self._manager.restore(step, args=ocp.args.StandardRestore(arrays))
        except MemoryError:
            raise
        except Exception as error:  # Orbax and TensorStore raise what they come upon first.
            reason = _reason(error)
        return (None if parallel.any_of_us(state is None) else state), reason

    def _set_aside(self, directory: pathlib.Path, damaged: dict[int, str]) -> None:
        if not damaged:
            return
        if parallel.is_primary():
            aside = directory.with_name(f"{directory.name}_damaged")
            aside.mkdir(exist_ok=True)
            for step, reason in damaged.items():
                print(
                    f"The checkpoint {directory / str(step)} is damaged ({reason}); now in "
                    f"{aside}.",
                    file=sys.stderr,
                )
                (directory / str(step)).rename(_unused(aside / str(step)))
        parallel.wait_for_all("damaged checkpoints are set aside")
        self._manager.reload()

    def close(self) -> None:
        """Waits until everything is written; UnsavedCheckpointError where that fails."""
        with self._open, self._said_where_it_fails():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextlib.contextmanager
    def _said_where_it_fails(self) -> Iterator[None]:
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:  # Orbax and TensorStore raise what they come upon first.
            raise UnsavedCheckpointError(
                f"A checkpoint cannot be saved in {self._directory} ({_reason(error)}): make room, "
                "or allow writing, and rerun the command, which resumes from the one before."
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _loops_that_finish() -> Iterator[None]:
    """Within, a new event loop waits for its tasks before it closes. It may be nested.

    Orbax reads and writes arrays side by side and closes its loop as soon as one of them fails.
    TensorStore would hand the others to the closed loop, and Python would report an "Event loop is
    closed" for each that nobody can catch.
    """
    make_loop = asyncio.new_event_loop
    if getattr(make_loop, "is_patient", False):
        yield
        return

    def make_patient_loop() -> asyncio.AbstractEventLoop:
        loop = make_loop()
        close = loop.close

        def finish_and_close() -> None:
            tasks = set() if loop.is_closed() else asyncio.all_tasks(loop)
            if tasks:
                loop.run_until_complete(asyncio.wait(tasks, timeout=LONGEST_WAIT))
            close()

        loop.close = finish_and_close  # type: ignore[method-assign]
        return loop

    make_patient_loop.is_patient = True  # type: ignore[attr-defined]
    asyncio.new_event_loop = make_patient_loop
    try:
        yield
    finally:
        asyncio.new_event_loop = make_loop


def _reason(error: Exception) -> str:
    """What the system said, where an error of TensorStore's quotes it; else the error itself."""
    quoted = re.search(r"([^:\[\]]+) \[os_error_code", str(error))
    if quoted:
        return quoted[1].strip()
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _unused(path: pathlib.Path) -> pathlib.Path:
    number = 1
    while path.exists():
        path, number = path.with_name(f"{path.name.partition('.')[0]}.{number}"), number + 1
    return path
