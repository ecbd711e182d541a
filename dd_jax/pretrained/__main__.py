"""Converts a weight file to safetensors, with PyTorch's names and layout.

python -m dd_jax.pretrained in.pth --model resnet18 out.safetensors
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from dd_jax import models
from dd_jax.pretrained.errors import WeightsError
from dd_jax.pretrained.files import SUFFIXES, checked_variables, read_arrays, save_safetensors

TARGET_SUFFIX = ".safetensors"


def convert(source: pathlib.Path, name: str, target: pathlib.Path) -> int:
    """Writes the weights of the net `name` to `target` and returns the number of arrays.

    Raises WeightsError if the file does not hold this net's weights, or if `target` has another
    suffix.
    """
    if target.suffix != TARGET_SUFFIX:
        raise WeightsError(
            f"{target} would be a safetensors file; give it a name that ends in {TARGET_SUFFIX}."
        )
    arrays = read_arrays(source, name)
    checked_variables(source, name, arrays)
    save_safetensors(target, arrays)
    return len(arrays)


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
        "--model", required=True, choices=models.NAMES, help="the net that the weights belong to"
    )
    parser.add_argument("target", type=pathlib.Path, help=f"a file that ends in {TARGET_SUFFIX}")
    chosen = parser.parse_args(arguments)
    try:
        count = convert(chosen.source, chosen.model, chosen.target)
    except WeightsError as error:
        sys.exit(f"error: {error}")
    print(f"{chosen.target} holds the {count} arrays of {chosen.model}.")


if __name__ == "__main__":
    main()
