"""Rewritten nets are the same functions, to second derivatives, whatever the layer's form; and nothing slow is left in them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax.closures import hoist
from dd_jax.rewriting import operations

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
    "a channel each": {"feature_group_count": 12, "features": 24, "kernel_size": (3, 2), "padding": [(1, 0), (2, 1)]},
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
                **{"features": 6, "kernel_size": (5, 5), "dtype": x.dtype, "name": "conv", **dict(self.convolution)}
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
        apply_fn, closure = hoist(lambda x: layer.apply(params, x), jax.ShapeDtypeStruct(x.shape, x.dtype))
        return apply_fn(closure, x)

    def everything(net):
        def size_of_gradient(params, x):
            gradient = jax.grad(lambda x: jnp.sum(net(params, x) ** 2))(x)
            return jnp.sum(gradient**2)

        return jax.jit(lambda p, x: (net(p, x), jax.grad(size_of_gradient, argnums=(0, 1))(p, x)))(params, x)

    leaves = zip(jax.tree.leaves(everything(rewritten)), jax.tree.leaves(everything(plain)), strict=True)
    for actual, wanted in leaves:
        assert np.abs(wanted).max() > 0
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())


@pytest.fixture
def images(x64):
    return jnp.asarray(np.random.default_rng(0).standard_normal((3, 13, 14, 4)))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_are_the_same(name, images):
    options = CONVOLUTIONS[name]
    images = jnp.concatenate([images, -images, images**2], axis=3)[..., : options.get("feature_group_count", 2) * 2]
    assert_same_to_second_order(Layer(convolution=freeze(options)), images[..., :12])


@pytest.mark.parametrize("options", [{}, {"feature_group_count": 12, "features": 12}, {"kernel_dilation": 2}])
def test_convolutions_over_one_axis_are_the_same(options, images):
    series = jnp.concatenate([images, -images, images**2], axis=3)[:, 0]
    strides = {} if "kernel_dilation" in options else {"strides": (2,)}
    assert_same_to_second_order(Layer(convolution=freeze({"kernel_size": (3,), **strides, **options})), series)


class Repeated(nn.Module):
    """A convolution within checkpoint, scan or cond."""

    kind: str

    @nn.compact
    def __call__(self, x):
        kernels = self.param("kernels", nn.initializers.normal(0.3), (2, 3, 3, 4, 4), x.dtype)
        convolve = lambda x, kernel: jnp.tanh(
            jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        )
        if self.kind == "checkpoint":
            return jax.checkpoint(convolve)(x, kernels[0]).sum((1, 2))
        if self.kind == "scan":
            last, all_of_them = jax.lax.scan(lambda x, k: (convolve(x, k), x.sum((1, 2))), x, kernels, reverse=True)
            return last.sum((1, 2)) + all_of_them[0]
        branches = [lambda x: convolve(x, kernels[0]), lambda x: convolve(x, kernels[1])]
        return jax.lax.cond(jnp.sum(kernels) > 100, *branches, x).sum((1, 2))


@pytest.mark.parametrize("kind", ["checkpoint", "scan", "cond"])
def test_convolutions_within_control_flow_are_the_same_and_rewritten(kind, images):
    small = images[:, :5, :6]
    assert_same_to_second_order(Repeated(kind), small)
    params = Repeated(kind).init(jax.random.key(0), small)
    apply_fn, closure = hoist(lambda x: Repeated(kind).apply(params, x), jax.ShapeDtypeStruct(small.shape, small.dtype))
    assert "custom_vjp_call" in set(primitives(jax.make_jaxpr(apply_fn)(closure, small).jaxpr))


def test_products_of_narrow_numbers_added_up_in_wide_ones_stay_so():
    """Whole numbers of 8 bits, and halves added up in floats."""
    few, wide = jnp.full((2, 300), 100, jnp.int8), jnp.full((300, 3), 100, jnp.int8)
    total = lambda x: jax.lax.dot(few, wide, preferred_element_type=jnp.int32).astype(x.dtype) + x
    apply_fn, closure = hoist(total, jax.ShapeDtypeStruct((2, 3), jnp.float32))
    np.testing.assert_array_equal(apply_fn(closure, jnp.zeros((2, 3))), np.full((2, 3), 3e6))
    half = lambda x: jax.lax.dot(x.astype(jnp.bfloat16), wide.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    apply_fn, closure = hoist(half, jax.ShapeDtypeStruct((2, 300), jnp.float32))
    assert apply_fn(closure, jnp.ones((2, 300))).dtype == jnp.float32


@pytest.mark.parametrize("name", POOLINGS)
def test_poolings_are_the_same(name, images):
    assert_same_to_second_order(Layer(pooling=freeze(POOLINGS[name])), images)


def primitives(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


def test_no_slow_derivative_is_left():
    """Kernel gradients in XLA's own form have rhs-dilated or batch-as-feature windows; here every one is plain."""
    layer = Layer(freeze({"padding": 2}), freeze(POOLINGS["overlapping"]))
    x = jnp.zeros((2, 12, 12, 3))
    params = layer.init(jax.random.key(0), x)

    def loss(params, x):
        apply_fn, closure = hoist(lambda x: layer.apply(params, x), jax.ShapeDtypeStruct(x.shape, x.dtype))
        return jnp.sum(apply_fn(closure, x) ** 2)

    names = set(primitives(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, x).jaxpr))
    assert "conv_general_dilated" in names
    assert not {name for name in names if "reduce_window" in name or "select_and" in name}


def test_operations_are_counted_once_per_application():
    weights, kernel = jnp.ones((8, 5)), jnp.ones((3, 3, 2, 4))

    def net(x):
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x).reshape(x.shape[0], -1)[:, :8]
        return jax.lax.scan(lambda x, _: (jax.jit(jnp.matmul)(x, jnp.eye(8)), None), x, length=3)[0] @ weights

    counted = operations(jax.make_jaxpr(net)(jnp.ones((7, 6, 5, 2))).jaxpr)
    assert counted == 7 * 2 * (4 * 3 * 4 * 3 * 3 * 2 + 3 * 8 * 8 + 8 * 5)
