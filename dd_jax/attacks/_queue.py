"""The work queue that the attacks share.

Examples stop after different numbers of steps. An attack therefore takes its work from a queue:
each turn gathers a fixed number of examples that are still active, each at its own step, takes one
step for each, and writes them back. An example that has stopped costs nothing more, and one
compiled loop body serves all. Results do not depend on the queue.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from dd_jax.xla.closure_convert import (
    ApplyFn,
    Closure,
    Traces,
    closure_convert,
    rows_are_interchangeable,
)
from dd_jax.xla.rewrite import operations

TURNS_PER_BATCH = {"cpu": 4}
"""How many turns take one step of a whole batch, by backend; measured."""
SMALLEST_TURN = {"cpu": 4}
"""The fewest rows of a turn, by backend. Fewer rows do not fill the device."""
DEFAULT_SMALLEST_TURN = 64
LEAST_WORK = {"cpu": 4e7}
"""The fewest operations of a turn's forward pass. With fewer, matrix products are inefficient."""
MOST_WORK = {"cpu": 4e9}
"""The most operations of a turn's forward pass. With more, rows only wait for one another."""
LAST_TURN_SHARE = 3
"""The last, slowest examples are taken in turns of a third of the rows."""


class Turns(NamedTuple):
    """The number of rows of a turn, and of a last turn, when at most `num_last_rows` are active."""

    num_rows: int
    num_last_rows: int

    def of_one_size(self) -> "Turns":
        """The same without the last turn, where all examples take equally many steps: it would
        only be another program to compile.
        """
        return Turns(self.num_rows, self.num_rows)


def plan_turns(
    traces: Traces, batch: int, rewrite: bool | None = None
) -> tuple[ApplyFn, Closure, Turns]:
    """Chooses the number of rows of a turn, and returns the net for that many rows."""
    backend, work = jax.default_backend(), operations(traces.of(batch).jaxpr)
    num_turns = max(TURNS_PER_BATCH.get(backend, 1), int(work // MOST_WORK.get(backend, math.inf)))
    num_turns = min(num_turns, max(1, int(work // LEAST_WORK.get(backend, 1))))
    num_rows = max(-(-batch // num_turns), SMALLEST_TURN.get(backend, DEFAULT_SMALLEST_TURN))
    if num_rows >= batch or not rows_are_interchangeable(traces, batch, num_rows):
        num_rows = batch
    last_rows = num_rows if num_rows == batch else max(1, num_rows // LAST_TURN_SHARE)
    if last_rows != num_rows and not rows_are_interchangeable(traces, batch, last_rows):
        last_rows = num_rows
    turns = Turns(num_rows, last_rows)
    return *closure_convert(traces, *turns, rewrite=rewrite), turns


def work_off(
    take_step: Callable[[Any, Any], Any],
    problem: Any,
    state: Any,
    turns: Turns,
    left: Callable[[Any], Int[Array, " batch"]],
) -> Any:
    """Takes steps, `take_step(rows of the problem, rows of the state) -> rows of the state`, until
    nothing is left; `left(state)` is how many steps each example may still take.
    """

    def turn(state: Any, num_rows: int) -> Any:
        rows, to = next_rows(left(state), num_rows)
        part, before = jax.tree.map(lambda x: x[rows], (problem, state))
        after = take_step(part, before)
        return jax.tree.map(lambda x, new: x.at[to].set(new, mode="drop"), state, after)

    return run_turns(turn, lambda state: jnp.sum(left(state) > 0), state, turns)


def run_turns(
    turn: Callable[[Any, int], Any], num_active: Callable, state: Any, turns: Turns
) -> Any:
    """Takes turns, `turn(state, num_rows) -> state`, until `num_active(state)` is 0."""
    few = turns.num_last_rows if turns.num_last_rows < turns.num_rows else 0
    goes_on, all_rows = lambda state: num_active(state) > few, turns.num_rows
    state = lax.while_loop(goes_on, lambda state: turn(state, all_rows), state)
    if few:
        state = lax.while_loop(lambda state: num_active(state) > 0, lambda s: turn(s, few), state)
    return state


def next_rows(
    priority: Int[Array, " batch"], num_rows: int
) -> tuple[Int[Array, " rows"], Int[Array, " rows"]]:
    """Returns the `num_rows` examples of highest priority: the rows to read and the rows to write.

    If fewer than `num_rows` have a positive priority, the others are read but not written: their
    row to write is out of range, which `mode="drop"` ignores.
    """
    batch = priority.shape[0]
    if num_rows == batch:  # All rows in their own order: no sorting needed.
        return jnp.arange(batch), jnp.where(priority > 0, jnp.arange(batch), batch)
    highest, rows = lax.top_k(priority, num_rows)
    return rows, jnp.where(highest > 0, rows, batch)
