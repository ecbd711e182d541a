"""The training state, the training step, the loop around it, and its checkpoints."""

from dd_jax.training.checkpoints import Checkpoints, DamagedCheckpointError
from dd_jax.training.train_step import (
    SCHEDULES,
    DivergenceError,
    TrainState,
    cosine,
    fit,
    fresh_state,
    halved_at_four_fifths,
    initial_state,
    make_logits_fn,
    make_optimizer,
    make_train_step,
)

__all__ = [
    "SCHEDULES",
    "Checkpoints",
    "DamagedCheckpointError",
    "DivergenceError",
    "TrainState",
    "cosine",
    "fit",
    "fresh_state",
    "halved_at_four_fifths",
    "initial_state",
    "make_logits_fn",
    "make_optimizer",
    "make_train_step",
]
