"""Trains a reference net, defends it, and prints what it gained: `dd-jax train` in a checkout.

    python train.py --config configs/digits_mlp.py [--workdir DIR] [--config.FIELD=VALUE ...]

`python train.py --help` describes the rest; the code is in dd_jax/commands/train.py.
"""

import sys

from dd_jax import commands


def main() -> None:
    commands.run("train", sys.argv[1:], commands.SCRIPTS)


if __name__ == "__main__":
    main()
