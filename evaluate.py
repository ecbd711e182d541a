"""Measures finished runs and compares them: `dd-jax evaluate` in a checkout.

    python evaluate.py --workdir runs/digits_mlp [--measure deepfool fgsm ...] [--limit N]
    python evaluate.py --compare runs/ten/* [--out runs/comparison]

`python evaluate.py --help` describes the rest; the code is in dd_jax/commands/evaluate.py.
"""

import sys

from dd_jax import commands


def main() -> None:
    commands.run("evaluate", sys.argv[1:], commands.SCRIPTS)


if __name__ == "__main__":
    main()
