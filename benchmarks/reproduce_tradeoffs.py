"""What accuracy the trials of the search left for what rho_2: the paper's Figure 6, from held-out images.

A trial counts if no other of its defense is at least as good in both. The paper varies one option of each
defense (c, epsilon) for this figure; the search varies all of them.
"""

import pathlib
from collections.abc import Sequence

from benchmarks.reproduce_search import DEFENSES, Figures, Line, read_lines
from dd_jax.experiment.figures import legend_labels
from dd_jax.results import plots
from dd_jax.results.report import REFERENCE

SHORTFALL = 0.03  # What is drawn may have so much less accuracy than the reference.
DOTS_PER_INCH = 200


def front(trials: Sequence[Line], lowest: float) -> list[tuple[float, float]]:
    """(accuracy, rho_2) of the trials with an accuracy of `lowest` or more that no other beats, by
    accuracy.
    """
    figures: list[Figures] = [line["figures"] for line in trials if line["figures"] is not None]
    pairs = sorted({(of["accuracy"], of["rho_l2"]) for of in figures if of["accuracy"] >= lowest})
    return [(a, rho) for i, (a, rho) in enumerate(pairs) if all(rho > r for _, r in pairs[i + 1 :])]


def draw(net: str, results: pathlib.Path) -> pathlib.Path | None:
    """Writes tradeoffs_NET.png into `results`; None where the net has no trials."""
    lines = read_lines(results / f"search_{net}.jsonl")
    reference = next((line["figures"] for line in lines if line["defense"] == REFERENCE), None)
    if reference is None:
        return None
    points = {REFERENCE: [(reference["accuracy"], reference["rho_l2"], None)]}
    for defense in DEFENSES:
        trials = [line for line in lines if line["defense"] == defense]
        if pairs := front(trials, reference["accuracy"] - SHORTFALL):
            points[defense] = [(accuracy, rho, None) for accuracy, rho in pairs]
    figure = plots.robustness_over_accuracy_figure(points, labels=legend_labels(list(points)))
    path = results / f"tradeoffs_{net}.png"
    figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})
    return path
