"""From a configuration to a run: data, net, reference, defense, measurements. The only reader of configurations.

A run directory holds

    config.json           the configuration
    preprocessing.npz     the input space, fitted on the training images
    metrics.jsonl         one line per logged interval, epoch and final measurement, each with its stage
    checkpoints/STAGE/    Orbax checkpoints of the stages "reference" and "defended"
    report.json           what was measured, and with what

Every stage goes on from what the directory holds, so a run that was stopped is taken up by the same command.
"""

import pathlib
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from dd_jax import baselines, data, evaluation, metrics, models, parallel, pretrained, run_log, training
from dd_jax.checkpoints import Checkpoints
from dd_jax.configuration import ConfigurationError, load
from dd_jax.data import DataSet, Preprocessing
from dd_jax.progress import progress

DEVICES = {"compile_fn": parallel.sums_and_rows}  # Every measurement is shared among all devices.
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


NONE_AS_ZERO = ("num_candidates", "classes_at_once")


def defense_options(config: ConfigDict) -> dict[str, Any]:
    """The options that the chosen defense takes, out of all that the configuration has."""
    names = baselines.option_names(config.defense.name)
    options = {name: value for name, value in config.defense.items() if name in names}
    return {name: (value or None) if name in NONE_AS_ZERO else value for name, value in options.items()}


class Stage(NamedTuple):
    """One training of the net: with which defense, how, and for how long."""

    name: str
    settings: ConfigDict
    defense: baselines.Defense
    num_steps: int
    steps_per_epoch: int


def make_stage(experiment: Experiment, name: str) -> Stage:
    """The reference's training, or the fine-tuning with the chosen defense."""
    config = experiment.config
    section = "reference" if name == REFERENCE else "fine_tuning"
    settings = config[section]
    defense, options = ("clean", {}) if name == REFERENCE else (config.defense.name, defense_options(config))
    try:
        steps_per_epoch = data.steps_per_epoch(len(experiment.data.train_labels), settings.batch_size)
    except ValueError as error:
        raise ConfigurationError(f"{section}.{error}.") from error
    num_steps = settings.num_epochs * steps_per_epoch
    if settings.max_steps:
        num_steps = min(num_steps, settings.max_steps)
    return Stage(name, settings, baselines.make_defense(defense, **options), num_steps, steps_per_epoch)


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
    if not any(line["stage"] == stage_name and "measured" in line for line in run_log.read(workdir)):
        raise ConfigurationError(f"{workdir} has no finished {stage_name} net; let train.py go on to its end.")
    with Checkpoints(workdir / "checkpoints" / stage_name, read_only=True) as saved:
        return saved.restore(jax.eval_shape(lambda: _untrained(experiment, stage)))


def _untrained(experiment: Experiment, stage: Stage) -> training.TrainState:
    image_shape = models.input_shape(experiment.config.model.name)
    return training.initial_state(experiment.model, make_optimizer(stage), image_shape, experiment.config.seed)


def train(experiment: Experiment, stage_name: str, start: Callable[[], training.TrainState]) -> training.TrainState:
    """Trains one stage to its end, from its latest checkpoint if there is one and from `start()` otherwise.

    Terminated where the process was asked to end (SIGTERM); the state is saved then.
    """
    stage = make_stage(experiment, stage_name)
    with Checkpoints(experiment.workdir / "checkpoints" / stage_name) as saved:
        state = start() if saved.latest() is None else saved.restore(jax.eval_shape(start))
        first_step = int(state.step)
        if parallel.is_primary():
            run_log.forget_after(experiment.workdir, stage_name, first_step)
        state = parallel.replicate(state)
        if first_step < stage.num_steps:
            settings, compute_dtype = stage.settings, experiment.config.model.compute_dtype
            options = dict(num_parts=settings.num_parts, compute_dtype=compute_dtype)
            train_step = training.make_train_step(experiment.model, make_optimizer(stage), stage.defense, **options)
            state = _train_with_progress(experiment, stage, state, train_step, saved)
        saved.save(int(state.step), parallel.as_global(state))
    return state


def _train_with_progress(
    experiment: Experiment, stage: Stage, state: training.TrainState, train_step: Callable, saved: Checkpoints
) -> training.TrainState:
    batch_of_step = lambda step: parallel.share_of(  # noqa: E731
        data.training_batch(
            experiment.train_inputs,
            experiment.data.train_labels,
            batch_size=stage.settings.batch_size,
            seed=experiment.config.seed,
            step=step,
            flip=experiment.config.data.flip,
        )
    )
    log_every = max(1, min(MOST_STEPS_PER_LINE, stage.num_steps // FEWEST_LINES))
    steps = training.fit(
        state, train_step, batch_of_step, num_steps=stage.num_steps, seed=experiment.config.seed, log_every=log_every
    )
    limit, last_saved = experiment.config.evaluation.epoch_examples, time.monotonic()
    bar = progress(
        f"{stage.name:9} training", stage.num_steps, "step", initial=int(state.step), disable=not parallel.is_primary()
    )
    with bar, parallel.Termination() as termination:
        for state, step, means in steps:
            bar.update()
            line = {"stage": stage.name, "step": step, "epoch": step / stage.steps_per_epoch}
            if means is not None:
                bar.set_postfix_str(f"loss {means['loss']:.3f}, accuracy {means['correct']:.3f}")
                log(experiment, line | means)
            if limit and step % stage.steps_per_epoch == 0:
                log(experiment, line | {"test": measure(experiment, state, limit=limit, quiet=True)})
            # Saved after the step's lines, so that none is missing where the run goes on from here.
            terminated = termination.asked_for(step)
            if terminated or (means is not None and time.monotonic() - last_saved > SECONDS_BETWEEN_CHECKPOINTS):
                saved.save(step, parallel.as_global(state))
                last_saved = time.monotonic()
            if terminated:
                raise parallel.Terminated(f"Asked to end; step {step} of the {stage.name} training is saved.")
    return state


def log(experiment: Experiment, line: dict[str, Any]) -> None:
    """Appends a line to metrics.jsonl; one process does."""
    if parallel.is_primary():
        run_log.append(experiment.workdir, line)


@lru_cache
def apply_fn(model: nn.Module, compute_dtype: str) -> evaluation.ApplyFn:
    """(variables, inputs) -> logits, the same function whenever it is asked for, so that it is compiled once."""

    def logits(variables: Any, inputs: jax.Array) -> jax.Array:
        params, batch_stats = variables["params"], variables["batch_stats"]
        return training.make_logits_fn(model, params, batch_stats, compute_dtype=compute_dtype)(inputs)

    return logits


def evaluation_settings(config: ConfigDict) -> metrics.Settings:
    """What the configuration says about measuring. The number of candidates is the defense's."""
    named = {name: value for name, value in config.evaluation.items() if name in metrics.Settings._fields}
    candidates = {name: config.defense[name] or None for name in NONE_AS_ZERO}
    return metrics.Settings(**named, **candidates)


def measure(
    experiment: Experiment,
    state: training.TrainState,
    *,
    names: Sequence[str] = ("deepfool",),
    limit: int | None = None,
    quiet: bool = False,
    name: str = "",
) -> metrics.Summary:
    """Accuracy and the measurements of those names (`evaluation.NAMES`) on the test images, the first `limit` of them.

    Adds "epsilon_half", where half of the images have fallen under FGS, where "fgs" is among the names; None: nowhere.
    """
    config = experiment.config
    net = apply_fn(experiment.model, config.model.compute_dtype)
    net = net, {"params": state.params, "batch_stats": state.batch_stats}
    inputs, labels = experiment.test_inputs[:limit], experiment.data.test_labels[:limit]
    settings, quiet = evaluation_settings(config), quiet or not parallel.is_primary()
    shared = dict(batch_size=min(config.evaluation.batch_size, len(labels)), show_progress=not quiet, **DEVICES)
    shared["bounds"] = data.bounds(experiment.preprocessing) if config.evaluation.clip else None
    found = evaluation.measure(
        *net,
        inputs,
        labels,
        settings=settings,
        names=names,
        carlini_wagner_examples=config.evaluation.carlini_wagner_examples,
        to_images=data.make_to_images(experiment.preprocessing),
        description=f"{name:9} measuring",
        **shared,
    )
    if "fgs" in names:
        largest, text = settings.fgs_max_epsilon, f"{name:9} epsilon of 50 %"
        epsilon = evaluation.half_epsilon(*net, inputs, labels, max_epsilon=largest, description=text, **shared)
        found["epsilon_half"] = epsilon
    return found


def measure_once(experiment: Experiment, stage_name: str, state: training.TrainState) -> metrics.Summary:
    """The final measurement of a stage, read from the run directory if it was made before."""
    step = int(state.step)
    for line in run_log.read(experiment.workdir):
        if line["stage"] == stage_name and line["step"] == step and "measured" in line:
            return line["measured"]
    measured = measure(experiment, state, name=stage_name)
    run_log.append(experiment.workdir, {"stage": stage_name, "step": step, "measured": measured})
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
