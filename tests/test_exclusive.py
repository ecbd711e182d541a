"""A run directory is one process's at a time, also where that process is killed."""

import subprocess
import sys

import pytest

from dd_jax.training.exclusive import OccupiedError, alone_in

HOLDS = """
import pathlib, sys, time
from dd_jax.training.exclusive import alone_in
with alone_in(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    with alone_in(tmp_path):
        pass  # Ended: nobody is kept out.
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OccupiedError, match=r"in .*: wait .*--workdir"), alone_in(tmp_path):
            pass
        holder.kill()
    with alone_in(tmp_path):
        pass  # Killed: nothing has to be cleared away.
