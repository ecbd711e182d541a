"""From a configuration to a run. Configurations stop here: a run holds plans and plain values."""

import pathlib
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from dd_jax import log, models, parallel, pretrained, training
from dd_jax.data import Preprocessing
from dd_jax.evaluation import Evaluator
from dd_jax.experiment.configuration import ConfigurationError, flatten, load
from dd_jax.experiment.inputs import Feed, open_inputs, preprocessing_name
from dd_jax.experiment.plans import (
    Facts,
    how_measured,
    make_evaluator,
    make_facts,
    make_stage,
    state_maker,
)
from dd_jax.results.report import DEFENDED, REFERENCE, read_report
from dd_jax.training import TrainState
from dd_jax.training.loop import StagePlan, latest_step, open_checkpoints

Weights = tuple[Any, Any]
"""Parameters and batch statistics, empty for nets without batch normalization."""


FITTED = "preprocessing.npz"
"""The file of the fitted preprocessing in a run directory."""


class Run(NamedTuple):
    """All that a run works with.

    stages: "reference" and "defended". reference_source: the run directory that the reference net
    comes from, None where it is trained or read from a file. load_reference: gives the weights of a
    reference that is not trained here, None where it is.
    """

    workdir: pathlib.Path
    facts: Facts
    model: nn.Module
    feed: Feed
    preprocessing: Preprocessing
    evaluator: Evaluator
    stages: dict[str, StagePlan]
    reference_source: pathlib.Path | None
    load_reference: Callable[[], Weights] | None


def build_run(config: ConfigDict, workdir: pathlib.Path, *, like: Run | None = None) -> Run:
    """Loads the data, fits (or restores) the preprocessing and makes the net and the plans; changes
    nothing on disk.

    With `like`, a run on the same data and net, what it has loaded and compiled is shared.

    DataError where the data is missing, ConfigurationError where the configuration does not fit it.
    """
    if config.tensorboard and not log.is_tensorboard_installed():
        raise ConfigurationError(
            "tensorboard is true, but tensorboardX is missing: pip install 'dd_jax[tensorboard]'."
        )
    if like is None:
        feed, preprocessing = open_inputs(config, _fitted_before(config, workdir))
        model = models.create(config.model.name, num_classes=feed.num_classes)
        evaluator = make_evaluator(config, model, feed, preprocessing)
    else:
        _, _, model, feed, preprocessing, evaluator, *_ = like
    stages = {
        name: make_stage(config, name, model, feed, evaluator) for name in (REFERENCE, DEFENDED)
    }
    path = pathlib.Path(config.reference.source) if config.reference.source else None
    is_run = path is not None and path.is_dir()
    load_reference = None
    if path is not None:
        load_reference = reference_loader(config, path, model, feed.num_classes)
    facts, source = make_facts(config, feed, preprocessing), path if is_run else None
    shared = (model, feed, preprocessing, evaluator, stages)
    return Run(workdir, facts, *shared, source, load_reference)


def _fitted_before(config: ConfigDict, workdir: pathlib.Path) -> Preprocessing | None:
    """The preprocessing of the run directory; of a new one, that of the run that its reference net
    comes from, which was trained on such inputs, also if on more images than this run has.
    """
    if (saved := workdir / FITTED).exists():
        return _fitted(saved)
    source = pathlib.Path(config.reference.source)
    if config.reference.source and (source / FITTED).exists():
        space = lambda c: (c.data.name, preprocessing_name(c))
        return _fitted(source / FITTED) if space(load(source)) == space(config) else None
    return None


def _fitted(path: pathlib.Path) -> Preprocessing:
    try:
        return Preprocessing.load(path)
    # What NumPy and zipfile raise of a damaged file.
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigurationError(
            f"{path} is damaged ({type(error).__name__}): remove it, and rerun train.py, which "
            "fits it to the training images again."
        ) from error


def open_run(
    workdir: pathlib.Path, data_dir: str | None = None, overrides: Sequence[str] = ()
) -> Run:
    """The run of a directory that train.py made; `data_dir` where its data has moved. `overrides`
    change how it is measured.
    """
    config = load(workdir, overrides)
    if data_dir:
        config.data.dir = data_dir
    return build_run(config, workdir)


def open_run_like(run: Run, workdir: pathlib.Path, overrides: Sequence[str] = ()) -> Run:
    """Another run on the same data, which is not loaded again.

    ConfigurationError if its data, net, input space or settings of the measurements differ.
    """
    config = load(workdir, overrides)
    config.data.dir = run.facts.config["data.dir"]
    ours, theirs = how_measured(run.facts.config), how_measured(flatten(config))
    names = ours.keys() | theirs.keys()
    if different := sorted(name for name in names if ours.get(name) != theirs.get(name)):
        raise ConfigurationError(
            f"{workdir} and {run.workdir} differ in {', '.join(different)}; only runs whose data, "
            "net and measurements are the same compare."
        )
    return build_run(config, workdir, like=run)


def restore_state(run: Run, stage_name: str) -> TrainState:
    """The final state of a stage in the run directory; ConfigurationError before it is finished."""
    check_finished(run, stage_name)
    return _restored(run.workdir, stage_name, run.stages[stage_name].make_state)


def check_finished(run: Run, stage_name: str) -> None:
    """ConfigurationError before that stage of the run directory is trained to its end."""
    step = latest_step(run.workdir, stage_name)
    if step is None or step < run.stages[stage_name].num_steps:
        raise _unfinished(run.workdir, stage_name)


def _unfinished(workdir: pathlib.Path, stage_name: str) -> ConfigurationError:
    return ConfigurationError(
        f"{workdir} has no finished {stage_name} net; rerun train.py on it to its end."
    )


def _restored(
    workdir: pathlib.Path, stage_name: str, make_state: Callable[[], TrainState]
) -> TrainState:
    with open_checkpoints(workdir, stage_name, read_only=True) as saved:
        return saved.restore(jax.eval_shape(make_state))


def reference_loader(
    config: ConfigDict, path: pathlib.Path, model: nn.Module, num_classes: int
) -> Callable[[], Weights]:
    """A function that gives the weights of the reference net that the configuration names.

    It raises ConfigurationError where the path holds something else than a finished reference for
    this net and input space.
    """
    name, data_name = config.model.name, config.data.name

    def load_reference() -> Weights:
        if path.is_dir():
            return _reference_of_run(config, path, model)
        if path.suffix not in pretrained.SUFFIXES or not path.is_file():
            kinds = ", ".join(pretrained.SUFFIXES)
            raise ConfigurationError(
                f"reference.source is {str(path)!r}; it must be a run directory or a file of "
                f"weights ({kinds})."
            )
        try:
            variables = pretrained.load(path, name)
        except pretrained.WeightsError as error:
            reason = str(error).rstrip(".")
            raise ConfigurationError(
                f"reference.source {path} is of no use for {name} ({reason})."
            ) from error
        expected = jax.eval_shape(state_maker(config, REFERENCE, model)).params
        if jax.tree.map(np.shape, variables["params"]) != jax.tree.map(np.shape, expected):
            raise ConfigurationError(
                f"reference.source {path} must have {num_classes} classes, as {data_name} has."
            )
        both = variables["params"], variables.get("batch_stats", {})
        return jax.tree.map(jax.numpy.asarray, both)

    return load_reference


def _reference_of_run(config: ConfigDict, path: pathlib.Path, model: nn.Module) -> Weights:
    """All processes call it together. They read the checkpoint once all have found it of use."""
    try:
        make_state = parallel.in_all_processes(partial(_checked_reference, config, path, model))
    except parallel.OthersFailedError as error:
        raise ConfigurationError(str(error)) from None
    state = training.averaged(_restored(path, REFERENCE, make_state))
    return state.params, state.batch_stats


def _checked_reference(
    config: ConfigDict, path: pathlib.Path, model: nn.Module
) -> Callable[[], TrainState]:
    """What makes a state like that of the reference net of a run; ConfigurationError where that is
    of no use here.
    """
    other = load(path)
    theirs, ours = (
        f"{c.model.name} on {c.data.name} ({preprocessing_name(c)})" for c in (other, config)
    )
    if theirs != ours:
        raise ConfigurationError(
            f"reference.source {path} is of {theirs}; this configuration needs {ours}."
        )
    _check_held_out(config, other, path)
    report, is_defended = read_report(path), (path / "checkpoints" / DEFENDED).is_dir()
    if not is_defended and (report is None or REFERENCE not in report.measured):
        raise _unfinished(path, REFERENCE)
    return state_maker(other, REFERENCE, model)


def _check_held_out(config: ConfigDict, other: ConfigDict, path: pathlib.Path) -> None:
    """ConfigurationError where a reference may have seen the images that it is measured on."""
    ours, theirs = ((c.data.validation_images, c.data.train_limit) for c in (config, other))
    if ours[0] and ours != theirs:
        raise ConfigurationError(
            f"reference.source {path} has data.validation_images={theirs[0]} and "
            f"data.train_limit={theirs[1]}; they must be {ours[0]} and {ours[1]} as here, or the "
            "reference net has seen images that it is measured on."
        )
