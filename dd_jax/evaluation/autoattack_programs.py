"""What AutoAttack runs on the device, see `dd_jax.evaluation.autoattack`: two programs for the
examples themselves, and two for each attack. `dd_jax.evaluation.programs` says why two.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dd_jax.attacks._autoattack import Version, attack_by
from dd_jax.attacks._losses import cross_entropy_margin
from dd_jax.data import Batch
from dd_jax.evaluation.programs import ApplyFn, AttackFn, JudgeFn, Rows, Shared
from dd_jax.evaluation.verification import ROUNDING, is_fooled, predicted_classes
from dd_jax.norms import LpNorm, lp_norm, move_within
from dd_jax.types import LogitsFn

SAME = 1e-4
"""By how much the logits of an input may differ between two programs, relative to their size."""
IS_ONE = 1e-5
"""By how much the sum of probabilities may differ from 1."""


class Setting(NamedTuple):
    """What is measured. Sizes are in the units of the inputs."""

    norm: LpNorm = "linf"
    epsilon: float = 0.1
    version: Version = "standard"
    seed: int = 0
    channel_axis: int = -1  # of inputs with four axes, the batch first


def clean_programs(apply_fn: ApplyFn, setting: Setting) -> tuple[AttackFn, JudgeFn]:
    """The two programs that ask the net about the examples themselves, and look for odd nets."""

    def attack(shared: Shared, batch: Batch) -> Rows:
        logits_fn = _of_batch(apply_fn, shared, batch, setting, 0)
        slope = jax.grad(lambda x: jnp.sum(cross_entropy_margin(logits_fn(x), batch["label"], x)))
        return {"logits": logits_fn(batch["image"]), "gradient": slope(batch["image"])}

    def judge(shared: Shared, batch: Batch, found: Rows) -> tuple[Array, Rows]:
        logits_fn = _of_batch(apply_fn, shared, batch, setting, 1)
        logits, odd = logits_fn(batch["image"]), odd_rows(logits_fn, shared, batch, found)
        falls = predicted_classes(logits_fn, batch["image"]) != batch["label"]
        rows = {name: batch[name] for name in ("number", "label")} | {"todo": _todo(batch)}
        rows |= {"falls": falls, "odd": odd, "logits": logits.astype(jnp.float32)}
        return jnp.sum(batch["mask"]), rows | {"num_queries": jnp.ones_like(batch["number"])}

    return attack, judge


def odd_rows(logits_fn: LogitsFn, shared: Shared, batch: Batch, found: Rows) -> Array:
    """(rows, 4): whether the outputs are probabilities, the gradient is zero, the logits differ
    from those of the other program, and the input is out of bounds.
    """
    inputs, logits = batch["image"], logits_fn(batch["image"])
    one = jnp.abs(jnp.sum(logits, axis=-1) - 1) < IS_ONE
    is_probability = one & jnp.all((logits > -IS_ONE) & (logits < 1 + IS_ONE), axis=-1)
    is_flat = lp_norm(jnp.asarray(found["gradient"]), "l1") == 0
    size = jnp.linalg.norm(logits, axis=-1) + jnp.finfo(logits.dtype).tiny
    change = jnp.linalg.norm(logits - found["logits"], axis=-1) / size
    differs = ~(change <= jnp.maximum(SAME, ROUNDING * jnp.finfo(logits.dtype).eps))
    precision = ROUNDING * jnp.finfo(inputs.dtype).eps
    is_outside = lp_norm(inputs - move_within(inputs, shared["bounds"]), "linf") > precision
    return jnp.stack((is_probability, is_flat, differs, is_outside), axis=-1)


def attack_programs(apply_fn: ApplyFn, name: str, setting: Setting) -> tuple[AttackFn, JudgeFn]:
    """The two programs of one of AutoAttack's attacks."""
    fixed: dict[str, Any] = dict(norm=setting.norm, version=setting.version)
    fixed["channel_axis"] = setting.channel_axis

    def attack(shared: Shared, batch: Batch) -> dict[str, Array]:
        # No class is -1: what has fallen, or fills up the batch, is done at once.
        labels = jnp.where(_todo(batch), batch["label"], -1)
        net = partial(apply_fn, shared["variables"])
        ball = dict(epsilon=shared["epsilon"], bounds=shared["bounds"], key=batch["key"])
        return attack_by(name, net, batch["image"], labels, **fixed, **ball)._asdict()

    return attack, partial(judge_attack, apply_fn, setting)


def judge_attack(
    apply_fn: ApplyFn, setting: Setting, shared: Shared, batch: Batch, found: Mapping[str, Array]
) -> tuple[Array, Rows]:
    """What the net says of an attack's perturbations."""
    logits_fn = _of_batch(apply_fn, shared, batch, setting, 2)
    limits = dict(bounds=shared["bounds"], epsilon=shared["epsilon"], norm=setting.norm)
    given = batch["image"], found["perturbation"], batch["label"]
    rows: Rows = {
        "falls": is_fooled(logits_fn, *given, **limits),
        "num_queries": found["num_queries"],
    }
    rows |= {"number": batch["number"], "todo": _todo(batch)}
    return jnp.sum(batch["mask"]), rows


def _todo(batch: Batch) -> Array:
    """Which rows are to be attacked: none of those that fill up a batch."""
    return (batch["todo"] > 0) & (batch["mask"] > 0)


def _of_batch(
    apply_fn: ApplyFn, shared: Shared, batch: Batch, setting: Setting, draw: int
) -> LogitsFn:
    """The net; a random one draws for each row with the example's key, `draw` being a fresh one."""
    if setting.version != "rand":
        return partial(apply_fn, shared["variables"])

    def one(x: Array, key: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key), draw)
        return apply_fn(shared["variables"], x[None], key)[0]

    return lambda x: jax.vmap(one)(x, batch["key"])
