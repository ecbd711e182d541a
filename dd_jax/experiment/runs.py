"""A run: its reference is trained and measured, then defended and measured again.

A run directory holds

    config.json           the configuration
    preprocessing.npz     the input space, fitted on the training images
    metrics.jsonl         a line per logged interval, epoch and final measurement, with its stage
    checkpoints/STAGE/    Orbax checkpoints of the stages "reference" and "defended"
    undecodable.jsonl     training images that could not be decoded: stage, step, name, reason; of
                          several processes each has its undecodable_process_I.jsonl; a run that
                          went on may name one twice
    report.json           what was measured, and with what
    plots/                its curves, from evaluate.py
    tensorboard/STAGE/    the same for TensorBoard, where the configuration wants it

Every stage goes on from what the directory holds, so a run that was stopped is taken up by the same
command.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable
from typing import Any

import jax

from dd_jax import log, parallel, training
from dd_jax.evaluation import metrics
from dd_jax.experiment.build import (
    DEFENDED,
    REFERENCE,
    Experiment,
    Stage,
    first_state,
    given_reference,
    make_optimizer,
    make_stage,
)
from dd_jax.experiment.measuring import measure
from dd_jax.log import progress
from dd_jax.training.checkpoints import Checkpoints

SECONDS_BETWEEN_CHECKPOINTS = 30  # At least, where a line of metrics.jsonl has just been written.
MOST_SECONDS_BETWEEN_CHECKPOINTS = (
    300  # At most, but for one step; the line that follows is of the steps after it alone.
)
# Of the processes to each other: whether one was asked to end, or should save.
SECONDS_BETWEEN_QUESTIONS = 1.0
MOST_STEPS_PER_LINE, FEWEST_LINES = 50, 10  # Of metrics.jsonl.


def train(
    experiment: Experiment, stage_name: str, start: Callable[[], training.TrainState]
) -> training.TrainState:
    """Trains one stage to its end, from its latest checkpoint if there is one and from `start()`
    otherwise.

    Terminated where the process was asked to end (SIGTERM); the state is saved then.
    """
    stage = make_stage(experiment, stage_name)
    with Checkpoints(experiment.workdir / "checkpoints" / stage_name) as saved:
        state = start() if saved.latest() is None else saved.restore(jax.eval_shape(start))
        first_step = int(state.step)
        if parallel.is_primary():
            log.forget_lines_after(experiment.workdir, stage_name, first_step)
        state = parallel.replicate(state)
        if first_step < stage.num_steps:
            settings, compute_dtype = stage.settings, experiment.config.model.compute_dtype
            options = dict(
                accumulation_steps=settings.accumulation_steps, compute_dtype=compute_dtype
            )
            train_step = training.make_train_step(
                experiment.model, make_optimizer(stage), stage.defense, **options
            )
            state = _train_with_progress(experiment, stage, state, train_step, saved)
        saved.save(int(state.step), parallel.as_global(state))
    return state


def _train_with_progress(
    experiment: Experiment,
    stage: Stage,
    state: training.TrainState,
    train_step: Callable,
    saved: Checkpoints,
) -> training.TrainState:
    log_every = max(1, min(MOST_STEPS_PER_LINE, stage.num_steps // FEWEST_LINES))
    settings = dict(num_steps=stage.num_steps, seed=experiment.config.seed)
    feeding = experiment.feed.training(batch_size=stage.settings.batch_size, **settings)
    limit, latest = experiment.config.evaluation.epoch_examples, {}
    bar = progress(
        f"{stage.name:9} training",
        stage.num_steps,
        "step",
        initial=int(state.step),
        disable=not parallel.is_primary(),
    )
    folder, step = experiment.workdir / "tensorboard" / stage.name, int(state.step)
    wanted = experiment.config.tensorboard and parallel.is_primary()
    curves = log.open_curves(folder, step) if wanted else contextlib.nullcontext(lambda line: None)

    def measured_step(*arguments: Any) -> tuple[training.TrainState, dict[str, Any]]:
        state, measured = train_step(*arguments)
        latest.update(measured)
        return state, measured

    with (
        bar,
        feeding as batch_of_step,
        curves as add_to_curves,
        parallel.Termination() as termination,
    ):

        def note(line: dict[str, Any]) -> None:
            log_line(experiment, line)
            add_to_curves(line)

        pauses, undecodable = Pauses(), Undecodable(experiment, stage.name)
        steps = training.fit(state, measured_step, batch_of_step, log_every=log_every, **settings)
        for state, step, means in steps:
            bar.update()
            line = {"stage": stage.name, "step": step, "epoch": step / stage.steps_per_epoch}
            if means is not None:
                pace = input_pace(batch_of_step)
                bar.set_postfix_str(
                    f"loss {means['loss']:.3f}, accuracy {means['correct']:.3f}{pace_text(pace)}"
                )
                note(line | means | pace)
                undecodable.note(step, batch_of_step)
            if limit and step % stage.steps_per_epoch == 0:
                note(line | {"test": measure(experiment, state, limit=limit, quiet=True)})
            # Saved after the step's lines, so that none is missing where the run goes on from here.
            to_save, to_end = pauses.after(
                step, is_line=means is not None, asked=termination.asked_for()
            )
            if to_save:
                check_finite(latest["loss"], step)
                undecodable.note(step, batch_of_step)
                saved.save(step, parallel.as_global(state))
            if to_end:
                raise parallel.Terminated(
                    f"Asked to end; step {step} of the {stage.name} training is saved."
                )
    return state


class Pauses:
    """After which steps of a training its state is saved, and after which it ends: the same ones in
    every process.

    One process looks after every step. Several, since they wait for each other and for their
    devices to agree, do after every line of metrics.jsonl and, by the pace that the primary process
    had before, about once a second.
    """

    def __init__(self) -> None:
        self._saved = self._agreed = time.monotonic()
        self._agreed_step: int | None = None
        self._next_step, self._seconds_per_step = 0, math.inf

    def after(self, step: int, *, is_line: bool, asked: bool) -> tuple[bool, bool]:
        """Whether to save the state after this step, and whether to end then, as this process or
        another was asked to.
        """
        _, num_processes = parallel.my_share()
        if num_processes > 1 and not is_line and step < self._next_step:
            return False, False
        said = parallel.of_all(
            [float(asked), time.monotonic() - self._saved, self._seconds_per_step]
        )
        to_end, (_, seconds_since, seconds_per_step) = bool(said[:, 0].any()), said[0]
        now, before = time.monotonic(), self._agreed_step
        self._next_step = step + max(
            1, int(SECONDS_BETWEEN_QUESTIONS / max(seconds_per_step, 1e-6))
        )
        self._seconds_per_step = (
            math.inf if before is None else (now - self._agreed) / (step - before)
        )
        self._agreed, self._agreed_step = now, step
        most = SECONDS_BETWEEN_CHECKPOINTS if is_line else MOST_SECONDS_BETWEEN_CHECKPOINTS
        to_save = to_end or bool(seconds_since > most)
        if to_save:
            self._saved = now
        return to_save, to_end


def check_finite(loss: Any, step: int) -> None:
    """DivergenceError where a step's loss is not a finite number: such a state is not worth
    saving.
    """
    if not math.isfinite(float(loss)):
        raise training.DivergenceError(
            f"The loss is not finite at step {step}: lower the learning rate or the penalty's "
            f"weight."
        )


class Undecodable:
    """Writes which training images could not be decoded by this process."""

    def __init__(self, experiment: Experiment, stage_name: str) -> None:
        index, count = parallel.my_share()
        name = "undecodable.jsonl" if count == 1 else f"undecodable_process_{index}.jsonl"
        self._path, self._stage_name, self._num_noted = experiment.workdir / name, stage_name, 0

    def note(self, step: int, batch_of_step: Callable) -> None:
        """Adds those that have failed since it was called last, in the steps up to this; none for
        data in memory.
        """
        failures = list(getattr(batch_of_step, "failures", {}).items())[self._num_noted :]
        if failures:
            lines = [
                dict(stage=self._stage_name, step=step, name=name, reason=reason)
                for name, reason in failures
            ]
            with self._path.open("a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
            self._num_noted += len(failures)


def input_pace(batch_of_step: Callable) -> dict[str, Any]:
    """How fast images are decoded and used, and which could not be decoded; nothing for data in
    memory.
    """
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


def log_line(experiment: Experiment, line: dict[str, Any]) -> None:
    """Appends a line to metrics.jsonl; one process does."""
    if parallel.is_primary():
        log.append_line(experiment.workdir, line)


def measure_once(
    experiment: Experiment, stage_name: str, state: training.TrainState
) -> metrics.Summary:
    """The final measurement of a stage, read from the run directory if it was made before."""
    step = int(state.step)
    for line in log.read_lines(experiment.workdir):
        if line["stage"] == stage_name and line["step"] == step and "measured" in line:
            return line["measured"]
    measured = measure(experiment, state, name=stage_name)
    log_line(experiment, {"stage": stage_name, "step": step, "measured": measured})
    return measured


def reference_state(experiment: Experiment) -> training.TrainState:
    """The reference net: restored from the run directory or from what the configuration names, else
    trained.
    """
    preprocessing_file = experiment.workdir / "preprocessing.npz"
    if parallel.is_primary() and not preprocessing_file.exists():
        experiment.preprocessing.save(preprocessing_file)
    given = given_reference(experiment)

    def start() -> training.TrainState:
        stage = make_stage(experiment, REFERENCE)
        if given is None:
            return first_state(experiment, stage)
        state = training.fresh_state(make_optimizer(stage), *given)
        # Nothing left to train.
        return state._replace(step=jax.numpy.asarray(stage.num_steps, jax.numpy.int32))

    return train(experiment, REFERENCE, start)


def run(experiment: Experiment) -> dict[str, metrics.Summary]:
    """The whole run: reference, its measurement, fine-tuning with the defense, its measurement.
    Returns both.
    """
    reference = reference_state(experiment)
    before = measure_once(experiment, REFERENCE, reference)
    optimizer = make_optimizer(make_stage(experiment, DEFENDED))
    # Training donates its state.
    weights = jax.tree.map(jax.numpy.copy, (reference.params, reference.batch_stats))
    defended = train(experiment, DEFENDED, lambda: training.fresh_state(optimizer, *weights))
    return {REFERENCE: before, DEFENDED: measure_once(experiment, DEFENDED, defended)}
