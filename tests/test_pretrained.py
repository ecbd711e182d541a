"""PyTorch's weights in Flax's order. That whole nets then compute the authors' logits is in
test_models.py.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax import models
from dd_jax.pretrained import from_torch

GOLDEN = pathlib.Path(__file__).parent / "golden"


def golden_state_dict(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {
            key.removeprefix("param/"): arrays[key]
            for key in arrays.files
            if key.startswith("param/")
        }


def lenet_state_dict(num_classes=10, dtype=np.float32):
    shapes = {
        "conv1": (20, 1, 5, 5),
        "conv2": (50, 20, 5, 5),
        "fc1": (500, 800),
        "fc2": (num_classes, 500),
    }
    entries = {f"{layer}.weight": shape for layer, shape in shapes.items()}
    entries |= {f"{layer}.bias": shape[:1] for layer, shape in shapes.items()}
    return {
        entry: np.arange(np.prod(shape), dtype=dtype).reshape(shape)
        for entry, shape in entries.items()
    }


@pytest.mark.parametrize("name", ["mlp", "lenet", "convnet", "nin"])
def test_the_tree_is_the_one_that_init_makes(name):
    params = from_torch(name, golden_state_dict(name))
    images = jax.ShapeDtypeStruct((1, *models.input_shape(name)), jnp.float32)
    expected = jax.eval_shape(models.create(name).init, jax.random.key(0), images)["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, expected)


def test_every_axis_goes_to_its_place():
    state_dict = lenet_state_dict()
    params = from_torch("lenet", state_dict)
    assert params["conv2"]["kernel"][1, 2, 3, 4] == state_dict["conv2.weight"][4, 3, 1, 2]
    assert params["fc2"]["kernel"][7, 6] == state_dict["fc2.weight"][6, 7]
    assert params["fc2"]["bias"][8] == state_dict["fc2.bias"][8]
    row, column, channel = 1, 2, 30  # of the 4 x 4 maps with 50 channels that fc1 reads
    ours, torchs = (row * 4 + column) * 50 + channel, (channel * 4 + row) * 4 + column
    assert params["fc1"]["kernel"][ours, 9] == state_dict["fc1.weight"][9, torchs]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_dtype_is_kept(dtype):
    params = from_torch("lenet", lenet_state_dict(dtype=dtype))
    assert {array.dtype for array in jax.tree.leaves(params)} == {np.dtype(dtype)}


def test_jax_arrays_will_do():
    state_dict = lenet_state_dict()
    params, same = (
        from_torch("lenet", state_dict),
        from_torch("lenet", jax.tree.map(jnp.asarray, state_dict)),
    )
    jax.tree.map(np.testing.assert_array_equal, params, same)


def test_the_last_layer_tells_the_number_of_classes():
    params = from_torch("lenet", lenet_state_dict(num_classes=3))
    assert params["fc2"]["kernel"].shape == (500, 3)
    images = jnp.ones((2, *models.input_shape("lenet")))
    assert models.create("lenet", num_classes=3).apply({"params": params}, images).shape == (2, 3)


def test_one_error_lists_all_that_does_not_fit():
    state_dict = lenet_state_dict(num_classes=7)
    del state_dict["conv1.bias"], state_dict["fc1.bias"]
    state_dict |= {
        "fc3.weight": np.ones((2, 2)),
        "conv3.bias": np.ones(4),
        "conv2.weight": np.ones((50, 20, 3, 3)),
        "fc2.bias": np.ones(10),
    }
    with pytest.raises(ValueError) as caught:
        from_torch("lenet", state_dict)
    message = str(caught.value)
    missing, unknown, misshaped = (
        message.index(word) for word in ("missing:", "unknown:", "of another shape:")
    )
    assert message.startswith("These arrays are not the weights of 'lenet'")
    for entry in ("conv1.bias (20,)", "fc1.bias (500,)"):
        assert missing < message.index(entry) < unknown
    for entry in ("fc3.weight (2, 2)", "conv3.bias (4,)"):
        assert unknown < message.index(entry) < misshaped
    for entry in (
        "conv2.weight (50, 20, 3, 3) instead of (50, 20, 5, 5)",
        "fc2.bias (10,) instead of (7,)",
    ):
        assert misshaped < message.index(entry)
    assert "fc2.weight" not in message and "conv2.bias" not in message


def test_errors_mention_only_what_is_wrong():
    state_dict = lenet_state_dict()
    del state_dict["fc2.weight"]  # the very entry that tells the number of classes
    with pytest.raises(ValueError, match=r"'lenet'; missing: fc2.weight \(10, 500\)\.$"):
        from_torch("lenet", state_dict)


def test_another_nets_weights_are_refused():
    with pytest.raises(ValueError, match="missing: .*conv1.weight.*unknown: .*fc3.weight"):
        from_torch("lenet", golden_state_dict("mlp"))


def test_an_unknown_net_gets_the_list_of_nets():
    with pytest.raises(ValueError, match="'vgg'.*mlp, lenet, convnet, nin"):
        from_torch("vgg", {})
