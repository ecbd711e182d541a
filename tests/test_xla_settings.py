"""The flags are added where they are known to be accepted, never over the user's own, and change no result."""

import importlib.metadata
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from dd_jax import xla_settings

NAME = "--xla_cpu_experimental_ynn_fusion_type"
SCRIPT = """
import json, sys
from dd_jax import xla_settings
added = xla_settings.apply() if sys.argv[1] == "with" else []
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
print(json.dumps([added, float(value), [np.asarray(leaf).ravel().tolist() for leaf in jax.tree.leaves(gradient)]]))
"""


def test_unknown_versions_get_no_flag():
    assert xla_settings.flags_to_add("0.0.1", "") == []
    assert xla_settings.flags_to_add(xla_settings.KNOWN_VERSIONS[0], "") == [f"{NAME}=dot,eltwise,reduce"]


def test_users_own_setting_stands(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"{NAME}=dot --xla_force_host_platform_device_count=2")
    assert xla_settings.apply() == []
    assert os.environ["XLA_FLAGS"] == f"{NAME}=dot --xla_force_host_platform_device_count=2"


def test_other_flags_are_kept(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: xla_settings.KNOWN_VERSIONS[0])
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    assert xla_settings.apply() == [f"{NAME}=dot,eltwise,reduce"]
    assert os.environ["XLA_FLAGS"] == f"--xla_force_host_platform_device_count=2 {NAME}=dot,eltwise,reduce"


def test_results_agree_with_and_without():
    if importlib.metadata.version("jaxlib") not in xla_settings.KNOWN_VERSIONS:
        pytest.skip("this jaxlib is not known to take the flags, so there is nothing to compare")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    results = []
    for which in ("with", "without"):
        command = [sys.executable, "-c", SCRIPT, which]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    (added, value, gradient), (none_added, plain_value, plain_gradient) = results
    assert added and not none_added
    np.testing.assert_allclose(value, plain_value, rtol=1e-5)
    for leaf, plain_leaf in zip(gradient, plain_gradient, strict=True):
        np.testing.assert_allclose(leaf, plain_leaf, rtol=0, atol=1e-5 * np.abs(plain_leaf).max())
