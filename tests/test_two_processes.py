"""Commands that two processes run together give what one gives."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from test_experiment import ROOT, run, setting  # noqa: F401  A fixture of both modules.
from test_parallel import free_port


def compare(out, workdirs, *more):
    command = [sys.executable, "evaluate.py", "--compare", *map(str, workdirs)]
    command += ["--measure", "pgd", "--out", str(out), *more]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    return subprocess.Popen(command, **pipes)


def figures(out):
    return json.loads((out / "comparison.json").read_text())["figures"]


def test_two_processes_compare_runs_as_one_does(tmp_path):
    """Both measure what the runs lack, PGD, each on its half of every batch; one of them writes."""
    for name in ("deep_defense", "clean"):
        run(tmp_path / "runs" / name, f"defense.name={name}")
    for copy in ("one", "two"):
        shutil.copytree(tmp_path / "runs", tmp_path / copy)
    both = ["--coordinator", f"127.0.0.1:{free_port()}", "--num_processes", "2", "--process_id"]
    pair = [compare(tmp_path / "of_two", tmp_path.glob("two/*"), *both, str(i)) for i in range(2)]
    alone = compare(tmp_path / "of_one", tmp_path.glob("one/*"))
    ends = [process.communicate(timeout=300) for process in (*pair, alone)]
    assert [process.returncode for process in (*pair, alone)] == [0, 0, 0], ends
    (first, _), (second, _), _ = ends
    assert "deep_defense" in first and "deep_defense" not in second
    one, two = figures(tmp_path / "of_one"), figures(tmp_path / "of_two")
    assert one.keys() == two.keys() and len(one) == 3
    for label in one:
        assert one[label]["accuracy_pgd"] == pytest.approx(two[label]["accuracy_pgd"], abs=1e-6)
        np.testing.assert_allclose(one[label]["rho_l2"], two[label]["rho_l2"], rtol=1e-3)
    assert {path.name for path in (tmp_path / "of_one").iterdir()} == {
        path.name for path in (tmp_path / "of_two").iterdir()
    }
