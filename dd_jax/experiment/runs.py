"""A run: its reference is trained and measured, then defended and measured again.

A run directory holds

    config.json           the configuration
    preprocessing.npz     the input space, fitted on the training images
    metrics.jsonl, checkpoints/, undecodable.jsonl, tensorboard/    see `dd_jax.training.loop`
    report.json           what was measured, and with what
    plots/, report.html   its curves, and everything in one file; from the commands

Every stage resumes from what the directory holds, so rerunning the command resumes a stopped run.
"""

import jax
import jax.numpy as jnp

from dd_jax import parallel, training
from dd_jax.evaluation import Summary
from dd_jax.experiment.build import FITTED, Run
from dd_jax.experiment.measuring import measure_state
from dd_jax.experiment.reporting import add_to_report, make_report
from dd_jax.results.report import (
    DEFENDED,
    REFERENCE,
    Report,
    forget_stage,
    has_figures,
    read_report,
)
from dd_jax.training import TrainState
from dd_jax.training.loop import StagePlan, latest_step, train_stage


def run_stages(run: Run) -> Report:
    """The whole run: reference, its measurement, fine-tuning with the defense, its measurement.

    Returns the report, which is in the run directory then.
    """
    reference = reference_state(run)
    measured = {REFERENCE: measure_once(run, REFERENCE, reference)}
    add_to_report(run, make_report(run, measured))
    defended = defended_state(run, reference)
    measured[DEFENDED] = measure_once(run, DEFENDED, defended)
    return add_to_report(run, make_report(run, measured))[0]


def reference_state(run: Run) -> TrainState:
    """The reference net: restored from the run directory or from what the configuration names, else
    trained.
    """
    file, plan = run.workdir / FITTED, run.stages[REFERENCE]
    if parallel.is_primary() and not file.exists():
        run.preprocessing.save(file)
    if run.load_reference is None or latest_step(run.workdir, REFERENCE) is not None:
        return _trained(run, plan)
    given = run.load_reference()

    def make_state() -> TrainState:
        num_steps = jnp.asarray(plan.num_steps, jnp.int32)  # Nothing is left to train.
        return plan.with_weights(*given)._replace(step=num_steps)

    return _trained(run, plan._replace(make_state=make_state))


def defended_state(run: Run, reference: TrainState) -> TrainState:
    """The net that is defended, from the reference net on: restored from the run directory, else
    trained.
    """
    plan, averaged = run.stages[DEFENDED], training.averaged(reference)
    # Copies, since training donates its state.
    weights = jax.tree.map(jnp.copy, (averaged.params, averaged.batch_stats))
    return _trained(run, plan._replace(make_state=lambda: plan.with_weights(*weights)))


def _trained(run: Run, plan: StagePlan) -> TrainState:
    """The stage trained to its end; what was measured of an earlier net of it is forgotten."""

    def forget() -> None:
        if parallel.is_primary():
            forget_stage(run.workdir, plan.name)
        parallel.wait_for_all(f"forgot {plan.name}")

    return train_stage(plan, run.workdir, forget)


def measure_once(run: Run, stage_name: str, state: TrainState) -> Summary:
    """The final measurement of a stage, read from the report if it was made before."""
    report = read_report(run.workdir)
    if report is not None and has_figures(report, stage_name, ("deepfool",)):
        return report.measured[stage_name]
    return measure_state(run.evaluator, state, name=stage_name)
