"""A Sphinx extension: dd_jax's docstrings, written to be read in a terminal, as reStructuredText.

    `name`                          code
    an indented block               as it stands: the equations in plain text
    Args:, Returns:, Raises:        lists
    lines "name: what it is"        a list
    >>> and what follows            an example (tests/test_docstrings.py runs them)

Everything else is text in which the characters of reStructuredText mean nothing. Signatures show
the annotations as they stand in the source. The pages around the docstrings typeset the equations.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

SECTION = re.compile(r"(Args|Attributes|Returns|Raises):$")
ENTRY = re.compile(r"([\w*]+(?:, [\w*]+)*):\s+(\S.*)")


def setup(app: Any) -> dict[str, bool]:
    """Connects the extension to Sphinx."""
    app.connect("autodoc-process-docstring", convert)
    app.connect("autodoc-process-signature", as_written)
    return {"parallel_read_safe": True}


def convert(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Replaces the lines of a docstring."""
    if obj in (None, tuple.__doc__) or lines[:1] == ["Alias for field number"]:
        return
    lines[:] = list(converted(lines))


def as_written(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str | None] | None:
    """The signature of a function or of a class's constructor, as its source has it."""
    function = obj.__dict__.get("__init__") if inspect.isclass(obj) else obj
    if not inspect.isfunction(function):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, SyntaxError, TypeError):
        return None
    if not isinstance(tree, ast.FunctionDef):
        return None
    if tree.args.args and tree.args.args[0].arg in ("self", "cls"):
        tree.args.args.pop(0)
    return f"({ast.unparse(tree.args)})", ast.unparse(tree.returns) if tree.returns else None


def converted(lines: list[str]) -> Iterator[str]:
    """The lines of a docstring in reStructuredText."""
    for block in blocks(lines):
        first = block[0]
        if first.startswith(">>>"):
            yield from block
        elif SECTION.match(first):
            yield from [f"**{first.removesuffix(':')}**", ""]
            body = dedented(block[1:])
            yield from map(text, body) if first == "Returns:" else entries(body)
        elif first.startswith(" "):
            yield from ["::", "", *(f"   {line}" for line in dedented(block))]
        elif len(block) > 1 and all(ENTRY.match(line) or line.startswith(" ") for line in block):
            yield from entries(block)
        else:
            yield from paragraph(block)
        yield ""


def paragraph(block: list[str]) -> Iterator[str]:
    """Text; a list within it ("- one") begins after an empty line."""
    before = ""
    for line in block:
        if line.startswith("- ") and before and not before.startswith(("- ", "  ")):
            yield ""
        yield text(line)
        before = line


def blocks(lines: list[str]) -> list[list[str]]:
    """The paragraphs; indented ones in a row are one block, and belong to a section before them."""
    found: list[list[str]] = []
    begins = True
    for line in lines:
        if not line.strip():
            begins = True
            continue
        if SECTION.match(line):
            begins = True
        if not begins:
            found[-1].append(line)
        elif line.startswith(" ") and found and takes_indented(found[-1]):
            found[-1] += ["", line]
        else:
            found.append([line])
        begins = False
    return found


def takes_indented(block: list[str]) -> bool:
    """Whether an indented paragraph after this one belongs to it."""
    return block[0].startswith(" ") or bool(SECTION.match(block[0]))


def dedented(block: list[str]) -> list[str]:
    """The lines without the indentation that all of them share."""
    return textwrap.dedent("\n".join(block)).splitlines()


def entries(body: list[str]) -> Iterator[str]:
    """A list of "names: what they are", each of which may go on in indented lines."""
    for line in body:
        entry = ENTRY.match(line)
        if entry:
            names = ", ".join(f"``{name}``" for name in entry[1].split(", "))
            yield f"- {names}: {text(entry[2])}"
        else:
            yield f"  {text(line.strip())}" if line.strip() else ""


def text(line: str) -> str:
    """A line of text: `name` is code, and no other character has a meaning."""
    parts = line.split("`")
    if len(parts) % 2 == 0:  # Code that goes on in the next line is shown as text.
        return escaped(line)
    return "".join(f"``{part}``" if i % 2 else escaped(part) for i, part in enumerate(parts))


def escaped(part: str) -> str:
    """The text with a backslash before the characters that reStructuredText would interpret."""
    return re.sub(r"([\\*|_`])", r"\\\1", part)
