"""Sweeps: which runs they make, and whose reference these start from."""

import pathlib

import pytest

from dd_jax.experiment import configuration, sweeps
from dd_jax.experiment.configuration import ConfigurationError
from dd_jax.experiment.sweeps import SOURCE

ROOT = pathlib.Path(__file__).parent.parent
HERE = pathlib.Path("runs/six")


def test_the_first_run_trains_the_reference_and_the_others_start_from_it():
    runs = sweeps.expand(["defense.name=clean,parseval"], ["--config.seed=1"], HERE)
    assert runs == [
        ("clean", ("--config.seed=1", "--config.defense.name=clean")),
        (
            "parseval",
            (
                "--config.seed=1",
                "--config.defense.name=parseval",
                "--config.reference.source=runs/six/clean",
            ),
        ),
    ]


def test_several_fields_give_all_combinations():
    names = [
        run.name
        for run in sweeps.expand(["defense.name=a,b", "defense.correct_scale=5,10"], [], HERE)
    ]
    assert names == [
        "a,correct_scale=5",
        "a,correct_scale=10",
        "b,correct_scale=5",
        "b,correct_scale=10",
    ]


def runs_of(sweeps_, overrides=()):
    """From the names of the runs to their own overrides, without the beginning that all have in
    common.
    """
    runs = sweeps.expand(sweeps_, [f"--config.{override}" for override in overrides], HERE)
    return {
        run.name: [o.removeprefix("--config.") for o in run.overrides if SOURCE not in o]
        for run in runs
    }


def test_an_option_is_for_the_defenses_of_the_sweep_that_take_it():
    overrides = [
        "seed=1",
        "defense.num_steps=3",
        "seed=2",
        "defense.beta=0.1",
        "defense.class_chunk_size=3",
    ]
    assert runs_of(["defense.name=clean,deep_defense,parseval"], overrides) == {
        "clean": ["seed=1", "seed=2", "defense.class_chunk_size=3", "defense.name=clean"],
        "deep_defense": [*overrides[:3], overrides[4], "defense.name=deep_defense"],
        "parseval": ["seed=1", "seed=2", *overrides[3:], "defense.name=parseval"],
    }


def test_a_defense_without_the_swept_option_is_trained_once():
    assert runs_of(["defense.name=clean,deep_defense", "defense.correct_scale=5,10"]) == {
        "clean": ["defense.name=clean"],
        "deep_defense,correct_scale=5": ["defense.name=deep_defense", "defense.correct_scale=5"],
        "deep_defense,correct_scale=10": ["defense.name=deep_defense", "defense.correct_scale=10"],
    }
    # Figure 6's.
    both = ["defense.epsilon=0.1,0.2", "defense.name=adversarial_fgsm,deep_defense_fgsm"]
    assert list(runs_of(both)) == [
        "epsilon=0.1,adversarial_fgsm",
        "epsilon=0.1,deep_defense_fgsm",
        "epsilon=0.2,adversarial_fgsm",
        "epsilon=0.2,deep_defense_fgsm",
    ]


@pytest.mark.parametrize("defense", ["clean", "deep_defense"])
def test_what_no_defense_of_the_sweep_takes_is_left_for_the_configuration_to_refuse(
    defense, monkeypatch
):
    monkeypatch.syspath_prepend(ROOT)
    for sweep, overrides in (
        (["defense.name=clean,deep_defense"], ["--config.defense.beta=0.1"]),
        (["defense.name=clean,deep_defense", "defense.beta=0.1"], []),
        ([f"defense.name={defense}", "defense.beta=0.1,0.2"], []),
        (["defense.beta=0.1,0.2"], [f"--config.defense.name={defense}"]),
    ):
        for run in sweeps.expand(sweep, overrides, HERE):
            with pytest.raises(
                ConfigurationError, match=r"does not take defense\.beta \(which is for parseval\)"
            ):
                configuration.read(str(ROOT / "configs/digits_mlp.py"), run.overrides)


def test_two_values_that_would_share_a_directory_stay_two_runs():
    names = [run.name for run in sweeps.expand(["data.dir=a/b,a_b"], [], HERE)]
    # The second is refused: the directory is the first one's.
    assert names == ["dir=a_b", "dir=a_b"]


@pytest.mark.parametrize(
    "sweep, override",
    [
        ("seed=0,1", ""),
        ("data.train_limit=5,6", ""),
        ("defense.name=a,b", "reference.source=runs/x"),
    ],
)
def test_references_are_not_shared_where_they_differ_or_are_given(sweep, override):
    runs = sweeps.expand([sweep], [f"--config.{override}"] if override else [], HERE)
    assert len(runs) == 2 and not any("six" in text for run in runs for text in run.overrides)


@pytest.mark.parametrize("sweep", ["defense.name", "=1,2", "seed=", "seed=1,,2", "seed=1,1"])
def test_what_is_no_sweep_costs_one_sentence(sweep):
    with pytest.raises(
        ConfigurationError, match=r"is not understood; it looks like --sweep .*each value once\.$"
    ):
        sweeps.expand([sweep], [], HERE)


def test_a_field_comes_once():
    with pytest.raises(ConfigurationError, match="names seed, seed; it must name each field once"):
        sweeps.expand(["seed=1,2", "seed=3"], [], HERE)
