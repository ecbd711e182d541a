"""Optional packages. `pip install dd_jax` brings JAX, jaxtyping and NumPy; extras bring the rest.

    with extras.needed("train"):
        import optax

Where optax is missing, the error is one sentence with the command that installs it. pyproject.toml
lists what each extra brings.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class MissingPackageError(ModuleNotFoundError):
    """One sentence: which package is missing, and the command that installs it."""


@contextmanager
def needed(extra: str) -> Iterator[None]:
    """Around imports of packages that an extra brings.

    Args:
      extra: its name in pyproject.toml. Where these blocks are nested, the outermost is named: it
        stands for what the user wanted.

    Raises:
      MissingPackageError: a package is not installed. Other errors of an import, and modules of
        dd_jax itself that are not found, pass through unchanged.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "dd_jax"):
            raise
        raise MissingPackageError(
            f"The package {package} is missing; pip install 'dd_jax[{extra}]' installs it.",
            name=error.name,
        ) from None
