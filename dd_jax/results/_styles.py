"""How each method is called and drawn, and how every figure is styled."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import matplotlib

STYLE = {
    "font.family": ["STIXGeneral", "DejaVu Sans"],  # The second for what the first lacks.
    "mathtext.fontset": "stix",
    "font.size": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "legend.handletextpad": 0.6,
    "legend.borderpad": 0.1,
    "legend.borderaxespad": 0.2,
    "axes.formatter.useoffset": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.88",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "lines.markeredgewidth": 0.9,
    "pdf.fonttype": 42,  # Text stays text; many publishers refuse the default, Type 3.
}


class Look(NamedTuple):
    """A method's name, color, lengths of its line's dashes and gaps in line widths (none: solid),
    and marker.
    """

    label: str
    color: str
    dashes: tuple[float | int, ...]
    marker: str


LOOKS = {  # Colors after Okabe and Ito, told apart by the color-blind.
    "reference": Look("Reference", "#000000", (), "o"),
    "clean": Look("Clean", "#7f7f7f", (1, 1.2), "x"),
    "parseval": Look("Parseval", "#56b4e9", (5, 1.5, 1, 1.5), "^"),
    "adversarial_deepfool": Look("Adv. Train I (DeepFool)", "#e69f00", (4, 1.5), "s"),
    "adversarial_fgsm": Look("Adv. Train II (FGSM)", "#cc79a7", (3, 1.2, 1, 1.2, 1, 1.2), "v"),
    "deep_defense": Look("Deep Defense", "#d55e00", (), "D"),
    "deep_defense_fgsm": Look("Deep Defense + FGSM", "#0072b2", (8, 2), "P"),
}
# For names that are not above; the numbers of choices share no factor, so that few of them look the
# same.
COLORS = ("#009e73", "#882255", "#332288", "#999933")
DASHES = ((2, 1), (6, 2, 2, 2), ())
MARKERS = ("<", ">", "p", "h", "*")


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """The look of each method. One not in LOOKS goes by its own name and gets its look by its place
    among such.

    Labels are plain text: draw them with `parse_math=False`.
    """
    unknown = [name for name in methods if name not in LOOKS]
    place = {name: index for index, name in enumerate(unknown)}
    choose = lambda choices, name: choices[place[name] % len(choices)]
    own = lambda name: Look(
        _shown(name), *(choose(choices, name) for choices in (COLORS, DASHES, MARKERS))
    )
    return {name: own(name) if name in place else LOOKS[name] for name in methods}


def _shown(name: str) -> str:
    """A name in one line, and without a leading underscore, which hides it from legends."""
    name = " ".join(name.split())
    return f" {name}" if name.startswith("_") else name


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Matplotlib's own defaults and STYLE, whatever the user has set; as it was before at the
    end.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield
