"""A run: its stages, what it measures, where its reference comes from, and that stopping it changes
no bit.
"""

import itertools
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dd_jax import data, defenses, models, pretrained
from dd_jax.evaluation import Evaluator
from dd_jax.experiment import build, configuration, inputs, runs
from dd_jax.experiment.configuration import ConfigurationError
from dd_jax.results.report import DEFENDED, REFERENCE, read_report
from dd_jax.training import loop

TESTS = pathlib.Path(__file__).parent
ROOT = TESTS.parent
CONFIG = ROOT / "configs/digits_mlp.py"
TINY = (
    "data.train_limit=200",
    "data.test_limit=45",  # A batch of 25 and one that is not full.
    "reference.num_epochs=3",
    "reference.batch_size=50",
    "reference.learning_rate=0.05",
    "fine_tuning.num_epochs=2",
    "fine_tuning.learning_rate=0.002",
    "fine_tuning.batch_size=50",
    "evaluation.batch_size=25",
    "evaluation.num_steps=5",
    "evaluation.epoch_examples=25",
)
TINY_DEFENSE = ("defense.num_steps=2", "defense.correct_scale=10")
REFERENCE_STEPS, DEFENDED_STEPS, STEPS_PER_EPOCH = 12, 8, 4
LOG_EVERY = 2
NEVER = math.inf


@pytest.fixture(autouse=True, scope="module")
def setting():
    """Configurations can be read, every second step is logged, and nothing is saved before the end
    of a stage.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        patch.setattr(loop, "MOST_STEPS_PER_LINE", LOG_EVERY)
        patch.setattr(loop, "FEWEST_LINES", 1)
        patch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", NEVER)
        yield


def configured(*overrides):
    config = configuration.read(
        str(CONFIG), [f"--config.{override}" for override in (*TINY, *overrides)]
    )
    # TINY_DEFENSE, whether the defense takes it or not.
    config.defense.num_steps, config.defense.correct_scale = 2, 10.0
    return config


def built(workdir, *overrides):
    return build.build_run(configured(*overrides), workdir)


def run(workdir, *overrides):
    configuration.claim_directory(configured(*overrides), workdir)
    return runs.run_stages(built(workdir, *overrides))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run directory of a run that nothing has disturbed."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    run(workdir)
    return workdir


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def states(workdir, *overrides):
    parts = built(workdir, *overrides)
    return {stage: build.restore_state(parts, stage) for stage in (REFERENCE, DEFENDED)}


def assert_bitwise(actual, wanted):
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def assert_same_run(workdir, wanted):
    """Parameters, the optimizer's state and the step, every line of metrics.jsonl, the report."""
    assert_bitwise(states(workdir), states(wanted))
    assert lines(workdir) == lines(wanted)
    assert read_report(workdir) == read_report(wanted)


# An undisturbed run


def test_a_run_logs_its_steps_epochs_and_measurements(finished):
    logged = lines(finished)
    for stage, num_steps, parts in (
        (REFERENCE, REFERENCE_STEPS, {"loss", "cross_entropy", "correct"}),
        (
            DEFENDED,
            DEFENDED_STEPS,
            {"loss", "cross_entropy", "correct", "penalty", "margin", "num_steps"},
        ),
    ):
        training = [line for line in logged if line["stage"] == stage and "loss" in line]
        assert [line["step"] for line in training] == list(range(2, num_steps + 1, LOG_EVERY))
        assert all(set(line) == {"stage", "step", "epoch"} | parts for line in training)
        assert all(line["epoch"] == line["step"] / STEPS_PER_EPOCH for line in training)
        epochs = [line for line in logged if line["stage"] == stage and "test" in line]
        assert [line["step"] for line in epochs] == list(range(4, num_steps + 1, STEPS_PER_EPOCH))
        assert all(line["test"]["num_examples"] == 25 for line in epochs)
        assert not [line for line in logged if "measured" in line], "report.json alone has these."
        assert read_report(finished).measured[stage]["num_examples"] == 45
    first, last = (
        line["loss"]
        for line in logged
        if line["stage"] == REFERENCE and line["step"] in (2, 12) and "loss" in line
    )
    assert last < first / 2


def test_a_run_makes_the_net_harder_to_fool(finished):
    before, after = (read_report(finished).measured[stage] for stage in (REFERENCE, DEFENDED))
    assert before["accuracy"] > 0.9 and after["accuracy"] > 0.9
    assert after["rho_l2"] > 1.2 * before["rho_l2"] > 0 and after["l2"] > 1.2 * before["l2"]
    assert 0.9 < after["deepfool_success"] <= 1


def test_a_run_is_a_function_of_its_configuration(finished, tmp_path):
    """A finished run is not run again, another one ends the same, another seed ends elsewhere."""
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    result = run(finished)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    assert run(tmp_path / "again") == result
    assert_same_run(tmp_path / "again", finished)
    run(tmp_path / "other", "seed=1", "fine_tuning.num_epochs=0")
    kernel = lambda state: state.params["fc1"]["kernel"]  # noqa: E731
    seeds = states(tmp_path / "other", "seed=1", "fine_tuning.num_epochs=0")
    assert np.abs(kernel(seeds[REFERENCE]) - kernel(states(finished)[REFERENCE])).max() > 1e-3


def test_what_is_measured_is_the_saved_net(finished):
    parts = built(finished)
    for stage in (REFERENCE, DEFENDED):
        x = jax.numpy.asarray(parts.feed.test_inputs)
        logits = parts.model.apply({"params": build.restore_state(parts, stage).params}, x)
        measured = read_report(finished).measured[stage]
        assert measured["accuracy"] == np.mean(
            np.argmax(logits, axis=-1) == parts.feed.data.test_labels
        )


# Stopped and started again


@pytest.fixture
def steps_taken(monkeypatch):
    """Counts the batches asked for."""
    taken, original = [], data.training_batch
    monkeypatch.setattr(
        data,
        "training_batch",
        lambda *args, **kw: taken.append(kw["step"]) or original(*args, **kw),
    )
    return taken


def stop_at(patch, module, name, call):
    """Lets the n-th call of a function be the moment of Ctrl-C."""
    original, calls = getattr(module, name), itertools.count(1)

    def stopped(*args, **options):
        if next(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **options)

    patch.setattr(module, name, stopped)


@pytest.mark.parametrize(
    "seconds, module, name, call, steps_again",
    [
        pytest.param(0, data, "training_batch", 1, 20, id="before the first step"),
        pytest.param(
            0, data, "training_batch", 8, 14, id="in the reference's training, checkpoint at 6"
        ),
        pytest.param(
            NEVER, data, "training_batch", 8, 20, id="in the reference's training, no checkpoint"
        ),
        pytest.param(
            0, Evaluator, "measure", 1, 18, id="while an epoch is measured, checkpoint at 2"
        ),
        pytest.param(NEVER, Evaluator, "measure", 4, 8, id="while the reference is measured"),
        pytest.param(NEVER, data, "training_batch", 13, 8, id="between the stages"),
        pytest.param(0, data, "training_batch", 18, 4, id="in the fine-tuning, checkpoint at 4"),
        pytest.param(NEVER, data, "training_batch", 18, 8, id="in the fine-tuning, no checkpoint"),
        pytest.param(NEVER, Evaluator, "measure", 7, 0, id="while the defended net is measured"),
    ],
)
def test_a_stopped_run_ends_where_an_undisturbed_one_ends(
    finished, tmp_path, steps_taken, monkeypatch, seconds, module, name, call, steps_again
):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", seconds - 1)
        stop_at(patch, module, name, call)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    steps_taken.clear()
    run(tmp_path)
    assert len(steps_taken) == steps_again
    assert_same_run(tmp_path, finished)


def test_what_a_killed_run_left_half_written_is_cleared_away(finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", -1)
        stop_at(patch, data, "training_batch", 18)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "defended", "step": 6, "loss": 3.1')
    (tmp_path / "metrics.partial").write_text('{"stage": "reference"')
    (tmp_path / "config.partial").write_text("{")
    (tmp_path / "preprocessing.npz.partial").write_bytes(b"PK")
    (tmp_path / "checkpoints/defended/6.orbax-checkpoint-tmp/default").mkdir(parents=True)
    (tmp_path / "checkpoints/defended/6.orbax-checkpoint-tmp/default/_METADATA").write_text("{")
    run(tmp_path)
    assert_same_run(tmp_path, finished)


SLOW_TRAINING = """
import sys, time
sys.path[:0] = [{root!r}]
import train
from dd_jax import data
from dd_jax.experiment import command_line
from dd_jax.training import loop
loop.MOST_STEPS_PER_LINE, loop.FEWEST_LINES = {log_every}, 1
loop.SECONDS_BETWEEN_CHECKPOINTS = -1
training_batch = data.training_batch
data.training_batch = lambda *args, **options: time.sleep(0.1) or training_batch(*args, **options)
command_line.run(train.main)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_a_run_that_was_killed_ends_where_an_undisturbed_one_ends(finished, tmp_path):
    code = SLOW_TRAINING.format(root=str(ROOT), log_every=LOG_EVERY)
    command = [
        sys.executable,
        "-c",
        code,
        "--config",
        str(CONFIG),
        "--workdir",
        str(tmp_path / "run"),
    ]
    command += [f"--config.{override}" for override in (*TINY, *TINY_DEFENSE)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    journal, patience = tmp_path / "run/metrics.jsonl", time.monotonic() + 300
    try:
        while not (journal.exists() and '"defended", "step": 4' in journal.read_text()):
            assert process.poll() is None and time.monotonic() < patience, process.communicate()[1]
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert DEFENDED not in read_report(tmp_path / "run").measured
    assert 4 <= lines(tmp_path / "run")[-1]["step"] < DEFENDED_STEPS
    run(tmp_path / "run")
    assert_same_run(tmp_path / "run", finished)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    finished, tmp_path, steps_taken, monkeypatch, capfd
):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", -1)
        run(tmp_path)
    files = [path for path in (tmp_path / "checkpoints/defended/8").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    steps_taken.clear()
    run(tmp_path)
    assert len(steps_taken) == 2 and "checkpoints/defended/8 is damaged" in capfd.readouterr().err
    assert_same_run(tmp_path, finished)


def test_slow_steps_are_saved_between_lines_and_those_that_diverge_are_not(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(loop.Checkpoints, "save", lambda self, step, state: saved.append(step))
    monkeypatch.setattr(loop, "MOST_STEPS_PER_LINE", 4)
    monkeypatch.setattr(loop, "MOST_SECONDS_BETWEEN_CHECKPOINTS", -1)
    nothing_more = ("fine_tuning.num_epochs=0", "evaluation.epoch_examples=0")
    runs.reference_state(built(tmp_path, *nothing_more))
    # Lines, at 4 and 8, have a constant of their own; 12 is the end.
    assert saved == [1, 2, 3, 5, 6, 7, 9, 10, 11, 12]
    saved.clear()
    with pytest.raises(loop.DivergenceError, match="The loss is not finite at step [23]: lower"):
        runs.reference_state(built(tmp_path, *nothing_more, "reference.learning_rate=1e30"))
    assert saved in ([1], [1, 2])


def test_what_cannot_be_decoded_is_written_down_once(tmp_path):
    def batch_of_step(step):
        raise NotImplementedError

    plan = built(tmp_path).stages[REFERENCE]
    journal = loop.Journal(plan, tmp_path, None, lambda line: None, batch_of_step)
    journal.note_undecodable(1)  # Data in memory: nothing fails.
    batch_of_step.failures = {}
    journal.note_undecodable(2)
    assert not list(tmp_path.iterdir())
    for step in (3, 4, 5):
        batch_of_step.failures |= {"a.png": "cut short"} if step == 3 else {"b/c.jpg": "no JPEG"}
        journal.note_undecodable(step)
    assert [
        json.loads(line) for line in (tmp_path / "undecodable.jsonl").read_text().splitlines()
    ] == [
        {"stage": REFERENCE, "step": 3, "name": "a.png", "reason": "cut short"},
        {"stage": REFERENCE, "step": 4, "name": "b/c.jpg", "reason": "no JPEG"},
    ]


# Where the reference comes from


def test_every_defense_starts_from_the_same_reference(finished, tmp_path, steps_taken):
    run(tmp_path / "trained", "defense.name=clean")
    assert len(steps_taken) == REFERENCE_STEPS + DEFENDED_STEPS
    steps_taken.clear()
    source = f"reference.source={finished}"
    run(tmp_path / "given", "defense.name=clean", source)
    assert steps_taken == list(range(DEFENDED_STEPS))
    trained = states(tmp_path / "trained", "defense.name=clean")
    given = states(tmp_path / "given", "defense.name=clean", source)
    defended = states(finished)
    assert_bitwise(trained[REFERENCE], defended[REFERENCE])
    assert_bitwise(given[REFERENCE].params, defended[REFERENCE].params)
    assert_bitwise(given[DEFENDED], trained[DEFENDED])
    assert (
        np.abs(
            given[DEFENDED].params["fc3"]["kernel"] - defended[DEFENDED].params["fc3"]["kernel"]
        ).max()
        > 1e-4
    )
    first, second = (read_report(path).measured for path in (finished, tmp_path / "given"))
    assert first[REFERENCE] == second[REFERENCE] and first[DEFENDED] != second[DEFENDED]
    assert not [
        line for line in lines(tmp_path / "given") if line["stage"] == REFERENCE and "loss" in line
    ]


def test_a_run_takes_the_inputs_that_its_reference_was_trained_on(tmp_path):
    mean = "data.preprocessing=mean_image"
    run(tmp_path / "first", mean, "fine_tuning.num_epochs=0")
    source = f"reference.source={tmp_path / 'first'}"
    theirs = built(tmp_path / "first", mean).preprocessing.mean_image
    fewer = ("data.train_limit=100", source)
    np.testing.assert_array_equal(
        built(tmp_path / "second", mean, *fewer).preprocessing.mean_image, theirs
    )
    alone = built(tmp_path / "third", mean, "data.train_limit=100").preprocessing.mean_image
    assert np.abs(alone - theirs).max() > 1
    # Another input space is refused with the reference, as before.
    other = built(tmp_path / "fourth", "data.preprocessing=none", source)
    assert other.preprocessing.name == "none"
    with pytest.raises(ConfigurationError, match="is of mlp on digits"):
        other.load_reference()


def torch_arrays():
    with np.load(TESTS / "golden/mlp.npz") as arrays:
        return {
            name.removeprefix("param/"): arrays[name]
            for name in arrays.files
            if name.startswith("param/")
        }


def test_a_reference_given_as_pytorch_named_arrays_is_taken_as_it_is(tmp_path, steps_taken):
    np.savez(tmp_path / "mlp.npz", **torch_arrays())
    overrides = (f"reference.source={tmp_path / 'mlp.npz'}", "fine_tuning.num_epochs=0")
    result = run(tmp_path / "run", *overrides)
    assert not steps_taken and result.measured[REFERENCE] == result.measured[DEFENDED]
    wanted = jax.tree.map(np.float32, pretrained.from_torch("mlp", torch_arrays()))
    for state in states(tmp_path / "run", *overrides).values():
        assert_bitwise(state.params, wanted)


def refusal_of_source(workdir, source):
    with pytest.raises(ConfigurationError) as caught:
        built(workdir, f"reference.source={source}").load_reference()
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    return str(caught.value)


def five_classes(arrays):
    return arrays | {"fc3.weight": arrays["fc3.weight"][:5], "fc3.bias": arrays["fc3.bias"][:5]}


@pytest.mark.parametrize(
    "make, said",
    [
        pytest.param(
            lambda path: None, "must be a run directory or a file of weights (", id="nothing"
        ),
        pytest.param(lambda path: path.write_text("net"), "is of no use for mlp (", id="text"),
        pytest.param(lambda path: path.write_bytes(b""), "is of no use for mlp (", id="empty file"),
        pytest.param(
            lambda path: path.write_bytes(b"PK\x03\x04"), "is of no use for mlp (", id="cut short"
        ),
        pytest.param(
            lambda path: np.save(path.open("wb"), np.ones(3)),
            "is of no use for mlp (",
            id="one array",
        ),
        pytest.param(
            lambda path: np.savez(path, a=np.ones(3)), "fc1.bias (500,), ", id="other arrays"
        ),
        pytest.param(
            lambda path: np.savez(path, **five_classes(torch_arrays())),
            "must have 10 classes",
            id="5 classes",
        ),
        pytest.param(
            lambda path: path.mkdir(),
            "is not a run directory: it has no config.json",
            id="directory",
        ),
    ],
)
def test_a_source_that_holds_no_reference_is_refused(tmp_path, make, said):
    path = tmp_path / "source.npz"
    make(path)
    message = refusal_of_source(tmp_path / "run", path)
    assert said in message and str(path) in message and not (tmp_path / "run").exists()


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "net.txt").write_bytes(b"PK")
    message = refusal_of_source(tmp_path / "run", tmp_path / "net.txt")
    assert "net.txt'; it must be a run directory or a file of weights (.pth, " in message


def test_a_run_of_another_net_or_input_space_or_one_that_is_not_finished_is_refused(tmp_path):
    for override, said in (
        (
            "model.name=lenet",
            "is of lenet on digits (none); this configuration needs mlp on digits (none).",
        ),
        (
            "data.name=mnist",
            "is of mlp on mnist (mean_image); this configuration needs mlp on digits (none).",
        ),
        (
            "data.preprocessing=mean_image",
            "is of mlp on digits (mean_image); this configuration needs mlp on digits (none).",
        ),
        (
            "data.preprocessing=none",
            "has no finished reference net; rerun train.py on it to its end.",
        ),
    ):
        (tmp_path / "theirs/config.json").unlink(missing_ok=True)
        theirs = configuration.read(str(CONFIG), [f"--config.{override}"])
        configuration.claim_directory(theirs, tmp_path / "theirs")
        message = refusal_of_source(tmp_path / "mine", tmp_path / "theirs")
        assert str(tmp_path / "theirs") in message and said in message


def test_a_finished_run_does_not_need_its_reference_s_source(finished, tmp_path):
    source = shutil.copytree(finished, tmp_path / "source")
    override = f"reference.source={source}"
    report = run(tmp_path / "run", "defense.name=clean", override)
    shutil.rmtree(source)
    parts = built(tmp_path / "run", "defense.name=clean", override)
    assert build.restore_state(parts, DEFENDED).step == DEFENDED_STEPS
    assert run(tmp_path / "run", "defense.name=clean", override) == report


def test_a_stage_that_is_trained_again_is_measured_again(finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "run")
    report = read_report(copy)
    report.measured[DEFENDED] = {"num_examples": 45, "accuracy_pgd": 0.5}
    (copy / "report.json").write_text(json.dumps(report._asdict()))
    assert run(copy).measured == {
        REFERENCE: report.measured[REFERENCE],
        DEFENDED: report.measured[DEFENDED] | read_report(finished).measured[DEFENDED],
    }, "what the defended net lacks is measured"
    shutil.rmtree(copy / "checkpoints/defended")
    assert run(copy).measured == read_report(finished).measured, "PGD was of the net before"


# Before a run


def test_missing_data_is_noticed_at_once_and_nothing_is_made(tmp_path):
    config = configuration.read(
        str(ROOT / "configs/mnist_mlp.py"), [f"--config.data.dir={tmp_path / 'no data'}"]
    )
    start = time.monotonic()
    with pytest.raises(data.DataError, match="mnist is not in .*no data"):
        build.build_run(config, tmp_path / "run")
    assert time.monotonic() - start < 2 and not any(tmp_path.iterdir())


@pytest.mark.parametrize("section", ["reference", "fine_tuning"])
def test_a_batch_larger_than_the_data_is_refused(tmp_path, section):
    with pytest.raises(
        ConfigurationError,
        match=f"{section}.batch_size is 201, but there are only 200 training examples",
    ):
        built(tmp_path / "run", f"{section}.batch_size=201")
    assert not (tmp_path / "run").exists()
    built(tmp_path / "run", f"{section}.batch_size=200")


def test_a_reference_may_begin_with_weights_centered_on_images(tmp_path):
    parts = built(tmp_path / "run", "reference.center_on=30")
    drawn, state = built(tmp_path / "run").stages, parts.stages
    drawn, state = (stages[REFERENCE].make_state() for stages in (drawn, state))
    logits = parts.model.apply(
        {"params": state.params}, jax.numpy.asarray(parts.feed.train_inputs[:30])
    )
    np.testing.assert_allclose(logits.std(axis=0), 1, rtol=1e-4)
    assert jax.tree.map(np.shape, state) == jax.tree.map(np.shape, drawn)


def test_stages_have_their_own_lengths_losses_and_schedules(tmp_path):
    parts = built(
        tmp_path, "fine_tuning.max_steps=5", "reference.max_steps=1000", "reference.batch_size=60"
    )
    reference, defended = (parts.stages[name] for name in (REFERENCE, DEFENDED))
    assert (reference.num_steps, reference.steps_per_epoch) == (9, 3)
    assert (defended.num_steps, defended.steps_per_epoch) == (5, 4)
    options = {stage.name: stage.make_step.args[2] for stage in (reference, defended)}
    of_reference = options[REFERENCE].loss_fn
    assert of_reference.func is defenses.plain_loss and not of_reference.keywords
    assert options[DEFENDED].loss_fn.func is defenses.DEFENSES["deep_defense"].loss
    section, keywords = dict(configured().defense), options[DEFENDED].loss_fn.keywords
    assert keywords == {name: section[name] for name in keywords} | {
        "num_candidates": None,
        "class_chunk_size": None,
    }
    assert keywords.keys() == defenses.option_names("deep_defense")


@pytest.mark.parametrize("name", defenses.NAMES)
def test_every_defense_takes_its_options_from_the_configuration(name, tmp_path):
    wanted = {
        "epsilon": 0.3,
        "mixing_weight": 0.25,
        "fgsm_weight": 0.75,
        "beta": 0.125,
        "num_candidates": 3,
        "class_chunk_size": 4,
        "num_steps": 2,
    }
    config = configured(f"defense.name={name}")
    config.defense.update(wanted)
    parts = build.build_run(config, tmp_path)
    defense = parts.stages[DEFENDED].make_step.args[2]
    keywords = getattr(defense.loss_fn, "keywords", {}) | getattr(defense.retract, "keywords", {})
    known = defenses.option_names(name)
    measured = parts.evaluator.settings
    assert (measured.num_candidates, measured.class_chunk_size) == (3, 4)
    assert {k: v for k, v in keywords.items() if k in wanted} == {
        k: v for k, v in wanted.items() if k in known
    }


def test_the_input_space_is_the_one_that_the_run_was_made_with(tmp_path):
    parts = built(tmp_path, "data.preprocessing=mean_image")
    assert (
        np.abs(parts.feed.train_inputs.mean(axis=0)).max()
        < 1e-3
        < parts.preprocessing.mean_image.max()
    )
    parts.preprocessing._replace(mean_image=parts.preprocessing.mean_image + 51).save(
        tmp_path / "preprocessing.npz"
    )
    again = built(tmp_path, "data.preprocessing=mean_image")
    np.testing.assert_allclose(parts.feed.test_inputs - again.feed.test_inputs, 0.2, rtol=1e-5)


@pytest.mark.parametrize(
    "name, preprocessing",
    [("digits", "none"), ("mnist", "mean_image"), ("cifar10", "contrast_whiten")],
)
def test_paper_stands_for_what_the_paper_did(name, preprocessing):
    config = configuration.read(str(CONFIG), [f"--config.data.name={name}"])
    assert inputs.preprocessing_name(config) == preprocessing
    config.data.preprocessing = "none"
    assert inputs.preprocessing_name(config) == "none"


@pytest.mark.parametrize("name", models.NAMES)
def test_every_net_gets_images_of_its_shape(name, tmp_path):
    parts = built(tmp_path, f"model.name={name}", "data.train_limit=100", "data.test_limit=3")
    assert (
        parts.feed.test_inputs.shape == (3, *models.input_shape(name))
        and parts.feed.test_inputs.dtype == np.float32
    )
