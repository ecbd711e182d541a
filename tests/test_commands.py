"""`dd-jax` and `python -m dd_jax`: the commands, configurations by name, and what both say.

What the commands compute is tested through train.py and evaluate.py, which run the same code.
"""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dd_jax
from dd_jax import commands, models, pretrained, xla
from dd_jax.experiment import comparison, configuration, configuration_files
from dd_jax.experiment.configuration import ConfigurationError

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `dd-jax ARGUMENTS`; returns the exit code, and what it says on stdout and stderr."""
    # JAX has started: the flags are conftest's, and there is nothing to say of them.
    monkeypatch.setattr(xla, "set_flags", lambda: xla.Settings((), (), ""))

    def run(*arguments, **options):
        try:
            code = commands.main([str(argument) for argument in arguments], **options) or 0
        except SystemExit as exit_:
            code = exit_.code
            if isinstance(code, str):  # As the interpreter does.
                print(code, file=sys.stderr)
                code = 1
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_every_command_is_listed_and_describes_itself(run):
    code, out, _ = run("--help")
    assert code == 0 and "dd-jax COMMAND --help" in out
    assert {"train", "evaluate", "compare", "convert", "data"} <= set(commands.COMMANDS)
    for name, command in commands.COMMANDS.items():
        assert f"    {name}" in out and command.summary in out
        code, described, _ = run(name, "--help")
        assert code == 0 and described.startswith(f"usage: dd-jax {name} ")
        assert "python train.py" not in described
        assert "{train}" not in described and "{compare}" not in described


def test_help_of_train_lists_the_configurations_and_names_compare(run):
    _, out, _ = run("train", "--help", program="python -m dd_jax")
    assert "python -m dd_jax train --config digits_mlp" in out
    assert "`python -m dd_jax compare DIR/*`" in out
    assert all(name in out for name in configuration_files.names())


def test_the_version_is_said(run):
    assert run("--version") == (0, f"dd_jax {dd_jax.__version__}\n", "")


@pytest.mark.parametrize("arguments", [(), ("trian",), ("--config", "digits_mlp")])
def test_what_is_no_command_is_refused(run, arguments):
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and "dd-jax: error: " in err.splitlines()[-1]


def test_a_misspelled_configuration_costs_one_sentence(run, tmp_path):
    code, out, err = run("train", "--config", "digits_mpl", "--workdir", tmp_path / "run")
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert err.startswith("error: There is no configuration file digits_mpl; there are ")
    assert "digits_mlp" in err and not list(tmp_path.iterdir())


def test_a_sweep_names_the_command_that_compares_it(run, monkeypatch, tmp_path):
    from dd_jax.commands import train

    trained = []
    monkeypatch.setattr(train, "train", lambda *arguments: trained.append(arguments))
    sweep = ("--sweep", "defense.correct_scale=5,10", "--workdir", tmp_path / "two")
    code, out, err = run("train", "--config", "digits_mlp", *sweep)
    assert (code, err) == (0, "") and len(trained) == 2
    assert out.splitlines()[-1] == f"Compare them: dd-jax compare {tmp_path / 'two'}/*"


def test_compare_is_evaluate_with_compare(run, monkeypatch):
    asked = []

    def compare(*arguments, **options):
        asked.append((arguments, options))
        return "table"

    monkeypatch.setattr(comparison, "compare", compare)
    more = ("--measure", "deepfool", "--limit", "5", "--out", "out")
    assert run("compare", "runs/a", "runs/b", *more) == (0, "table\n", "")
    assert run("evaluate", "--compare", "runs/a", "runs/b", *more) == (0, "table\n", "")
    assert asked[0] == asked[1]
    assert asked[0][0] == ([pathlib.Path("runs/a"), pathlib.Path("runs/b")], pathlib.Path("out"))
    assert asked[0][1].items() >= {"names": ["deepfool"], "limit": 5, "data_dir": None}.items()


def test_converting_and_downloading_are_commands(run, tmp_path):
    variables = models.create("lenet").init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    source, target = tmp_path / "in.npz", tmp_path / "out.safetensors"
    kernels = {"conv1": (20, 1, 5, 5), "conv2": (50, 20, 5, 5), "fc1": (500, 800), "fc2": (10, 500)}
    random = np.random.default_rng(0)
    arrays = {f"{name}.weight": random.normal(size=shape) for name, shape in kernels.items()}
    arrays |= {f"{name}.bias": np.zeros(shape[0]) for name, shape in kernels.items()}
    np.savez(source, **{name: array.astype(np.float32) for name, array in arrays.items()})
    code, out, err = run("convert", source, "--model", "lenet", target)
    assert (code, err) == (0, "") and str(target) in out
    kernel = pretrained.load(target, "lenet")["params"]["conv1"]["kernel"]
    assert kernel.shape == variables["params"]["conv1"]["kernel"].shape
    np.testing.assert_array_equal(kernel, np.float32(arrays["conv1.weight"]).transpose(2, 3, 1, 0))
    code, _, err = run("convert", tmp_path / "nope.pth", "--model", "lenet", target)
    assert code == 1 and err.startswith("error: There is no file ")
    code, _, err = run("data", "nope")
    assert code == 1 and err.startswith("error: 'nope' cannot be downloaded")


def test_as_a_module_in_a_shell():
    done = subprocess.run(
        [sys.executable, "-m", "dd_jax", "evaluate", "--workdir", "nowhere"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: nowhere is not a run directory")


# Configurations by name and by file


def test_the_names_are_those_of_the_files_and_stand_for_them():
    files = {path.stem: path for path in (ROOT / "configs").glob("[!_]*.py")}
    assert configuration_files.names() == sorted(files)
    for name, path in files.items():
        by_name, by_file = configuration.read(name), configuration.read(str(path))
        assert by_name.to_dict() == by_file.to_dict()


INHERITS = """from configs import {parent}
def get_config():
    config = {parent}.get_config()
    config.seed = {seed}
    return config
"""


def test_a_file_finds_the_configurations_of_dd_jax_and_its_neighbors(tmp_path, monkeypatch):
    """Also outside a checkout, and whatever else is called configs."""
    theirs = tmp_path / "configs"
    theirs.mkdir()
    (theirs / "__init__.py").touch()
    (theirs / "base.py").write_text(INHERITS.format(parent="mnist_lenet", seed=1))
    (theirs / "mine.py").write_text(INHERITS.format(parent="base", seed=2))
    (tmp_path / "other.py").write_text(INHERITS.format(parent="base", seed=3))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(ROOT))])
    before = {name for name in sys.modules if name.startswith("configs")}
    mine = configuration.read(str(theirs / "mine.py"))
    assert mine.seed == 2 and mine.model.name == "lenet" and mine.data.name == "mnist"
    with pytest.raises(ConfigurationError, match="cannot import name 'base' from 'configs'"):
        configuration.read(str(tmp_path / "other.py"))
    # Not syspath_prepend, which would keep the shortened path after the test.
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert configuration.read(str(tmp_path / "other.py")).seed == 3
    assert {name for name in sys.modules if name.startswith("configs")} == before


def test_a_neighbor_comes_before_the_configuration_of_the_same_name(tmp_path):
    theirs = tmp_path / "configs"
    theirs.mkdir()
    default = (ROOT / "configs/default.py").read_text().replace('"seed": 0', '"seed": 7')
    (theirs / "default.py").write_text(default)
    (theirs / "mine.py").write_text("from configs.default import get_config\n")
    assert configuration.read(str(theirs / "mine.py")).seed == 7
    assert configuration.read("digits_mlp").seed == 0
