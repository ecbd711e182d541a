"""Measures a net on a whole data set: batches of one shape, results on the host, sums until the
end.

    evaluator = Evaluator(apply_fn, examples, settings=Settings(num_steps=50))
    evaluator.measure(variables, names=("deepfool", "pgd"))     # accuracy, rho_2, l_2, ...
    evaluator.fgsm_accuracy(variables, [0.1, 0.2])              # accuracy under FGSM
    evaluator.half_epsilon(variables)                           # where half have fallen

An evaluator compiles each measurement once. The weights are arguments of what it compiled, so that
measuring again after every epoch compiles nothing. Memory is that of one batch.

How what is run on the device is compiled stands in `dd_jax.evaluation.programs`.
"""

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from dd_jax.data import Examples
from dd_jax.evaluation import metrics
from dd_jax.evaluation.autoattack import AutoAttack
from dd_jax.evaluation.autoattack_programs import Setting
from dd_jax.evaluation.measurements import MEASUREMENTS, MINIMUM_NORM, Settings, curve_epsilons
from dd_jax.evaluation.metrics import Summary
from dd_jax.evaluation.programs import (
    SIZE,
    ApplyFn,
    BatchFn,
    CompileFn,
    Rows,
    curve_programs,
    example_programs,
    in_full_precision,
    in_two_programs,
    measurement_programs,
)
from dd_jax.log import progress

Bounds = Sequence[Array | np.ndarray | float | int]
ToImages = Callable[[np.ndarray], np.ndarray]
AUTOATTACK = "autoattack"
NAMES = (*metrics.MEASUREMENTS, "pass", AUTOATTACK)
# Of the first search for `half_epsilon`; later ones have as many points.
GRID_SIZE, GRID_SPAN = 16, 1000.0
PRECISION, SMALLEST = 1e-3, 1e-6  # Relative to the epsilon found, and to the largest.


class Evaluator:
    """Measures nets of one architecture on one data set, under fixed settings.

    Args:
      apply_fn: `apply_fn(variables, inputs) -> logits`, row by row; variables may be any pytree.
      examples: what to measure on; `data.in_memory(inputs, labels)`.
      settings: options of the attacks.
      batch_size: how many are attacked at once; no figure depends on it, but for PGD's from random
        starts.
      carlini_wagner_examples: measure C&W, which is slow, on the first of these only. None: on all.
      minimum_norm_examples: the same for DDN and FMN, and their robustness curves.
      autoattack: what AutoAttack is to measure. autoattack_examples: on how many.
      bounds: (lower, upper) of inputs, numbers or arrays that broadcast to a batch, for FGSM and
        PGD. None: they are not clipped.
      box: the same for C&W, which needs one, DDN, FMN and AutoAttack. None: the bounds, or else the
        least and the greatest value among all inputs.
      to_images: maps inputs (a batch, or with perturbations) to images in 0..1 for PASS.
      show_progress: whether there are progress bars.
      compile_fn: see `dd_jax.evaluation.programs`, which also says in which precision is measured.

    Raises ValueError for a number of C&W's, or of DDN's and FMN's examples below 1.
    """

    def __init__(
        self,
        apply_fn: ApplyFn,
        examples: Examples,
        *,
        settings: Settings = Settings(),  # noqa: B008  A tuple, which nobody changes.
        batch_size: int = 500,
        carlini_wagner_examples: int | None = 500,
        minimum_norm_examples: int | None = 500,
        autoattack: Setting = Setting(),  # noqa: B008
        autoattack_examples: int | None = 1000,
        bounds: Bounds | None = None,
        box: Bounds | None = None,
        to_images: ToImages | None = None,
        show_progress: bool = True,
        compile_fn: CompileFn = in_two_programs,
    ) -> None:
        metrics.check_counts(
            carlini_wagner_examples=carlini_wagner_examples,
            minimum_norm_examples=minimum_norm_examples,
            autoattack_examples=autoattack_examples,
        )
        self.settings, self.show_progress = settings, show_progress
        self._apply_fn, self._examples, self._batch_size = apply_fn, examples, batch_size
        self._to_images = to_images
        # What is slow, and on how many examples it is measured.
        self._few = {"carlini_wagner": carlini_wagner_examples}
        self._few |= dict.fromkeys(MINIMUM_NORM, minimum_norm_examples)
        self._bounds, self._box = bounds, box if box is not None else bounds
        self._compile_fn = in_full_precision(compile_fn)
        self._compiled: dict[tuple[str, ...], BatchFn] = {}
        self._autoattack = AutoAttack(
            apply_fn,
            limited(examples, autoattack_examples),
            bounds=broadcast(examples.limits if self._box is None else self._box, examples.shape),
            batch_size=batch_size,
            compile_fn=compile_fn,
        )
        self.autoattack = autoattack

    def measure(
        self,
        variables: Any,
        *,
        names: Sequence[str] = ("deepfool",),
        limit: int | None = None,
        description: str = "measuring",
        show_progress: bool | None = None,
        save_to: pathlib.Path | None = None,
    ) -> Summary:
        """Accuracy, and what the named measurements give.

        Args:
          variables: the net's.
          names: of NAMES. Whichever are asked for, each gives the same.
          limit: measure the first `limit` examples only.
          description: in front of the progress bars.
          show_progress: None: as the evaluator was told.
          save_to: a file in which AutoAttack keeps how far it is, to go on from. None: nowhere.

        Returns:
          By name: "num_examples", then the figures of `metrics.summarize`; "fgsm": also
          "fgsm_curve", {"epsilons": [...], "success": [...]}; "carlini_wagner": also
          "carlini_wagner_examples"; "ddn", "fmn_linf" and "fmn_l1": also "ddn_examples" and
          "ddn_curve", a `metrics.robustness_curve`, and so on; "pass": DeepFool's figures, "pass",
          which is PASS of its examples, and "pass_unaligned", the share of those that could not be
          aligned; "autoattack": a list with what `AutoAttack.measure` returns. It can be written as
          JSON.

        Raises:
          ValueError: no examples, an unknown name, PASS without `to_images`, or options that make
            no sense.
          MissingPackageError: "pass" without the packages of the extra `evaluate`.
        """
        metrics.check_names(names, NAMES)
        if "pass" in names:
            check_pass(self._to_images)
        examples = limited(self._examples, limit)
        show = dict(show_progress=show_progress)
        fast = tuple(name for name in names if name not in self._few and name != AUTOATTACK)
        found = self._summary(variables, fast, examples, description, self._bounds, **show)
        for slow in dict.fromkeys(name for name in names if name in self._few):
            more = self._slow_summary(variables, slow, examples, description, **show)
            found |= {name: value for name, value in more.items() if name not in found}
        if AUTOATTACK in names:
            options: dict[str, Any] = dict(limit=limit, save_to=save_to, **show)
            found[AUTOATTACK] = [self._robust(variables, f"{description} AutoAttack", **options)]
        if "fgsm" in names:
            epsilons = curve_epsilons(self.settings)
            found["fgsm_curve"] = {"epsilons": epsilons, "success": found["fgsm_curve"]}
        return found

    def _slow_summary(
        self, variables: Any, name: str, examples: Examples, description: str, **show: Any
    ) -> Summary:
        """What a measurement on fewer examples gives; their number is "NAME_examples"."""
        box = examples.limits if self._box is None else self._box
        few, title = limited(examples, self._few[name]), MEASUREMENTS[name].title
        more = self._summary(variables, (name,), few, f"{description} ({title})", box, **show)
        return more | {f"{name}_examples": more.pop("num_examples")}

    def _robust(
        self, variables: Any, description: str, *, show_progress: bool | None, **options: Any
    ) -> Summary:
        options |= dict(description=description, show_progress=self._shows(show_progress))
        return self._autoattack.measure(variables, self.autoattack, **options)

    def fgsm_accuracy(
        self,
        variables: Any,
        epsilons: Sequence[float],
        *,
        limit: int | None = None,
        description: str = "accuracy under FGSM",
        show_progress: bool | None = None,
    ) -> list[float]:
        """The accuracy under FGSM (linf) at each epsilon; what is misclassified anyway counts as
        such.

        epsilons: in the units of the inputs, 0 or more, in any order; compiled once for every
        number of them. The rest, and what raises: as in `measure`.
        """
        examples = limited(self._examples, limit)
        if len(epsilons) == 0 or not min(epsilons) >= 0:
            raise ValueError(
                f"epsilons must be one number or more, each 0 or more; got {list(epsilons)}."
            )
        if ("curve",) not in self._compiled:
            self._compiled[("curve",)] = self._compile_fn(*curve_programs(self._apply_fn))
        box = broadcast(self._bounds, examples.shape)
        grid = np.asarray(epsilons, np.float32)
        shared = {"variables": variables, "bounds": box, "epsilons": grid}
        num_right, num_examples = np.zeros(len(epsilons), np.int64), 0
        for batch in self._batches(examples, description, show_progress):
            right, seen = self._compiled[("curve",)](shared, batch)[0]
            num_right, num_examples = num_right + np.asarray(right), num_examples + int(seen)
        return (num_right / max(num_examples, 1)).tolist()

    def half_epsilon(
        self,
        variables: Any,
        *,
        max_epsilon: float | None = None,
        description: str = "epsilon of 50 %",
        **options: Any,
    ) -> float | None:
        """The smallest epsilon at which FGSM (linf) has at least half of the images misclassified.

        A geometric grid from max_epsilon / 1000 to max_epsilon is searched for the first epsilon at
        which it is so, then the interval below that by evenly spaced grids, over again. FGSM that
        fools may fail at a larger epsilon; where the share rises above a half and falls below again
        between two points, that is missed. What is misclassified anyway counts.

        Args:
          variables: the net's.
          max_epsilon: in the units of the inputs, more than 0. None: the settings'.
          description, options: of `fgsm_accuracy`.

        Returns:
          epsilon, at most 0.1 % too large (below max_epsilon / 10^6: at most by that). 0.0 where
          half of the images are misclassified as they are; None where max_epsilon does not suffice.
        """
        most = self.settings.fgsm_max_epsilon if max_epsilon is None else max_epsilon
        if not most > 0:
            raise ValueError(f"max_epsilon is {most}; it must be more than 0.")
        accuracies = partial(self.fgsm_accuracy, variables, description=description, **options)
        return first_half(accuracies, most)

    def deepfool_examples(self, variables: Any, limit: int) -> dict[str, np.ndarray]:
        """DeepFool's perturbations of the first `limit` examples, and what the net says of them.

        Returns arrays with one row per example: "image", "label", "perturbation", and "before" and
        "after", the classes predicted by a plain forward pass without and with the perturbation.
        """
        if ("examples",) not in self._compiled:
            programs = example_programs(self._apply_fn, self.settings)
            self._compiled[("examples",)] = self._compile_fn(*programs)
        found = []
        for batch in self._batches(limited(self._examples, limit), "examples", False):
            rows = jax.device_get(self._compiled[("examples",)]({"variables": variables}, batch)[1])
            found.append({name: values[rows["mask"] > 0] for name, values in rows.items()})
        return {name: np.concatenate([part[name] for part in found]) for name in found[0]}

    def _summary(
        self,
        variables: Any,
        names: tuple[str, ...],
        examples: Examples,
        description: str,
        bounds: Bounds | None,
        *,
        show_progress: bool | None,
    ) -> Summary:
        if names not in self._compiled:
            programs = measurement_programs(self._apply_fn, names, self.settings)
            self._compiled[names] = self._compile_fn(*programs)
        shared = {"variables": variables, "bounds": broadcast(bounds, examples.shape)}
        total: metrics.Sums | None = None
        sizes = []
        for i, batch in enumerate(self._batches(examples, description, show_progress)):
            key = random_key(self.settings, i)
            sums, rows = jax.device_get(self._compiled[names](shared | {"key": key}, batch))
            sums = jax.tree.map(np.float64, sums)
            if "pass" in names:
                figures = sums.figures | sums_of_pass(rows, check_pass(self._to_images))
                sums = sums._replace(figures=figures)
            sizes.append(sizes_of(rows or {}))
            total = sums if total is None else metrics.add(total, sums)
        assert total is not None  # `limited` refuses to measure nothing.
        return metrics.summarize(total) | curves_of(sizes)

    def _shows(self, show_progress: bool | None) -> bool:
        return self.show_progress if show_progress is None else show_progress

    def _batches(
        self, examples: Examples, description: str, show_progress: bool | None
    ) -> Iterator[Mapping[str, np.ndarray]]:
        return batches(examples, self._batch_size, description, self._shows(show_progress))


def first_half(
    accuracies: Callable[[Sequence[float]], list[float]], largest: float
) -> float | None:
    """The first epsilon at which the accuracy is at most a half, see `Evaluator.half_epsilon`."""

    def first_fall(grid: Sequence[float]) -> int:
        """The place in the grid of the first such epsilon; after its end if there is none."""
        return [*(accuracy <= 0.5 for accuracy in accuracies(grid)), True].index(True)

    grid = [0.0, *np.geomspace(largest / GRID_SPAN, largest, GRID_SIZE - 1).tolist()]
    first = first_fall(grid)
    if first == 0:
        return 0.0
    if first == GRID_SIZE:
        return None
    low, high = grid[first - 1 : first + 1]
    while high - low > PRECISION * high and high > SMALLEST * largest:
        grid = np.linspace(low, high, GRID_SIZE + 2)[1:-1].tolist()
        first = first_fall(grid)
        low, high = [low, *grid][first], [*grid, high][first]
    return high


def batches(
    examples: Examples, batch_size: int, description: str, show_progress: bool
) -> Iterator[Mapping[str, np.ndarray]]:
    """All examples in batches of one shape, with a progress bar that moves when a batch is done."""
    batch_size = max(1, min(batch_size, examples.count)) if batch_size > 0 else batch_size
    with progress(description, examples.count, "image", disable=not show_progress) as bar:
        for batch in examples.batches(examples.count, batch_size):
            yield batch
            bar.update(min(batch_size, bar.total - bar.n))


def check_pass(to_images: ToImages | None) -> ToImages:
    """`to_images`; ValueError or MissingPackageError where PASS cannot be measured, before hours of
    others.
    """
    if to_images is None:
        raise ValueError(
            "PASS compares images, and whitened inputs are none: give to_images, or leave 'pass' "
            "out."
        )
    import dd_jax.evaluation.pass_score  # noqa: F401

    return to_images


def sums_of_pass(rows: Rows, to_images: ToImages) -> dict[str, np.float64]:
    """The sums of PASS, and of how many could not be aligned, over the rows whose mask is 1."""
    from dd_jax.evaluation.pass_score import pass_scores

    counts = np.asarray(rows["mask"]) > 0
    inputs, perturbation = (np.asarray(rows[name])[counts] for name in ("image", "perturbation"))
    scores, aligned = pass_scores(to_images(inputs), to_images(inputs + perturbation))
    return {"pass": np.sum(scores), "pass_unaligned": np.float64(np.sum(~aligned))}


def sizes_of(rows: Rows) -> dict[str, np.ndarray]:
    """By measurement, the sizes for its robustness curve, of the rows whose mask is 1."""
    return {
        name.removeprefix(SIZE): np.asarray(values)[np.asarray(rows["mask"]) > 0]
        for name, values in rows.items()
        if name.startswith(SIZE)
    }


def curves_of(sizes: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """The robustness curves of the sizes of all batches."""
    return {
        metrics.curve_name(name): metrics.robustness_curve(
            name, np.concatenate([part[name] for part in sizes])
        )
        for name in sizes[0]
    }


def random_key(settings: Settings, batch_index: int) -> PRNGKeyArray | None:
    """For the random starts of a batch; None if there are to be none."""
    if settings.pgd_seed is None:
        return None
    return jax.random.fold_in(jax.random.key(settings.pgd_seed), batch_index)


def limited(examples: Examples, limit: int | None) -> Examples:
    """The first `limit` examples, all of them if it is None. ValueError where there are none."""
    count = examples.count if limit is None else min(limit, examples.count)
    if count < 1:
        raise ValueError("There is no example to measure: the data set is empty or its limit is 0.")
    return examples._replace(count=count)


def broadcast(bounds: Bounds | None, shape: tuple[int, ...]) -> tuple[np.ndarray, ...] | None:
    """Bounds of one example, from numbers or from arrays that broadcast to a batch."""
    if bounds is None:
        return None
    of_one = lambda bound: np.broadcast_to(np.asarray(bound, np.float32), (1, *shape))[0]
    try:
        return tuple(map(of_one, bounds))
    except ValueError as error:
        shapes = " and ".join(str(np.shape(bound)) for bound in bounds)
        raise ValueError(
            f"bounds have the shapes {shapes}; they must be numbers or broadcast to one input, "
            f"{shape}."
        ) from error
