"""Converts a weight file to safetensors, with PyTorch's names and layout.

python -m dd_jax.pretrained in.pth --model resnet18 out.safetensors
python -m dd_jax.pretrained Carmon2019Unlabeled.pt out.safetensors
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

import jax

from dd_jax import models
from dd_jax.pretrained.classifiers import recognized
from dd_jax.pretrained.errors import WeightsError
from dd_jax.pretrained.files import SUFFIXES, checked_variables, read_arrays, save
from dd_jax.pretrained.layouts import with_normalization


def convert(
    source: pathlib.Path,
    name: str | None,
    target: pathlib.Path,
    normalization: models.Normalization | None = None,
) -> tuple[str, int]:
    """Writes the weights of the net `name` to `target` and returns the net's name and the number of
    arrays.

    `name` None stands for the net that the weights are recognized as. The target has float32 arrays
    with the names of the net itself, without prefixes and unused weights, and of a net that
    normalizes its inputs itself "mu" and "sigma": `normalization`, or those that `load` would take.
    Raises WeightsError if the file does not hold this net's weights, if it takes no normalization,
    or if `target` has another suffix.
    """
    arrays = read_arrays(source, name)
    name = name or recognized(source, arrays)
    variables = checked_variables(source, name, arrays)
    if normalization is not None:
        variables = with_normalization(variables, normalization)
    save(target, name, variables)
    return name, len(jax.tree.leaves(variables))


def main(
    arguments: Sequence[str] | None = None, program: str = "python -m dd_jax.pretrained"
) -> None:
    """Runs the command line, sys.argv's if None. An error that the user can correct prints one
    sentence and exits with status 1.
    """
    parser = argparse.ArgumentParser(
        prog=program, description="Converts weights to safetensors, with PyTorch's names."
    )
    parser.add_argument(
        "source", type=pathlib.Path, help=f"a file that ends in {', '.join(SUFFIXES)}"
    )
    parser.add_argument(
        "--model",
        help="the net that the weights belong to: "
        f"{', '.join((*models.NAMES, *(family.names for family in models.FAMILIES)))}; "
        "not needed for those that are recognized",
    )
    parser.add_argument(
        "--normalization",
        choices=tuple(models.NORMALIZATIONS),
        help="of images with values in [0, 1], in place of the file's",
    )
    parser.add_argument("target", type=pathlib.Path, help="a file that ends in .safetensors")
    chosen = parser.parse_args(arguments)
    normalization = models.NORMALIZATIONS.get(chosen.normalization)
    try:
        name, count = convert(chosen.source, chosen.model, chosen.target, normalization)
    except WeightsError as error:
        sys.exit(f"error: {error}")
    print(f"{chosen.target} holds the {count} arrays of {name}.")


if __name__ == "__main__":
    main()
