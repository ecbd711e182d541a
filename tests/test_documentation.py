"""What README.md and the pages in docs/ say is true of the code: every Python block runs, every
command in a shell block exists with its flags and fields, every link has a target.

The blocks of a page run in order in one namespace, each page in a directory of its own.
"""

import contextlib
import doctest
import functools
import importlib.util
import inspect
import io
import pathlib
import re
import runpy
import shlex
import sys
import tomllib
from typing import NamedTuple

import jax
import pytest

import dd_jax
from dd_jax import attacks, defenses, penalties
from dd_jax.data import catalog as data_catalog
from dd_jax.experiment import configuration, sweeps
from dd_jax.models.catalog import NETS

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(ROOT.glob("docs/**/*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LANGUAGES = {"python", "pycon", "bash", "text", "bibtex", "json"}
MOST_WORDS = 1000  # Of the README.
# Of shell blocks; none of them is ours.
OTHER_PROGRAMS = {"git", "cd", "export", "sphinx-build", "ruff", "mypy"}


class Block(NamedTuple):
    """A fenced block of a page, and the line on which it begins."""

    language: str
    line: int
    text: str


def blocks(page):
    """The fenced blocks of a page; directives such as {toctree} are for Sphinx."""
    fence, language, begun, lines = "", "", 0, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        opening = re.match(r"(`{3,})(.*)", line)
        if fence and line.strip() == fence:
            if not language.startswith("{"):
                yield Block(language, begun, "\n".join(lines) + "\n")
            fence = ""
        elif fence:
            lines.append(line)
        elif opening:
            fence, language, begun, lines = opening[1], opening[2].strip(), number + 1, []
    assert not fence, f"{page.name}: the block of line {begun} has no end."


def name_of(page):
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
with_python = [page for page in PAGES if any(b.language.startswith("py") for b in blocks(page))]


@each_page
def test_every_block_says_what_it_is(page):
    unknown = [block for block in blocks(page) if block.language not in LANGUAGES]
    assert not unknown, f"{page.name}, line {unknown[0].line}: its language is none of {LANGUAGES}."


@pytest.fixture
def registries():
    """What a page adds to them is taken out again."""
    all_of_them = (defenses.DEFENSES, penalties.PENALTIES, data_catalog.DATA_SETS, NETS)
    before = [dict(registry) for registry in all_of_them]
    yield
    for registry, entries in zip(all_of_them, before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.mark.parametrize("page", with_python, ids=name_of)
def test_the_python_blocks_run(page, tmp_path, monkeypatch, registries):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setitem(sys.modules, "__page__", type(sys)("__page__"))
    names = vars(sys.modules["__page__"])
    with jax.numpy_rank_promotion("allow"), contextlib.redirect_stdout(io.StringIO()):
        for block in blocks(page):
            if block.language == "python":
                # The line numbers of an error are the page's.
                code = "\n" * (block.line - 1) + block.text
                exec(compile(code, page, "exec"), names)
            elif block.language == "pycon":
                check_session(block, names, page)


def check_session(block, names, page):
    test = doctest.DocTestParser().get_doctest(block.text, names, page.name, str(page), block.line)
    test.globs = names  # Not a copy: later blocks use what this one defines.
    output = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    assert test.examples and not runner.run(test, out=output.append, clear_globs=False).failed, (
        "".join(output)
    )


# Examples


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_run_and_their_nets_gain(path):
    with jax.numpy_rank_promotion("allow"), contextlib.redirect_stdout(io.StringIO()) as printed:
        found = runpy.run_path(str(path))["main"]()
    (before, rho_before), (after, rho_after) = found["reference"], found["defended"]
    assert rho_after > 1.1 * rho_before and after > before - 0.02 and before > 0.9, found
    assert f"rho_2 {rho_after:.3f}" in printed.getvalue()


def test_the_page_on_your_own_loop_shows_every_example():
    text = (ROOT / "docs/own_loop.md").read_text()
    assert EXAMPLES
    for path in EXAMPLES:
        assert f"../examples/{path.name}" in text, f"docs/own_loop.md does not show {path.name}."


# Commands


def commands(page):
    """The commands of the shell blocks: (line, words)."""
    for block in blocks(page):
        if block.language != "bash":
            continue
        line = block.line
        for text in block.text.replace("\\\n", " \0").splitlines():
            for command in re.split(r"&&|;|\|", text.replace("\0", "")):
                words = shlex.split(command, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words:
                    yield line, words
            line += 1 + text.count("\0")


with_commands = [page for page in PAGES if any(commands(page))]


@pytest.mark.parametrize("page", with_commands, ids=name_of)
def test_the_commands_exist_and_take_what_they_are_given(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    for line, words in commands(page):
        try:
            check_command(words)
        except AssertionError as error:
            pytest.fail(f"{name_of(page)}, line {line}: {' '.join(words)}: {error}")


def check_command(words):
    program, *arguments = words
    program = program.removeprefix(".venv/bin/")
    if program in ("python", "python3"):
        if arguments[0] == "-m":
            check_module(arguments[1], arguments[2:])
        elif arguments[0] == "-c":
            compile(arguments[1], "-c", "exec")
        else:
            assert (ROOT / arguments[0]).is_file(), f"there is no {arguments[0]}"
            check_flags(("script", arguments[0]), arguments[1:])
    elif program == "dd-jax":
        check_module("dd_jax", arguments)
    elif program == "pip":
        check_install(arguments)
    else:
        assert program in OTHER_PROGRAMS, f"{program} is not known to this test"


def check_module(name, arguments):
    assert importlib.util.find_spec(name), f"there is no module {name}"
    if name == "pip":
        check_install(arguments)
    elif name == "dd_jax":
        check_flags(("module", name, arguments[0]), arguments[1:])
    elif name.split(".")[0] in ("dd_jax", "benchmarks"):
        check_flags(("module", name), arguments)


def check_install(arguments):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for named in re.findall(r"\[(.+?)\]", " ".join(arguments)):
        unknown = set(named.split(",")) - set(extras["optional-dependencies"])
        assert not unknown, f"there is no extra {', '.join(unknown)}"


def check_flags(command, arguments):
    """Each flag stands in the command's help, each field and value is one of the configuration."""
    overrides = [word for word in arguments if word.startswith("--config.")]
    flags = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    # What gets no flags need not know --help, unless it is a command of dd-jax.
    help_text = help_of(command) if flags or command[:2] == ("module", "dd_jax") else ""
    for flag in flags - {word.partition("=")[0] for word in overrides}:
        assert re.search(rf"{flag}\b", help_text), f"it takes no {flag}"
    config = next((after for word, after in pairs(arguments) if word == "--config"), None)
    if config is None:
        return
    swept = [after for word, after in pairs(arguments) if word == "--sweep"]
    values = sweeps.expand(swept, overrides, pathlib.Path("unused")) if swept else [None]
    for run in values:
        fields = run.overrides if run else overrides
        try:
            configuration.read(config, fields)
        except configuration.ConfigurationError as error:
            raise AssertionError(error) from error


def pairs(words):
    """The words, each with the one after it; --flag=value counts as two."""
    flat = [part for word in words for part in split_flag(word)]
    return zip(flat, flat[1:], strict=False)


def split_flag(word):
    is_flag = word.startswith("--") and not word.startswith("--config.")
    return word.split("=", 1) if is_flag and "=" in word else [word]


@functools.cache
def help_of(command):
    """What --help prints."""
    kind, name, *subcommands = command
    out = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
        contextlib.suppress(SystemExit),
    ):
        patch.setattr(sys, "argv", [name, *subcommands, "--help"])
        run = runpy.run_path if kind == "script" else runpy.run_module
        run(name, run_name="__main__", **({"alter_sys": True} if kind == "module" else {}))
    text = out.getvalue()
    assert "usage" in text.lower(), f"{' '.join(map(str, command))} --help prints no usage: {text}"
    return text


# Words and links


def test_the_readme_is_short():
    words = len(README.read_text().split())
    assert words < MOST_WORDS, f"README.md has {words} words; move what is not for all to docs/."


@each_page
def test_the_links_within_the_repository_have_targets(page):
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text())
    links = [link for link in re.findall(r"\]\(<?([^)\s>]+)>?\)", text) if "://" not in link]
    for link in links:
        target, _, anchor = link.partition("#")
        path = (page.parent / target) if target else page
        assert path.exists(), f"{name_of(page)} links to {link}, which does not exist."
        if anchor and path.suffix == ".md":
            titles = re.findall(r"(?m)^#+ (.+)$", path.read_text())
            assert anchor in map(anchor_of, titles), f"{name_of(page)} links to {link}."


def anchor_of(title):
    """The anchor that GitHub and MyST make of a title."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


# The API


def test_the_api_pages_hold_every_public_function():
    text = "\n".join(path.read_text() for path in sorted((ROOT / "docs/api").glob("*.md")))
    public = {f"dd_jax.{name}" for name in dd_jax.__all__ if not is_module(dd_jax, name)}
    public |= {f"dd_jax.attacks.{name}" for name in attacks.__all__}
    public |= {f"dd_jax.penalties.{name}" for name in penalties.PENALTIES}
    public -= {"dd_jax.attacks.deepfool"}  # dd_jax.deepfool
    missing = {name for name in public if not re.search(rf":: {re.escape(name)}$", text, re.M)}
    assert not missing, f"docs/api does not document {', '.join(sorted(missing))}."


def is_module(parent, name):
    return inspect.ismodule(getattr(parent, name)) or name.startswith("__")


def test_the_api_pages_typeset_equations():
    for path in (ROOT / "docs/api").glob("*.md"):
        if "autofunction" in path.read_text():
            assert "$$" in path.read_text(), f"{name_of(path)} has no equation."
