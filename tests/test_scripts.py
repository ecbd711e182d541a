"""train.py and evaluate.py as they are run: what they leave and print, and one sentence for what
the user can mend.
"""

import contextlib
import io
import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from dd_jax import data, xla
from dd_jax.experiment import runs

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = ROOT / "configs/digits_mlp.py"
TINY = (
    "data.train_limit=200",
    "data.test_limit=45",
    "reference.num_epochs=3",
    "reference.batch_size=50",
    "reference.learning_rate=0.05",
    "defense.num_steps=2",
    "defense.correct_scale=10",
    "fine_tuning.num_epochs=2",
    "fine_tuning.learning_rate=0.002",
    "fine_tuning.batch_size=50",
    "evaluation.batch_size=25",
    "evaluation.num_steps=5",
)


@pytest.fixture(autouse=True, scope="module")
def at_the_root():
    """Where the commands in the documentation are given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.syspath_prepend(ROOT)
        yield


def run(script, *arguments):
    """Runs a script in this process as a shell would; returns its exit code, and what it says on
    stdout and stderr.

    Progress bars are left out of the latter.
    """
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        # JAX has started: the flags are conftest's, and there is nothing to say of them.
        patch.setattr(xla, "set_flags", lambda: xla.Settings((), (), ""))
        try:
            code = __import__(script).main() or 0
        except SystemExit as exit_:
            code = exit_.code
            if isinstance(code, str):  # As the interpreter does.
                code = print(code, file=err) or 1
    said = [line for line in err.getvalue().splitlines() if line and not re.search(r"\d%\|", line)]
    return code, out.getvalue(), "\n".join(said)


def overrides(*changes):
    return [f"--config.{override}" for override in (*TINY, *changes)]


def contents(directory):
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run directory, and what train.py printed while it made it."""
    workdir = tmp_path_factory.mktemp("finished") / "runs" / "tiny"
    code, out, err = run("train", "--config", CONFIG, "--workdir", workdir, *overrides())
    assert (code, err) == (0, "")
    return workdir, out


# What a run leaves and prints


def test_training_leaves_everything_in_the_run_directory(finished):
    workdir, _ = finished
    assert sorted(path.name for path in workdir.iterdir()) == [
        "checkpoints",
        "config.json",
        "lock",
        "metrics.jsonl",
        "plots",
        "preprocessing.npz",
        "report.html",
        "report.json",
    ]
    assert sorted(str(path.relative_to(workdir)) for path in workdir.glob("checkpoints/*/*")) == [
        "checkpoints/defended/8",
        "checkpoints/reference/12",
    ]
    config = json.loads((workdir / "config.json").read_text())
    assert config["reference"]["num_epochs"] == 3 and config["model"] == {
        "name": "mlp",
        "compute_dtype": "float32",
    }
    steps = [
        json.loads(line)["step"]
        for line in (workdir / "metrics.jsonl").read_text().splitlines()
        if "loss" in line
    ]
    assert steps == [*range(1, 13), *range(1, 9)]  # A short training logs every step.


def test_training_prints_the_table_of_the_report(finished):
    workdir, out = finished
    report = json.loads((workdir / "report.json").read_text())
    lines = out.splitlines()
    assert lines[0] == report["data"] and lines[1] == f"mlp, deep_defense; run directory {workdir}"
    assert lines[-1] == f"written to {workdir / 'report.json'}, report.html and plots/"
    for name, stage in (("reference", "reference"), ("deep_defense", "defended")):
        figures = report["measured"][stage]
        shown = [f"{figures['accuracy']:.2%}", f"{figures['rho_l2']:.4f}", f"{figures['l2']:.3f}"]
        assert [name, *shown, f"{figures['deepfool_success']:.2%}"] in [
            line.split() for line in lines
        ]
        assert figures["num_examples"] == 45
    assert (
        report["measured"]["defended"]["rho_l2"] > 1.1 * report["measured"]["reference"]["rho_l2"]
    )


def test_the_same_command_again_changes_nothing(finished):
    workdir, out = finished
    before = contents(workdir)
    assert run("train", "--config", CONFIG, "--workdir", workdir, *overrides()) == (0, out, "")
    assert contents(workdir) == before


def test_evaluating_measures_the_same_again_wherever_the_run_lies(finished, tmp_path):
    workdir, _ = finished
    moved = shutil.copytree(workdir, tmp_path / "moved")
    (moved / "report.json").unlink()
    before = contents(moved)
    code, out, err = run("evaluate", "--workdir", moved, "--measure", "deepfool")
    assert (code, err) == (0, "")
    assert json.loads((moved / "report.json").read_text()) == json.loads(
        (workdir / "report.json").read_text()
    )
    written = f"written to {moved / 'report.json'}, report.html and plots/"
    assert out.splitlines()[-1] == written and "deep_defense" in out
    assert {path.name for path in (moved / "plots").iterdir()} == {
        f"{name}.{kind}" for name in ("single_run", "fooling_examples") for kind in ("png", "pdf")
    }
    # The page names the directory, in the commands that make the run again.
    page = (workdir / "report.html").read_text().replace(str(workdir), str(moved))
    again = {moved / "report.json": (workdir / "report.json").read_bytes()}
    assert contents(moved) == before | again | {moved / "report.html": page.encode()}


def test_the_default_run_directory_is_named_after_the_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nothing = ("reference.num_epochs=0", "fine_tuning.num_epochs=0")
    code, out, err = run("train", "--config", CONFIG, *overrides(*nothing))
    assert (code, err) == (0, "") and (tmp_path / "runs/digits_mlp/report.json").exists()
    assert "The reference net has random weights: reference.source is empty" in out
    measured = json.loads((tmp_path / "runs/digits_mlp/report.json").read_text())["measured"]
    assert measured["reference"] == measured["defended"]


# What the user can mend


def refused(directory, script, *arguments):
    """The one sentence on stderr; the exit code is 1, nothing is printed and nothing in the
    directory is touched.
    """
    before = contents(directory)
    code, out, err = run(script, *arguments)
    assert code == 1 and err.startswith("error: ") and "\n" not in err, err
    assert contents(directory) == before
    return err.removeprefix("error: ")


@pytest.mark.parametrize(
    "change, said",
    {
        "defense.nope=1": "There is no field 'defense.nope' in the configuration; did you mean ",
        "reference.batch_size=abc": "reference.batch_size is 'abc'; it must be a whole number",
        "defense.name=clean": "The defense 'clean' does not take defense.num_steps (which is for "
        "adversarial_deepfool, ",
        "seed=1.5": "seed is '1.5'; it must be a whole number",
        "model.name=vgg": "model.name is 'vgg'; it must be one of mlp, ",
        "fine_tuning.batch_size=201": "fine_tuning.batch_size is 201, but there are only 200 "
        "training examples",
        "reference.source=runs/nope": "reference.source is 'runs/nope'; it must be a run directory "
        "or a file of weights",
    }.items(),
)
def test_a_wrong_configuration_costs_one_sentence_and_makes_nothing(tmp_path, change, said):
    arguments = ("--config", CONFIG, "--workdir", tmp_path / "run", *overrides(change))
    assert said in refused(tmp_path, "train", *arguments)


def test_a_wrong_file_or_flag_costs_one_sentence_and_makes_nothing(tmp_path):
    workdir = ("--workdir", tmp_path / "run")
    assert "no configuration file configs/nope.py" in refused(
        tmp_path, "train", "--config", "configs/nope.py", *workdir
    )
    assert "'--workdr'" in refused(
        tmp_path, "train", "--config", CONFIG, "--workdr", tmp_path / "run"
    )
    assert "'--configs.seed=1'" in refused(
        tmp_path, "train", "--config", CONFIG, *workdir, "--configs.seed=1"
    )
    for arguments in ((), ("--workdir",), ("--config",)):
        code, _, err = run("train", *arguments)
        assert code == 2 and "train.py: error: " in err.splitlines()[-1] and "Traceback" not in err


def test_missing_data_costs_one_sentence_and_makes_nothing(tmp_path):
    arguments = (
        "--config",
        "configs/mnist_mlp.py",
        "--workdir",
        tmp_path / "run",
        "--data_dir",
        "/nonexistent",
    )
    message = refused(tmp_path, "train", *arguments)
    assert (
        "mnist is not in /nonexistent" in message
        and "python -m dd_jax.data mnist --data_dir /nonexistent" in message
    )


def test_a_directory_of_something_else_is_left_alone(finished, tmp_path):
    workdir, _ = finished
    theirs = refused(
        workdir, "train", "--config", CONFIG, "--workdir", workdir, *overrides("seed=5")
    )
    assert "belongs to another configuration: seed (0 there, 5 here)" in theirs
    # Of images that the preprocessing there does not take.
    other_shape = shutil.copytree(workdir, tmp_path / "run")
    data.fit("mean_image", np.zeros((1, 28, 28, 1), np.uint8)).save(
        other_shape / "preprocessing.npz"
    )
    arguments = ("--config", CONFIG, "--workdir", other_shape, *overrides("model.name=convnet"))
    assert "model.name ('mlp' there, 'convnet' here)" in refused(tmp_path, "train", *arguments)
    (tmp_path / "file").write_text("precious")
    for directory in (tmp_path, tmp_path / "file"):
        message = refused(
            tmp_path, "train", "--config", CONFIG, "--workdir", directory, *overrides()
        )
        assert "is not a run directory" in message
    assert "cannot be made" in refused(
        tmp_path, "train", "--config", CONFIG, "--workdir", tmp_path / "file/run"
    )


def test_evaluating_what_is_no_finished_run_costs_one_sentence(finished, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        assert f"{path} is not a run directory" in refused(tmp_path, "evaluate", "--workdir", path)
    run_directory = shutil.copytree(finished[0], tmp_path / "run")
    (run_directory / "report.json").unlink()
    # As they were on the way: the last stage is looked at last.
    for folder, stage in (("defended/8", "defended"), ("reference/12", "reference")):
        shutil.rmtree(run_directory / "checkpoints" / folder)
        message = refused(tmp_path, "evaluate", "--workdir", run_directory)
        said = f"{run_directory} has no finished {stage} net; rerun train.py on it to its end."
        assert said in message
    shutil.rmtree(run_directory / "checkpoints")
    assert "has no finished reference net" in refused(
        tmp_path, "evaluate", "--workdir", run_directory
    )


def test_a_training_that_diverges_names_the_steps_and_saves_nothing_of_them(tmp_path):
    arguments = (
        "--config",
        CONFIG,
        "--workdir",
        tmp_path,
        *overrides("reference.learning_rate=1e30"),
    )
    for _ in range(2):  # Again from the start: no checkpoint holds what diverged.
        code, _, err = run("train", *arguments)
        assert code == 1 and re.match(
            r"error: The loss is not finite between steps \d and \d: lower the learning", err
        )
        assert (
            not list(tmp_path.glob("checkpoints/*/*"))
            and "NaN" not in (tmp_path / "metrics.jsonl").read_text()
        )


def test_stopping_says_how_to_go_on(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run_stages", stop)
    code, _, err = run("train", "--config", CONFIG, "--workdir", tmp_path, *overrides())
    assert (code, err) == (130, "Stopped. Rerun the command to resume from the latest checkpoint.")


def test_help_is_of_the_script_that_was_called():
    for script, said in (("train", "--config digits_mlp"), ("evaluate", "--workdir runs/")):
        code, out, _ = run(script, "--help")
        assert code == 0 and f"python {script}.py {said}" in out and "dd-jax" not in out


@pytest.mark.parametrize(
    "command, said",
    {
        "train.py --config configs/nope.py": "error: There is no configuration file "
        "configs/nope.py; there are ",
        "evaluate.py --workdir nowhere": "error: nowhere is not a run directory: it has no "
        "config.json",
    }.items(),
)
def test_in_a_shell(command, said):
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1
