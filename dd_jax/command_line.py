"""What train.py and evaluate.py share: one clear sentence instead of a traceback for what the user can mend."""

import argparse
import sys
from collections.abc import Callable

from dd_jax.configuration import ConfigurationError
from dd_jax.data import DataError
from dd_jax.parallel import Terminated
from dd_jax.training import DivergenceError

USER_ERRORS = (ConfigurationError, DataError, DivergenceError, FileNotFoundError)
INTERRUPTED, TERMINATED = 130, 143


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser that shows the script's docstring as its help."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def run(main: Callable[[], None]) -> None:
    """Runs a script's main function: exit code 1 with one sentence for errors of use, 130 when interrupted, 143 when
    asked to end (SIGTERM)."""
    try:
        main()
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from the latest checkpoint.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Terminated as reason:
        print(f"\n{reason} The same command goes on from there.", file=sys.stderr)
        sys.exit(TERMINATED)
