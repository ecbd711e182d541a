"""Runs the notebooks and stores their outputs: `python docs/record_notebooks.py [NAME ...]`.

Run it after a change of a notebook or of what it shows. The fingerprint of the cells is stored with
the outputs; tests/test_notebooks.py checks that they belong together.
"""

import hashlib
import pathlib
import sys
import time

import nbformat
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parent / "notebooks"
OF_ONE_RUN = ("execution",)  # Metadata of cells that differ in every run.


def fingerprint(notebook: nbformat.NotebookNode) -> str:
    """Of the sources of all code cells."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def main() -> None:
    """Runs all notebooks, or those that are named."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        if sys.argv[1:] and path.stem not in sys.argv[1:]:
            continue
        notebook, begun = nbformat.read(path, as_version=4), time.perf_counter()
        NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=str(FOLDER))
        for cell in notebook.cells:
            for name in OF_ONE_RUN:
                cell.metadata.pop(name, None)
        notebook.metadata = {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "recorded": {"cells": fingerprint(notebook)},
        }
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - begun:.0f} s, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
