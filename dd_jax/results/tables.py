"""The paper's table from measured figures, with the paper's figures in brackets, as text and as
Markdown.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dd_jax.results.curves import STANDARD, Point, in_order, points
from dd_jax.results.published import Figures


class Column(NamedTuple):
    """One figure of the table.

    `name`: its key in the measured figures. `form`: its format string. `published`: its field in
    the paper's `Figures`, if it has one. `usual`: the column is left out where all nets have this
    value.
    """

    heading: str
    name: str
    form: str
    published: str | None = None
    usual: float | None = None


class Row(NamedTuple):
    """One net: its label, its measured figures, and the paper's figures for the same method."""

    label: str
    measured: Mapping[str, Any]
    published: Mapping[str, Any] | Figures | None = None


FGSM_FRACTIONS = (0.2, 0.5, 1.0)
"""Fractions of epsilon_ref, the epsilon with which FGSM fools the Deep Defense net on half of the
images.
"""


def fgsm_name(fraction: float) -> str:
    """The name of the accuracy under FGSM at a fraction of epsilon_ref."""
    return f"accuracy_fgsm_{fraction}"


COLUMNS = (
    Column("accuracy", "accuracy", "{:.2%}"),
    Column("rho_2", "rho_l2", "{:.4f}"),
    Column("l_2", "l2", "{:.3f}", "l2_deepfool"),
    Column("DeepFool success", "deepfool_success", "{:.2%}"),
    Column("rho_inf", "rho_linf", "{:.4f}", "rho_linf_fgsm"),
    Column("FGSM success", "fgsm_success", "{:.2%}"),
    Column("eps. 50 %", "epsilon_half", "{:.4f}"),
    *(Column(f"acc. FGSM {x} ref", fgsm_name(x), "{:.2%}") for x in FGSM_FRACTIONS),
    Column("l_2 C&W", "l2_carlini_wagner", "{:.3f}", "l2_carlini_wagner"),
    Column("C&W success", "carlini_wagner_success", "{:.2%}"),
    Column("rho_2 DDN", "rho_l2_ddn", "{:.4f}"),
    Column("l_2 DDN", "l2_ddn", "{:.3f}"),
    Column("DDN success", "ddn_success", "{:.2%}", usual=1.0),
    Column("rho_inf FMN", "rho_linf_fmn", "{:.4f}"),
    Column("l_inf FMN", "linf_fmn", "{:.4f}"),
    Column("FMN l_inf success", "fmn_linf_success", "{:.2%}", usual=1.0),
    Column("l_1 FMN", "l1_fmn", "{:.3f}"),
    Column("FMN l_1 success", "fmn_l1_success", "{:.2%}", usual=1.0),
    Column("acc. PGD", "accuracy_pgd", "{:.2%}", "accuracy_pgd"),
    Column("PASS", "pass", "{:.4f}", "similarity_pass"),
)
BEFORE_AUTOATTACK = "accuracy_pgd"
"""The column that AutoAttack's columns follow."""
PAPERS = "in brackets: the paper's"


def measured_columns(rows: Sequence[Row]) -> list[Column]:
    """The columns for which a row has a measured figure; of AutoAttack, one per norm, epsilon and
    version.
    """
    place = [column.name for column in COLUMNS].index(BEFORE_AUTOATTACK) + 1
    columns = [*COLUMNS[:place], *_autoattack_columns(rows), *COLUMNS[place:]]
    return [column for column in columns if _is_shown(column, rows)]


def cell(row: Row, column: Column) -> str:
    """A row's figure as text, with the paper's in brackets; "-" where it was not measured."""
    value, published = measured_value(row, column), _published(row, column)
    text = "-" if value is None else column.form.format(value)
    return text if published is None else f"{text} ({column.form.format(published)})"


def measured_value(row: Row, column: Column) -> float | None:
    """A row's figure in a column of `measured_columns`."""
    if column.name in row.measured:
        return row.measured[column.name]
    found = {_autoattack_name(point): point.robust_accuracy for point in points(row.measured)}
    return found.get(column.name)


def _is_shown(column: Column, rows: Sequence[Row]) -> bool:
    values = {measured_value(row, column) for row in rows} - {None}
    return bool(values) and values != {column.usual}


def _autoattack_name(point: Point) -> str:
    return f"accuracy_autoattack_{point.norm}_{point.epsilon:g}_{point.version}"


def _autoattack_columns(rows: Sequence[Row]) -> list[Column]:
    """A column for each norm, epsilon and version of AutoAttack, in this order."""
    columns = {}
    for point in in_order(point for row in rows for point in points(row.measured)):
        version = "" if point.version == STANDARD else f" {point.version}"
        heading = f"acc. AA{version} {point.norm} {point.epsilon:g}"
        columns[_autoattack_name(point)] = Column(heading, _autoattack_name(point), "{:.2%}")
    return list(columns.values())


def text_table(rows: Sequence[Row]) -> str:
    """The table for a terminal, with aligned columns. Columns without measurements are left out."""
    cells = _cells(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            [label.ljust(widths[0])]
            + [x.rjust(width) for x, width in zip(others, widths[1:], strict=True)]
        )
        for label, *others in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(rows: Sequence[Row]) -> str:
    """The table for a README, with the same columns."""
    first, *others = _cells(rows)
    lines = [first, ["---", *("---:" for _ in first[1:])], *others]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def has_published(rows: Sequence[Row]) -> bool:
    """Whether the table of these rows has any figure of the paper."""
    return any(
        _published(row, column) is not None for row in rows for column in measured_columns(rows)
    )


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    columns = measured_columns(rows)
    return [["", *(column.heading for column in columns)]] + [
        [row.label, *(cell(row, column) for column in columns)] for row in rows
    ]


def _published(row: Row, column: Column) -> float | None:
    if row.published is None or column.published is None:
        return None
    figures = row.published._asdict() if isinstance(row.published, Figures) else row.published
    return figures.get(column.published)
