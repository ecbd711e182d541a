"""From a configuration to what a run works with: data, net, stages of training, reference, settings
of measurements.

This module, `measuring` and `runs` are the only readers of configurations.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from dd_jax import data, defenses, log, models, parallel, pretrained, training
from dd_jax.data import Preprocessing
from dd_jax.data.pipeline import InMemory, Streamed
from dd_jax.evaluation import metrics
from dd_jax.experiment.configuration import (
    CLASS_LIMITS,
    NOT_PART_OF_THE_RUN,
    ConfigurationError,
    flatten,
    load,
)
from dd_jax.models.data_dependent_init import centered
from dd_jax.results import published
from dd_jax.training.checkpoints import Checkpoints

REFERENCE, DEFENDED = "reference", "defended"
PAPER_PREPROCESSING = {"digits": "none", "mnist": "mean_image", "cifar10": "contrast_whiten"}
CAFFE_NETS = ("alexnet",)
NO_MATTER_TO_FIGURES = (
    *NOT_PART_OF_THE_RUN,
    "data.flip",
    "evaluation.batch_size",
    "evaluation.epoch_examples",
)


class Experiment(NamedTuple):
    """All that a run works with."""

    config: ConfigDict
    workdir: pathlib.Path
    model: nn.Module
    feed: InMemory | Streamed
    preprocessing: Preprocessing


def build(config: ConfigDict, workdir: pathlib.Path) -> Experiment:
    """Loads the data, fits (or restores) the preprocessing and makes the net; changes nothing on
    disk.

    DataError where the data is missing, ConfigurationError where a batch is larger than the data.
    """
    if config.tensorboard and not log.is_tensorboard_installed():
        raise ConfigurationError(
            "tensorboard is true, but tensorboardX is missing: pip install 'dd_jax[tensorboard]'."
        )
    saved = workdir / "preprocessing.npz"
    preprocessing = Preprocessing.load(saved) if saved.exists() else None
    open_feed = open_images if config.data.name in data.STREAMED_SOURCES else open_in_memory
    feed, preprocessing = open_feed(config, preprocessing)
    if feed.num_classes < 2:
        raise ConfigurationError(
            f"There is one class only in {feed.description}; there must be two or more (a folder "
            f"needs train/CLASS/*)."
        )
    model = models.create(config.model.name, num_classes=feed.num_classes)
    experiment = Experiment(config, workdir, model, feed, preprocessing)
    for stage in (REFERENCE, DEFENDED):
        make_stage(experiment, stage)
    return experiment


def open_run(workdir: pathlib.Path, data_dir: str | None = None) -> Experiment:
    """The experiment of a run directory that train.py made; `data_dir` where its data has moved."""
    config = load(workdir)
    if data_dir:
        config.data.dir = data_dir
    return build(config, workdir)


def open_like(experiment: Experiment, workdir: pathlib.Path) -> Experiment:
    """Another run on the same data, which is not loaded again.

    ConfigurationError if its data, net, input space or settings of the measurements differ.
    """
    config = load(workdir)
    config.data.dir = experiment.config.data.dir
    ours, theirs = (how_measured(flatten(c)) for c in (experiment.config, config))
    if different := sorted(
        name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
    ):
        raise ConfigurationError(
            f"{workdir} and {experiment.workdir} differ in {', '.join(different)}; only runs whose "
            f"data, net and measurements "
            "are the same compare."
        )
    return experiment._replace(config=config, workdir=workdir)


def how_measured(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Of a flat configuration the fields on which a net's figures depend, its weights apart."""
    sections = ("data.", "model.", "evaluation.")
    return {
        name: value
        for name, value in fields.items()
        if (name.startswith(sections) and name not in NO_MATTER_TO_FIGURES)
        or name == "defense.num_candidates"
    }


def paper_row(config: ConfigDict, method: str) -> published.Figures | None:
    """The paper's figures for a method, where this configuration measures what the paper does."""
    space, epsilon = preprocessing_name(config), config.evaluation.pgd_epsilon
    return published.lookup(
        config.data.name, config.model.name, method, input_space=space, pgd_epsilon=epsilon
    )


def open_in_memory(
    config: ConfigDict, preprocessing: Preprocessing | None
) -> tuple[InMemory, Preprocessing]:
    """A small data set in the shape that the net wants, preprocessed. DataError, within a second,
    where it is missing.
    """
    data_set = data.load(
        config.data.name,
        models.input_shape(config.model.name),
        data_dir=config.data.dir or None,
        train_limit=config.data.train_limit or None,
        test_limit=config.data.test_limit or None,
    )
    preprocessing = preprocessing or data.fit(preprocessing_name(config), data_set.train_images)
    inputs = preprocessing(data_set.train_images), preprocessing(data_set.test_images)
    return InMemory(data_set, *inputs, config.data.flip), preprocessing


def open_images(
    config: ConfigDict, preprocessing: Preprocessing | None
) -> tuple[Streamed, Preprocessing]:
    """Image files, to be decoded while the net trains. DataError where they are missing."""
    images = data.open_images(
        config.data.name,
        data_dir=config.data.dir or None,
        train_limit=config.data.train_limit or None,
        test_limit=config.data.test_limit or None,
    )
    if config.reference.center_on:
        raise ConfigurationError(
            "reference.center_on needs images in memory; it must be 0 for images that are streamed."
        )
    name = preprocessing_name(config)
    if name not in data.UNFITTED:
        raise ConfigurationError(
            f"data.preprocessing is {name!r}; of images that are streamed it can be "
            f"{', '.join(data.UNFITTED)}."
        )
    preprocessing = preprocessing or Preprocessing(name)
    crop_size = models.input_shape(config.model.name)[0]
    return Streamed(
        images, preprocessing, crop_size, config.data.flip, config.data.num_workers
    ), preprocessing


def preprocessing_name(config: ConfigDict) -> str:
    """The preprocessing that a configuration stands for, "paper" resolved by data set."""
    name = config.data.preprocessing
    if name != "paper":
        return name
    if config.data.name in data.STREAMED_SOURCES:
        return "caffe" if config.model.name in CAFFE_NETS else "torchvision"
    return PAPER_PREPROCESSING[config.data.name]


def defense_options(config: ConfigDict) -> dict[str, Any]:
    """The options that the chosen defense takes, out of all that the configuration has;
    `configuration.read` has refused others where they were given on the command line.
    """
    names = defenses.option_names(config.defense.name)
    options = {name: value for name, value in config.defense.items() if name in names}
    return {
        name: (value or None) if name in CLASS_LIMITS else value for name, value in options.items()
    }


class Stage(NamedTuple):
    """One training of the net: with which defense, how, and for how long."""

    name: str
    settings: ConfigDict
    defense: defenses.Defense
    num_steps: int
    steps_per_epoch: int


def make_stage(experiment: Experiment, name: str) -> Stage:
    """The reference's training, or the fine-tuning with the chosen defense."""
    config = experiment.config
    section = "reference" if name == REFERENCE else "fine_tuning"
    settings = config[section]
    defense, options = (
        ("clean", {}) if name == REFERENCE else (config.defense.name, defense_options(config))
    )
    try:
        steps_per_epoch = data.steps_per_epoch(experiment.feed.num_train, settings.batch_size)
    except ValueError as error:
        raise ConfigurationError(f"{section}.{error}.") from error
    _, num_processes = parallel.my_share()
    if settings.batch_size % num_processes:
        raise ConfigurationError(
            f"{section}.batch_size is {settings.batch_size}; it must be a multiple of the "
            f"{num_processes} processes."
        )
    num_steps = settings.num_epochs * steps_per_epoch
    if settings.max_steps:
        num_steps = min(num_steps, settings.max_steps)
    return Stage(
        name, settings, defenses.make_defense(defense, **options), num_steps, steps_per_epoch
    )


def make_optimizer(stage: Stage) -> Any:
    """SGD as the stage's settings have it."""
    settings = stage.settings
    schedule = training.SCHEDULES[settings.schedule](settings.learning_rate, stage.num_steps)
    return training.make_optimizer(
        schedule,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        max_gradient_norm=settings.max_gradient_norm,
    )


def given_reference(experiment: Experiment) -> tuple[Any, Any] | None:
    """Weights and batch statistics of the reference net that the configuration names; None if it
    names none.

    ConfigurationError where it names something else than a finished reference for this net and
    input space.
    """
    config = experiment.config
    if not config.reference.source:
        return None
    path = pathlib.Path(config.reference.source)
    if path.is_dir():
        theirs, ours = (
            f"{c.model.name} on {c.data.name} ({preprocessing_name(c)})"
            for c in (load(path), config)
        )
        if theirs != ours:
            raise ConfigurationError(
                f"reference.source {path} is of {theirs}; this configuration needs {ours}."
            )
        state = restore(experiment._replace(workdir=path), REFERENCE)
        return state.params, state.batch_stats
    if path.suffix not in pretrained.SUFFIXES or not path.is_file():
        kinds = ", ".join(pretrained.SUFFIXES)
        raise ConfigurationError(
            f"reference.source is {str(path)!r}; it must be a run directory or a file of weights "
            f"({kinds})."
        )
    try:
        variables = pretrained.load(path, config.model.name)
    except pretrained.WeightsError as error:
        reason = str(error).rstrip(".")
        raise ConfigurationError(
            f"reference.source {path} is of no use for {config.model.name} ({reason})."
        ) from error
    expected = jax.eval_shape(
        lambda: untrained(experiment, make_stage(experiment, REFERENCE))
    ).params
    if jax.tree.map(np.shape, variables["params"]) != jax.tree.map(np.shape, expected):
        classes = experiment.feed.num_classes
        raise ConfigurationError(
            f"reference.source {path} must have {classes} classes, as {config.data.name} has."
        )
    return jax.tree.map(jax.numpy.asarray, (variables["params"], variables.get("batch_stats", {})))


def restore(experiment: Experiment, stage_name: str) -> training.TrainState:
    """The final state of a stage in the run directory; ConfigurationError before the stage is
    trained and measured.
    """
    check_finished(experiment, stage_name)
    stage, workdir = make_stage(experiment, stage_name), experiment.workdir
    with Checkpoints(workdir / "checkpoints" / stage_name, read_only=True) as saved:
        return saved.restore(jax.eval_shape(lambda: untrained(experiment, stage)))


def check_finished(experiment: Experiment, stage_name: str) -> None:
    """ConfigurationError before the stage of the run directory is trained and measured."""
    workdir = experiment.workdir
    if not any(
        line["stage"] == stage_name and "measured" in line for line in log.read_lines(workdir)
    ):
        raise ConfigurationError(
            f"{workdir} has no finished {stage_name} net; let train.py go on to its end."
        )


def untrained(experiment: Experiment, stage: Stage) -> training.TrainState:
    """The state that a stage would begin with if there were no weights: drawn from the seed."""
    image_shape = models.input_shape(experiment.config.model.name)
    return training.initial_state(
        experiment.model, make_optimizer(stage), image_shape, experiment.config.seed
    )


def first_state(experiment: Experiment, stage: Stage) -> training.TrainState:
    """What the reference's training begins with: `untrained`, centered on images where the
    configuration says so.
    """
    state, num_images = untrained(experiment, stage), stage.settings.center_on
    if not num_images:
        return state
    return state._replace(
        params=centered(experiment.model, state.params, experiment.feed.train_inputs[:num_images])
    )


def evaluation_settings(config: ConfigDict) -> metrics.Settings:
    """What the configuration says about measuring. The limits on the classes are the defense's."""
    named = {
        name: value for name, value in config.evaluation.items() if name in metrics.Settings._fields
    }
    candidates = {name: config.defense[name] or None for name in CLASS_LIMITS}
    return metrics.Settings(**named, **candidates)
