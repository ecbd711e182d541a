"""What must be so before the tests import JAX, and what the tests of the core share.

Two fake CPU devices, so that `pmap` is tested without hardware; a compilation cache beside the
project, one per version of JAX, so that a second run is quick; implicit rank promotion is an error;
the library's annotations are checked at every call.
"""

import gc
import importlib.metadata
import os
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
DEVICES = "--xla_force_host_platform_device_count"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=2".strip()
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache" / importlib.metadata.version("jaxlib"))
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

jaxtyping.install_import_hook("dd_jax", "beartype.beartype")
from dd_jax import xla  # noqa: E402
from dd_jax.attacks import _queue  # noqa: E402

# JAX has not computed yet: the tests run under the flags that the commands run under.
xla.set_flags()


MOST_MEMORY_MAPS = 20000
"""Of a process; Linux allows 65,530, and every compiled program needs some."""


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps():
    """Forgets compiled programs before a process that has run many tests is out of memory maps."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MEMORY_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """Float64 while the test runs."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked(monkeypatch):
    """Switches the checks of annotations off: what the library itself does with wrong arguments."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def short_turns(monkeypatch):
    """Makes the work queue take a third of a batch per turn, which it would not for batches as
    small as the tests'.
    """
    monkeypatch.setitem(_queue.TURNS_PER_BATCH, "cpu", 3)
    monkeypatch.setitem(_queue.SMALLEST_TURN, "cpu", 2)
    monkeypatch.setitem(_queue.LEAST_WORK, "cpu", 1)
