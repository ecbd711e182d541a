"""The canary tells right from wrong, knows what it has seen, and warns once, wherever the first
call comes from.
"""

import json
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dd_jax
from dd_jax.xla import canary

WRONG = {"tested": canary.Program(lambda x: x + 1, (np.zeros(3, np.float32),), np.zeros(3))}
X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)), jnp.float32)
LABELS = jnp.asarray([0, 1, 2, 0])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return canary.cache_file()


@pytest.fixture
def asked(monkeypatch):
    """Whatever new process is asked, it says that "pairs" alone is wrong; how often it was asked."""
    calls = []
    monkeypatch.setattr(
        canary, "_failures_in_new_process", lambda flags: calls.append(flags) or ["pairs"]
    )
    return calls


@pytest.fixture
def unwarned(monkeypatch):
    monkeypatch.setattr(canary, "_warned", canary.threading.Event())
    monkeypatch.delenv(canary.VARIABLE, raising=False)


def test_the_programs_know_the_right_result_and_find_wrong_ones():
    assert list(canary.programs()) == ["row_products", "pairs", "high_rank_sum"]
    for name, program in canary.programs().items():
        with (
            jax.enable_x64(True),
            jax.default_matmul_precision("highest"),
            jax.disable_jit(program.is_fatal),
        ):
            wide = tuple(jnp.asarray(argument, jnp.float64) for argument in program.arguments)
            found = np.asarray(program.run(*wide))
        np.testing.assert_allclose(found, program.right, rtol=1e-9, atol=1e-12, err_msg=name)
        assert np.abs(program.right).min() < np.abs(program.right).max()
    right = canary.Program(
        lambda x: 2 * x, (np.arange(3, dtype=np.float32),), np.array([0.0, 2.0, 4.0])
    )
    assert canary.is_right(right) and not canary.is_right(
        right._replace(right=np.array([0.0, 2.0, 4.001]))
    )
    assert not canary.is_right(
        right._replace(right=np.array([0.0, 2.0, 4.0]), run=lambda x: x * np.nan)
    )


def test_a_new_process_computes_rightly_under_the_flags_that_are_shipped_and_wrongly_under_others(
    cache,
):
    assert canary.failures_under("--xla_cpu_experimental_ynn_fusion_type=") == ()
    wrong = canary.failures_under("--xla_cpu_experimental_ynn_fusion_type=dot,eltwise,reduce")
    # On every jaxlib so far; where this fails, the list of candidates may grow.
    assert "pairs" in wrong
    assert canary.failures_under("--xla_no_such_flag=1") == tuple(canary.programs())
    assert len(json.loads(cache.read_text())) == 3


def test_neither_jaxs_own_settings_nor_the_working_directory_change_what_is_seen(
    cache, tmp_path, monkeypatch
):
    seen = canary.failures_under("--xla_cpu_experimental_ynn_fusion_type=eltwise")
    cache.unlink()
    monkeypatch.setenv("JAX_DISABLE_JIT", "1")  # Single operations would be right.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dd_jax.py").write_text("raise ImportError")
    assert (
        canary.failures_under("--xla_cpu_experimental_ynn_fusion_type=eltwise") == seen
        and "pairs" in seen
    )


@pytest.mark.parametrize(
    "program, found",
    [
        ("print('begun row_products high_rank_sum')", ("pairs",)),
        (
            "import os; print('begun row_products pairs', flush=True); os.abort()",
            ("high_rank_sum",),
        ),
        (
            "import time; print('begun row_products pairs', flush=True); time.sleep(60)",
            ("high_rank_sum",),
        ),
        (
            "import sys; sys.exit('Unknown flag in XLA_FLAGS')",
            ("row_products", "pairs", "high_rank_sum"),
        ),
        ("import os; print('begun row_products', flush=True); os.kill(os.getpid(), 9)", None),
        ("print('begun row_products pairs'); exit(1)", None),
        ("raise MemoryError", None),
        ("import time; time.sleep(60)", None),
        (None, None),
    ],
)
def test_what_says_nothing_about_xla_is_no_verdict_and_not_kept(
    cache, program, found, tmp_path, monkeypatch
):
    python = tmp_path / "python"
    if program:
        python.write_text(f"#!{sys.executable}\n{program}\n")
        python.chmod(0o755)
    monkeypatch.setattr(canary.sys, "executable", str(python))
    monkeypatch.setattr(canary, "SECONDS", 1.0)
    assert canary.failures_under("--a=1") == found and cache.exists() == (found is not None)


def test_what_was_seen_is_kept_by_version_and_flags(cache, asked, monkeypatch):
    assert [canary.failures_under("--a=1") for _ in range(2)] == [("pairs",)] * 2 and asked == [
        "--a=1"
    ]
    canary.failures_under("--a=1 --xla_force_host_platform_device_count=8")  # Changes no program.
    assert len(asked) == 1
    canary.failures_under("--a=2")
    monkeypatch.setattr(canary.metadata, "version", lambda name: "0.0.1")
    canary.failures_under("--a=2")
    monkeypatch.setattr(canary, "_cpu", lambda: "another")
    canary.failures_under("--a=2")
    assert asked == ["--a=1", "--a=2", "--a=2", "--a=2"] and len(json.loads(cache.read_text())) == 4


@pytest.mark.parametrize("damage", ["{", "[]", '{"a": 1}', "null", b"\xff\xfe"])
def test_a_damaged_file_counts_as_none(cache, asked, damage):
    cache.parent.mkdir()
    cache.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    assert [canary.failures_under("--a=1") for _ in range(2)] == [("pairs",)] * 2 and len(
        asked
    ) == 1


def test_where_nothing_can_be_kept_it_is_asked_again(tmp_path, asked, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [canary.failures_under("--a=1") for _ in range(2)] == [("pairs",)] * 2 and len(
        asked
    ) == 2


def margin(x):
    return dd_jax.signed_margin(lambda x: x @ jnp.eye(3) + x**2, x, LABELS[: len(x)], num_steps=1)


CALLS = {
    "plain": lambda: margin(X),
    "jit": lambda: jax.jit(margin)(X),
    "grad": lambda: jax.jit(jax.grad(lambda x: margin(x).sum()))(X),
    "vmap": lambda: jax.vmap(margin)(X[:, None]),
    "pmap": lambda: jax.pmap(margin)(X[:2, None]),
    "no jit": lambda: jax.disable_jit()(margin)(X),
    "x64": lambda: jax.enable_x64(True)(margin)(X),
}


@pytest.mark.parametrize("how", CALLS)
def test_a_wrong_jax_is_warned_of_once(how, unwarned, unchecked, monkeypatch):
    monkeypatch.setattr(canary, "programs", lambda: WRONG)
    with pytest.warns(
        RuntimeWarning, match=r"computes some programs wrongly .*tested.*dd_jax.xla.set_flags\(\)"
    ):
        CALLS[how]()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        margin(X)


def test_a_program_that_jax_refuses_to_run_is_not_taken_for_a_wrong_one(
    unwarned, unchecked, monkeypatch
):
    refused = canary.Program(lambda x: 1 / 0, (np.zeros(3, np.float32),), np.zeros(3))
    monkeypatch.setattr(canary, "programs", lambda: {"refused": refused})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        margin(X)
    assert canary._warned.is_set()


def test_a_right_jax_is_not_warned_of_nor_one_that_is_told_not_to_look(unwarned, monkeypatch):
    right = WRONG["tested"]._replace(run=lambda x: x)
    monkeypatch.setattr(
        canary,
        "programs",
        lambda: {"right": right, "fatal": WRONG["tested"]._replace(is_fatal=True)},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        margin(X)
        assert canary._warned.is_set()
        canary._warned.clear()
        monkeypatch.setattr(canary, "programs", lambda: WRONG)
        monkeypatch.setenv(canary.VARIABLE, "0")
        margin(X)
