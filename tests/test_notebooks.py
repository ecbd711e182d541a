"""The notebooks run from start to end, and their stored outputs belong to their cells.

A cell may end with assertions on what it found: they hold here, too.
"""

import contextlib
import hashlib
import io
import json
import pathlib
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
MOST_BYTES = 200_000
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 3


@each_notebook
def test_the_cells_run_and_what_they_assert_holds(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    module = type(sys)("__notebook__")
    monkeypatch.setitem(sys.modules, "__notebook__", module)
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "show", lambda: pyplot.close("all"))
    with jax.numpy_rank_promotion("allow"), contextlib.redirect_stdout(io.StringIO()):
        for number, cell in enumerate(code_cells(path)):
            exec(compile(source(cell), f"{path.name}, code cell {number}", "exec"), vars(module))
    assert "assert" in source(code_cells(path)[-1]), "Its last cell checks what the text says."


@each_notebook
def test_the_outputs_are_those_of_the_cells_and_small(path):
    notebook, cells = json.loads(path.read_text()), code_cells(path)
    cells_now = hashlib.sha256("\0".join(map(source, cells)).encode()).hexdigest()
    recorded = notebook["metadata"].get("recorded", {}).get("cells")
    assert recorded == cells_now, "Run python docs/record_notebooks.py, and look at the outputs."
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert path.stat().st_size < MOST_BYTES
