"""Configuration files: those that come with dd_jax, by name, and those of the user.

    load("cifar_nin")            # configs/cifar_nin.py of dd_jax
    load("mine/tuned.py")        # a file anywhere; `from configs import default` works in it

A configuration file is a Python program with a function `get_config()`.
"""

import contextlib
import importlib.util
import pathlib
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from types import ModuleType

from ml_collections import ConfigDict

PACKAGE = "configs"


class ConfigurationError(ValueError):
    """One sentence for the person who wrote the configuration or the command."""


def directory() -> pathlib.Path:
    """Where the configurations of dd_jax are: in the package, or beside it in a checkout."""
    package = pathlib.Path(__file__).parent.parent
    installed = package / PACKAGE
    return installed if installed.is_dir() else package.parent / PACKAGE


def names() -> list[str]:
    """The names of the configurations of dd_jax, in alphabetical order."""
    return sorted(path.stem for path in directory().glob("[!_]*.py"))


def find(text: str) -> pathlib.Path:
    """The file that `text` stands for: one of `names()`, or a path.

    ConfigurationError where there is none, with those that there are.
    """
    if text in names():
        return directory() / f"{text}.py"
    path = pathlib.Path(text)
    if path.is_file():
        return path
    beside = path.parent.glob("[!_]*.py") if path.suffix and path.parent.is_dir() else ()
    others = sorted(map(str, beside)) or names()
    kind = "" if others != names() else "configurations of the names "
    raise ConfigurationError(
        f"There is no configuration file {text}; there are {kind}{', '.join(others)}."
    )


def load(text: str) -> ConfigDict:
    """What `get_config()` of a configuration file gives; `text` as in `find`.

    ConfigurationError where there is no such file, or where it fails.
    """
    path = find(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"The configuration file {path} must be named *.py.")
    module = importlib.util.module_from_spec(spec)
    try:
        with _configs_importable(path):
            spec.loader.exec_module(module)
            config = module.get_config()
    # Whatever the file does wrong is the user's to know, without our traceback.
    except Exception as error:
        raise ConfigurationError(
            f"The configuration file {path} cannot be used: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(config, ConfigDict):
        raise ConfigurationError(
            f"get_config() in {path} gives a {type(config).__name__}; it must give a ConfigDict."
        )
    return config


@contextlib.contextmanager
def _configs_importable(path: pathlib.Path) -> Iterator[None]:
    """Makes `from configs import ...` find the neighbors of the file in a folder "configs", the
    configurations of dd_jax, and a package "configs" on the user's path, in this order.
    """
    folder, on_path = path.resolve().parent, PathFinder.find_spec(PACKAGE)
    places = [str(folder)] if folder.name == PACKAGE else []
    places.append(str(directory()))
    if on_path is not None:
        places += on_path.submodule_search_locations or []
    before = _taken_from_modules()
    package = ModuleType(PACKAGE)
    package.__path__ = list(dict.fromkeys(places))
    sys.modules[PACKAGE] = package
    try:
        yield
    finally:
        _taken_from_modules()
        sys.modules.update(before)


def _taken_from_modules() -> dict[str, ModuleType]:
    """The package and its modules as far as they are imported; takes them out of sys.modules."""
    taken = [name for name in sys.modules if name.partition(".")[0] == PACKAGE]
    return {name: sys.modules.pop(name) for name in taken}
