"""One run for benchmarks/reliability.py: train, then evaluate, with a checkpoint after every line.

    python benchmarks/reliability_run.py WORKDIR [--kill_at N] [--events FILE] [--seconds S]
        [--skip_train] [--skip_evaluate] [ARGUMENT ...]

prints a digest of all that must be bitwise the same however often the run was killed. `--kill_at`:
the process kills itself (SIGKILL) before its N-th operation on a file of the run directory that
changes something. `--events`: where to write these operations. `--seconds`: a pause before every
step, so that there is time to be killed from outside. ARGUMENT: of `dd-jax train`.
"""

import argparse
import hashlib
import importlib
import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
OVERRIDES = (
    "data.train_limit=200",
    "data.test_limit=45",
    "reference.num_epochs=4",
    "reference.batch_size=50",
    "reference.learning_rate=0.05",
    "fine_tuning.num_epochs=2",
    "fine_tuning.learning_rate=0.002",
    "fine_tuning.batch_size=50",
    "defense.num_steps=2",
    "defense.correct_scale=10",
    "evaluation.batch_size=25",
    "evaluation.num_steps=5",
    "evaluation.epoch_examples=25",
)
STEPS_PER_LINE = 2
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")


def watch_files(workdir: str, kill_at: int | None, events: str | None) -> None:
    """Counts the operations that change something in the run directory, before they happen."""
    count = 0
    record = None if events is None else pathlib.Path(events).open("w")  # noqa: SIM115

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        is_write = event == "open" and arguments[2] is not None
        is_write = is_write and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (is_write or event in CHANGES) or workdir not in str(arguments[:2]):
            return
        count += 1
        if record is not None:
            record.write(f"{count} {event} {arguments[0]}\n")
            record.flush()
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def digest(workdir: pathlib.Path) -> dict[str, str]:
    """What must be the same: every bit of both nets and of their optimizers, the lines, the
    figures.
    """
    import jax
    import numpy as np

    from dd_jax.experiment import build
    from dd_jax.results.report import read_report

    run, found = build.open_run(workdir), {}
    for stage in run.stages:
        sha = hashlib.sha256()
        for leaf in jax.tree.leaves(build.restore_state(run, stage)):
            sha.update(np.asarray(leaf).tobytes())
        found[stage] = sha.hexdigest()
    figures = json.dumps(read_report(workdir).measured, sort_keys=True).encode()
    found["metrics.jsonl"] = hashlib.sha256((workdir / "metrics.jsonl").read_bytes()).hexdigest()
    return found | {"report.json": hashlib.sha256(figures).hexdigest()}


def load() -> None:
    """Imports all that a run imports; JAX does not start."""
    names = ("dd_jax.commands.train", "dd_jax.commands.evaluate", "dd_jax.experiment.pages")
    for name in (*names, "matplotlib.pyplot", "sklearn.datasets"):
        importlib.import_module(name)


def main(arguments: Sequence[str]) -> None:
    """Trains and evaluates, see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--kill_at", type=int)
    parser.add_argument("--events")
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--skip_train", action="store_true")
    parser.add_argument("--skip_evaluate", action="store_true")
    chosen, more = parser.parse_known_args(arguments)
    from dd_jax import commands, data
    from dd_jax.commands import train as train_command
    from dd_jax.training import loop

    loop.MOST_STEPS_PER_LINE, loop.FEWEST_LINES = STEPS_PER_LINE, 1
    loop.SECONDS_BETWEEN_CHECKPOINTS = -1
    training_batch = data.training_batch

    def slow_batch(*arguments, **options):
        time.sleep(chosen.seconds)
        return training_batch(*arguments, **options)

    data.training_batch = slow_batch
    watch_files(str(chosen.workdir), chosen.kill_at, chosen.events)
    overrides = [f"--config.{override}" for override in OVERRIDES]
    train = ["--config", str(ROOT / "configs/digits_mlp.py"), "--workdir", str(chosen.workdir)]
    if chosen.skip_evaluate:  # The page takes as long as the rest.
        train_command.write_page = lambda *_: ""
    if not chosen.skip_train:
        commands.run("train", [*train, *overrides, *more], commands.SCRIPTS)
    if not chosen.skip_evaluate:
        evaluate = ["--workdir", str(chosen.workdir), "--measure", "deepfool", "fgsm"]
        commands.run("evaluate", evaluate, commands.SCRIPTS)
    print(json.dumps(digest(chosen.workdir)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
