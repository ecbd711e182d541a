"""The arrows between the modules, and the bounds that keep each of them readable.

A module may import those above it in ORDER and no other of the library. A package's entry stands
for all of it.
"""

import ast
import inspect
import io
import pathlib
import subprocess
import sys
import tokenize

import pytest

import dd_jax

ROOT = pathlib.Path(__file__).parent.parent
CORE = (
    "dd_jax.extras",
    "dd_jax.types",
    "dd_jax.norms",
    "dd_jax.xla.canary",
    "dd_jax.xla.flags",
    "dd_jax.xla.convolution",
    "dd_jax.xla.pooling",
    "dd_jax.xla.equation_forms",
    "dd_jax.xla.rewrite",
    "dd_jax.xla.closure_convert",
    "dd_jax.xla",
    "dd_jax.attacks._queue",
    "dd_jax.attacks._arguments",
    "dd_jax.attacks._deepfool_step",
    "dd_jax.attacks._deepfool",
    "dd_jax.attacks._ascent",
    "dd_jax.attacks._gradient_sign",
    "dd_jax.attacks._carlini_wagner_problem",
    "dd_jax.attacks._carlini_wagner",
    "dd_jax.attacks._minimum_norm",
    "dd_jax.attacks._ddn",
    "dd_jax.attacks._fmn",
    "dd_jax.attacks._superdeepfool",
    "dd_jax.attacks._hyperplane",
    "dd_jax.attacks._losses",
    "dd_jax.attacks._restarts",
    "dd_jax.attacks._auto_pgd_schedule",
    "dd_jax.attacks._auto_pgd",
    "dd_jax.attacks._fab",
    "dd_jax.attacks._square_windows",
    "dd_jax.attacks._square",
    "dd_jax.attacks._autoattack",
    "dd_jax.attacks",
    "dd_jax.penalties",
    "dd_jax._margin",
    "dd_jax.deep_defense",
    "dd_jax.evaluation.verification",
    "dd_jax.evaluation.measurements",
    "dd_jax.evaluation.metrics",
    "dd_jax",
)
TRAINING = (
    "dd_jax.defenses",
    "dd_jax.log",
    "dd_jax.models",
    "dd_jax.pretrained",
    "dd_jax.parallel",
    "dd_jax.data",
    "dd_jax.evaluation",
    "dd_jax.training",
    "dd_jax.results",
    "dd_jax.experiment.configuration_files",
    "dd_jax.experiment.configuration",
    "dd_jax.experiment.sweeps",
    "dd_jax.experiment.inputs",
    "dd_jax.experiment.measuring",
    "dd_jax.experiment.plans",
    "dd_jax.experiment.build",
    "dd_jax.experiment.reporting",
    "dd_jax.experiment.runs",
    "dd_jax.experiment.figures",
    "dd_jax.experiment.pages",
    "dd_jax.experiment.comparison",
    "dd_jax.experiment.command_line",
    "dd_jax.experiment",
    "dd_jax.commands",
    "dd_jax.__main__",
)
ORDER = CORE + TRAINING
CORE_MAY_IMPORT = {"jax", "jaxtyping", "numpy"} | sys.stdlib_module_names
NOT_IN_THE_CORE = ("flax", "optax", "orbax", "tensorflow_datasets", "grain", "ml_collections")
ONLY_IN = {
    "orbax": ("dd_jax.training",),
    "tensorflow_datasets": ("dd_jax.data",),
    "grain": ("dd_jax.data",),
    "ml_collections": (
        "dd_jax.experiment",
        "dd_jax.experiment.configuration_files",
        "dd_jax.experiment.configuration",
        "dd_jax.experiment.inputs",
        "dd_jax.experiment.plans",
        "dd_jax.experiment.build",
        "dd_jax.commands",
    ),
    "matplotlib": ("dd_jax.results",),
    "tensorboardX": ("dd_jax.log",),
}
# What only `parallel` may say.
PROCESS_NAMES = {"pmap", "shard_map", "process_index", "process_count"}
MOST_LINES, MOST_TOKENS = 400, 250


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted((ROOT / "dd_jax").rglob("*.py"))}
TREES = {module: ast.parse(path.read_text()) for module, path in FILES.items()}
each_module = pytest.mark.parametrize("module", FILES)


def place(module):
    """Where in ORDER a module stands, by its own name or that of a package around it."""
    names = [module.rsplit(".", i)[0] for i in range(module.count("."))] or [module]
    found = next((name for name in names if name in ORDER), None)
    if found is None:
        pytest.fail(
            f"{module} is new: add it to ORDER in tests/test_architecture.py, below all that it "
            f"imports."
        )
    return ORDER.index(found)


def imports(module):
    """The full names of all that a module imports, wherever in the file."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively: write the full name."
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in FILES else node.module


def functions(module):
    return [node for node in ast.walk(TREES[module]) if isinstance(node, ast.FunctionDef)]


@each_module
def test_arrows_point_up_only(module):
    for imported in imports(module):
        if imported.split(".")[0] == "dd_jax" and place(imported) != place(module):
            assert place(imported) < place(module), (
                f"{module} imports {imported}, which stands below it."
            )


@each_module
def test_the_core_imports_jax_alone_and_others_what_is_theirs(module):
    packages = {name.split(".")[0] for name in imports(module)} - {"dd_jax"}
    home = ORDER[place(module)]
    if home in CORE:
        others = packages - CORE_MAY_IMPORT
        assert not others, f"{module} belongs to the core; it may not import {', '.join(others)}."
    for package, owners in ONLY_IN.items():
        assert package not in packages or home in owners, (
            f"{module} imports {package}; only {', '.join(owners)} may."
        )


def test_the_core_runs_where_nothing_but_jax_can_be_imported():
    modules = [module for module in FILES if ORDER[place(module)] in CORE]
    program = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {NOT_IN_THE_CORE}:
            raise ImportError(name + " was imported")

sys.meta_path.insert(0, Blocker())
import jax.numpy as jnp
import {", ".join(modules)}
weights = jnp.array([[1.0, -1.0], [3.0, 0.5]])  # logits -1 and -2.5 at (2, -1)
print(dd_jax.regularizer(lambda x: x @ weights, jnp.array([[2.0, -1.0]]), jnp.array([0]))[0])
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(
        2.718281828 ** (-25 * 1.02 * 1.5 / (10.25 * 5) ** 0.5), rel=1e-4
    )


@each_module
def test_only_parallel_knows_of_several_devices(module):
    said = {getattr(node, "attr", getattr(node, "id", None)) for node in ast.walk(TREES[module])}
    said |= {
        alias.name
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert module.startswith("dd_jax.parallel") or not said & PROCESS_NAMES, (
        f"{module} says {said & PROCESS_NAMES}."
    )


READS_CONFIGURATIONS = ("dd_jax.experiment", "dd_jax.commands.train")


@each_module
def test_configurations_stop_in_the_experiment_package(module):
    """No other module imports or reads one, under whatever name it is passed on."""
    if module.startswith(READS_CONFIGURATIONS):
        return
    read = {
        ast.unparse(node)
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Attribute) and node.attr in ("config", "configuration")
    }
    # A report holds a copy of the configuration as a record.
    assert read <= {"jax.config", "report.config"}, f"{module} reads {read}."
    arguments = {node.arg for node in ast.walk(TREES[module]) if isinstance(node, ast.arg)}
    assert not arguments & {"config", "configuration"}, f"{module} is given a configuration."


def test_in_the_experiment_package_runs_hold_no_configuration():
    """`build` resolves it; what comes after works with plans."""
    after = ("measuring", "reporting", "runs", "figures", "comparison")
    for name in after:
        tree = TREES[f"dd_jax.experiment.{name}"]
        read = [n for n in ast.walk(tree) if getattr(n, "attr", getattr(n, "arg", "")) == "config"]
        assert {ast.unparse(node) for node in read} <= READ_AS_A_RECORD, name


READ_AS_A_RECORD = {
    "config=facts.config",  # report.json's copy of it
    "facts.config",
    "run.facts.config",
    "report.config",
    "before.config",
}


def test_public_names_are_few_and_documented():
    assert sorted(dd_jax.__all__) == dd_jax.__all__ and len(dd_jax.__all__) <= 20
    for name in dd_jax.__all__:
        documented = (
            inspect.getdoc(getattr(dd_jax, name))
            if name not in ("LogitsFn", "Solver")
            else alias_doc("dd_jax.types", name)
        )
        assert documented and len(documented) > 40, f"dd_jax.{name} has no docstring."


def alias_doc(module, name):
    """The string that follows an assignment."""
    body = TREES[module].body
    assigned = [isinstance(node, ast.Assign) and node.targets[0].id == name for node in body]
    return ast.literal_eval(body[assigned.index(True) + 1].value)


@each_module
def test_what_is_public_is_typed_and_documented(module):
    if FILES[module].stat().st_size:
        assert ast.get_docstring(TREES[module]), f"{module} does not say what it is for."
    tree = TREES[module]
    classes = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    methods = [
        node for parent in classes for node in parent.body if isinstance(node, ast.FunctionDef)
    ]
    public = [node for node in tree.body if isinstance(node, ast.FunctionDef)] + methods
    for node in public + classes:
        if node.name.startswith("_"):
            continue
        assert ast.get_docstring(node), f"{module}: {node.name} has no docstring."
        if isinstance(node, ast.ClassDef):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        untyped = [
            arg.arg
            for arg in arguments
            if arg.annotation is None and arg.arg not in ("self", "cls")
        ]
        assert not untyped and node.returns, (
            f"{module}: {node.name} lacks annotations: {untyped or 'what it returns'}."
        )


COUNTED = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
# From Python 3.12 on, an f-string is many tokens between these two; before, it is one.
FSTRING_START, FSTRING_END = (getattr(tokenize, f"FSTRING_{end}", None) for end in ("START", "END"))


def token_lines(path):
    """The lines on which a file's tokens begin; an f-string is one token."""
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if depth == 0 and token.type in (*COUNTED, FSTRING_START):
            yield token.start[0]
        depth += (token.type == FSTRING_START) - (token.type == FSTRING_END)


TOKENS = {module: list(token_lines(path)) for module, path in FILES.items()}


def tokens_of(module, node):
    """The number of tokens in a function's body, its docstring, comments and layout left out."""
    body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
    return sum(body[0].lineno <= line <= node.end_lineno for line in TOKENS[module])


@each_module
def test_files_and_bodies_are_short(module):
    num_lines = len(FILES[module].read_text().splitlines())
    assert num_lines <= MOST_LINES, f"{module} is long: does it do one thing?"
    for node in functions(module):
        length = tokens_of(module, node)
        assert length <= MOST_TOKENS, f"{module}: the body of {node.name} has {length} tokens."
