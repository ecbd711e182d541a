"""Sphinx configuration of the documentation: `sphinx-build -W docs docs/_build`.

Sphinx with furo, because MkDocs 1 has no maintainer and Material for MkDocs ends this year, while
Sphinx, furo and MyST are maintained.
"""

import importlib.metadata
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

project = "dd_jax"
author = "the authors of dd_jax"
copyright = "the authors of dd_jax"
release = version = importlib.metadata.version("dd_jax")

extensions = [
    "myst_nb",  # pages in Markdown, and the notebooks
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "docstrings",
]
exclude_patterns = ["_build"]
# Annotations are shown as they are written; "Settings" alone may be one of several.
suppress_warnings = ["ref.python"]

html_theme = "furo"
html_title = "dd_jax"
html_show_sphinx = False

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

# The notebooks are stored with their outputs; tests/test_notebooks.py runs them.
nb_execution_mode = "off"

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True

python_maximum_signature_line_length = 80

copybutton_exclude = ".linenos, .gp, .go"
smartquotes = False
