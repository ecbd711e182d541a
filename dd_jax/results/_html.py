"""HTML from Python values: text is escaped, and what is HTML already stays as it is."""

import base64
import html
from collections.abc import Sequence
from typing import Any

EMPTY_ELEMENTS = ("img", "meta")


class Html(str):
    """Text that is HTML already."""


def text(content: Any) -> Html:
    """The content as HTML: escaped, unless it is HTML already."""
    return content if isinstance(content, Html) else Html(html.escape(str(content)))


def element(name: str, /, *content: Any, **attributes: Any) -> Html:
    """<name attributes>content</name>.

    Contents that are None are left out, and so are such attributes. A name like `class_` stands for
    `class`, `aria_label` for `aria-label`.
    """
    given = [
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    ]
    start = f"<{name}{''.join(given)}>"
    if name in EMPTY_ELEMENTS:
        return Html(start)
    return Html(start + "".join(text(part) for part in content if part is not None) + f"</{name}>")


def joined(parts: Sequence[Any]) -> Html:
    """The parts one after the other, in lines of their own."""
    return Html("\n".join(text(part) for part in parts))


def table(caption: str, head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> Html:
    """A table whose first row and first column are headings; it scrolls where it is too wide."""
    first = element("tr", *(element("th", cell, scope="col") for cell in head))
    lines = [
        element(
            "tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])
        )
        for row in rows
    ]
    whole = element(
        "table",
        element("caption", caption),
        element("thead", first),
        element("tbody", joined(lines)),
    )
    # Can be reached, and scrolled, from the keyboard.
    return element("div", whole, class_="wide", tabindex=0, role="region", aria_label=caption)


def image(png: bytes, alt: str, **attributes: Any) -> Html:
    """An image that is part of the page."""
    source = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
    return element("img", src=source, alt=alt, **attributes)


def folded(summary: str, *content: Any) -> Html:
    """Content that is shown after a click on the summary."""
    return element("details", element("summary", summary), *content)


def document(title: str, style: str, body: Html, description: str) -> str:
    """A whole page. It may load nothing, and runs no script."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = [
        Html('<meta charset="utf-8">'),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        Html(f'<meta name="generator" content="dd_jax {html.escape(description)}">'),
        element("title", title),
        element("style", Html(style)),
    ]
    page = joined([element("head", joined(head)), element("body", element("main", body))])
    return f'<!DOCTYPE html>\n<html lang="en">\n{page}\n</html>\n'
