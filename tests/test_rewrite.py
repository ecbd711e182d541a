"""Rewritten nets are the same functions, to second derivatives, whatever the layer's form; and
nothing slow is left in them.

What a later JAX might call or give its primitives is played by `Later`: such equations are left to
JAX, and raise nothing.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
import pytest

import dd_jax
from dd_jax import attacks
from dd_jax.xla.closure_convert import Traces, closure_convert
from dd_jax.xla.equation_forms import FORMS
from dd_jax.xla.rewrite import evaluate, operations

CONVOLUTIONS = {
    "same size": {"padding": 2},
    "valid": {"padding": "VALID"},
    "stride 2": {"padding": "SAME", "strides": (2, 2)},
    "resnet stem": {"kernel_size": (7, 7), "padding": [(3, 3), (3, 3)], "strides": (2, 2)},
    "pointwise": {"kernel_size": (1, 1)},
    "pointwise, stride 2": {"kernel_size": (1, 1), "strides": (2, 2)},
    "two groups": {"feature_group_count": 2, "padding": 2},
    "groups, strides and ragged padding": {
        "kernel_size": (11, 5),
        "feature_group_count": 2,
        "padding": [(0, 1), (2, 1)],
        "strides": (4, 3),
    },
    "one output channel": {"features": 1, "padding": [(2, 1), (0, 3)]},
    "one output channel, odd sizes": {"features": 1, "kernel_size": (2, 3), "padding": "VALID"},
    "dilated": {"kernel_dilation": 2},
    "dilated image": {"input_dilation": (2, 3), "padding": [(2, 2), (1, 0)]},
    "dilated image, cropped": {"input_dilation": 2, "padding": [(-1, 0), (2, -1)]},
    "a channel each": {
        "feature_group_count": 12,
        "features": 24,
        "kernel_size": (3, 2),
        "padding": [(1, 0), (2, 1)],
    },
    "a channel each, stride 2": {"feature_group_count": 12, "features": 12, "strides": (2, 3)},
}
POOLINGS = {
    "side by side": {"window_shape": (2, 2), "strides": (2, 2)},
    "overlapping": {"window_shape": (3, 3), "strides": (2, 2)},
    "same": {"window_shape": (3, 3), "strides": (2, 2), "padding": "SAME"},
    "every pixel": {"window_shape": (3, 3), "strides": (1, 1), "padding": [(1, 1), (0, 2)]},
    "gaps": {"window_shape": (2, 2), "strides": (3, 3)},
    "not square": {"window_shape": (2, 3), "strides": (2, 2)},
}


class Layer(nn.Module):
    convolution: tuple = ()
    pooling: tuple = ()

    @nn.compact
    def __call__(self, x):
        if self.convolution:
            x = nn.Conv(
                **{
                    "features": 6,
                    "kernel_size": (5, 5),
                    "dtype": x.dtype,
                    "name": "conv",
                    **dict(self.convolution),
                }
            )(x)
        if self.pooling:
            x = nn.max_pool(x, **dict(self.pooling))
        x = jnp.tanh(x).reshape(x.shape[0], -1)
        return nn.Dense(3, dtype=x.dtype, param_dtype=x.dtype, name="out")(x)


def freeze(options):
    return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in options.items())


def assert_same_to_second_order(layer, x):
    params = jax.tree.map(lambda a: a.astype(x.dtype), layer.init(jax.random.key(0), x))

    def plain(params, x):
        return layer.apply(params, x)

    def rewritten(params, x):
        apply_fn, closure = closure_convert(Traces(lambda x: layer.apply(params, x), x), len(x))
        return apply_fn(closure, x)

    def everything(net):
        def size_of_gradient(params, x):
            gradient = jax.grad(lambda x: jnp.sum(net(params, x) ** 2))(x)
            return jnp.sum(gradient**2)

        return jax.jit(lambda p, x: (net(p, x), jax.grad(size_of_gradient, argnums=(0, 1))(p, x)))(
            params, x
        )

    leaves = zip(
        jax.tree.leaves(everything(rewritten)), jax.tree.leaves(everything(plain)), strict=True
    )
    for actual, wanted in leaves:
        assert np.abs(wanted).max() > 0
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())


@pytest.fixture
def images(x64):
    return jnp.asarray(np.random.default_rng(0).standard_normal((3, 13, 14, 4)))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_are_the_same(name, images):
    options = CONVOLUTIONS[name]
    images = jnp.concatenate([images, -images, images**2], axis=3)[
        ..., : options.get("feature_group_count", 2) * 2
    ]
    assert_same_to_second_order(Layer(convolution=freeze(options)), images[..., :12])


@pytest.mark.parametrize(
    "options", [{}, {"feature_group_count": 12, "features": 12}, {"kernel_dilation": 2}]
)
def test_convolutions_over_one_axis_are_the_same(options, images):
    series = jnp.concatenate([images, -images, images**2], axis=3)[:, 0]
    strides = {} if "kernel_dilation" in options else {"strides": (2,)}
    assert_same_to_second_order(
        Layer(convolution=freeze({"kernel_size": (3,), **strides, **options})), series
    )


class Repeated(nn.Module):
    """A convolution within checkpoint, scan or cond."""

    kind: str

    @nn.compact
    def __call__(self, x):
        kernels = self.param("kernels", nn.initializers.normal(0.3), (2, 3, 3, 4, 4), x.dtype)
        convolve = lambda x, kernel: jnp.tanh(
            jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )
        if self.kind == "checkpoint":
            return jax.checkpoint(convolve)(x, kernels[0]).sum((1, 2))
        if self.kind == "scan":
            last, all_of_them = jax.lax.scan(
                lambda x, k: (convolve(x, k), x.sum((1, 2))), x, kernels, reverse=True
            )
            return last.sum((1, 2)) + all_of_them[0]
        branches = [lambda x: convolve(x, kernels[0]), lambda x: convolve(x, kernels[1])]
        return jax.lax.cond(jnp.sum(kernels) > 100, *branches, x).sum((1, 2))


@pytest.mark.parametrize("kind", ["checkpoint", "scan", "cond"])
def test_convolutions_within_control_flow_are_the_same_and_rewritten(kind, images):
    small = images[:, :5, :6]
    assert_same_to_second_order(Repeated(kind), small)
    params = Repeated(kind).init(jax.random.key(0), small)
    apply_fn, closure = closure_convert(
        Traces(lambda x: Repeated(kind).apply(params, x), small), len(small)
    )
    assert "custom_vjp_call" in names_of(apply_fn, closure, small)


def test_products_of_narrow_numbers_added_up_in_wide_ones_stay_so():
    """Whole numbers of 8 bits, and halves added up in floats."""
    few, wide = jnp.full((2, 300), 100, jnp.int8), jnp.full((300, 3), 100, jnp.int8)
    total = lambda x: jax.lax.dot(few, wide, preferred_element_type=jnp.int32).astype(x.dtype) + x
    apply_fn, closure = closure_convert(Traces(total, jnp.zeros((2, 3))), 2)
    np.testing.assert_array_equal(apply_fn(closure, jnp.zeros((2, 3))), np.full((2, 3), 3e6))
    half = lambda x: jax.lax.dot(
        x.astype(jnp.bfloat16), wide.astype(jnp.bfloat16), preferred_element_type=jnp.float32
    )
    apply_fn, closure = closure_convert(Traces(half, jnp.zeros((2, 300))), 2)
    assert apply_fn(closure, jnp.ones((2, 300))).dtype == jnp.float32


@pytest.mark.parametrize("name", POOLINGS)
def test_poolings_are_the_same(name, images):
    assert_same_to_second_order(Layer(pooling=freeze(POOLINGS[name])), images)


def primitives(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr"),
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


def names_of(function, *arguments):
    return set(primitives(jax.make_jaxpr(function)(*arguments).jaxpr))


def test_no_slow_derivative_is_left():
    """Kernel gradients in XLA's own form have rhs-dilated or batch-as-feature windows; here every
    one is plain.
    """
    layer = Layer(freeze({"padding": 2}), freeze(POOLINGS["overlapping"]))
    x = jnp.zeros((2, 12, 12, 3))
    params = layer.init(jax.random.key(0), x)

    def loss(params, x):
        apply_fn, closure = closure_convert(Traces(lambda x: layer.apply(params, x), x), len(x))
        return jnp.sum(apply_fn(closure, x) ** 2)

    names = names_of(jax.grad(loss, argnums=(0, 1)), params, x)
    assert "conv_general_dilated" in names
    assert not {name for name in names if "reduce_window" in name or "select_and" in name}


def test_operations_are_counted_once_per_application():
    weights, kernel = jnp.ones((8, 5)), jnp.ones((3, 3, 2, 4))

    def net(x):
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x).reshape(x.shape[0], -1)[:, :8]
        return (
            jax.lax.scan(lambda x, _: (jax.jit(jnp.matmul)(x, jnp.eye(8)), None), x, length=3)[0]
            @ weights
        )

    counted = operations(jax.make_jaxpr(net)(jnp.ones((7, 6, 5, 2))).jaxpr)
    assert counted == 7 * 2 * (4 * 3 * 4 * 3 * 3 * 2 + 3 * 8 * 8 + 8 * 5)


OURS = {
    "custom_vjp_call",
    "custom_jvp_call",
}  # A trace without functions of this kind has them from the replacements alone.


class Later:
    """A primitive as another release of JAX might have it: of the same name, with parameters that
    only it understands.
    """

    def __init__(self, equation):
        self.name, self.multiple_results = (
            equation.primitive.name,
            equation.primitive.multiple_results,
        )
        self.get_bind_params = lambda params: equation.primitive.get_bind_params(equation.params)
        self.bind = equation.primitive.bind


def other_parameters(params):
    """Each way in which parameters may turn out unknown: one more, one fewer, another name, another
    value.
    """
    yield "one more", params | {"invented": True}
    for name, value in params.items():
        others = {other: params[other] for other in params if other != name}
        yield f"no {name}", others
        yield f"{name} renamed", others | {f"new_{name}": value}
        yield f"{name} of another kind", others | {name: object()}


@partial(jax.jit, inline=False)
def in_jit(x, w):
    return jnp.tanh(x @ w)


PRODUCTS = {
    "conv_general_dilated": lambda x, w: jax.lax.conv_general_dilated(
        x.reshape(3, 4, 4, 2),
        w.reshape(2, 2, 2, 8),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ),
    "dot_general": lambda x, w: x[:, :8] @ w,
    "reduce_window_max": lambda x, w: nn.max_pool(x.reshape(3, 4, 4, 2), (2, 2), (1, 1)) * w.sum(),
    "jit": lambda x, w: in_jit(x[:, :8], w),
    "remat2": lambda x, w: jax.checkpoint(in_jit)(x[:, :8], w),
    "scan": lambda x, w: jax.lax.scan(lambda x, _: (in_jit(x, w), x[0]), x[:, :8], None, length=3),
    "cond": lambda x, w: jax.lax.cond(
        x[0, 0] > 0, in_jit, lambda x, w: jnp.sin(x) @ w, x[:, :8], w
    ),
    "closed_call": lambda x, w: in_jit(x[:, :8], w),
}


def traced_with(name):
    """The traced function, the place in it of the one equation of this name, and its arguments."""
    x, w = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(3, 32), (8, 8)])
    )
    traced = jax.make_jaxpr(lambda x, w: jax.tree.leaves(PRODUCTS[name](x, w)))(x, w)
    if name == "closed_call":  # No public function of JAX leaves one in a trace.
        call = jex_core.primitives.closed_call_p
        of_call = lambda e: e.replace(primitive=call, params={"call_jaxpr": e.params["jaxpr"]})
        equations = [of_call(e) if e.primitive.name == "jit" else e for e in traced.jaxpr.eqns]
        traced, name = with_equations(traced, equations), call.name
    (place,) = [
        i for i, equation in enumerate(traced.jaxpr.eqns) if equation.primitive.name == name
    ]
    return traced, place, (x, w)


def with_equations(traced, equations):
    return jex_core.ClosedJaxpr(traced.jaxpr.replace(eqns=equations), traced.consts)


def values_and_gradients(traced, arguments, **options):
    def total(arguments):
        results = evaluate(traced, *arguments, **options)
        return sum(jnp.sum(jnp.cos(result)) for result in results), results

    (_, results), gradients = jax.value_and_grad(total, has_aux=True)(arguments)
    return [*results, *gradients]


@pytest.mark.parametrize("name", PRODUCTS)
def test_equations_of_unknown_parameters_are_left_to_jax(name):
    traced, place, arguments = traced_with(name)
    known = traced.jaxpr.eqns[place]
    assert names_of(partial(evaluate, traced), *arguments) & OURS
    expected = values_and_gradients(traced, arguments, rewrite=False)
    for what, params in other_parameters(known.params):
        unknown = known.replace(primitive=Later(known), params=params)
        later = with_equations(
            traced, [unknown if equation is known else equation for equation in traced.jaxpr.eqns]
        )
        left = names_of(partial(evaluate, later), *arguments)
        assert known.primitive.name in left and not left & OURS, what
        for actual, wanted in zip(values_and_gradients(later, arguments), expected, strict=True):
            assert np.abs(wanted).max() > 0
            np.testing.assert_allclose(actual, wanted, rtol=1e-6, atol=1e-6, err_msg=what)
        assert np.isfinite(operations(later.jaxpr)), what


def test_every_known_form_is_tried_with_unknown_parameters():
    here = {
        traced.jaxpr.eqns[place].primitive.name for traced, place, _ in map(traced_with, PRODUCTS)
    }
    assert here | {"closed_call", "eval_jaxpr"} == set(FORMS) and len(here) == len(PRODUCTS)


def test_values_that_no_replacement_understands_are_left_to_jax():
    """Products in a precision of their own, calls with options for the compiler, loops with
    effects, empty results.
    """
    w, seen, one = jnp.ones((3, 3)), [], jax.sharding.SingleDeviceSharding(jax.devices()[0])
    note = lambda x: jax.debug.callback(lambda: seen.append(1)) or x
    nets = {
        "precision": lambda x: jax.lax.dot(x, w, precision="BF16_BF16_F32"),
        "sharding": lambda x: jax.jit(lambda x: x @ w, out_shardings=one)(x),
        "effects": lambda x: jax.lax.scan(lambda x, _: (note(x) @ w, None), x, None, length=2)[0],
        "effects in a branch": lambda x: jax.lax.cond(
            x[0, 0] > 0, lambda x: note(x) @ w, lambda x: x, x
        ),
        "effects in checkpoint": jax.checkpoint(lambda x: note(x) @ w),
        "empty": lambda x: x[:0] @ w,
    }
    for what, net in nets.items():
        apply_fn, closure = closure_convert(Traces(net, jnp.zeros((2, 3))), 2)
        assert not names_of(apply_fn, closure, jnp.ones((2, 3))) & OURS, what
        np.testing.assert_allclose(
            jax.jit(apply_fn)(closure, jnp.ones((2, 3))), net(jnp.ones((2, 3))), err_msg=what
        )
    jax.effects_barrier()
    assert seen, "The callbacks ran."


def small_net():
    net = Layer(freeze({"features": 3, "kernel_size": (3, 3)}), freeze(POOLINGS["overlapping"]))
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 2))
    return net, net.init(jax.random.key(0), x), x


TAKE_REWRITE = {
    "deepfool": lambda f, x, y, **options: (
        dd_jax.deepfool(f, x, y, num_steps=3, **options).perturbation
    ),
    "signed_margin": lambda f, x, y, **options: dd_jax.signed_margin(
        f, x, y, num_steps=2, **options
    ),
    "regularizer": lambda f, x, y, **options: dd_jax.regularizer(
        f, x, y, num_steps=2, correct_scale=1.0, **options
    ),
    "deep_defense_loss": lambda f, x, y, **options: dd_jax.deep_defense_loss(
        f, x, y, num_steps=2, **options
    )[0],
}
TAKE_THE_ENVIRONMENT = TAKE_REWRITE | {
    "carlini_wagner_l2": lambda f, x, y: (
        attacks.carlini_wagner_l2(
            f,
            x,
            y,
            bounds=(-9.0, 9.0),
            num_steps=3,
            initial_constant=99.0,
            num_binary_search_steps=1,
        ).perturbation
    ),
    "minimal_fgsm": lambda f, x, y: attacks.minimal_fgsm(f, x, y, max_epsilon=9.0).perturbation,
    "pgd": lambda f, x, y: (
        attacks.pgd(f, x, y, epsilon=0.1, step_size=0.02, num_steps=2).perturbation
    ),
}
DIFFERENTIABLE = ("signed_margin", "regularizer", "deep_defense_loss")
ON, OFF = "1", "0"


@pytest.mark.parametrize("name", TAKE_THE_ENVIRONMENT)
def test_rewriting_is_turned_off_by_the_environment_and_by_an_argument(name, monkeypatch):
    """Off, JAX's own convolutions, products and poolings are all that is left; the numbers are the
    same.
    """
    net, params, x = small_net()
    labels = jnp.argmax(net.apply(params, x), axis=1)

    def result(params, **options):
        run = lambda params: TAKE_THE_ENVIRONMENT[name](
            partial(net.apply, params), x, labels, **options
        )
        total = lambda params: (jnp.sum(run(params) ** 2), run(params))
        return jax.grad(total, has_aux=True)(params) if name in DIFFERENTIABLE else total(params)

    def function(said, **options):
        monkeypatch.setenv("DD_JAX_REWRITE", said)
        return partial(result, **options)

    def is_rewritten(said, **options):
        return "optimization_barrier" in names_of(function(said, **options), params)

    off = {"rewrite": False} if name in TAKE_REWRITE else {}
    assert is_rewritten(ON) and not is_rewritten(OFF)
    assert not off or (not is_rewritten(ON, **off) and is_rewritten(OFF, rewrite=True))
    said = ON if off else OFF
    actual, expected = jax.jit(function(said, **off))(params), jax.jit(function(ON))(params)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
    with pytest.raises(ValueError, match="DD_JAX_REWRITE is 'no'; it must be 0"):
        names_of(function("no"), params)
