"""Commands that two processes run together give what one gives."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from test_experiment import ROOT, run, setting  # noqa: F401  A fixture of both modules.
from test_parallel import free_port

from dd_jax.experiment import comparison


def figures(out):
    return json.loads((out / "comparison.json").read_text())["figures"]


def test_two_processes_compare_runs_as_one_does(tmp_path):
    """They measure what the run lacks, PGD, each on its half of every batch; one of them writes."""
    run(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    command = [sys.executable, "evaluate.py", "--compare", str(tmp_path / "two")]
    command += ["--measure", "pgd", "--out", str(tmp_path / "of_two")]
    command += ["--coordinator", f"127.0.0.1:{free_port()}", "--num_processes", "2"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    pair = [subprocess.Popen([*command, "--process_id", str(i)], **pipes) for i in range(2)]
    printed = comparison.compare([tmp_path / "one"], tmp_path / "of_one", names=("pgd",))
    ends = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], ends
    (first, _), (second, _) = ends
    assert all("deep_defense" in text for text in (printed, first)) and "reference" not in second
    one, two = figures(tmp_path / "of_one"), figures(tmp_path / "of_two")
    assert one.keys() == two.keys() and len(one) == 2
    for label in one:
        assert one[label]["accuracy_pgd"] == pytest.approx(two[label]["accuracy_pgd"], abs=1e-6)
        np.testing.assert_allclose(one[label]["rho_l2"], two[label]["rho_l2"], rtol=1e-3)
    names = [{path.name for path in (tmp_path / out).iterdir()} for out in ("of_one", "of_two")]
    assert names[0] == names[1]
