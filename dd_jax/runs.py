"""A run: its reference is trained and measured, then defended and measured again.

A run directory holds

    config.json           the configuration
    preprocessing.npz     the input space, fitted on the training images
    metrics.jsonl         one line per logged interval, epoch and final measurement, each with its stage
    checkpoints/STAGE/    Orbax checkpoints of the stages "reference" and "defended"
    report.json           what was measured, and with what
    plots/                its curves, from evaluate.py
    tensorboard/STAGE/    the same for TensorBoard, where the configuration wants it

Every stage goes on from what the directory holds, so a run that was stopped is taken up by the same command.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax

from dd_jax import metrics, parallel, run_log, tensorboard, training
from dd_jax.checkpoints import Checkpoints
from dd_jax.experiment import (
    DEFENDED,
    REFERENCE,
    Experiment,
    Stage,
    first_state,
    given_reference,
    make_optimizer,
    make_stage,
)
from dd_jax.measuring import measure
from dd_jax.progress import progress

SECONDS_BETWEEN_CHECKPOINTS = 30
MOST_STEPS_PER_LINE, FEWEST_LINES = 50, 10  # Of metrics.jsonl.


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
    log_every = max(1, min(MOST_STEPS_PER_LINE, stage.num_steps // FEWEST_LINES))
    settings = dict(num_steps=stage.num_steps, seed=experiment.config.seed)
    feeding = experiment.feed.training(batch_size=stage.settings.batch_size, **settings)
    limit, last_saved = experiment.config.evaluation.epoch_examples, time.monotonic()
    bar = progress(
        f"{stage.name:9} training", stage.num_steps, "step", initial=int(state.step), disable=not parallel.is_primary()
    )
    folder, step = experiment.workdir / "tensorboard" / stage.name, int(state.step)
    wanted = experiment.config.tensorboard and parallel.is_primary()
    curves = tensorboard.open_curves(folder, step) if wanted else contextlib.nullcontext(lambda line: None)
    with bar, feeding as batch_of_step, curves as add_to_curves, parallel.Termination() as termination:

        def log_line(line: dict[str, Any]) -> None:
            log(experiment, line)
            add_to_curves(line)

        steps = training.fit(state, train_step, batch_of_step, log_every=log_every, **settings)
        for state, step, means in steps:
            bar.update()
            line = {"stage": stage.name, "step": step, "epoch": step / stage.steps_per_epoch}
            if means is not None:
                pace = input_pace(batch_of_step)
                bar.set_postfix_str(f"loss {means['loss']:.3f}, accuracy {means['correct']:.3f}{pace_text(pace)}")
                log_line(line | means | pace)
            if limit and step % stage.steps_per_epoch == 0:
                log_line(line | {"test": measure(experiment, state, limit=limit, quiet=True)})
            # Saved after the step's lines, so that none is missing where the run goes on from here.
            terminated = termination.asked_for(step)
            due = time.monotonic() - last_saved > SECONDS_BETWEEN_CHECKPOINTS
            if terminated or (means is not None and parallel.any_of_us(due)):
                saved.save(step, parallel.as_global(state))
                last_saved = time.monotonic()
            if terminated:
                raise parallel.Terminated(f"Asked to end; step {step} of the {stage.name} training is saved.")
    return state


def input_pace(batch_of_step: Callable) -> dict[str, Any]:
    """How fast images are decoded and used, and which could not be decoded; nothing for data in memory."""
    if not hasattr(batch_of_step, "pace"):
        return {}
    pace = batch_of_step.pace()._asdict()
    return {"input": pace | {"failures": len(batch_of_step.failures)}}


def pace_text(pace: dict[str, Any]) -> str:
    """The same for the progress bar: so that an accelerator that starves is seen."""
    if not pace:
        return ""
    of = pace["input"]
    failures = f", {of['failures']} undecodable" if of["failures"] else ""
    return f", {of['images_per_second']:.0f} images/s, waiting {of['waiting']:.0%}{failures}"


def log(experiment: Experiment, line: dict[str, Any]) -> None:
    """Appends a line to metrics.jsonl; one process does."""
    if parallel.is_primary():
        run_log.append(experiment.workdir, line)


def measure_once(experiment: Experiment, stage_name: str, state: training.TrainState) -> metrics.Summary:
    """The final measurement of a stage, read from the run directory if it was made before."""
    step = int(state.step)
    for line in run_log.read(experiment.workdir):
        if line["stage"] == stage_name and line["step"] == step and "measured" in line:
            return line["measured"]
    measured = measure(experiment, state, name=stage_name)
    log(experiment, {"stage": stage_name, "step": step, "measured": measured})
    return measured


def reference_state(experiment: Experiment) -> training.TrainState:
    """The reference net: restored from the run directory or from what the configuration names, else trained."""
    preprocessing_file = experiment.workdir / "preprocessing.npz"
    if parallel.is_primary() and not preprocessing_file.exists():
        experiment.preprocessing.save(preprocessing_file)
    given = given_reference(experiment)

    def start() -> training.TrainState:
        stage = make_stage(experiment, REFERENCE)
        if given is None:
            return first_state(experiment, stage)
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
