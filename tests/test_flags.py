"""The first candidate under which the canary passes is set, never over the user's own flag, and it
changes no result.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from dd_jax.xla import canary, flags
from dd_jax.xla.flags import FLAG

OTHERS = "--xla_force_host_platform_device_count=2"
SCRIPT = """
import json, sys
from dd_jax import xla
said = xla.set_flags() if sys.argv[1] == "with" else None
import functools, jax, jax.numpy as jnp, numpy as np, dd_jax, flax.linen as nn

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x))
        return nn.Dense(3, name="out")(nn.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1))

x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 6, 6, 1)), jnp.float32)
net = Net()
params = net.init(jax.random.key(0), x)
loss = lambda p: dd_jax.deep_defense_loss(functools.partial(net.apply, p), x, jnp.arange(8) % 3)[0].mean()
value, gradient = jax.jit(jax.value_and_grad(loss))(params)
leaves = [np.asarray(leaf).ravel().tolist() for leaf in jax.tree.leaves(gradient)]
after = xla.set_flags().sentence  # JAX has started.
print(json.dumps([said and said.failures, float(value), leaves, after]))
"""


@pytest.fixture
def environment(monkeypatch):
    """XLA_FLAGS that hold another flag, in a process in which JAX has not started."""
    monkeypatch.setenv("XLA_FLAGS", OTHERS)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(flags, "_jax_has_started", lambda: False)


def failing(monkeypatch, *fragments):
    """A canary that fails where one of these is within the flags ("" stands for no flag of ours),
    and what it was asked.
    """
    asked = []

    def failures_under(flags):
        asked.append(flags)
        return (
            ("pairs",)
            if any(part in flags if part else FLAG not in flags for part in fragments)
            else ()
        )

    monkeypatch.setattr(canary, "failures_under", failures_under)
    return asked


def test_xlas_own_choice_stands_where_it_is_right(environment, monkeypatch):
    asked = failing(monkeypatch)
    assert (
        flags.set_flags() == ((), (), "")
        and asked == [OTHERS]
        and os.environ["XLA_FLAGS"] == OTHERS
    )


def test_the_empty_list_is_set_where_xlas_own_choice_is_wrong(environment, monkeypatch):
    asked = failing(monkeypatch, "")
    added, failures, sentence = flags.set_flags()
    assert (added, failures) == ((f"{FLAG}=",), ()) and f"{FLAG}=," in sentence
    assert os.environ["XLA_FLAGS"] == f"{OTHERS} {FLAG}=" == asked[-1]


def test_a_candidate_that_fails_is_passed_over(environment, monkeypatch):
    failing(monkeypatch, "", "=bad")
    monkeypatch.setattr(flags, "CANDIDATES", ((f"{FLAG}=bad",), (), (f"{FLAG}=good",)))
    assert flags.set_flags().added == (f"{FLAG}=good",)


def test_where_all_are_wrong_none_is_set_and_a_sentence_says_so(environment, monkeypatch):
    failing(monkeypatch, "", "=")
    added, failures, sentence = flags.set_flags()
    assert (
        (added, failures) == ((), ("pairs",))
        and "computes wrongly on this CPU" in sentence
        and "jaxlib" in sentence
    )
    assert os.environ["XLA_FLAGS"] == OTHERS


@pytest.mark.parametrize("value, is_wrong", [("dot", True), ("", False)])
def test_the_users_own_flag_stands_and_is_looked_at(environment, monkeypatch, value, is_wrong):
    own = f"{FLAG}={value} {OTHERS}"
    monkeypatch.setenv("XLA_FLAGS", own)
    failing(monkeypatch, "=dot")
    said = flags.set_flags()
    assert os.environ["XLA_FLAGS"] == own and not said.added
    assert bool(said.failures) == bool(said.sentence) == is_wrong


def test_a_file_of_flags_stands_and_is_looked_at(environment, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "/some/file")
    asked = failing(monkeypatch, "")
    assert flags.set_flags().failures == ("pairs",)
    assert asked == ["/some/file"] == [os.environ["XLA_FLAGS"]]


def test_where_the_canary_cannot_be_run_nothing_is_added_and_nothing_is_called_wrong(
    environment, monkeypatch
):
    monkeypatch.setattr(canary, "failures_under", lambda flags: None)
    added, failures, sentence = flags.set_flags()
    assert (
        (added, failures) == ((), ())
        and "gave no verdict" in sentence
        and "wrongly" not in sentence
    )
    assert os.environ["XLA_FLAGS"] == OTHERS


def test_nothing_is_done_where_jax_may_not_use_the_cpu(environment, monkeypatch):
    asked = failing(monkeypatch, "")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert flags.set_flags() == ((), (), "") and not asked
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert flags.set_flags().added == (f"{FLAG}=",)


def test_results_agree_with_and_without_and_jax_that_has_started_is_left_alone():
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    results = []
    for which in ("with", "without"):
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT, which]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    (failures, value, gradient, after), (nothing, plain_value, plain_gradient, _) = results
    assert failures == [] and nothing is None and after.startswith("JAX has started already")
    np.testing.assert_allclose(value, plain_value, rtol=1e-5)
    for leaf, plain_leaf in zip(gradient, plain_gradient, strict=True):
        np.testing.assert_allclose(leaf, plain_leaf, rtol=0, atol=1e-5 * np.abs(plain_leaf).max())
