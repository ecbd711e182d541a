"""Saves and restores training states with Orbax, never losing the latest one.

A stage of a run has one folder. Saving is asynchronous and atomic: a run killed while saving restores the checkpoint
before. What is being saved may be donated to the next training step at once: where Orbax still reads the state's own
memory (on the CPU), JAX sees that it is in use and lets the step write elsewhere.
"""

import logging
import pathlib
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import LatestN

State = TypeVar("State")
NUM_KEPT = 2  # The latest, and the one before it in case the disk fills up while the latest is being written.

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every save at length.


class Checkpoints:
    """The checkpoints of one stage in a folder, numbered by step. Use as a context manager, or call `close`."""

    def __init__(self, directory: pathlib.Path | str, *, read_only: bool = False):
        path = pathlib.Path(directory).resolve()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=LatestN(NUM_KEPT),
            create=not read_only,
            read_only=read_only,
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(path, options=options)

    def latest(self) -> int | None:
        """The step of the latest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: State) -> None:
        """Saves a tree of arrays in the background. A step that is already there is left as it is."""
        if step != self.latest():
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

    def restore(self, like: State) -> State:
        """The latest state. `like` gives the tree, shapes and types. FileNotFoundError if there is none.

        It is read as NumPy arrays, since the devices that it was saved from need not be here, and handed over as if it
        had just been made: what is compiled for it is what was compiled before the interruption.
        """
        step = self.latest()
        if step is None:
            raise FileNotFoundError(f"There is no checkpoint in {self._manager.directory}.")
        arrays = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
        return jax.tree.map(jnp.asarray, self._manager.restore(step, args=ocp.args.StandardRestore(arrays)))

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
