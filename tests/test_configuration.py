"""Configurations: what is read, what is refused and in which words, and which run directories are
taken.
"""

import json
import pathlib
import re

import pytest
from ml_collections import ConfigDict

from dd_jax import defenses
from dd_jax.experiment import configuration
from dd_jax.experiment.configuration import ConfigurationError

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if path.name != "__init__.py")
NAMES = [path.stem for path in CONFIGS]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Where the commands in the documentation are given."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)


def read(*overrides, path="configs/default.py"):
    return configuration.read(str(path), [f"--config.{override}" for override in overrides])


def refusal(function, *arguments):
    """The message of the ConfigurationError: one sentence, on one line."""
    with pytest.raises(ConfigurationError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert message[-1] in ".?" and "\n" not in message
    return message


def contents(directory):
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


# The files in configs/


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_every_file_loads_and_differs_from_the_default_in_existing_fields_only(path):
    default, config = configuration.flatten(read()), configuration.flatten(read(path=path))
    assert {name: type(value) for name, value in config.items()} == {
        name: type(value) for name, value in default.items()
    }
    assert path.stem == "default" or config != default


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.stem != "default"], ids=lambda path: path.stem
)
def test_every_file_names_its_command(path):
    text, config = path.read_text(), read(path=path)
    command = f"python train.py --config configs/{path.name}"
    if config.data.name != "digits":
        command += " --data_dir DIR"
    docstring = text.removeprefix('"""').split('"""')[0]
    assert text.startswith('"""') and any(
        line.strip().startswith(command) for line in docstring.splitlines()
    )


def test_the_default_describes_every_field_and_every_choice():
    lines = (ROOT / "configs/default.py").read_text().splitlines()
    for name in configuration.flatten(read()):
        field = f'"{name.split(".")[-1]}":'
        described = [
            a
            for before, a in zip(["", *lines], lines, strict=False)
            if field in a and "#" in before + a
        ]
        assert described or name.endswith(("learning_rate", "overshoot")), f"{name} has no comment"
    for name, choices in configuration.CHOICES.items():
        field = name.split(".")[-1]
        found = [i for i, line in enumerate(lines) if f'"{field}":' in line]
        said = " ".join(line for i in found for line in lines[max(i - 3, 0) : i + 1])
        assert all(re.search(rf"\b{choice}\b", said) for choice in choices), (
            f"{name} does not list {choices}"
        )


# Overrides


def test_overrides_take_the_type_of_the_field():
    config = read(
        "seed=7",
        "defense.correct_scale=30",
        "reference.weight_decay=1e-3",
        "data.flip=TRUE",
        "data.dir=a=b c",
        "model.name=nin",
    )
    assert (config.seed, config.data.flip, config.data.dir, config.model.name) == (
        7,
        True,
        "a=b c",
        "nin",
    )
    assert config.defense.correct_scale == 30.0 and isinstance(config.defense.correct_scale, float)
    assert config.reference.weight_decay == 1e-3 and config.fine_tuning.weight_decay == 5e-4
    assert read("seed=1", "seed=2").seed == 2
    assert read("data.flip=true", "data.flip=False").data.flip is False


@pytest.mark.parametrize(
    "overrides, scales",
    [
        ((), (15.0, 5.0)),  # The file's, which were chosen for its penalty.
        (("defense.penalty=exponential",), (15.0, 5.0)),
        (("defense.penalty=hinge",), (5.0, 5.0)),
        (("defense.penalty=linear", "defense.wrong_scale=2"), (1.0, 2.0)),
        (("defense.correct_scale=3", "defense.penalty=reciprocal"), (3.0, 25.0)),
    ],
)
def test_another_penalty_brings_its_own_scales_but_those_that_are_given(overrides, scales):
    defense = read(*overrides, path="configs/digits_mlp.py").defense
    assert (defense.correct_scale, defense.wrong_scale) == scales


@pytest.mark.parametrize(
    "override, said",
    {
        "defense.nope=1": "no field 'defense.nope' in the configuration; did you mean defense.norm "
        "or ",
        "defense.corect_scale=1": "did you mean defense.correct_scale",
        "model=mlp": "did you mean model.name",
        "xyzzy=1": "There is no field 'xyzzy' in the configuration; there are data.crop_padding, data.dir, ",
        "reference.batch_size=abc": "reference.batch_size is 'abc'; it must be a whole number, "
        "such as 100",
        "seed=1.5": "seed is '1.5'; it must be a whole number",
        "seed=True": "seed is 'True'; it must be a whole number",
        "seed=": "seed is ''; it must be a whole number",
        "seed={[]: 1}": "it must be a whole number",
        "reference.average_decay=1": "reference.average_decay is 1.0; it must be below 1",
        "defense.solver=ddn": "defense.solver is 'ddn'; it needs defense.gradient=at_boundary",
        "seed=-1": "seed is -1; it must be a finite number, 0 or more",
        "seed=4294967296": "seed is 4294967296; it must be below 4294967296",
        "data.flip=1": "data.flip is '1'; it must be true or false",
        "data.train_limit=-5": "data.train_limit is -5; it must be a finite number, 0 or more",
        "reference.batch_size=0": "reference.batch_size is 0; it must be at least 1",
        "fine_tuning.batch_size=-3": "fine_tuning.batch_size is -3; it must be at least 1",
        "evaluation.batch_size=0": "evaluation.batch_size is 0; it must be at least 1",
        "evaluation.num_steps=0": "evaluation.num_steps is 0; it must be at least 1",
        "defense.num_steps=0": "defense.num_steps is 0; it must be at least 1",
        "defense.num_candidates=1": "defense.num_candidates is 1; it must be at least 2, or 0 for "
        "all classes",
        "reference.num_epochs=-1": "reference.num_epochs is -1; it must be a finite number, 0 or "
        "more",
        "reference.learning_rate=0": "reference.learning_rate is 0.0; it must be above 0",
        "fine_tuning.learning_rate=-0.1": "fine_tuning.learning_rate is -0.1; it must be above 0",
        "reference.learning_rate=nan": "reference.learning_rate is 'nan'; it must be a number",
        "reference.learning_rate=inf": "reference.learning_rate is 'inf'; it must be a number",
        "reference.learning_rate=1e999": "reference.learning_rate is inf; it must be a finite "
        "number",
        "reference.momentum=-0.9": "reference.momentum is -0.9; it must be a finite number, 0 or "
        "more",
        "fine_tuning.weight_decay=-1e-4": "fine_tuning.weight_decay is -0.0001; it must be a "
        "finite number, 0 or more",
        "defense.penalty_weight=-15": "defense.penalty_weight is -15.0; it must be a finite "
        "number, 0 or more",
        "defense.overshoot=abc": "defense.overshoot is 'abc'; it must be a number, such as 0.02",
        "data.name=minst": "data.name is 'minst'; it must be one of digits, mnist, cifar10",
        "data.preprocessing=zca": "it must be one of paper, none, mean_image, contrast_whiten",
        "model.name=resnet": "model.name is 'resnet'; it must be one of mlp, lenet, convnet, nin",
        "defense.name=deep": "defense.name is 'deep'; it must be one of clean, parseval, ",
        "defense.norm=l1": "defense.norm is 'l1'; it must be one of l2, linf",
        "reference.schedule=linear": "reference.schedule is 'linear'; it must be one of "
        "halved_at_four_fifths, cosine",
        "fine_tuning.schedule=": "fine_tuning.schedule is ''; it must be one of",
    }.items(),
)
def test_a_wrong_override_costs_one_sentence(override, said):
    assert said in refusal(read, override)


TAKEN_BY = {
    "beta": ("parseval",),
    "mixing_weight": ("adversarial_deepfool",),
    "epsilon": ("adversarial_fgsm", "deep_defense_fgsm", "adversarial_pgd", "trades"),
    "fgsm_weight": ("adversarial_fgsm", "deep_defense_fgsm"),
    "penalty_weight": ("deep_defense", "deep_defense_fgsm", "amm"),
    "gradient_offset": ("deep_defense", "deep_defense_fgsm", "amm"),
    "num_steps": ("adversarial_deepfool", "deep_defense", "deep_defense_fgsm", "amm"),
    "kl_weight": ("trades",),
    "attack_norm": ("adversarial_pgd", "trades", "mma"),
    "num_candidates": defenses.NAMES,  # The evaluation keeps to them.
    "class_chunk_size": defenses.NAMES,
}


@pytest.mark.parametrize("option", TAKEN_BY)
@pytest.mark.parametrize("name", defenses.NAMES)
def test_an_option_that_the_defense_does_not_take_is_refused_where_it_is_given(option, name):
    field = f"defense.{option}"
    # Its default counts as given, too.
    override = f"{field}={configuration.flatten(read())[field]}"
    if name in TAKEN_BY[option]:
        assert (
            read(f"defense.name={name}", override).defense.name
            == read(override, f"defense.name={name}").defense.name
        )
        return
    said = (
        f"The defense {name!r} does not take {field} (which is for {', '.join(TAKEN_BY[option])}); "
        "leave it out, or choose another defense.name."
    )
    for overrides in ((f"defense.name={name}", override), (override, f"defense.name={name}")):
        assert refusal(read, *overrides) == said


def test_all_options_that_are_not_taken_are_named_and_files_may_set_them(tmp_path):
    message = refusal(
        read,
        "defense.name=clean",
        "defense.beta=1",
        "defense.num_candidates=3",
        "defense.epsilon=1",
    )
    assert (
        "defense.beta (which is for parseval), defense.epsilon (which is for adversarial_fgsm, "
        in message
    )
    assert "num_candidates" not in message
    path = tmp_path / "mine.py"
    path.write_text(
        INHERIT + "config.defense.name = 'clean'\n    config.defense.beta = 0.5\n    return config"
    )
    assert configuration.read(str(path)).defense.beta == 0.5
    with pytest.raises(ConfigurationError, match="The defense 'clean' does not take defense.beta"):
        configuration.read(str(path), ["--config.defense.beta=0.25"])


@pytest.mark.parametrize(
    "argument", ["--config.seed", "--workdr=runs/a", "--workdr", "seed=1", "config.seed=1", "-h2"]
)
def test_what_is_no_override_costs_one_sentence(argument):
    message = refusal(configuration.read, "configs/default.py", [argument])
    assert (
        f"The argument {argument!r} is not understood; overrides look like --config.seed=1"
        in message
    )


# Configuration files of the user's own


def test_a_missing_file_is_refused_with_those_that_there_are():
    message = refusal(configuration.read, "configs/nope.py")
    assert message.startswith(
        "There is no configuration file configs/nope.py; there are configs/cifar_convnet.py, "
    )
    assert "__init__" not in message and "configs/mnist_mlp.py" in message
    for nothing_beside in ("nowhere/nope.py", "cifar_nim"):
        assert refusal(configuration.read, nothing_beside).startswith(
            f"There is no configuration file {nothing_beside}; there are configurations of the "
            "names cifar_convnet, cifar_nin, "
        )
    assert "There is no configuration file configs;" in refusal(configuration.read, "configs")


INHERIT = "from configs import default\ndef get_config():\n    config = default.get_config()\n    "


@pytest.mark.parametrize(
    "text, said",
    {
        "def get_config(:": "cannot be used: SyntaxError: ",
        "import nonexistent_package": "cannot be used: ModuleNotFoundError: No module named "
        "'nonexistent_package'",
        "config = None": "cannot be used: AttributeError: ",
        "def get_config():\n    return {'seed': 1}": "gives a dict; it must give a ConfigDict",
        "def get_config():\n    pass": "gives a NoneType; it must give a ConfigDict",
        INHERIT + "config.defense.corect_scale = 3.0\n    return config": "corect_scale",
        INHERIT + "config.seed = 1.5\n    return config": "cannot be used: TypeError: ",
        INHERIT
        + "config.fine_tuning.batch_size = 0\n    return config": "fine_tuning.batch_size is 0; it "
        "must be at least 1",
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'seed': "
        "1})": ("The configuration has no data.name, data.preprocessing, defense.aggregation, "),
    }.items(),
)
def test_a_mistake_in_a_file_costs_one_sentence(tmp_path, text, said):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        configuration.read(str(path))
    assert said in str(caught.value)


def test_a_file_anywhere_may_inherit(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(INHERIT + "config.seed = 3\n    return config")
    assert configuration.read(str(path), ["--config.model.name=lenet"]).seed == 3


# Run directories


def test_a_directory_is_claimed_once_and_again_by_the_same_configuration(tmp_path):
    workdir, config = tmp_path / "some" / "where", read("seed=3")
    configuration.check_directory(config, workdir)
    assert not (tmp_path / "some").exists()
    configuration.claim_directory(config, workdir)
    first = contents(workdir)
    assert [path.name for path in first] == ["config.json"]
    loaded = configuration.load(workdir)
    assert loaded.to_dict() == config.to_dict()
    (workdir / "metrics.jsonl").write_text("")  # As a run goes on.
    configuration.claim_directory(loaded, workdir)
    assert contents(workdir) == first | {workdir / "metrics.jsonl": b""}


@pytest.mark.parametrize(
    "before, after", [("data.dir=/here", "data.dir=/there"), ("seed=0", "evaluation.batch_size=9")]
)
def test_what_differs_between_machines_may_change_when_a_run_goes_on(before, after, tmp_path):
    configuration.claim_directory(read(before), tmp_path)
    configuration.claim_directory(read(after), tmp_path)
    assert configuration.load(tmp_path).to_dict() == read(after).to_dict()


def test_an_empty_directory_will_do_and_so_will_one_where_claiming_was_cut_short(tmp_path):
    (tmp_path / "config.partial").write_text('{"se')
    configuration.claim_directory(read(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def refused_directory(workdir, config):
    """Both functions refuse in the same words and change nothing."""
    before = contents(workdir.parent)
    message = refusal(configuration.claim_directory, config, workdir)
    assert refusal(configuration.check_directory, config, workdir) == message
    assert contents(workdir.parent) == before
    return message


def test_another_configurations_run_is_left_alone(tmp_path):
    configuration.claim_directory(
        read("defense.correct_scale=10.0", "model.name=lenet"), tmp_path / "run"
    )
    message = refused_directory(tmp_path / "run", read("defense.correct_scale=30"))
    assert f"The run directory {tmp_path / 'run'} belongs to another configuration: " in message
    assert (
        "defense.correct_scale (10.0 there, 30.0 here), model.name ('lenet' there, 'mlp' here)"
        in message
    )
    assert "--workdir" in message


def test_a_run_directory_from_before_fields_were_renamed_and_added_still_opens(tmp_path):
    config = read("seed=3", "reference.accumulation_steps=4")
    configuration.claim_directory(config, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    for old, new in configuration.RENAMED.items():
        section, name = new.split(".")
        fields[section][old.split(".")[1]] = fields[section].pop(name)
    for added in configuration.ADDED:
        section, _, name = added.rpartition(".")
        del (fields[section] if section else fields)[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert configuration.load(tmp_path).to_dict() == config.to_dict()
    configuration.check_directory(config, tmp_path)
    default = configuration.flatten(read())
    assert {name: default[name] for name in configuration.ADDED} == configuration.ADDED


@pytest.mark.parametrize("old", configuration.RENAMED)
def test_an_old_name_is_answered_with_the_new_one(old):
    new = configuration.RENAMED[old]
    assert refusal(read, f"{old}=1") == f"{old} is now called {new}; use that name."


def test_a_run_that_an_older_version_made_is_left_alone(tmp_path):
    configuration.claim_directory(read(), tmp_path / "run")
    fields = json.loads((tmp_path / "run/config.json").read_text())
    del fields["defense"]["overshoot"]
    (tmp_path / "run/config.json").write_text(json.dumps(fields))
    assert "defense.overshoot (None there, 0.02 here)" in refused_directory(
        tmp_path / "run", read()
    )


def test_what_is_no_run_directory_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.jpg").write_text("precious")
    for name in ("file", "photos"):
        assert "exists and is not a run directory (it has no config.json)" in refused_directory(
            tmp_path / name, read()
        )
    before = contents(tmp_path)
    assert "cannot be made (Not a directory)" in refusal(
        configuration.claim_directory, read(), tmp_path / "file/run"
    )
    assert contents(tmp_path) == before


def test_loading_what_is_no_run_costs_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nowhere", tmp_path, tmp_path / "file"):
        assert f"{path} is not a run directory: it has no config.json" in refusal(
            configuration.load, path
        )


@pytest.mark.parametrize(
    "text, said",
    {
        '{"seed": 0, "mod': "Unterminated string",
        "[1, 2]": "'list' object",
        '"text"': "'str' object",
        '{"hidden_size": 768, "model_type": "bert"}': "The configuration has no data.name, ",
        "\xff": "Expecting value",
    }.items(),
)
def test_a_damaged_or_foreign_configuration_costs_one_sentence(tmp_path, text, said):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(text)
    message = refused_directory(tmp_path / "run", read())
    assert (
        message.startswith(f"{tmp_path / 'run/config.json'} is damaged, or no run's (")
        and said in message
    )
    assert refusal(configuration.load, tmp_path / "run") == message


def test_flatten():
    nested = {"a": 1, "b": {"c": 2.0, "d": {"e": "f"}}}
    assert (
        configuration.flatten(nested)
        == configuration.flatten(ConfigDict(nested))
        == {"a": 1, "b.c": 2.0, "b.d.e": "f"}
    )
