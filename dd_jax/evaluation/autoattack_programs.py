"""What AutoAttack runs on the device, see `dd_jax.evaluation.autoattack`: two programs for the
examples themselves, and two for each attack. `dd_jax.evaluation.programs` says why two.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dd_jax.attacks._autoattack import Version, attack_by
from dd_jax.attacks._losses import cross_entropy_margin
from dd_jax.data import Batch
from dd_jax.evaluation.programs import ApplyFn, AttackFn, JudgeFn, Rows, Shared
from dd_jax.evaluation.verification import is_fooled
from dd_jax.norms import LpNorm, lp_norm
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
        logits = _of_batch(apply_fn, shared, batch, setting, 1)(batch["image"])
        size = jnp.linalg.norm(logits, axis=-1) + jnp.finfo(logits.dtype).tiny
        change = jnp.linalg.norm(logits - found["logits"], axis=-1) / size
        one = jnp.abs(jnp.sum(logits, axis=-1) - 1) < IS_ONE
        is_probability = one & jnp.all((logits > -IS_ONE) & (logits < 1 + IS_ONE), axis=-1)
        vanishes = lp_norm(jnp.asarray(found["gradient"]), "l1") == 0
        odd = (is_probability, vanishes, ~(change <= SAME))
        wrong = jnp.argmax(logits, axis=-1) != batch["label"]
        rows = {name: batch[name] for name in ("number", "todo")}
        queries = jnp.ones_like(batch["number"])
        rows |= {"falls": wrong, "num_queries": queries, "odd": jnp.stack(odd, axis=-1)}
        return jnp.sum(batch["mask"]), rows

    return attack, judge


def attack_programs(apply_fn: ApplyFn, name: str, setting: Setting) -> tuple[AttackFn, JudgeFn]:
    """The two programs of one of AutoAttack's attacks."""
    norm, _, version, _, channel_axis = setting

    def attack(shared: Shared, batch: Batch) -> dict[str, Array]:
        # No class is -1: what has fallen, or fills up the batch, is done at once.
        labels = jnp.where(batch["todo"], batch["label"], -1)
        net = partial(apply_fn, shared["variables"])
        options = dict(norm=norm, epsilon=shared["epsilon"], bounds=shared["bounds"])
        options |= dict(version=version, key=batch["key"], channel_axis=channel_axis)
        return attack_by(name, net, batch["image"], labels, **options)._asdict()

    def judge(shared: Shared, batch: Batch, found: Mapping[str, Array]) -> tuple[Array, Rows]:
        logits_fn = _of_batch(apply_fn, shared, batch, setting, 2)
        limits = dict(bounds=shared["bounds"], epsilon=shared["epsilon"], norm=norm)
        falls = is_fooled(
            logits_fn, batch["image"], found["perturbation"], batch["label"], **limits
        )
        rows = {name: batch[name] for name in ("number", "todo")}
        return jnp.sum(batch["mask"]), rows | {"falls": falls, "num_queries": found["num_queries"]}

    return attack, judge


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
