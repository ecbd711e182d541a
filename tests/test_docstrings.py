"""The examples in the docstrings of the core's public functions run, and every function has one."""

import doctest
import inspect

import jax
import pytest

import dd_jax
from dd_jax import attacks, penalties

PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (dd_jax, attacks)
    for name in module.__all__
    if inspect.isfunction(getattr(module, name))
} | {f"dd_jax.penalties.{name}": function for name, function in penalties.PENALTIES.items()}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_examples_run_and_give_what_they_say(name):
    text = inspect.getdoc(PUBLIC[name])
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert test.examples, f"{name} has no example in its docstring."
    output = []
    with jax.numpy_rank_promotion("allow"):
        result = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF).run(
            test, out=output.append
        )
    assert not result.failed, "".join(output)
