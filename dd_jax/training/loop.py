"""Trains one stage to its end, with checkpoints, metrics.jsonl and a progress bar.

A stage is a plan: what is trained, for how long, on which batches. Training resumes from the latest
checkpoint of the run directory. A run directory holds, of this module,

    metrics.jsonl         a line per logged interval and epoch, with its stage
    checkpoints/STAGE/    Orbax checkpoints
    undecodable.jsonl     training images that could not be decoded: stage, step, name, reason. Each
                          of several processes has its own undecodable_process_I.jsonl. A resumed
                          run may name an image twice.
    tensorboard/STAGE/    the curves for TensorBoard, where the plan asks for them
    lock                  keeps a second process from training there
"""

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax

from dd_jax import log, parallel
from dd_jax.data import Batch
from dd_jax.log import progress
from dd_jax.training.checkpoints import Checkpoints
from dd_jax.training.exclusive import alone_in
from dd_jax.training.train_step import DivergenceError, TrainState, fit

SECONDS_BETWEEN_CHECKPOINTS = 30  # At least, where a line of metrics.jsonl has just been written.
# At most, but for one step; the line that follows is of the steps after it alone.
MOST_SECONDS_BETWEEN_CHECKPOINTS = 300
# Of the processes to each other: whether one was asked to end, or should save.
SECONDS_BETWEEN_QUESTIONS = 1.0
MOST_STEPS_PER_LINE, FEWEST_LINES = 50, 10  # Of metrics.jsonl.

BatchOfStep = Callable[[int], Batch]
Line = dict[str, Any]


class StagePlan(NamedTuple):
    """A training of the net, with everything decided.

    make_state: the first state. with_weights: the same with given parameters and batch statistics.
    make_step: the training step, compiled for all devices.
    open_batches: a context manager around the function from a step's number to its batch.
    measure_epoch: what to measure after every epoch, None for nothing. write_curves: whether to
    write them for TensorBoard.
    """

    name: str
    num_steps: int
    steps_per_epoch: int
    seed: int
    make_state: Callable[[], TrainState]
    with_weights: Callable[[Any, Any], TrainState]
    make_step: Callable[[], Callable]
    open_batches: Callable[[], AbstractContextManager[BatchOfStep]]
    measure_epoch: Callable[[TrainState], Line] | None = None
    write_curves: bool = False


def train_stage(
    plan: StagePlan, workdir: pathlib.Path, on_training: Callable[[], None] = lambda: None
) -> TrainState:
    """Trains a stage to its end: from its latest checkpoint if there is one, else from the start.

    `on_training` is called before the first step, if there is one to take. Terminated where the
    process was asked to end (SIGTERM); the state is saved then. OccupiedError where another process
    is training there.
    """
    alone = alone_in(workdir) if parallel.is_primary() else contextlib.nullcontext()
    with alone, open_checkpoints(workdir, plan.name) as saved:
        is_new = saved.latest() is None
        state = plan.make_state() if is_new else saved.restore(jax.eval_shape(plan.make_state))
        first_step = int(state.step)
        if parallel.is_primary():
            last_line = _last_line(plan, workdir, first_step)
            log.forget_lines_after(workdir, plan.name, first_step, last_line=last_line)
        state = parallel.replicate(state)
        if first_step < plan.num_steps:
            on_training()
            state = _train_with_progress(plan, workdir, state, saved)
        saved.save(int(state.step), state)
    return state


def open_checkpoints(
    workdir: pathlib.Path, stage_name: str, *, read_only: bool = False
) -> Checkpoints:
    """The checkpoints of a stage in a run directory."""
    return Checkpoints(workdir / "checkpoints" / stage_name, read_only=read_only)


def latest_step(workdir: pathlib.Path, stage_name: str) -> int | None:
    """The step of a stage's latest checkpoint in a run directory; None if there is none."""
    if not (workdir / "checkpoints" / stage_name).is_dir():
        return None
    with open_checkpoints(workdir, stage_name, read_only=True) as saved:
        return saved.latest()


def _train_with_progress(
    plan: StagePlan, workdir: pathlib.Path, state: TrainState, saved: Checkpoints
) -> TrainState:
    step = int(state.step)
    latest: dict[str, Any] = {}
    train_step = _remembering(plan.make_step(), latest)
    with contextlib.ExitStack() as stack:
        batch_of_step = stack.enter_context(plan.open_batches())
        journal = stack.enter_context(_open_journal(plan, workdir, step, batch_of_step))
        termination = stack.enter_context(parallel.Termination())
        options = dict(num_steps=plan.num_steps, seed=plan.seed, log_every=_steps_per_line(plan))
        pauses, steps = Pauses(), fit(state, train_step, batch_of_step, **options)
        for state, step, means in steps:
            journal.note_step(state, step, means)
            # Saved after the step's lines, so that none is missing where the run resumes from here.
            asked, is_line = termination.asked_for(), means is not None
            to_save, to_end = pauses.after(step, is_line=is_line, asked=asked)
            if to_save:
                check_finite(latest["loss"], step)
                journal.note_undecodable(step)
                saved.save(step, state)
            if to_end:
                raise parallel.Terminated(
                    f"Asked to end; step {step} of the {plan.name} training is saved."
                )
    return state


def _last_line(plan: StagePlan, workdir: pathlib.Path, step: int) -> int | None:
    """The step of the last line that was written up to a saved step; None where there need be
    none, as of a net that was loaded and not trained.
    """
    if step == plan.num_steps:
        is_trained = any(line["stage"] == plan.name for line in log.read_lines(workdir))
        return step if is_trained else None
    return step - step % _steps_per_line(plan) or None


def _steps_per_line(plan: StagePlan) -> int:
    return max(1, min(MOST_STEPS_PER_LINE, plan.num_steps // FEWEST_LINES))


def _remembering(train_step: Callable, latest: Line) -> Callable:
    """The step, which also leaves its metrics in `latest`: they are looked at before a save."""

    def step(*arguments: Any) -> tuple[TrainState, Line]:
        state, measured = train_step(*arguments)
        latest.update(measured)
        return state, measured

    return step


class Journal:
    """What is written down of a stage while it is trained: lines, curves, progress, bad images."""

    def __init__(
        self,
        plan: StagePlan,
        workdir: pathlib.Path,
        bar: Any,
        add_to_curves: Callable[[Line], None],
        batch_of_step: BatchOfStep,
    ) -> None:
        self._plan, self._workdir, self._bar = plan, workdir, bar
        self._add_to_curves, self._batch_of_step = add_to_curves, batch_of_step
        index, count = parallel.my_share()
        name = "undecodable.jsonl" if count == 1 else f"undecodable_process_{index}.jsonl"
        self._undecodable, self._num_noted = workdir / name, 0

    def note_step(self, state: TrainState, step: int, means: Mapping[str, float] | None) -> None:
        """Moves the bar, and writes what is due: an interval's means, an epoch's measurement."""
        plan = self._plan
        self._bar.update()
        epoch = step / plan.steps_per_epoch
        line: Line = {"stage": plan.name, "step": step, "epoch": epoch}
        if means is not None:
            pace = input_pace(self._batch_of_step)
            text = f"loss {means['loss']:.3f}, accuracy {means['correct']:.3f}{pace_text(pace)}"
            self._bar.set_postfix_str(text)
            self._write(line | dict(means) | pace)
            self.note_undecodable(step)
        if plan.measure_epoch is not None and step % plan.steps_per_epoch == 0:
            self._write(line | {"test": plan.measure_epoch(state)})

    def note_undecodable(self, step: int) -> None:
        """Writes the images that this process could not decode, in the steps up to this one, and
        has not written yet; none for data in memory.
        """
        failures = getattr(self._batch_of_step, "failures", {})
        new = list(failures.items())[self._num_noted :]
        if new:
            lines = [
                {"stage": self._plan.name, "step": step, "name": name, "reason": reason}
                for name, reason in new
            ]
            with self._undecodable.open("a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
            self._num_noted += len(new)

    def _write(self, line: Line) -> None:
        if parallel.is_primary():
            log.append_line(self._workdir, line)
        self._add_to_curves(line)


@contextlib.contextmanager
def _open_journal(
    plan: StagePlan, workdir: pathlib.Path, step: int, batch_of_step: BatchOfStep
) -> Iterator[Journal]:
    options = dict(initial=step, disable=not parallel.is_primary())
    bar = progress(f"{plan.name:9} training", plan.num_steps, "step", **options)
    curves: AbstractContextManager[Callable[[Line], None]] = contextlib.nullcontext(
        lambda line: None
    )
    if plan.write_curves and parallel.is_primary():
        curves = log.open_curves(workdir / "tensorboard" / plan.name, step)
    with bar, curves as add_to_curves:
        yield Journal(plan, workdir, bar, add_to_curves, batch_of_step)


class Pauses:
    """After which steps of a training its state is saved, and after which it ends: the same ones in
    every process.

    One process looks after every step. Several processes wait for each other and for their devices
    to agree. They look after every line of metrics.jsonl and, by the pace that the primary process
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
        seconds_since_save = time.monotonic() - self._saved
        said = parallel.of_all([float(asked), seconds_since_save, self._seconds_per_step])
        to_end, (_, seconds_since, seconds_per_step) = bool(said[:, 0].any()), said[0]
        now, before = time.monotonic(), self._agreed_step
        steps_until_question = int(SECONDS_BETWEEN_QUESTIONS / max(seconds_per_step, 1e-6))
        self._next_step = step + max(1, steps_until_question)
        since = math.inf if before is None else (now - self._agreed) / (step - before)
        self._seconds_per_step = since
        self._agreed, self._agreed_step = now, step
        most = SECONDS_BETWEEN_CHECKPOINTS if is_line else MOST_SECONDS_BETWEEN_CHECKPOINTS
        to_save = to_end or bool(seconds_since > most)
        if to_save:
            self._saved = now
        return to_save, to_end


def check_finite(loss: Any, step: int) -> None:
    """DivergenceError where a step's loss is not a finite number: such a state is not saved."""
    if not math.isfinite(float(loss)):
        raise DivergenceError(
            f"The loss is not finite at step {step}: lower the learning rate or the penalty's "
            "weight."
        )


def input_pace(batch_of_step: Any) -> Line:
    """How fast images are decoded and used, and how many could not be decoded; nothing for data in
    memory.
    """
    if not hasattr(batch_of_step, "pace"):
        return {}
    pace = batch_of_step.pace()._asdict()
    return {"input": pace | {"failures": len(batch_of_step.failures)}}


def pace_text(pace: Line) -> str:
    """The same for the progress bar, so that a starving accelerator is noticed."""
    if not pace:
        return ""
    of = pace["input"]
    failures = f", {of['failures']} undecodable" if of["failures"] else ""
    return f", {of['images_per_second']:.0f} images/s, waiting {of['waiting']:.0%}{failures}"
