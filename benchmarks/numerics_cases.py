"""The cases of benchmarks/numerics.py: every public function, on nets with seeded weights.

Inputs, weights and labels are drawn by NumPy, and NumPy computes the nets in float64 too, so that
no compiler has a say in what is right.
"""

import functools
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

import dd_jax
from dd_jax import attacks, models

WIDTHS = (1, 3, 17, 784)
BATCHES = (1, 2, 7, 100, 4096, 32768, 32769, 70000)
TRIED_ON_BOTH = 32769  # Of these batches, the one that both small nets get.
LARGE, WIDEST_OF_LARGE = 4096, 17  # Larger batches have narrow rows.
PAPER_NETS = {"mlp": (1, 3, 16), "lenet": (1, 3, 16), "convnet": (1, 3, 16), "nin": (1, 2)}
SMALL_NETS = ("affine", "smooth")
QUADRATIC, QUADRATIC_BATCH, QUADRATIC_WIDTH = "quadratic", 40000, 3  # the canary's row_products
SMALL_CLASSES, HIDDEN, RANK = 4, (8, 6), 3  # of the small nets
STEPS = 3  # of DeepFool and PGD
EPSILON = 0.05  # per component of the inputs
LEAST_INPUT = 0.2  # The inputs lie within LEAST_INPUT..1: no margin is relative to almost nothing.
SCALES = {"correct_scale": 5.0, "wrong_scale": 1.0}  # No example outweighs all others together.
WRONG_EVERY = 5  # Every fifth label is another class than the predicted one.
SPREAD = 0.5  # of the mean logits, in units of their standard deviation over the images
LEAST_IMAGES = 4  # On which the last bias is fitted, so that predictions vary.

Params = dict[str, dict[str, np.ndarray]]
Arrays = dict[str, Any]


class Function(NamedTuple):
    """A public function and what it is called with. `bounds`: none, numbers or per pixel."""

    name: str
    norm: str
    bounds: str = "none"

    def __str__(self) -> str:
        bounds = "" if self.bounds == "none" else f", bounds {self.bounds}"
        return f"{self.name} {self.norm}{bounds}".strip()


class Case(NamedTuple):
    """A function on a net. `width`: the number of input components."""

    function: Function
    net: str
    batch: int
    width: int

    def __str__(self) -> str:
        return f"{self.function} ({self.net}, {self.batch} x {self.width})"


class Setup(NamedTuple):
    """What a function is called with besides the net."""

    inputs: np.ndarray  # float32
    labels: np.ndarray
    bounds: tuple[Any, Any] | None
    epsilon: float  # in the norm of the function


OPTIONS: dict[str, Callable[[float], dict[str, Any]]] = {
    "deepfool": lambda epsilon: {"num_steps": STEPS},
    "fgsm": lambda epsilon: {"epsilon": epsilon},
    "pgd": lambda epsilon: {"epsilon": epsilon, "step_size": epsilon / 2, "num_steps": STEPS},
    "minimal_fgsm": lambda epsilon: {"max_epsilon": 10 * epsilon},
    "fgsm_success_curve": lambda epsilon: {"epsilons": [i * epsilon for i in range(8)]},
    "carlini_wagner_l2": lambda epsilon: {"num_steps": 10, "num_binary_search_steps": 2},
}
"""Of the attacks, given epsilon."""
LOGITS = "logits"  # Of the net itself, in a plain forward pass.
LOSSES = ("signed_margin", "regularizer", "deep_defense_loss")


def functions() -> list[Function]:
    """The net, and every public function in l2 and linf, with several kinds of bounds."""
    found = [Function(name, norm) for name in ("deepfool", *LOSSES) for norm in ("l2", "linf")]
    bounds = {"l2": "per pixel", "linf": "numbers"}
    for norm in bounds:
        found += [Function("fgsm", norm), Function("pgd", norm, bounds[norm])]
        found += [Function("minimal_fgsm", norm), Function("fgsm_success_curve", norm)]
        found += [Function("deepfool", norm, bounds[norm])]
    found += [Function("carlini_wagner_l2", "l2", kind) for kind in ("numbers", "per pixel")]
    return [Function(LOGITS, "")] + found


def all_cases(quick: bool) -> list[Case]:
    """Every function on every batch size, width, small net and net of the paper.

    Widths and small nets take turns from batch to batch and from function to function, so that all
    pairs of two of these occur. `quick`: a selection of about a quarter.
    """
    cases = list(dict.fromkeys([*_small_cases(quick), *_paper_cases(quick)]))
    return sorted(cases, key=lambda case: (case.net in PAPER_NETS, case.net, case.batch))


def _small_cases(quick: bool) -> Iterator[Case]:
    batches = (7, TRIED_ON_BOTH) if quick else BATCHES
    for i, function in enumerate(functions()):
        for j, batch in enumerate(batches):
            widths = [w for w in WIDTHS if w <= WIDEST_OF_LARGE] if batch > LARGE else WIDTHS
            width, net = widths[(i + j) % len(widths)], (i + j // 2) % 2
            on_both = batch == TRIED_ON_BOTH and not quick
            for name in SMALL_NETS if on_both else SMALL_NETS[net : net + 1]:
                yield Case(function, name, batch, width)
        yield Case(function, QUADRATIC, QUADRATIC_BATCH, QUADRATIC_WIDTH)


def _paper_cases(quick: bool) -> Iterator[Case]:
    for i, function in enumerate(functions()):
        for j, (net, batches) in enumerate(PAPER_NETS.items()):
            if not quick or (i + 5 * j) % 16 == 0:
                width = math.prod(models.input_shape(net))
                yield Case(function, net, batches[(i + i // 3 + j) % len(batches)], width)


def generator(seed: int, *names: Any) -> np.random.Generator:
    """A generator that depends on the seed and on these names alone."""
    return np.random.default_rng([seed, zlib.crc32("/".join(map(str, names)).encode())])


def _images(random: np.random.Generator, batch: int, shape: tuple[int, ...]) -> np.ndarray:
    scale = np.float32(1 - LEAST_INPUT)
    return np.float32(LEAST_INPUT) + scale * random.random((batch, *shape), np.float32)


def shape_of(net: str, width: int) -> tuple[int, ...]:
    """The shape of an input."""
    return models.input_shape(net) if net in PAPER_NETS else (width,)


def setup(case: Case, seed: int) -> Setup:
    """Inputs, labels and bounds of a case."""
    inputs, labels, wider = _drawn(case.net, case.batch, case.width, seed)
    bounds = {"none": None, "numbers": (0.0, 1.0), "per pixel": (-wider[0], 1 + wider[1])}
    size = math.sqrt(case.width) if case.function.norm == "l2" else 1.0
    return Setup(inputs, labels, bounds[case.function.bounds], EPSILON * size)


@functools.lru_cache(maxsize=8)
def _drawn(net: str, batch: int, width: int, seed: int) -> tuple[np.ndarray, ...]:
    shape, random = shape_of(net, width), generator(seed, net, batch, width)
    inputs = _images(random, batch, shape)
    logits = forward(net, parameters(net, width, seed), inputs)
    labels = np.argmax(logits, axis=-1)
    is_wrong = np.arange(batch) % WRONG_EVERY == WRONG_EVERY - 2
    labels = np.where(is_wrong, (labels + 1) % logits.shape[-1], labels).astype(np.int32)
    return inputs, labels, np.float32(0.3) * random.random((2, 1, *shape), np.float32)


@functools.cache
def parameters(net: str, width: int, seed: int) -> Params:
    """Weights of He's scale in float32, and a last bias that brings the mean logits near 0.

    Not to 0: all boundaries of an affine net of width 1 would then meet in one point, and which is
    the nearest would be a matter of rounding.
    """
    random = generator(seed, net, width)
    params = {}
    for layer, shape in _kernels(net, width).items():
        scale = math.sqrt(2 / math.prod(shape[:-1]))
        kernel = np.float32(scale * random.standard_normal(shape))
        params[layer] = {
            "kernel": kernel,
            "bias": np.float32(0.1 * random.standard_normal(shape[-1:])),
        }
    if net == QUADRATIC:
        del params["fc1"]["bias"]
    images = _images(random, max(LEAST_IMAGES, 1000 // width), shape_of(net, width))
    logits = forward(net, params, images)
    spread = np.std(logits, axis=0).mean()
    offsets = SPREAD * spread * random.standard_normal(logits.shape[1]) - np.mean(logits, axis=0)
    params[layer]["bias"] = np.float32(params[layer]["bias"] + offsets)
    return params


def _kernels(net: str, width: int) -> dict[str, tuple[int, ...]]:
    if net == "affine":
        return {"fc1": (width, SMALL_CLASSES)}
    if net == QUADRATIC:
        return {"fc1": (width, SMALL_CLASSES * RANK), "fc2": (1, SMALL_CLASSES)}
    if net == "smooth":
        sizes = (width, *HIDDEN, SMALL_CLASSES)
        return {f"fc{i + 1}": sizes[i : i + 2] for i in range(3)}
    model = models.create(net)
    image = jax.ShapeDtypeStruct((1, *models.input_shape(net)), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), image)["params"]
    order = {  # that of the computation; a dictionary of Flax's is sorted by name
        "nin": "conv1 cccp1 cccp2 conv2 cccp3 cccp4 conv3 cccp5 cccp6",
        "lenet": "conv1 conv2 fc1 fc2",
    }.get(net, " ".join(sorted(shapes)))
    return {layer: shapes[layer]["kernel"].shape for layer in order.split()}


def apply_fn_of(net: str) -> Callable[[Any, jax.Array], jax.Array]:
    """A net as users write it: (params, inputs) -> logits.

    "affine" is a net of one row under vmap. "smooth" is of a batch, with tanh(u) + u / 2 and
    softplus(u) + u / 2, which are nowhere flat: DeepFool's steps stay short. "quadratic" is a sum
    of squares per class of a product with one row.
    """

    def affine(params: Any, x: jax.Array) -> jax.Array:
        kernel, bias = params["fc1"]["kernel"], params["fc1"]["bias"]
        return jax.vmap(lambda row: kernel.T @ row + bias)(x)

    def smooth(params: Any, x: jax.Array) -> jax.Array:
        linear = lambda layer, x: x @ params[layer]["kernel"] + params[layer]["bias"]
        first = linear("fc1", x)
        second = linear("fc2", jnp.tanh(first) + first / 2)
        return linear("fc3", jax.nn.softplus(second) + second / 2)

    def quadratic(params: Any, x: jax.Array) -> jax.Array:
        matrices = jnp.split(params["fc1"]["kernel"].T, SMALL_CLASSES)
        squares = lambda row: jnp.stack([jnp.sum((matrix @ row) ** 2) for matrix in matrices])
        return jax.vmap(squares)(x) * params["fc2"]["kernel"] + params["fc2"]["bias"]

    small = {"affine": affine, "smooth": smooth, QUADRATIC: quadratic}
    return small.get(net) or (lambda params, x: models.create(net).apply({"params": params}, x))


def call(case: Case, params: Any, setup: Setup) -> Arrays:
    """What the function gives, by name, and for a loss the gradients of its mean."""
    name, apply_fn = case.function.name, apply_fn_of(case.net)
    if name == LOGITS:
        return {"value": apply_fn(params, setup.inputs)}
    if name in LOSSES:
        return _loss_and_gradients(case.function, apply_fn, params, setup)
    logits_fn = functools.partial(apply_fn, params)
    options = OPTIONS[name](setup.epsilon)
    options |= {} if name == "carlini_wagner_l2" else {"norm": case.function.norm}
    if name != "fgsm_success_curve" or setup.bounds is not None:
        options["bounds"] = setup.bounds
    found = getattr(attacks, name)(logits_fn, setup.inputs, setup.labels, **options)
    return {"curve": found.T} if name == "fgsm_success_curve" else found._asdict()


def _loss_and_gradients(function: Function, apply_fn: Callable, params: Any, s: Setup) -> Arrays:
    def mean(params: Any, inputs: jax.Array) -> tuple[jax.Array, Arrays]:
        logits_fn = functools.partial(apply_fn, params)
        loss_fn = getattr(dd_jax, function.name)
        options = {"norm": function.norm, "num_steps": STEPS}
        options |= {} if function.name == "signed_margin" else SCALES
        found = loss_fn(logits_fn, inputs, s.labels, **options)
        value, metrics = found if isinstance(found, tuple) else (found, {})
        steps = {name: metrics[name] for name in ("num_steps",) if name in metrics}
        return value.mean(), {"value": value} | steps

    gradient = jax.grad(mean, argnums=(0, 1), has_aux=True)
    (of_params, of_inputs), values = gradient(params, s.inputs)
    leaves = traverse_util.flatten_dict({"parameters": of_params}, sep="/")
    return values | {"input_gradient": of_inputs} | leaves


def forward(net: str, params: Params, x: np.ndarray) -> np.ndarray:
    """The logits in float64, by NumPy."""
    p = {f"{layer}/{name}": np.float64(a) for layer in params for name, a in params[layer].items()}
    x = np.float64(x)
    if net in PAPER_NETS:
        return _PAPER_FORWARD[net](p, x)
    if net == "affine":
        return dense(p, "fc1", x)
    if net == QUADRATIC:
        products = (x @ p["fc1/kernel"]).reshape(len(x), SMALL_CLASSES, RANK)
        return np.sum(products**2, axis=-1) * p["fc2/kernel"] + p["fc2/bias"]
    first = dense(p, "fc1", x)
    second = dense(p, "fc2", np.tanh(first) + first / 2)
    return dense(p, "fc3", np.logaddexp(0, second) + second / 2)


def dense(p: dict[str, np.ndarray], layer: str, x: np.ndarray) -> np.ndarray:
    """A fully connected layer."""
    return x.reshape(len(x), -1) @ p[f"{layer}/kernel"] + p[f"{layer}/bias"]


def conv(p: dict[str, np.ndarray], layer: str, x: np.ndarray, padding: int = 0) -> np.ndarray:
    """A convolution of stride 1 (a cross-correlation, as in every library of nets)."""
    kernel = p[f"{layer}/kernel"]
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    patches = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))
    patches = np.moveaxis(patches, 3, -1)  # (batch, y, x, kernel y, kernel x, channels)
    flat = patches.reshape(*patches.shape[:3], -1)
    return flat @ kernel.reshape(-1, kernel.shape[-1]) + p[f"{layer}/bias"]


def pool(x: np.ndarray, size: int, reduce: Callable) -> np.ndarray:
    """Pooling of squares that do not overlap."""
    batch, height, width, channels = x.shape
    blocks = x.reshape(batch, height // size, size, width // size, size, channels)
    return reduce(blocks, axis=(2, 4))


def relu(x: np.ndarray) -> np.ndarray:
    """max(x, 0)."""
    return np.maximum(x, 0)


def _mlp(p: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    return dense(p, "fc3", relu(dense(p, "fc2", relu(dense(p, "fc1", x)))))


def _lenet(p: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    x = pool(conv(p, "conv1", x), 2, np.max)
    x = pool(conv(p, "conv2", x), 2, np.max)
    return dense(p, "fc2", relu(dense(p, "fc1", x)))


def _convnet(p: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    x = relu(pool(conv(p, "conv1", x, 2), 2, np.max))
    x = pool(relu(conv(p, "conv2", x, 2)), 2, np.mean)
    x = pool(relu(conv(p, "conv3", x, 2)), 2, np.mean)
    return conv(p, "conv5", relu(conv(p, "conv4", x)))[:, 0, 0]


def _nin(p: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    layer = lambda name, x, padding=0: relu(conv(p, name, x, padding))
    x = pool(layer("cccp2", layer("cccp1", layer("conv1", x, 2))), 2, np.max)
    x = pool(layer("cccp4", layer("cccp3", layer("conv2", x, 2))), 2, np.mean)
    x = conv(p, "cccp6", layer("cccp5", layer("conv3", x, 1)))
    return pool(x, 8, np.mean)[:, 0, 0]


_PAPER_FORWARD = {"mlp": _mlp, "lenet": _lenet, "convnet": _convnet, "nin": _nin}
