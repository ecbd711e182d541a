"""Robust accuracy under AutoAttack on a whole data set, one attack after another.

    found = robust_accuracy(logits_fn, images, labels, norm="linf", epsilon=8 / 255)
    found["robust_accuracy"], found["robust_after"]

What every attack claims is judged by a plain forward pass in a program of its own, and only what
that confirms has fallen. The examples that are left are put together into full batches for the next
attack, so that what has fallen costs nothing more. Random keys are those of the example's place in
the data set: no figure depends on the size of a batch, or on where a run was interrupted.

`save_to` names a file that holds which examples have fallen, written after every batch. A
measurement that was killed goes on from there, example by example: where the options are the same,
and the label and the net's logits without an attack, which are always computed again.
"""

import hashlib
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dd_jax import parallel
from dd_jax.attacks import attack_names
from dd_jax.attacks._autoattack import Version
from dd_jax.data import Batch, Examples, in_memory
from dd_jax.evaluation.autoattack_flags import (
    NOT_FALLEN,
    WRONG,
    Flags,
    Store,
    no_flags,
    note,
    take_over,
)
from dd_jax.evaluation.autoattack_programs import SAME, Setting, attack_programs, clean_programs
from dd_jax.evaluation.metrics import Summary
from dd_jax.evaluation.programs import (
    ApplyFn,
    BatchFn,
    CompileFn,
    Rows,
    in_full_precision,
    in_two_programs,
)
from dd_jax.log import progress
from dd_jax.norms import Bounds, LpNorm, check_bounds

CLEAN = "clean"
"""The name of the first pass, without an attack."""
SQUARE_GAIN = 0.002
"""The share of examples that Square Attack may fool alone before a remark says so."""


def robust_accuracy(
    logits_fn: Callable[..., Array],
    inputs: Float[Array | np.ndarray, "n ..."],
    labels: Int[Array | np.ndarray, " n"],
    *,
    norm: LpNorm,
    epsilon: float,
    bounds: Bounds | None = (0.0, 1.0),
    version: Version = "standard",
    seed: int = 0,
    channel_axis: int = -1,
    batch_size: int = 250,
    save_to: pathlib.Path | str | None = None,
    show_progress: bool = True,
) -> Summary:
    """AutoAttack on a data set in memory, for any net.

    Args:
      logits_fn: maps (batch, ...) inputs to (batch, classes) logits, row by row. "rand":
        `logits_fn(inputs, key)`.
      inputs: floating, within the bounds; images (n, height, width, channels), or as in
        `dd_jax.attacks.square`.
      labels: the true classes.
      norm, epsilon, bounds, version, channel_axis: as in `dd_jax.attacks.autoattack`.
      seed: of all random numbers.
      batch_size: how many examples are attacked at once; no figure depends on it.
      save_to: a file (.npz) to resume from; it is removed by nobody. None: nothing is saved.
      show_progress: whether there are progress bars.

    Returns:
      See `AutoAttack.measure`.

    Raises:
      ValueError: no examples, or shapes, types or options that make no sense.
    """
    setting = Setting(norm, epsilon, version, seed, channel_axis)
    examples = in_memory(np.asarray(inputs), np.asarray(labels, np.int32))
    apply_fn = lambda variables, *arguments: logits_fn(*arguments)
    attack = AutoAttack(apply_fn, examples, bounds=bounds, batch_size=batch_size)
    return attack.measure(None, setting, save_to=save_to, show_progress=show_progress)


class AutoAttack:
    """AutoAttack for nets of one architecture on one data set. Each attack is compiled once.

    Args:
      apply_fn: `apply_fn(variables, inputs) -> logits`, row by row; for the version "rand",
        `apply_fn(variables, inputs, key)`.
      examples: what to measure on; `data.in_memory(inputs, labels)`.
      bounds: (lower, upper) of inputs, numbers or arrays that broadcast to one example. None: no
        bounds.
      batch_size: how many are attacked at once; no figure depends on it.
      compile_fn: see `dd_jax.evaluation.programs`.
    """

    def __init__(
        self,
        apply_fn: ApplyFn,
        examples: Examples,
        *,
        bounds: Bounds | None = (0.0, 1.0),
        batch_size: int = 250,
        compile_fn: CompileFn = in_two_programs,
    ) -> None:
        self._apply_fn, self._examples, self._batch_size = apply_fn, examples, batch_size
        self._bounds, self._compile_fn = bounds, in_full_precision(compile_fn)
        self._compiled: dict[tuple, BatchFn] = {}

    def measure(
        self,
        variables: Any,
        setting: Setting = Setting(),  # noqa: B008  A tuple, which nobody changes.
        *,
        limit: int | None = None,
        save_to: pathlib.Path | str | None = None,
        description: str = "AutoAttack",
        show_progress: bool = True,
    ) -> Summary:
        """Runs all attacks of the version, each on the examples that are left.

        Args:
          variables: the net's.
          setting: what to measure.
          limit: the first so many examples only.
          save_to: see the module. Of several processes, one writes and all read.
          description: in front of the progress bars.
          show_progress: whether there are any.

        Returns:
          It can be written as JSON: "norm", "epsilon", "version", "seed", "num_examples";
          "accuracy", without an attack; "robust_accuracy"; "robust_after", the robust accuracy
          after each attack; "num_queries", the mean number of times the net was asked about an
          example; "remarks", sentences that warn of a net for which AutoAttack says little:
          outputs that are probabilities, logits that change, gradients that are zero, images that
          are out of bounds, and Square Attack far ahead of the attacks that use gradients.

        Raises:
          ValueError: no examples, or options that make no sense.
        """
        count = self._examples.count if limit is None else min(limit, self._examples.count)
        if count < 1:
            raise ValueError("There is no example to attack: the data set is empty, or limit 0.")
        setting = _checked(setting, self._bounds, self._examples)
        store = Store(save_to, _identity(setting, self._bounds, count), count)
        flags = no_flags(count)
        names = (CLEAN, *attack_names(setting.version))
        for number, name in enumerate(names):
            todo = flags.num_tried == number
            if number:
                todo &= flags.fallen_to == NOT_FALLEN
            title = f"{description} {number}/{len(names) - 1}: {name}"
            with progress(title, int(np.sum(todo)), "image", disable=not show_progress) as bar:
                for rows in self._rows(name, variables, setting, todo):
                    note(flags, rows, number)
                    if number:
                        store.write(flags)
                    bar.update(int(np.sum(rows["todo"])))
            if number == 0:
                take_over(flags, store.read())
        return summary(flags, setting, names[1:])

    def _rows(
        self, name: str, variables: Any, setting: Setting, todo: np.ndarray
    ) -> Iterator[Rows]:
        """What the attack of that name gives for the examples to be done, batch by batch."""
        run, epsilon = self._program(name, setting), np.float32(setting.epsilon)
        shared = {"variables": variables, "bounds": self._bounds, "epsilon": epsilon}
        for batch in self._batches(todo, setting, len(todo)):
            yield jax.device_get(run(shared, batch)[1])

    def _program(self, name: str, setting: Setting) -> BatchFn:
        key = (name, setting.norm, setting.version, setting.channel_axis)
        if key not in self._compiled:
            programs = (
                clean_programs(self._apply_fn, setting)
                if name == CLEAN
                else attack_programs(self._apply_fn, name, setting)
            )
            self._compiled[key] = self._compile_fn(*programs)
        return self._compiled[key]

    def _batches(self, todo: np.ndarray, setting: Setting, count: int) -> Iterator[Batch]:
        """The examples still to be done: put together into full batches, or, where every process
        reads its own examples and all have to keep step, each in the batch where it always is.
        """
        keys = jax.random.key_data(
            jax.vmap(partial(jax.random.fold_in, jax.random.key(setting.seed)))(np.arange(count))
        )
        batches = self._examples.batches(count, self._batch_size)
        numbered = _numbered(batches, np.asarray(keys), self._examples.is_share)
        marked = ({**batch, "todo": _marked(batch, todo)} for batch in numbered)
        if self._examples.is_share and parallel.my_share()[1] > 1:
            yield from marked
        else:
            yield from _together(marked, min(self._batch_size, count))


def _numbered(
    batches: Iterable[Mapping[str, np.ndarray]], keys: np.ndarray, is_share: bool
) -> Iterator[dict[str, np.ndarray]]:
    """The batches with "number", each example's place in the data set, and its random key."""
    index, count = parallel.my_share() if is_share else (0, 1)
    for place, batch in enumerate(batches):
        rows = len(batch["label"])
        number = (place * count + index) * rows + np.arange(rows)
        number = np.minimum(number, len(keys) - 1)  # Rows that fill up a batch have mask 0.
        yield {**batch, "number": number.astype(np.int32), "key": keys[number]}


def _marked(batch: Batch, todo: np.ndarray) -> np.ndarray:
    return todo[batch["number"]] & (np.asarray(batch["mask"]) > 0)


def _together(batches: Iterator[Batch], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Full batches of the examples to be done; the last one is filled up with others."""
    waiting: dict[str, np.ndarray] = {}
    for batch in batches:
        chosen = {name: np.asarray(values)[batch["todo"]] for name, values in batch.items()}
        waiting = (
            chosen
            if not waiting
            else {name: np.concatenate([values, chosen[name]]) for name, values in waiting.items()}
        )
        while len(waiting["label"]) >= batch_size:
            yield {name: values[:batch_size] for name, values in waiting.items()}
            waiting = {name: values[batch_size:] for name, values in waiting.items()}
    if waiting and (missing := batch_size - len(waiting["label"])) < batch_size:
        filled = {
            name: np.concatenate([values, np.repeat(values[:1], missing, axis=0)])
            for name, values in waiting.items()
        }
        filled["todo"][batch_size - missing :] = False
        filled["mask"][batch_size - missing :] = 0
        yield filled


def _checked(setting: Setting, bounds: Bounds | None, examples: Examples) -> Setting:
    """The setting, its epsilon a number. ValueError for options that make no sense."""
    epsilon = float(setting.epsilon)
    if not (epsilon >= 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon is {epsilon}; it must be a finite number, 0 or more.")
    check_bounds(bounds, jnp.zeros((1, *examples.shape)))
    return setting._replace(epsilon=epsilon)


def _identity(setting: Setting, bounds: Bounds | None, count: int) -> str:
    """Changes with the options and the number of examples."""
    digest = hashlib.sha256(repr((setting, count)).encode())
    for leaf in jax.tree.leaves(bounds):
        digest.update(np.asarray(leaf, np.float64).tobytes())
    return digest.hexdigest()


def summary(flags: Flags, setting: Setting, names: tuple[str, ...]) -> Summary:
    """What `AutoAttack.measure` returns."""
    known, after = flags.num_tried > 0, {}  # An image that cannot be read stays unknown.
    share = lambda chosen: float(np.mean(chosen[known]))
    for number, name in enumerate(names):
        after[name] = share((flags.fallen_to == NOT_FALLEN) | (flags.fallen_to > number))
    return {
        **{name: getattr(setting, name) for name in ("norm", "epsilon", "version", "seed")},
        "num_examples": int(np.sum(known)),
        "accuracy": share(flags.fallen_to != WRONG),
        "robust_accuracy": after[names[-1]],
        "robust_after": after,
        "num_queries": float(np.mean(flags.num_queries[known])),
        "remarks": remarks_of(np.mean(flags.odd[known], axis=0), after, setting.version),
    }


def remarks_of(odd: np.ndarray, after: Mapping[str, float], version: str) -> list[str]:
    """Sentences that warn of a net for which AutoAttack says little."""
    probabilities, flat, changing, outside = odd
    sentences = []
    if probabilities == 1:
        sentences.append(
            "The outputs are probabilities (at least 0, with the sum 1), not logits: gradients "
            "vanish after a softmax. Give the logits."
        )
    if changing > 0 and version != "rand":
        sentences.append(
            f"The logits of {changing:.1%} of the images differ between two programs by more than "
            f"{SAME:g}: the net may draw random numbers. Give it a key and use version 'rand'."
        )
    if flat > 0:
        sentences.append(
            f"The gradient of the loss is exactly zero for {flat:.1%} of the images: attacks that "
            "use gradients cannot move them, and the robust accuracy may be too high."
        )
    if outside > 0:
        sentences.append(
            f"{outside:.1%} of the images are out of the bounds, and attacks cannot move them "
            "there: give the bounds of the inputs, or inputs within them."
        )
    names = list(after)
    if "square" in names:
        gain = after[names[names.index("square") - 1]] - after["square"]
        if gain > SQUARE_GAIN:
            sentences.append(
                f"Square Attack fooled {gain:.2%} of the images after all attacks before it had "
                "failed: gradients may be masked, and an attack adapted to the net may fool more."
            )
    return sentences
