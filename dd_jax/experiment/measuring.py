"""The nets of a run, measured on its test images on all devices."""

import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
from tqdm import tqdm

from dd_jax import data, evaluation, parallel, training
from dd_jax.evaluation import metrics
from dd_jax.experiment.build import Experiment, evaluation_settings


@lru_cache
def apply_fn(model: nn.Module, compute_dtype: str) -> evaluation.ApplyFn:
    """(variables, inputs) -> logits, the same function whenever it is asked for, so that it is
    compiled once.
    """

    def logits(variables: Any, inputs: jax.Array) -> jax.Array:
        params, batch_stats = variables["params"], variables["batch_stats"]
        return training.make_logits_fn(model, params, batch_stats, compute_dtype=compute_dtype)(
            inputs
        )

    return logits


def measure(
    experiment: Experiment,
    state: training.TrainState,
    *,
    names: Sequence[str] = ("deepfool",),
    limit: int | None = None,
    quiet: bool = False,
    name: str = "",
) -> metrics.Summary:
    """Accuracy and the measurements of those names (`evaluation.NAMES`) on the test images, the
    first `limit` of them.

    Adds "epsilon_half", where half of the images have fallen under FGSM, where "fgsm" is among the
    names; None: nowhere. Says on stderr where an attack's own success was not what a plain forward
    pass said.
    """
    config, settings = experiment.config, evaluation_settings(experiment.config)
    net, shared = _arguments(experiment, state, limit, quiet)
    found = evaluation.measure(
        *net,
        box=data.bounds(experiment.preprocessing),
        settings=settings,
        names=names,
        carlini_wagner_examples=config.evaluation.carlini_wagner_examples,
        to_images=data.make_to_images(experiment.preprocessing),
        description=f"{name:9} measuring",
        **shared,
    )
    if "fgsm" in names:
        options = dict(
            max_epsilon=settings.fgsm_max_epsilon, description=f"{name:9} epsilon of 50 %"
        )
        found["epsilon_half"] = evaluation.half_epsilon(*net, **options, **shared)
    if parallel.is_primary():
        for sentence in metrics.remarks(found, name or "the net"):
            tqdm.write(f"warning: {sentence}", file=sys.stderr)  # Above the progress bars.
    return found


def _arguments(
    experiment: Experiment, state: training.TrainState, limit: int | None, quiet: bool
) -> Any:
    """What all measurements take: the net and the test images, and how to go about it."""
    config = experiment.config
    net = apply_fn(experiment.model, config.model.compute_dtype)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    shared = {
        "limit": limit,
        "batch_size": config.evaluation.batch_size,
        "compile_fn": experiment.feed.compile_fn(),
        "bounds": data.bounds(experiment.preprocessing) if config.evaluation.clip else None,
        "show_progress": not quiet and parallel.is_primary(),
    }
    return (net, variables, experiment.feed.test_examples()), shared


def accuracy_under_fgsm(
    experiment: Experiment,
    state: training.TrainState,
    epsilons: Sequence[float],
    *,
    limit: int | None,
    name: str,
) -> list[float]:
    """The accuracy on the test images under FGSM (linf), at each epsilon."""
    net, shared = _arguments(experiment, state, limit, quiet=False)
    return evaluation.fgsm_accuracy(*net, epsilons, description=f"{name:9} under FGSM", **shared)
