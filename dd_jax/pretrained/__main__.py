"""Converts a file of weights to safetensors, under PyTorch's names and in its layout.

python -m dd_jax.pretrained in.pth --model resnet18 out.safetensors
"""

import argparse
import pathlib
import sys

from dd_jax import models
from dd_jax.pretrained.errors import WeightsError
from dd_jax.pretrained.files import SUFFIXES, checked_variables, read, save_safetensors

TARGET_SUFFIX = ".safetensors"


def convert(source: pathlib.Path, name: str, target: pathlib.Path) -> int:
    """Writes the weights of the net of that name; returns how many arrays. WeightsError if they are
    not that net's.
    """
    if target.suffix != TARGET_SUFFIX:
        raise WeightsError(
            f"{target} would be written as safetensors; give it a name that ends in "
            f"{TARGET_SUFFIX}."
        )
    arrays = read(source, name)
    checked_variables(source, name, arrays)
    save_safetensors(target, arrays)
    return len(arrays)


def main() -> None:
    """Runs the command line; an error that the user can mend is one sentence and exit status 1."""
    parser = argparse.ArgumentParser(
        prog="python -m dd_jax.pretrained", description="Converts weights to safetensors."
    )
    parser.add_argument(
        "source", type=pathlib.Path, help=f"a file that ends in {', '.join(SUFFIXES)}"
    )
    parser.add_argument(
        "--model", required=True, choices=models.NAMES, help="whose weights they are"
    )
    parser.add_argument("target", type=pathlib.Path, help=f"a file that ends in {TARGET_SUFFIX}")
    arguments = parser.parse_args()
    try:
        count = convert(arguments.source, arguments.model, arguments.target)
    except WeightsError as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.target} holds the {count} arrays of {arguments.model}.")


if __name__ == "__main__":
    main()
