"""`dd-jax convert` and `dd-jax data`: files of weights, and data sets.

`python -m dd_jax.pretrained` and `python -m dd_jax.data` run the same code.
"""

from collections.abc import Sequence

from dd_jax.commands import Calls
from dd_jax.data import download


def main(arguments: Sequence[str], calls: Calls) -> None:
    """Converts a file of weights, see `dd_jax.pretrained.__main__`."""
    from dd_jax.pretrained import __main__ as pretrained

    pretrained.main(arguments, calls["convert"])


def data(arguments: Sequence[str], calls: Calls) -> None:
    """Downloads a data set, see `dd_jax.data.download`."""
    download.main(arguments, calls["data"])
