"""What works where only JAX, jaxtyping and NumPy are installed, and what is said of the rest.

`.ci/wheel` does the same with the wheel in an environment of its own.
"""

import ast
import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import dd_jax
from dd_jax import extras

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
FILES = sorted((ROOT / "dd_jax").rglob("*.py"))
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in FILES
    if path.name != "__main__.py"
]


def distribution_names(requirements):
    return {re.match(r"[\w-]+", text)[0].lower().replace("_", "-") for text in requirements}


def brought_by(extra):
    """The names of the distributions that an extra brings, those of extras within it included."""
    brought = set()
    for requirement in EXTRAS[extra]:
        inner = re.fullmatch(r"dd_jax\[(.*)\]", requirement)
        if inner:
            brought |= set().union(*map(brought_by, inner[1].split(",")))
        else:
            brought |= distribution_names([requirement])
    return brought


def imported(node):
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import):
            yield from (alias.name.split(".")[0] for alias in inner.names)
        elif isinstance(inner, ast.ImportFrom):
            yield inner.module.split(".")[0]


THIRD_PARTY = {
    name
    for path in FILES
    for name in imported(ast.parse(path.read_text()))
    if name not in sys.stdlib_module_names and name != "dd_jax"
}
DISTRIBUTIONS = importlib.metadata.packages_distributions()
NOT_DECLARED = {
    "absl": "tensorflow-datasets, grain and optax need it",
    "requests": "tensorflow-datasets needs it",
}


def installed_as(package):
    """The names under which a package to import is installed."""
    return {name.lower().replace("_", "-") for name in DISTRIBUTIONS.get(package, [])}


def test_a_plain_installation_brings_jax_and_what_types_it_alone():
    assert distribution_names(PROJECT["dependencies"]) == {"jax", "jaxtyping", "numpy"}


def test_every_package_that_is_imported_is_a_requirement_or_of_an_extra():
    declared = distribution_names(PROJECT["dependencies"]) | brought_by("all")
    missing = {
        name for name in THIRD_PARTY - set(NOT_DECLARED) if not installed_as(name) & declared
    }
    assert not missing
    assert set(NOT_DECLARED) <= THIRD_PARTY, "a package of NOT_DECLARED is imported no more"


def test_the_extra_that_a_sentence_names_brings_what_is_missing():
    asked = [
        (item.context_expr.args[0].value, name)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.With)
        for item in node.items
        if ast.unparse(item.context_expr).startswith("extras.needed(")
        for name in imported(node)
        if name in THIRD_PARTY - set(NOT_DECLARED)
    ]
    assert {"train", "plots", "evaluate", "tensorboard"} <= {extra for extra, _ in asked}
    for extra, package in asked:
        assert installed_as(package) & brought_by(extra), f"{extra} does not bring {package}"


BLOCKED = sorted(THIRD_PARTY - {"jax", "jaxtyping", "numpy", "scipy"})  # JAX brings SciPy.
CORE_ALONE = f"""
import importlib, json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Blocker())
said = {{}}
for module in {MODULES}:
    try:
        importlib.import_module(module)
        said[module] = ""
    except ImportError as error:
        said[module] = type(error).__name__ + ": " + str(error)

import numpy as np
from dd_jax import data, evaluation, log

def refusal(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except ImportError as error:
        return type(error).__name__ + ": " + str(error)

weights = np.float32([[1, -1], [3, 0.5]])
inputs, labels = np.float32([[2, -1], [1, 2]]), np.int32([0, 0])
evaluator = evaluation.Evaluator(
    lambda weights, x: x @ weights, data.in_memory(inputs, labels), to_images=lambda x: x
)
figures = evaluator.measure(weights, names=("deepfool", "fgsm", "pgd", "carlini_wagner"))
called = dict(
    digits=refusal(data.load, "digits", (28, 28, 1)),
    PASS=refusal(evaluator.measure, weights, names=("pass",)),
    curves=refusal(log.open_curves("somewhere", 0).__enter__),
)
print(json.dumps([said, figures, called]))
"""


@pytest.fixture(scope="module")
def core_alone():
    """What importing every module says where only the core's requirements can be imported, the
    figures of an evaluator there, and what calls that need more say.
    """
    done = subprocess.run(
        [sys.executable, "-c", CORE_ALONE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def sentence(package, extra):
    command = f"pip install 'dd_jax[{extra}]' installs it."
    return f"MissingPackageError: The package {package} is missing; {command}"


def test_every_module_can_be_imported_or_names_the_command_that_helps(core_alone):
    said = core_alone[0]
    public = {name: text for name, text in said.items() if not name.split(".")[-1].startswith("_")}
    for name, text in public.items():
        assert not text or re.fullmatch(sentence(r"\w+", r"\w+").replace("[", r"\["), text), (
            f"{name}: {text}"
        )
    works = {name for name, text in public.items() if not text}
    core = ("attacks", "commands", "data", "defenses", "evaluation", "parallel", "results.report")
    more = ("commands.train", "experiment", "models", "pretrained", "training", "results.plots")
    assert works >= {f"dd_jax.{name}" for name in core}
    assert not works & {f"dd_jax.{name}" for name in (*more, "evaluation.pass_score")}


def test_what_the_user_asked_for_chooses_the_extra(core_alone):
    said, _, called = core_alone
    assert said["dd_jax.models"] == sentence("flax", "train")
    assert "dd_jax[pretrained]" in said["dd_jax.pretrained"]
    assert said["dd_jax.results.plots"] == sentence("matplotlib", "plots")
    assert called == {
        "digits": sentence("sklearn", "train"),
        "PASS": sentence("cv2", "evaluate"),
        "curves": sentence("tensorboardX", "tensorboard"),
    }


def test_an_evaluator_measures_arrays_there(core_alone):
    """Logits are linear, so that DeepFool's distances are those of the differences of logits over
    the slope, times 1 + overshoot.
    """
    figures = core_alone[1]
    slope = (2**2 + 2.5**2) ** 0.5
    first, second = abs(2 * 2 - 2.5) / slope, (2 * 1 + 2.5 * 2) / slope
    assert figures["num_examples"] == 2 and figures["accuracy"] == 1
    assert figures["l2"] == pytest.approx((first + second) / 2 * 1.02, rel=1e-3)
    assert figures["carlini_wagner_success"] == 1


def test_errors_that_are_no_missing_package_pass_unchanged():
    for error in (
        ModuleNotFoundError("No module named 'dd_jax.nope'", name="dd_jax.nope"),
        ImportError("cannot import name 'x' from 'flax'", name="flax"),
        ValueError("else"),
    ):
        with pytest.raises(type(error)) as caught, extras.needed("train"):
            raise error
        assert caught.value is error


def test_the_version_is_the_same_everywhere():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", dd_jax.__version__)
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {dd_jax.__version__}\n" in citation
    newest = next(
        x for x in (ROOT / "CHANGELOG.md").read_text().splitlines() if x.startswith("## ")
    )
    assert newest.split()[1] == dd_jax.__version__
