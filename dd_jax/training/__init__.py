"""The training state, the training step, the optimizer, the loop around them, and checkpoints."""

from dd_jax import extras

with extras.needed("train"):
    from dd_jax.training.checkpoints import Checkpoints, DamagedCheckpointError
    from dd_jax.training.optimizer import (
        SCHEDULES,
        cosine,
        halved_at_four_fifths,
        make_optimizer,
    )
    from dd_jax.training.train_step import (
        DivergenceError,
        TrainState,
        averaged,
        fit,
        fresh_state,
        initial_state,
        make_logits_fn,
        make_train_step,
    )

__all__ = [
    "SCHEDULES",
    "Checkpoints",
    "DamagedCheckpointError",
    "DivergenceError",
    "TrainState",
    "averaged",
    "cosine",
    "fit",
    "fresh_state",
    "halved_at_four_fifths",
    "initial_state",
    "make_logits_fn",
    "make_optimizer",
    "make_train_step",
]
