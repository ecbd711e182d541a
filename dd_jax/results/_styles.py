"""The look and the name of each method, and the style of every figure (paper.mplstyle)."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import matplotlib

STYLE_FILE = pathlib.Path(__file__).with_name("paper.mplstyle")
STYLE = matplotlib.rc_params_from_file(STYLE_FILE, use_default_template=False)
COLUMN_WIDTH, TEXT_WIDTH = 3.4, 5.5  # Inches, of papers in two columns and in one.
RHO = r"Robustness $\rho_2$"


class Look(NamedTuple):
    """How a method's line is drawn.

    `dashes`: the lengths of its dashes and gaps in line widths; () is a solid line.
    """

    color: str
    dashes: tuple[float | int, ...]
    marker: str


# The first seven colors follow Okabe and Ito. The others were chosen to have a large distance to
# all colors here, also in simulations of color blindness; dashes and markers differ in gray print.
LOOKS = {
    "reference": Look("#000000", (), "o"),
    "clean": Look("#7f7f7f", (1, 1.2), "x"),
    "parseval": Look("#56b4e9", (5, 1.5, 1, 1.5), "^"),
    "adversarial_deepfool": Look("#e69f00", (4, 1.5), "s"),
    "adversarial_fgsm": Look("#cc79a7", (3, 1.2, 1, 1.2, 1, 1.2), "v"),
    "deep_defense": Look("#d55e00", (), "D"),
    "deep_defense_fgsm": Look("#0072b2", (8, 2), "P"),
    "adversarial_pgd": Look("#8c510a", (1, 3), "X"),
    "trades": Look("#005f60", (6, 1.5, 6, 1.5, 1, 1.5), "d"),
    "mma": Look("#661100", (2, 3.5), "1"),
    "amm": Look("#003c30", (12, 1.5, 1.5, 1.5, 1.5, 1.5), "2"),
}
# For other names. The numbers of choices have no common factor, so few of these looks are equal.
COLORS = ("#009e73", "#882255", "#332288", "#999933")
DASHES = ((2, 1), (6, 2, 2, 2), ())
MARKERS = ("<", ">", "p", "h", "*")

LABELS = {
    "reference": "Reference",
    "clean": "Clean",
    "parseval": "Parseval",
    "adversarial_deepfool": "Adv. Train I (DeepFool)",
    "adversarial_fgsm": "Adv. Train II (FGSM)",
    "deep_defense": "Deep Defense",
    "deep_defense_fgsm": "Deep Defense + FGSM",
}
"""The names in the legend if the caller gives no labels."""
STRENGTH_SYMBOLS = {
    "deep_defense": "$c$",
    "adversarial_fgsm": r"$\epsilon$",
    "deep_defense_fgsm": r"$\epsilon$",
}
"""The symbols of the swept strengths if the caller gives none."""


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """The look of each method. One that is not in LOOKS gets its look by its place among such."""
    unknown = [name for name in methods if name not in LOOKS]
    place = {name: index for index, name in enumerate(unknown)}
    choose = lambda choices, name: choices[place[name] % len(choices)]
    own = lambda name: Look(*(choose(choices, name) for choices in (COLORS, DASHES, MARKERS)))
    return {name: own(name) if name in place else LOOKS[name] for name in methods}


def legend_names(methods: Sequence[str], labels: Mapping[str, str] | None) -> dict[str, str]:
    """The name of each method in the legend: its label, or its own name if it has none.

    `labels`: None stands for LABELS. The names are plain text: draw them with `parse_math=False`.
    """
    known = LABELS if labels is None else labels
    return {name: _in_one_line(known.get(name, name)) for name in methods}


def _in_one_line(name: str) -> str:
    """A name in one line, and without a leading underscore, which would hide it from legends."""
    name = " ".join(name.split())
    return f" {name}" if name.startswith("_") else name


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Within it, Matplotlib has its own defaults and STYLE, whatever the user's settings are.

    Restores the user's settings at the end.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield
