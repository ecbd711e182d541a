"""Pooling against its definition, against the authors' overlapping max-pooling net, and against
finite differences.
"""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads

from dd_jax.models.layers import only_pixel
from dd_jax.xla.pooling import avg_pool, max_pool

GOLDEN = pathlib.Path(__file__).parent / "golden" / "overlapping_maxpool.npz"

# (height, width), window, stride, padding, ceil_mode
POOLINGS = [
    ((6, 4), 2, 2, 0, False),
    ((7, 5), 2, 2, 0, False),  # a row and a column go unread
    ((8, 9), 3, 2, 0, False),
    ((7, 6), 3, 1, 1, False),
    ((6, 7), 3, 2, 1, False),
    ((9, 8), 2, 3, 0, False),  # pixels between the windows go unread
    ((8, 7), 3, 2, 0, True),
    ((8, 6), 3, 2, 1, True),
    ((5, 2), 2, 3, 1, True),  # across: the last window would start in the padding at the end
    ((2, 4), 3, 2, 0, True),  # down: no window fits without running over
    ((11, 9), 5, 3, 2, True),
]


def window_starts(size, window, stride, padding, ceil_mode):
    """Where windows start, by the definition: as long as they fit; in ceil mode one more that takes
    the rest.
    """
    starts = [
        start
        for start in range(-padding, size + padding, stride)
        if start + window <= size + padding
    ]
    following = starts[-1] + stride if starts else -padding
    rest = not starts or starts[-1] + window < size + padding
    return [*starts, following] if ceil_mode and rest and following < size else starts


def reference_max_pool(x, cotangents, window, stride, padding, ceil_mode):
    """The pooled maps and the pulled-back cotangents, one element at a time."""
    rows, columns = (
        window_starts(size, window, stride, padding, ceil_mode) for size in x.shape[1:3]
    )
    pooled, gradient = np.zeros((len(x), len(rows), len(columns), x.shape[3])), np.zeros(x.shape)
    for (n, c), (i, row), (j, column) in itertools.product(
        np.ndindex(x.shape[0], x.shape[3]), enumerate(rows), enumerate(columns)
    ):
        inside = [
            (h, w)
            for h in range(max(row, 0), min(row + window, x.shape[1]))
            for w in range(max(column, 0), min(column + window, x.shape[2]))
        ]
        # max returns the first of equals
        h, w = max(inside, key=lambda place: x[n, place[0], place[1], c])
        pooled[n, i, j, c] = x[n, h, w, c]
        if cotangents is not None:
            gradient[n, h, w, c] += cotangents[n, i, j, c]
    return pooled, gradient


@pytest.mark.parametrize(("size", "window", "stride", "padding", "ceil_mode"), POOLINGS)
def test_max_pool_and_its_gradient_follow_the_definition(size, window, stride, padding, ceil_mode):
    random = np.random.default_rng(0)
    # full of ties, and below zero as well
    x = random.integers(-3, 3, (2, *size, 3)).astype(np.float32)
    options = (window, stride, padding, ceil_mode)
    shape = reference_max_pool(x, None, *options)[0].shape
    cotangents = random.integers(1, 9, shape).astype(np.float32)
    expected, expected_gradient = reference_max_pool(x, cotangents, *options)

    @jax.jit
    def pool_and_pull_back(x, cotangents):
        pooled, pull_back = jax.vjp(
            lambda x: max_pool(x, window, stride, padding, ceil_mode=ceil_mode), x
        )
        return pooled, *pull_back(cotangents)

    pooled, gradient = pool_and_pull_back(x, cotangents)
    np.testing.assert_array_equal(pooled, expected)
    np.testing.assert_array_equal(gradient, expected_gradient)


@pytest.mark.parametrize(
    ("size", "window", "stride", "padding", "ceil_mode", "expected"),
    [(55, 3, 2, 0, False, 27), (32, 3, 2, 0, False, 15), (32, 3, 2, 0, True, 16), (112, 3, 2, 1, False, 56),
     (112, 3, 2, 1, True, 57), (5, 1, 3, 0, True, 2), (2, 2, 3, 1, True, 1), (4, 2, 2, 1, True, 3)],
)  # fmt: skip
def test_number_of_windows_is_pytorchs(size, window, stride, padding, ceil_mode, expected):
    pool = lambda x: max_pool(x, window, stride, padding, ceil_mode=ceil_mode)
    maps = jax.ShapeDtypeStruct((1, size, size, 1), jnp.float32)
    assert jax.eval_shape(pool, maps).shape == (1, expected, expected, 1)


def test_a_tie_gives_everything_to_the_first_and_overlapping_windows_add_up():
    ties = jnp.array([[2.0, 7.0, 7.0], [7.0, 1.0, 0.0]])[None, :, :, None]
    weights = jnp.array([3.0, 5.0]).reshape(1, 1, 2, 1)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(weights * max_pool(x, 2, 1))))(ties)
    np.testing.assert_array_equal(gradient[0, :, :, 0], [[0.0, 8.0, 0.0], [0.0, 0.0, 0.0]])


def golden_net(params, images):
    """conv1 (5, padding 2), MaxPool(3, 2), ReLU, conv2 (3), MaxPool(3, 2), ReLU, fc on
    channels-first maps.
    """
    x = images
    for name, padding in (("conv1", 2), ("conv2", 0)):
        kernel = params[f"{name}.weight"].transpose(2, 3, 1, 0)
        x = lax.conv_general_dilated(
            x, kernel, (1, 1), [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(max_pool(x + params[f"{name}.bias"].reshape(1, 1, 1, -1), 3, 2))
    x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
    return x @ params["fc.weight"].T + params["fc.bias"][None]


def test_overlapping_max_pool_in_a_net_gives_the_authors_derivatives(x64):
    golden = np.load(GOLDEN)
    params = {
        key[6:]: jnp.asarray(golden[key], jnp.float64)
        for key in golden.files
        if key.startswith("param/")
    }
    images = jnp.asarray(golden["input/images"].transpose(0, 2, 3, 1), jnp.float64)
    first, second = golden["double_backward/top2"].T
    rows = np.arange(len(images))

    @jax.jit
    def logits_and_jacobian(images):
        logits, pull_back = jax.vjp(lambda x: golden_net(params, x), images)
        one_hots = jnp.broadcast_to(jnp.eye(10)[:, None], (10, *logits.shape))
        return logits, jax.vmap(lambda cotangent: pull_back(cotangent)[0])(one_hots)

    @jax.jit
    @jax.value_and_grad
    def mean_distance(params):
        """(f_a - f_b) / ||d(f_a - f_b)/dx||, averaged over the images; a, b: the two largest
        logits.
        """
        difference = lambda x: (lambda logits: logits[rows, first] - logits[rows, second])(
            golden_net(params, x)
        )
        gap, pull_back = jax.vjp(difference, images)
        (gradient,) = pull_back(jnp.ones_like(gap))
        return jnp.mean(jnp.abs(gap) / jnp.sqrt(jnp.sum(gradient**2, axis=(1, 2, 3))))

    logits, jacobian = logits_and_jacobian(images)
    np.testing.assert_allclose(logits, golden["logits"], rtol=1e-11)
    np.testing.assert_allclose(
        jacobian.transpose(1, 0, 4, 2, 3), golden["jacobian"], rtol=1e-6, atol=1e-8
    )

    value, gradient = mean_distance(params)
    np.testing.assert_allclose(value, golden["double_backward/value"], rtol=1e-11)
    for name, array in gradient.items():
        expected = golden[f"double_backward/grad/{name}"]
        np.testing.assert_allclose(
            array, expected, rtol=1e-9, atol=1e-12 * np.abs(expected).max(), err_msg=name
        )


@pytest.mark.parametrize("options", [(2, 2), (3, 2, 1)])
def test_derivatives_of_both_pools_match_finite_differences(x64, options):
    # no ties
    x = jnp.asarray(np.random.default_rng(1).permutation(2 * 6 * 6).reshape(1, 6, 6, 2) / 10.0)
    net = jax.jit(lambda x: jnp.sum(jnp.sin(avg_pool(max_pool(x * x, *options), 3)) ** 2))
    check_grads(net, (x,), order=2, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_derivatives_of_derivatives_keep_the_dtype_and_agree_with_plain_comparisons(x64, dtype):
    x, direction = jnp.asarray(np.random.default_rng(2).normal(size=(2, 2, 7, 7, 3)), dtype)

    def plain_max_pool(x):
        slices = [x[:, i : i + 5 : 2, j : j + 5 : 2] for i in range(3) for j in range(3)]
        largest = slices[0]
        for candidate in slices[1:]:
            largest = jnp.where(candidate > largest, candidate, largest)
        return largest

    def derivatives(pool):
        loss = lambda x: jnp.sum(jnp.exp(0.3 * pool(x)) * pool(-x))
        reverse_over_reverse = jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x), direction))
        forward_over_reverse = lambda x: jax.jvp(jax.grad(loss), (x,), (direction,))[1]
        return jax.jit(lambda x: (loss(x), reverse_over_reverse(x), forward_over_reverse(x)))(x)

    ours, plain = derivatives(lambda x: max_pool(x, 3, 2)), derivatives(plain_max_pool)
    for value, expected in zip(ours, plain, strict=True):
        assert value.dtype == dtype
        np.testing.assert_allclose(
            value, expected, rtol=2e-5 if dtype == jnp.float32 else 1e-12, atol=1e-6
        )


def test_cotangents_under_vmap_in_a_while_loop():
    x, cotangents = (
        jnp.asarray(np.random.default_rng(3).normal(size=(1, 7, 7, 2)), jnp.float32),
        jnp.arange(1.0, 55.0),
    )
    cotangents = cotangents.reshape(3, 1, 3, 3, 2)

    def step(x):
        pull_back = jax.vjp(lambda x: max_pool(x, 3, 2), x)[1]
        return x - 0.01 * jax.vmap(lambda cotangent: pull_back(cotangent)[0])(cotangents).sum(
            axis=0
        )

    looped = jax.jit(
        lambda x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, step(c[1])), (0, x))[1]
    )(x)
    expected = np.asarray(x)
    for _ in range(3):
        total = np.asarray(cotangents.sum(axis=0))
        expected = expected - 0.01 * reference_max_pool(expected, total, 3, 2, 0, False)[1]
    np.testing.assert_allclose(looped, expected, rtol=1e-5, atol=1e-5)


def test_avg_pool_is_the_mean_of_each_patch():
    x = jnp.arange(1.0, 17.0).reshape(1, 2, 4, 2) ** 2
    expected = [
        [
            [(1 + 9 + 81 + 121) / 4, (4 + 16 + 100 + 144) / 4],
            [(25 + 49 + 169 + 225) / 4, (36 + 64 + 196 + 256) / 4],
        ]
    ]
    np.testing.assert_allclose(avg_pool(x, 2)[0], expected)
    gradient = jax.jit(jax.grad(lambda x: avg_pool(x, 2)[0, 0, 1, 0]))(x)
    np.testing.assert_array_equal(gradient[0, :, :, 0], [[0, 0, 0.25, 0.25], [0, 0, 0.25, 0.25]])
    assert not gradient[..., 1].any()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: max_pool(x, 2, 0), "stride 0"),
        (lambda x: max_pool(x, 0, 1), "window 0"),
        (lambda x: max_pool(x, 3, 2, 2), "padding 2"),
        (lambda x: max_pool(x, 7, 1), "no window of 7 fits"),
        (lambda x: max_pool(x[0], 2, 2), r"shape \(6, 4, 1\)"),
        (lambda x: max_pool(x.astype(int), 2, 2), "int32"),
        (lambda x: avg_pool(x, 4), "window 4 and maps of 6 x 4"),
        (lambda x: avg_pool(x, 0), "window 0"),
        (only_pixel, "6 x 4 pixels where it needs 1 x 1"),
    ],
)
def test_errors_say_what_came(unchecked, call, words):
    with pytest.raises(ValueError, match=words):
        call(jnp.ones((1, 6, 4, 1)))
