"""The radii and the checkpoints of Auto-PGD's runs; see `dd_jax.attacks._auto_pgd`."""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dd_jax.norms import LpNorm

FIRST_INTERVAL, SHORTER_BY, LEAST_INTERVAL = 0.22, 0.03, 0.06
"""Of the steps: the first interval between checkpoints, by how much each is shorter, the least."""
L1_INTERVAL = 0.04
L1_RADII = ((3.0, 0.3), (2.0, 0.3))
"""The larger radii of l1, relative to epsilon, and their shares of the steps."""


class Schedule(NamedTuple):
    """What happens at each evaluation of a run, the one at its starting point included."""

    is_first: Bool[Array, " evaluations"]  # of its radius
    is_last: Bool[Array, " evaluations"]
    counts: Bool[Array, " evaluations"]  # the radius is epsilon, so that success counts
    interval: Int[Array, " evaluations"]  # steps since the last checkpoint; 0: no checkpoint
    radius: Float[Array, " evaluations"]  # relative to epsilon
    next_radius: Float[Array, " evaluations"]  # of the evaluation after


def make_schedule(num_steps: int, norm: LpNorm) -> Schedule:
    """What happens at each of the evaluations of a run."""
    radii = [(1.0, num_steps)]
    if norm == "l1":
        parts = [(radius, math.ceil(share * num_steps)) for radius, share in L1_RADII]
        rest = num_steps - sum(count for _, count in parts)
        radii = [*parts, (1.0, rest)] if rest > 0 else radii
    intervals = l1_intervals if norm == "l1" else shrinking_intervals
    steps = np.concatenate([np.arange(count + 1) for _, count in radii])
    ends = np.concatenate([np.arange(count + 1) == count for _, count in radii])
    radius = np.concatenate([np.full(count + 1, radius) for radius, count in radii])
    interval = np.concatenate([intervals(count) for _, count in radii])
    arrays: Any = (steps == 0, ends, radius == 1, interval, radius, np.roll(radius, -1))
    return Schedule(*arrays)  # NumPy's, until a step takes its place in them.


def shrinking_intervals(num_steps: int) -> Int[np.ndarray, " evaluations"]:
    """The intervals that end at each evaluation, of l2 and linf."""
    shorter, least = (max(int(share * num_steps), 1) for share in (SHORTER_BY, LEAST_INTERVAL))
    interval, end = max(int(FIRST_INTERVAL * num_steps), 1), 0
    at = np.zeros(num_steps + 1, np.int32)
    while (end := end + interval) <= num_steps:
        at[end] = interval
        interval = max(interval - shorter, least)
    return at


def l1_intervals(num_steps: int) -> Int[np.ndarray, " evaluations"]:
    """The same of l1, all of one length."""
    interval, evaluations = max(int(L1_INTERVAL * num_steps), 1), np.arange(num_steps + 1)
    return np.where((evaluations > 0) & (evaluations % interval == 0), interval, 0)
