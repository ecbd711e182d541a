"""Measures a net of a run, and says on stderr where an attack's own success was not confirmed."""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from dd_jax import parallel, training
from dd_jax.evaluation import Evaluator, Summary, remarks


def variables_of(state: training.TrainState) -> dict[str, Any]:
    """What the net of a state is measured with: averaged weights where training averaged them."""
    state = training.averaged(state)
    return {"params": state.params, "batch_stats": state.batch_stats}


def measure_state(
    evaluator: Evaluator,
    state: training.TrainState,
    *,
    names: Sequence[str] = ("deepfool",),
    limit: int | None = None,
    quiet: bool = False,
    name: str = "",
    save_in: pathlib.Path | None = None,
) -> Summary:
    """Accuracy and the measurements of those names (`evaluation.NAMES`) on the test images, the
    first `limit` of them.

    Adds "epsilon_half", the epsilon at which half of the images have fallen under FGSM, where
    "fgsm" is among the names; None: nowhere. `name` is what the net is called in progress bars.
    `save_in`: a directory in which AutoAttack keeps how far it is.
    """
    variables = variables_of(state)
    options: dict[str, Any] = dict(limit=limit, show_progress=not quiet and parallel.is_primary())
    file = None if save_in is None else save_in / flags_name(evaluator, name, limit)
    description = f"{name:9} measuring"
    found = evaluator.measure(
        variables, names=names, description=description, save_to=file, **options
    )
    if "fgsm" in names:
        description = f"{name:9} epsilon of 50 %"
        found["epsilon_half"] = evaluator.half_epsilon(
            variables, description=description, **options
        )
    if parallel.is_primary():
        for sentence in remarks(found, name or "the net"):
            tqdm.write(f"warning: {sentence}", file=sys.stderr)  # Above the progress bars.
    return found


def flags_name(evaluator: Evaluator, name: str, limit: int | None) -> str:
    """The name of the file that holds which images have fallen to AutoAttack."""
    chosen = evaluator.autoattack
    first = "" if limit is None else f"_first_{limit}"
    return f"autoattack_{name}_{chosen.norm}_{chosen.epsilon:g}_{chosen.version}{first}.npz"
