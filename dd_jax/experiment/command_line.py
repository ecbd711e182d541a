"""What the commands share: processes, and one clear sentence instead of a traceback for what the
user can mend.
"""

import argparse
import errno
import sys
import traceback
from argparse import ArgumentParser
from collections.abc import Callable
from typing import TypeVar

import jax

from dd_jax import parallel
from dd_jax.data import DataError
from dd_jax.experiment.configuration_files import ConfigurationError
from dd_jax.extras import MissingPackageError
from dd_jax.parallel import Terminated
from dd_jax.pretrained import WeightsError
from dd_jax.training.checkpoints import DamagedCheckpointError, UnsavedCheckpointError
from dd_jax.training.exclusive import OccupiedError
from dd_jax.training.train_step import DivergenceError

USER_ERRORS = (
    ConfigurationError,
    DamagedCheckpointError,
    DataError,
    DivergenceError,
    MissingPackageError,
    OccupiedError,
    WeightsError,
    FileNotFoundError,
    UnsavedCheckpointError,
)
Prepared = TypeVar("Prepared")
INTERRUPTED, TERMINATED = 130, 143
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # XLA says this then.
STORAGE_ERRORS: tuple[int, ...]
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)
STORAGE_ERRORS += (errno.EIO,)


def make_parser(description: str, program: str | None = None) -> ArgumentParser:
    """A parser that shows the description as it is. `program`: how it is called; None: argv's."""
    return ArgumentParser(
        prog=program,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_process_arguments(parser: ArgumentParser) -> None:
    """The arguments of a run on several machines."""
    group = parser.add_argument_group(
        "several machines: the same command on each, on one shared file system"
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="join the other processes of this SLURM or TPU job",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of process 0, where nothing tells by itself"
    )
    group.add_argument("--num_processes", type=int)
    group.add_argument("--process_id", type=int, help="from 0")


def join_processes(arguments: argparse.Namespace) -> None:
    """Joins the other processes, if the arguments say that there are any. ConfigurationError if
    they contradict.
    """
    given = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    if arguments.distributed or any(x is not None for x in given):
        try:
            parallel.initialize(*given)
        except ValueError as error:
            raise ConfigurationError(str(error)) from error


def prepared_by_all(prepare: Callable[[], Prepared]) -> Prepared:
    """What `prepare` returns, once it has succeeded in all processes; none continues where it fails
    for another.

    Raises:
      One of USER_ERRORS: this process's own, or a ConfigurationError where only others failed.
    """
    try:
        return parallel.in_all_processes(prepare, USER_ERRORS)
    except parallel.OthersFailedError as error:
        raise ConfigurationError(str(error)) from None


def positive(text: str) -> int:
    """The type of an argument that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def say(text: str) -> None:
    """Prints at once; of several processes, one does."""
    if parallel.is_primary():
        print(text, flush=True)


def run(main: Callable[[], None], remark: str = "") -> None:
    """Runs a script's main function: exit code 1 with one sentence for errors of use, 130 when
    interrupted, 143 when asked to end (SIGTERM). One of several processes that fails ends without
    waiting for the others. `remark`: to be said on stderr before.
    """
    if remark:
        print(remark, file=sys.stderr, flush=True)
    try:
        main()
    except USER_ERRORS as error:
        if isinstance(error, UnsavedCheckpointError):
            parallel.wait_for_the_watch()
        _end(f"error: {error}", 1)
    except KeyboardInterrupt:
        _end("\nStopped. Rerun the command to resume from the latest checkpoint.", INTERRUPTED)
    # All processes end so, after the same step: they can wait for each other.
    except Terminated as reason:
        parallel.finish()
        print(f"\n{reason} Rerun the command to resume.", file=sys.stderr)
        sys.exit(TERMINATED)
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            _fail()
        _end(f"error: {_storage_sentence(error)}", 1)
    except jax.errors.JaxRuntimeError as error:
        if OUT_OF_MEMORY not in str(error):
            _fail()
        _end(f"error: {_memory_sentence(error)}", 1)
    except Exception:
        _fail()
    parallel.finish()


def _storage_sentence(error: OSError) -> str:
    where = error.filename or "The disk"
    return (
        f"{where} cannot be written ({error.strerror}): make room, or allow writing, and rerun the "
        "command, which resumes from what is saved."
    )


def _memory_sentence(error: Exception) -> str:
    said = str(error).splitlines()[0].removeprefix(f"{OUT_OF_MEMORY}:").strip().rstrip(".")
    return (
        f"There is not enough memory ({said}): measure fewer images at a time, as with "
        "--config.evaluation.batch_size=100, which changes no figure, or train on parts of a "
        "batch, as with --config.fine_tuning.accumulation_steps=4 in a new --workdir; what is "
        "saved is kept."
    )


def _fail() -> None:
    """Ends with the traceback of what this program did not foresee, or with the sentence of the
    watch where it comes of another process that is gone.
    """
    if parallel.is_one_of_several():
        parallel.wait_for_the_watch()
        _end(traceback.format_exc(), 1)
    raise  # noqa: PLE0704  The exception that is being handled.


def _end(text: str, code: int) -> None:
    print(text, file=sys.stderr)
    if parallel.is_one_of_several():
        parallel.end_process(code)
    sys.exit(code)
