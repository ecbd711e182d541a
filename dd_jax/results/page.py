"""A run's report, or a comparison's, as one HTML file that needs no network and no script.

    text = page.run_page(report, page.Contents(pictures, examples, commands))

All figures come from report.json; pictures and examples are part of the file. It follows the
reader's light or dark mode, and prints.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dd_jax.results import _html as html
from dd_jax.results._html import Html
from dd_jax.results._meanings import meaning
from dd_jax.results.report import Report, conditions, rows
from dd_jax.results.tables import PAPERS, Row, cell, has_published, measured_columns

BROAD = 1.6
"""From this ratio of width and height on, a picture takes the whole width of the page."""
STYLE = pathlib.Path(__file__).with_name("page.css")
CONFIRMED = "The verifying forward pass confirmed every success that an attack reported."
NO_EXAMPLES = "There are none: the inputs are no images, or no image fools all nets."


class Picture(NamedTuple):
    """A figure: its PNG, its title, what it shows in words, and the numbers in it as tables."""

    title: str
    png: bytes
    alt: str
    tables: Sequence[Html] = ()


class ExampleImage(NamedTuple):
    """An image: its PNG, and in words whose it is and what the net takes it for."""

    png: bytes
    caption: str


class Contents(NamedTuple):
    """What a page holds beside the figures of report.json.

    examples: for each original, the original and what fools each net. commands: to run in a shell,
    in order. provenance: in a word or two, to tell pages of other contents apart.
    """

    pictures: Sequence[Picture]
    examples: Sequence[Sequence[ExampleImage]]
    commands: Sequence[str]
    provenance: str = ""


def run_page(report: Report, contents: Contents) -> str:
    """The page of a run."""
    title = f"{report.model}, {report.defense}: {report.data.partition(' (')[0]}"
    both = rows(report)
    notes = [PAPERS] * has_published(both)
    body = [
        html.element("h1", title),
        html.element("p", conditions(report)),
        *_section("Measured", _table_of_run(both), *_paragraphs(notes), _glossary(both)),
        *_section("Remarks", _remarks(report.remarks)),
        *_after_the_table(contents),
        *_section("Configuration", html.folded("All fields", _configuration(report.config))),
        *_section("Machine and packages", _machine(report)),
    ]
    return _document(title, body, contents)


def comparison_page(
    rows: Sequence[Row], notes: Sequence[str], runs: Mapping[str, Report], contents: Contents
) -> str:
    """The page of a comparison: `rows` and `notes` of its table, and the runs' reports by label."""
    report, *others = runs.values()
    title = f"{len(runs)} runs of {report.model} on {report.data.partition(' (')[0]}"
    columns = measured_columns(rows)
    head = ["", *(column.heading for column in columns)]
    cells = [[row.label, *(cell(row, column) for column in columns)] for row in rows]
    remarks = list(dict.fromkeys(x for each in (report, *others) for x in each.remarks))
    differing = _differing(runs)
    body = [
        html.element("h1", title),
        *_section("Measured", html.table("Figures of each net", head, cells)),
        *_paragraphs(notes),
        _glossary(rows),
        *_section("Remarks", _remarks(remarks)),
        *_after_the_table(contents),
        *_section("How the runs differ", _in_words("Fields of each run", differing)),
        *_section("Configuration", html.folded("All fields", _configuration(report.config))),
        *_section("Machine and packages", _machine(report)),
    ]
    return _document(title, body, contents)


def _document(title: str, body: Sequence[Html], contents: Contents) -> str:
    return html.document(title, STYLE.read_text(), html.joined(body), contents.provenance)


def _section(heading: str, *content: Html) -> list[Html]:
    return [html.element("h2", heading), *content] if content else []


def _paragraphs(sentences: Sequence[str]) -> list[Html]:
    return [html.element("p", sentence, class_="faint") for sentence in sentences]


def _table_of_run(both: Sequence[Row]) -> Html:
    """A line per figure and a column per net."""
    lines = [
        [column.heading, *(cell(row, column) for row in both)] for column in measured_columns(both)
    ]
    return html.table("Figures of each net", ["", *(row.label for row in both)], lines)


def _glossary(rows: Sequence[Row]) -> Html:
    """What the columns mean."""
    parts = []
    for column in measured_columns(rows):
        parts += [html.element("dt", column.heading), html.element("dd", meaning(column))]
    return html.folded("What the figures mean", html.element("dl", html.joined(parts)))


def _remarks(remarks: Sequence[str]) -> Html:
    return html.element("ul", *(html.element("li", x) for x in remarks or [CONFIRMED]))


def _after_the_table(contents: Contents) -> list[Html]:
    """Pictures, examples and commands."""
    pictures = [_picture(picture) for picture in contents.pictures]
    examples = [_examples(each) for each in contents.examples]
    commands = html.element("pre", html.element("code", "\n".join(contents.commands)))
    return [
        *_section("Pictures", html.element("div", html.joined(pictures), class_="pictures")),
        *_section("Images that fool the nets", *(examples or _paragraphs([NO_EXAMPLES]))),
        *_section("Make it again", commands),
    ]


def _picture(picture: Picture) -> Html:
    data = html.folded("The numbers", *picture.tables) if picture.tables else None
    caption = html.element("figcaption", picture.title)
    # The size, as every PNG begins; without it the page would jump while it is opened.
    width, height = (int.from_bytes(picture.png[i : i + 4], "big") for i in (16, 20))
    image = html.image(picture.png, picture.alt, width=width, height=height)
    is_broad = width > BROAD * height
    return html.element("figure", image, caption, data, class_="broad" if is_broad else None)


def _examples(images: Sequence[ExampleImage]) -> Html:
    parts = [
        html.element("li", html.image(each.png, each.caption), html.element("div", each.caption))
        for each in images
    ]
    return html.element("ul", *parts, class_="examples")


def _in_words(caption: str, lines: Sequence[Sequence[Any]]) -> Html:
    """A table of words instead of numbers."""
    return html.element("div", html.table(caption, ["", "value"], lines), class_="text")


def _configuration(fields: Mapping[str, Any]) -> Html:
    lines = [[name, repr(value)] for name, value in fields.items()]
    return _in_words("config.json", lines)


def _machine(report: Report) -> Html:
    lines = [["device", report.device], ["Python", report.python]]
    lines += [["XLA_FLAGS", report.xla_flags or "-"], *map(list, report.packages.items())]
    return _in_words("What it was measured with", lines)


def _differing(runs: Mapping[str, Report]) -> list[list[str]]:
    """Each run's label, and FIELD=VALUE for the fields in which the runs differ."""
    records = {label: report.config for label, report in runs.items()}
    values = lambda name: {repr(record.get(name)) for record in records.values()}
    fields = [name for name in next(iter(records.values())) if len(values(name)) > 1]
    return [
        [label, ", ".join(f"{name}={record.get(name)}" for name in fields) or "-"]
        for label, record in records.items()
    ]
