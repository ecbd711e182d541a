"""Our attacks beside those of foolbox, ART, adversarial-library and torchattacks, on the authors'
LeNet and 16 images.

`golden/peers_lenet.json` holds what the four found in float32 with bounds [0, 1], and with which
parameters.
"""

import functools
import json
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax import deepfool, models
from dd_jax.attacks import carlini_wagner_l2, fgsm, pgd
from dd_jax.pretrained import from_torch

GOLDEN = pathlib.Path(__file__).parent / "golden"
PEERS = json.loads((GOLDEN / "peers_lenet.json").read_text())
BOUNDS = (0.0, 1.0)
TOLERATED = 1.02  # times the smallest median of the peers

SEARCHES = {
    "deepfool l2": (
        partial(deepfool, norm="l2"),
        ("foolbox_l2deepfool", "adv_lib_deepfool", "torchattacks_deepfool", "art_deepfool"),
    ),
    "deepfool linf": (
        partial(deepfool, norm="linf"),
        ("foolbox_linfdeepfool", "adv_lib_deepfool_linf"),
    ),
    "carlini_wagner_l2": (carlini_wagner_l2, ("foolbox_cw_l2",)),
}
ASCENTS = {  # with the parameters that the peers' entries name
    "foolbox_linf_fgsm": partial(fgsm, norm="linf"),
    "foolbox_linf_pgd": partial(pgd, norm="linf", step_size=0.01, num_steps=40),
    "foolbox_l2_pgd": partial(pgd, norm="l2", step_size=0.1, num_steps=40),
}


@functools.cache
def lenet():
    """The authors' LeNet, the images (batch, height, width, channels) and their labels."""
    with np.load(GOLDEN / "lenet.npz") as arrays:
        state_dict = {
            key.removeprefix("param/"): arrays[key]
            for key in arrays.files
            if key.startswith("param/")
        }
        images, labels = arrays["input/images"], arrays["input/labels"]
    params = jax.tree.map(
        lambda array: jnp.asarray(array, jnp.float32), from_torch("lenet", state_dict)
    )
    net = jax.jit(lambda images: models.create("lenet").apply({"params": params}, images))
    return net, jnp.asarray(images.transpose(0, 2, 3, 1)), jnp.asarray(labels, jnp.int32)


def flat_norm(perturbation, norm):
    return np.linalg.norm(
        np.asarray(perturbation, np.float64).reshape(16, -1),
        ord=np.inf if norm == "linf" else 2,
        axis=1,
    )


@pytest.mark.parametrize("name", SEARCHES)
def test_perturbations_are_as_small_as_the_best_peers(name):
    attack, peers = SEARCHES[name]
    net, images, _ = lenet()
    found = jax.jit(partial(attack, net, bounds=BOUNDS))(images)
    adversarial = images + found.perturbation
    assert (
        found.success.all()
        and (jnp.argmax(net(adversarial), axis=1) != jnp.argmax(net(images), axis=1)).all()
    )
    assert adversarial.min() >= -1e-6 and adversarial.max() <= 1 + 1e-6
    ours = flat_norm(found.perturbation, "linf" if "linf" in name else "l2")
    best = min(np.median(PEERS[f"{peer}_pred"]["norm"]) for peer in peers)
    assert np.median(ours) <= TOLERATED * best
    assert (ours <= 1.1 * np.max([PEERS[f"{peer}_pred"]["norm"] for peer in peers], axis=0)).all()


@pytest.mark.parametrize("name", ASCENTS)
def test_accuracies_losses_and_classes_are_the_peers(name):
    net, images, labels = lenet()
    peer = PEERS[name]
    epsilons = jnp.repeat(jnp.array(peer["epsilons"]), 16)
    images, labels = (
        jnp.tile(images, (len(peer["epsilons"]), 1, 1, 1)),
        jnp.tile(labels, len(peer["epsilons"])),
    )
    for early_stop in (True, False):  # The peers' images take every step, also misclassified ones.
        found = jax.jit(
            partial(ASCENTS[name], net, epsilon=epsilons, bounds=BOUNDS, early_stop=early_stop)
        )(images, labels)
        assert (1 - found.success.reshape(-1, 16).mean(axis=1)).tolist() == peer[
            "adversarial_accuracy"
        ]
    logits = net(images + found.perturbation)
    np.testing.assert_array_equal(np.argmax(logits, axis=1).reshape(-1, 16), peer["label_after"])
    cross_entropy = -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]
    np.testing.assert_allclose(
        cross_entropy.reshape(-1, 16).sum(axis=1), peer["cross_entropy_sum"], rtol=1e-3
    )
