"""From a configuration to a run: data, net, reference, defense, measurements. The only reader of configurations.

A run directory holds

    config.json           the configuration
    preprocessing.npz     the input space, fitted on the training images
    metrics.jsonl         one line per logged interval, epoch and final measurement, each with its stage
    checkpoints/STAGE/    Orbax checkpoints of the stages "reference" and "defended"
    report.json           what was measured, and with what

Every stage goes on from what the directory holds, so a run that was stopped is taken up by the same command.
"""

import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from dd_jax import baselines, data, metrics, models, pretrained, training
from dd_jax.checkpoints import Checkpoints
from dd_jax.configuration import ConfigurationError, load
from dd_jax.data import DataSet, Preprocessing

REFERENCE, DEFENDED = "reference", "defended"
SECONDS_BETWEEN_CHECKPOINTS = 30
MOST_STEPS_PER_LINE, FEWEST_LINES = 50, 10  # Of metrics.jsonl.
PAPER_PREPROCESSING = {"digits": "none", "mnist": "mean_image", "cifar10": "contrast_whiten"}


class Experiment(NamedTuple):
    """All that a run works with. Inputs are preprocessed, float32, in units of 1/255 of a pixel's range."""

    config: ConfigDict
    workdir: pathlib.Path
    model: nn.Module
    data: DataSet
    preprocessing: Preprocessing
    train_inputs: np.ndarray
    test_inputs: np.ndarray


def build(config: ConfigDict, workdir: pathlib.Path) -> Experiment:
    """Loads the data, fits (or restores) the preprocessing and makes the net; changes nothing on disk.

    DataError where the data is missing, ConfigurationError where a batch is larger than the data.
    """
    data_set = load_data(config)
    model = models.create(config.model.name, num_classes=data_set.num_classes)
    saved = workdir / "preprocessing.npz"
    fit = lambda: data.fit(preprocessing_name(config), data_set.train_images)
    preprocessing = Preprocessing.load(saved) if saved.exists() else fit()
    train_inputs, test_inputs = preprocessing(data_set.train_images), preprocessing(data_set.test_images)
    experiment = Experiment(config, workdir, model, data_set, preprocessing, train_inputs, test_inputs)
    for stage in (REFERENCE, DEFENDED):
        make_stage(experiment, stage)
    return experiment


def load_data(config: ConfigDict) -> DataSet:
    """The data set in the shape that the net wants. DataError, within a second, where it is missing."""
    return data.load(
        config.data.name,
        models.input_shape(config.model.name),
        data_dir=config.data.dir or None,
        train_limit=config.data.train_limit or None,
        test_limit=config.data.test_limit or None,
    )


def preprocessing_name(config: ConfigDict) -> str:
    """The preprocessing that a configuration stands for, "paper" resolved by data set."""
    name = config.data.preprocessing
    return PAPER_PREPROCESSING[config.data.name] if name == "paper" else name


def defense_options(config: ConfigDict) -> dict[str, Any]:
    """The options of the chosen defense's loss."""
    options = dict(config.defense)
    name = options.pop("name")
    if name == "clean":
        return {}
    return options | {"num_candidates": options["num_candidates"] or None}


class Stage(NamedTuple):
    """One training of the net: from where, with which loss and for how long."""

    name: str
    settings: ConfigDict
    loss_fn: baselines.LossFn
    num_steps: int
    steps_per_epoch: int


def make_stage(experiment: Experiment, name: str) -> Stage:
    """The reference's training, or the fine-tuning with the chosen defense."""
    config = experiment.config
    section = "reference" if name == REFERENCE else "fine_tuning"
    settings = config[section]
    loss_name, options = ("clean", {}) if name == REFERENCE else (config.defense.name, defense_options(config))
    try:
        steps_per_epoch = data.steps_per_epoch(len(experiment.data.train_labels), settings.batch_size)
    except ValueError as error:
        raise ConfigurationError(f"{section}.{error}.") from error
    num_steps = settings.num_epochs * steps_per_epoch
    if settings.max_steps:
        num_steps = min(num_steps, settings.max_steps)
    return Stage(name, settings, baselines.make_loss(loss_name, **options), num_steps, steps_per_epoch)


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
    """Weights and batch statistics of the reference net that the configuration names; None if it names none.

    ConfigurationError where it names something else than a finished reference for this net and input space.
    """
    config = experiment.config
    if not config.reference.source:
        return None
    path = pathlib.Path(config.reference.source)
    if path.is_dir():
        theirs, ours = (f"{c.model.name} on {c.data.name} ({preprocessing_name(c)})" for c in (load(path), config))
        if theirs != ours:
            raise ConfigurationError(f"reference.source {path} is of {theirs}; this configuration needs {ours}.")
        state = restore(experiment._replace(workdir=path), REFERENCE)
        return state.params, state.batch_stats
    if path.suffix != ".npz" or not path.is_file():
        raise ConfigurationError(
            f"reference.source is {str(path)!r}; it must be a run directory or an .npz file of PyTorch-named arrays."
        )
    try:
        with np.load(path) as arrays:
            params = pretrained.from_torch(config.model.name, dict(arrays))
    except Exception as error:  # Whatever is wrong with the file is the user's to know, without our traceback.
        reason = str(error).rstrip(".")
        raise ConfigurationError(f"reference.source {path} is of no use for {config.model.name} ({reason}).") from error
    expected = jax.eval_shape(lambda: _untrained(experiment, make_stage(experiment, REFERENCE))).params
    if jax.tree.map(np.shape, params) != jax.tree.map(np.shape, expected):
        classes = experiment.data.num_classes
        raise ConfigurationError(f"reference.source {path} must have {classes} classes, as {config.data.name} has.")
    return jax.tree.map(lambda x: jax.numpy.asarray(x, jax.numpy.float32), params), {}


def restore(experiment: Experiment, stage_name: str) -> training.TrainState:
    """The final state of a stage in the run directory; ConfigurationError before the stage is trained and measured."""
    stage, workdir = make_stage(experiment, stage_name), experiment.workdir
    if not any(line["stage"] == stage_name and "measured" in line for line in read_lines(workdir)):
        raise ConfigurationError(f"{workdir} has no finished {stage_name} net; let train.py go on to its end.")
    with Checkpoints(workdir / "checkpoints" / stage_name, read_only=True) as saved:
        return saved.restore(jax.eval_shape(lambda: _untrained(experiment, stage)))


def _untrained(experiment: Experiment, stage: Stage) -> training.TrainState:
    image_shape = models.input_shape(experiment.config.model.name)
    return training.initial_state(experiment.model, make_optimizer(stage), image_shape, experiment.config.seed)


def train(experiment: Experiment, stage_name: str, start: Callable[[], training.TrainState]) -> training.TrainState:
    """Trains one stage to its end, from its latest checkpoint if there is one and from `start()` otherwise."""
    stage = make_stage(experiment, stage_name)
    with Checkpoints(experiment.workdir / "checkpoints" / stage_name) as saved:
        state = start() if saved.latest() is None else saved.restore(jax.eval_shape(start))
        first_step = int(state.step)
        forget_lines_after(experiment.workdir, stage_name, first_step)
        if first_step < stage.num_steps:
            train_step = training.make_train_step(experiment.model, make_optimizer(stage), stage.loss_fn)
            state = _train_with_progress(experiment, stage, state, train_step, saved)
        saved.save(int(state.step), state)
    return state


def _train_with_progress(
    experiment: Experiment, stage: Stage, state: training.TrainState, train_step: Callable, saved: Checkpoints
) -> training.TrainState:
    batch_of_step = lambda step: data.training_batch(  # noqa: E731
        experiment.train_inputs,
        experiment.data.train_labels,
        batch_size=stage.settings.batch_size,
        seed=experiment.config.seed,
        step=step,
        flip=experiment.config.data.flip,
    )
    log_every = max(1, min(MOST_STEPS_PER_LINE, stage.num_steps // FEWEST_LINES))
    steps = training.fit(
        state, train_step, batch_of_step, num_steps=stage.num_steps, seed=experiment.config.seed, log_every=log_every
    )
    limit, last_saved = experiment.config.evaluation.epoch_examples, time.monotonic()
    with progress(f"{stage.name:9} training", stage.num_steps, "step", initial=int(state.step)) as bar:
        for state, step, means in steps:
            bar.update()
            line = {"stage": stage.name, "step": step, "epoch": step / stage.steps_per_epoch}
            if means is not None:
                bar.set_postfix_str(f"loss {means['loss']:.3f}, accuracy {means['correct']:.3f}")
                log(experiment.workdir, line | means)
            if limit and step % stage.steps_per_epoch == 0:
                log(experiment.workdir, line | {"test": measure(experiment, state, limit=limit, quiet=True)})
            # Saved after the step's lines, so that none is missing where the run goes on from here.
            if means is not None and time.monotonic() - last_saved > SECONDS_BETWEEN_CHECKPOINTS:
                saved.save(step, state)
                last_saved = time.monotonic()
    return state


def measure(
    experiment: Experiment, state: training.TrainState, *, limit: int | None = None, quiet: bool = False, name: str = ""
) -> metrics.Summary:
    """Accuracy and DeepFool figures on the test images (the first `limit` of them)."""
    settings = experiment.config.evaluation
    num_candidates = experiment.config.defense.num_candidates or None
    measure_batch = training.make_measure(
        experiment.model, num_steps=settings.num_steps, overshoot=settings.overshoot, num_candidates=num_candidates
    )
    inputs, labels = experiment.test_inputs[:limit], experiment.data.test_labels[:limit]
    batch_size = min(settings.batch_size, len(labels))
    total = None
    with progress(f"{name:9} measuring", len(labels), "image", disable=quiet) as bar:
        for batch in data.evaluation_batches(inputs, labels, batch_size):
            sums = jax.device_get(measure_batch(state.params, state.batch_stats, batch))
            total = sums if total is None else metrics.add(total, sums)
            bar.update(int(sums.examples))
    return metrics.summarise(total)


def measure_once(experiment: Experiment, stage_name: str, state: training.TrainState) -> metrics.Summary:
    """The final measurement of a stage, read from the run directory if it was made before."""
    step = int(state.step)
    for line in read_lines(experiment.workdir):
        if line["stage"] == stage_name and line["step"] == step and "measured" in line:
            return line["measured"]
    measured = measure(experiment, state, name=stage_name)
    log(experiment.workdir, {"stage": stage_name, "step": step, "measured": measured})
    return measured


def reference_state(experiment: Experiment) -> training.TrainState:
    """The reference net: restored from the run directory or from what the configuration names, else trained."""
    preprocessing_file = experiment.workdir / "preprocessing.npz"
    if not preprocessing_file.exists():
        experiment.preprocessing.save(preprocessing_file)
    given = given_reference(experiment)

    def start() -> training.TrainState:
        stage = make_stage(experiment, REFERENCE)
        if given is None:
            return _untrained(experiment, stage)
        state = training.fresh_state(make_optimizer(stage), *given)
        return state._replace(step=jax.numpy.asarray(stage.num_steps, jax.numpy.int32))  # Nothing left to train.

    return train(experiment, REFERENCE, start)


def run(experiment: Experiment) -> dict[str, metrics.Summary]:
    """The whole run: reference, its measurement, fine-tuning with the defense, its measurement. Returns both."""
    reference = reference_state(experiment)
    before = measure_once(experiment, REFERENCE, reference)
    optimizer = make_optimizer(make_stage(experiment, DEFENDED))
    weights = jax.tree.map(jax.numpy.copy, (reference.params, reference.batch_stats))  # Training donates its state.
    defended = train(experiment, DEFENDED, lambda: training.fresh_state(optimizer, *weights))
    return {REFERENCE: before, DEFENDED: measure_once(experiment, DEFENDED, defended)}


def progress(description: str, total: int, unit: str, **options: Any) -> tqdm:
    """A progress bar with the time left; seldom redrawn where the output is not a terminal."""
    options |= {"mininterval": 0.2 if sys.stderr.isatty() else 10, "dynamic_ncols": True, "smoothing": 0.1}
    return tqdm(total=total, desc=description, unit=unit, **options)


def log(workdir: pathlib.Path, line: dict[str, Any]) -> None:
    """Appends a line to metrics.jsonl."""
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def read_lines(workdir: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that a killed run left unfinished is passed over."""
    path = workdir / "metrics.jsonl"
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            yield json.loads(text)
        except json.JSONDecodeError:
            continue


def forget_lines_after(workdir: pathlib.Path, stage_name: str, step: int) -> None:
    """Drops what a stage logged after `step`: those steps were not saved and are about to be taken again."""
    path = workdir / "metrics.jsonl"
    if path.exists():
        kept = [line for line in read_lines(workdir) if line["stage"] != stage_name or line["step"] <= step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(path)
