"""The paper's figures, drawn from plain numbers: what report.json and metrics.jsonl hold. Needs no net and no device.

    points = {"reference": [(0.983, 0.11, None)], "deep_defense": [(0.984, 0.15, 25), (0.981, 0.18, 10)]}
    png, pdf = dd_jax.plots.robustness_over_accuracy("plots", points)

`NAME(folder, ...)` writes NAME.png and NAME.pdf and returns their paths; `NAME_figure(...)` returns the Matplotlib figure
itself. A number may be None, NaN or infinite: it leaves a gap. A method without a point keeps its place in the legend,
marked "(no data)". Methods look the same in every figure, and different in grey print. The same data gives the same
bytes, whatever the user's Matplotlib settings are.
"""

from dd_jax.plots.figures import (
    Example,
    fooling_examples,
    fooling_examples_figure,
    robustness_over_accuracy,
    robustness_over_accuracy_figure,
    single_run,
    single_run_figure,
    success_over_epsilon,
    success_over_epsilon_figure,
    training_over_epochs,
    training_over_epochs_figure,
)
from dd_jax.plots.looks import LOOKS, Look, looks

__all__ = [
    "LOOKS",
    "Example",
    "Look",
    "fooling_examples",
    "fooling_examples_figure",
    "looks",
    "robustness_over_accuracy",
    "robustness_over_accuracy_figure",
    "single_run",
    "single_run_figure",
    "success_over_epsilon",
    "success_over_epsilon_figure",
    "training_over_epochs",
    "training_over_epochs_figure",
]
