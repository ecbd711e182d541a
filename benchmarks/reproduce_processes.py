"""`python -m benchmarks.reproduce --processes N`: N processes at a time, each with its share of the runs.

Small nets leave most of an accelerator idle, and most of their time is compilation. Several processes on
one card take turns, or, with NVIDIA's MPS (`nvidia-cuda-mps-control -d` before), share it. The references
come first, each in a process of its own; then every defense of every net and seed. In a search a process
has all trials of a net's defense, since each depends on those before it.

What the processes say goes to WORKDIR/logs/NAME.log, and their programs are cached in WORKDIR/cache
(JAX_COMPILATION_CACHE_DIR, unless it is set). One that fails stops no other.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from benchmarks.reproduce_search import ROOT
from dd_jax.log import progress

Share = tuple[str, tuple[str, ...]]
"""The name of a process and its arguments: which net, which seed, which defense."""


def shares(
    nets: Sequence[str], seeds: Sequence[int], defenses: Sequence[str], *, search: bool
) -> tuple[list[Share], list[Share]]:
    """The references' processes, and those that need them."""
    of_net = [(net, ("--nets", net)) for net in nets]
    if not search:
        of_net = [
            (f"{name}-{seed}", (*share, "--seeds", str(seed)))
            for seed in seeds
            for name, share in of_net
        ]
    references = [(f"{name}-reference", (*share, "--defenses")) for name, share in of_net]
    others = [
        (f"{name}-{defense}", (*share, "--defenses", defense))
        for name, share in of_net
        for defense in defenses
    ]
    return references, others


def run_shares(
    number: int,
    waves: Sequence[Sequence[Share]],
    arguments: Sequence[str],
    workdir: pathlib.Path,
) -> list[str]:
    """Runs a wave of processes after the other, `number` at a time, with these arguments and each
    one's own. Returns the names of those that failed, or were asked to end: as this process was, by
    SIGTERM or Ctrl-C. They save then.
    """
    logs, failed = workdir / "logs", []
    logs.mkdir(parents=True, exist_ok=True)
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(workdir.resolve() / "cache")} | os.environ
    bar = progress("runs", sum(map(len, waves)), "run")
    with bar, _children() as start:

        def run(share: Share) -> None:
            name, own = share
            command = [sys.executable, "-m", "benchmarks.reproduce", *arguments, *own]
            with (logs / f"{name}.log").open("a") as log:
                code = start(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
            bar.update()
            if code:
                failed.append(name)
                tqdm.write(f"{name} ended with {code}; see {logs / name}.log", file=sys.stderr)

        for wave in waves:
            with ThreadPoolExecutor(number) as pool:
                list(pool.map(run, wave))
    return failed


@contextlib.contextmanager
def _children() -> Iterator[Callable[..., int]]:
    """A function that runs a process and returns its code. All are asked to end where this process
    is; none is started then.
    """
    running: set[subprocess.Popen] = set()
    ending, lock = threading.Event(), threading.Lock()

    def start(command: Sequence[str], **options: Any) -> int:
        with lock:
            if ending.is_set():
                return -signal.SIGTERM
            child = subprocess.Popen(command, **options)
            running.add(child)
        code = child.wait()
        running.discard(child)
        return code

    def end(number: int, frame: Any) -> None:
        ending.set()
        for child in list(running):
            child.terminate()

    before = {which: signal.signal(which, end) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield start
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
