"""Sweeps: which runs they make, and whose reference these start from."""

import pathlib

import pytest

from dd_jax import sweeps
from dd_jax.configuration import ConfigurationError

HERE = pathlib.Path("runs/six")


def test_the_first_run_trains_the_reference_and_the_others_start_from_it():
    runs = sweeps.expand(["defense.name=clean,parseval"], ["--config.seed=1"], HERE)
    assert runs == [
        ("clean", ("--config.seed=1", "--config.defense.name=clean")),
        (
            "parseval",
            ("--config.seed=1", "--config.defense.name=parseval", "--config.reference.source=runs/six/clean"),
        ),
    ]


def test_several_fields_give_all_combinations():
    names = [run.name for run in sweeps.expand(["defense.name=a,b", "defense.correct_scale=5,10"], [], HERE)]
    assert names == ["a,correct_scale=5", "a,correct_scale=10", "b,correct_scale=5", "b,correct_scale=10"]


@pytest.mark.parametrize(
    "sweep, override", [("seed=0,1", ""), ("data.train_limit=5,6", ""), ("defense.name=a,b", "reference.source=runs/x")]
)
def test_references_are_not_shared_where_they_differ_or_are_given(sweep, override):
    runs = sweeps.expand([sweep], [f"--config.{override}"] if override else [], HERE)
    assert len(runs) == 2 and not any("six" in text for run in runs for text in run.overrides)


@pytest.mark.parametrize("sweep", ["defense.name", "=1,2", "seed=", "seed=1,,2", "seed=1,1"])
def test_what_is_no_sweep_costs_one_sentence(sweep):
    with pytest.raises(ConfigurationError, match=r"is not understood; it looks like --sweep .*each value once\.$"):
        sweeps.expand([sweep], [], HERE)


def test_a_field_comes_once():
    with pytest.raises(ConfigurationError, match="names seed, seed; it must name each field once"):
        sweeps.expand(["seed=1,2", "seed=3"], [], HERE)
