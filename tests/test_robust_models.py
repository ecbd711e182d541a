"""Published robust classifiers: every architecture computes what PyTorch computes, is recognized
from its weights, and normalizes images by what the file, RobustBench or the net's code says.

The figures are in `golden/robust_logits.json`; `golden/make_robust_logits.py` made them, and draws
the same weights here.
"""

import json
import math
import pathlib
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from golden import make_robust_logits as made
from test_weight_files import run_command, write_pth

import dd_jax
from dd_jax import models, pretrained
from dd_jax.models import families
from dd_jax.models.families import deepmind, pre_activation, residual
from dd_jax.models.normalization import standardized
from dd_jax.pretrained import WeightsError, layouts, robustbench
from dd_jax.pretrained.state_dicts import plain_names

FIGURES = json.loads((pathlib.Path(__file__).parent / "golden" / "robust_logits.json").read_text())
CIFAR10 = models.NORMALIZATIONS["cifar10"]
SMALL = ((8, 1), (16, 2))
# Nets of architectures whose published sizes are too large for a test.
SMALL_NETS = {
    "small_dm_preactresnet": lambda: deepmind(
        families.DEEPMIND_PRE_ACT, SMALL, stem_features=8, shortcut="padded_input"
    ),
    "small_preactresnet": lambda: pre_activation(families.PRE_ACT, SMALL, stem_features=8),
    "small_preactresnet_plain": lambda: pre_activation(
        families.PRE_ACT, SMALL, stem_features=8, shortcut="input", final_norm=False
    ),
    "small_resnet_cifar": lambda: residual(
        families.SMALL_RESNET, (1, 2), features=8, small_images=True
    ),
    "small_bottleneck_resnet_cifar": lambda: residual(
        families.SMALL_RESNET, (1, 2), features=8, small_images=True, bottleneck_width=1
    ),
    "small_wide_bottleneck_resnet": lambda: residual(
        families.TORCHVISION, (1, 2), features=8, bottleneck_width=2
    ),
}
# Weights do not show these.
NAMED = (*SMALL_NETS, "wideresnet10_1_silu", "wideresnet10_1_standardizing")


def drawn(name):
    """The weights that PyTorch had, under PyTorch's names."""
    figures = FIGURES["nets"][name]
    weights = made.arrays({entry: tuple(shape) for entry, shape in figures["shapes"].items()})
    for entry in weights:
        if ".activation." in entry:
            weights[entry] = weights[f"activation.{entry.rpartition('.')[2]}"]
    total = sum(np.sum(array, dtype=np.float64) for array in weights.values())
    assert total == pytest.approx(figures["sum_of_weights"], rel=1e-9), (
        "NumPy draws other numbers than it did."
    )
    return {entry: np.asarray(array, np.float32) for entry, array in weights.items()}


def saved(path, arrays):
    safetensors.numpy.save_file(
        {name: np.asarray(a, order="C") for name, a in arrays.items()}, path
    )
    return path


@pytest.mark.parametrize("name", made.NETS)
def test_logits_and_gradients_are_pytorchs(name, tmp_path, monkeypatch, x64):
    if name in SMALL_NETS:
        monkeypatch.setitem(models.NETS, name, SMALL_NETS[name]())
    figures, path = FIGURES["nets"][name], saved(tmp_path / "net.safetensors", drawn(name))
    net = pretrained.robust_classifier(path, name if name in NAMED else None)
    assert net.name == name and net.num_classes == made.NUM_CLASSES
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), net.variables)

    def difference(images):
        logits = net.apply_fn(variables, images)
        return (logits[:, 0] - logits[:, 1]).sum(), logits

    gradient, logits = jax.jit(jax.grad(difference, has_aux=True))(jnp.asarray(made.images()))
    close = dict(rtol=1e-6, atol=1e-7)  # The colors' digits are those of float32 here.
    np.testing.assert_allclose(logits, figures["logits"], **close)
    lengths = np.linalg.norm(np.reshape(gradient, (len(gradient), -1)), axis=1)
    np.testing.assert_allclose(lengths, figures["input_gradient_norm"], **close)


WEIGHTS = drawn("wideresnet10_1")
IMAGES = np.asarray(made.images(), np.float32)
MU, SIGMA = np.array([0.1, 0.2, 0.3], np.float32), np.array([0.5, 0.6, 0.7], np.float32)


@pytest.fixture(scope="module")
def apply():
    """Logits of WideResNet-10-1, compiled once."""
    return jax.jit(models.create("wideresnet10_1", made.NUM_CLASSES).apply)


def axes(array):
    return array[None, :, None, None]


def prefixed(prefix, weights=WEIGHTS):
    return {f"{prefix}{name}": array for name, array in weights.items()}


OWNERS = ("module.normalizer", "module.attacker.normalize")
CHECKPOINTS = {
    "DataParallel": {"state_dict": prefixed("module."), "epoch": 76},
    "nested twice": {"net": {"state_dict": prefixed("module.model.")}},
}
CHECKPOINTS_WITH_COLORS = {
    "the last": {"best": {}, "last": WEIGHTS | {"mu": axes(MU), "sigma": axes(SIGMA)}},
    "DeepMind's": WEIGHTS | {"mean": MU[:, None, None], "std": SIGMA[:, None, None]},
    "Sequential": {"0.mean": axes(MU), "0.std": axes(SIGMA)} | prefixed("1."),
    "Sequential in DataParallel": {
        "state_dict": prefixed("module.1.") | {"module.0.mu": MU, "module.0.sigma": SIGMA}
    },
    "named": {
        "model_state_dict": prefixed("model.") | {"normalize.mean": MU, "normalize.std": SIGMA}
    },
    "robustness": {
        "model": prefixed("module.model.")
        | prefixed("module.attacker.model.")
        | {f"{owner}.new_mean": MU[:, None, None] for owner in OWNERS}
        | {f"{owner}.new_std": SIGMA[:, None, None] for owner in OWNERS}
    },
}


@pytest.mark.parametrize("kind", [*CHECKPOINTS, *CHECKPOINTS_WITH_COLORS])
def test_wrappers_and_their_normalization_are_seen_through(kind, tmp_path, apply):
    has_colors = kind in CHECKPOINTS_WITH_COLORS
    contents = (CHECKPOINTS | CHECKPOINTS_WITH_COLORS)[kind]
    net = pretrained.robust_classifier(write_pth(tmp_path / "net.pt", contents))
    assert net.name == "wideresnet10_1" and ("from the file" in net.notes[0]) == has_colors
    plain = layouts.variables_from_torch("wideresnet10_1", WEIGHTS)
    expected = apply(plain, (IMAGES - MU) / SIGMA if has_colors else IMAGES)
    np.testing.assert_allclose(apply(net.variables, IMAGES), expected, rtol=1e-4, atol=1e-5)
    # The first stage that is never called is left out with a word.
    assert net.notes[1] == (
        "10 arrays (sub_block1) are left out, because wideresnet10_1 does not use them."
    )


def test_load_warns_of_what_it_leaves_out_and_of_nothing_else(tmp_path):
    path = write_pth(tmp_path / "net.pt", WEIGHTS)
    with pytest.warns(UserWarning, match=r"net.pt: 10 arrays \(sub_block1\) are left out"):
        pretrained.load(path, "wideresnet10_1")
    used = {name: array for name, array in WEIGHTS.items() if "sub_block1" not in name}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pretrained.load(write_pth(path, used), "wideresnet10_1")


def test_names_that_would_become_one_stay_as_they_are():
    names = {"module.attacker.conv1.weight": 0, "module.conv1.weight": 0}
    assert plain_names(names) == {"conv1.weight": "module.conv1.weight"}
    assert plain_names(["a.b", "c"]) == {"a.b": "a.b", "c": "c"}
    assert plain_names(["net.a", "net.net.b"]) == {"a": "net.a", "net.b": "net.net.b"}
    # A mean among other entries of a layer is no normalization.
    others = ["bn.mean", "bn.std", "bn.weight"]
    assert plain_names(others) == dict(zip(others, others, strict=True))


@pytest.mark.parametrize(
    ("stem", "num_classes", "mean", "std"),
    [
        ("Rice2020Overfitting", 10, CIFAR10.mean, CIFAR10.std),
        ("Engstrom2019Robustness", 10, CIFAR10.mean, (0.2023, 0.1994, 0.201)),
        ("Wu2020Adversarial", 100, (0.507075, 0.486549, 0.440918), (0.267334, 0.256438, 0.27615)),
        ("Wu2020Adversarial", 10, (0, 0, 0), (1, 1, 1)),
        ("Hendrycks2019Using", 10, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("Carmon2019Unlabeled", 10, (0, 0, 0), (1, 1, 1)),
    ],
)
def test_what_robustbenchs_files_do_not_say_follows_from_their_names(
    stem, num_classes, mean, std, tmp_path
):
    head = {"fc.weight": (num_classes, 64), "fc.bias": (num_classes,)}
    weights = WEIGHTS | {name: np.zeros(shape, np.float32) for name, shape in head.items()}
    path = saved(tmp_path / f"{stem}.safetensors", weights)
    own = pretrained.robust_classifier(path).variables["batch_stats"]["normalize"]
    np.testing.assert_allclose(own["mu"], mean, rtol=1e-5)
    np.testing.assert_allclose(own["sigma"], std, rtol=1e-5)
    # The file's own numbers, and those that are asked for, come first.
    saved(path, weights | {"mu": MU, "sigma": SIGMA})
    net = pretrained.robust_classifier(path)
    np.testing.assert_array_equal(net.variables["batch_stats"]["normalize"]["mu"], MU)
    net = pretrained.robust_classifier(path, normalization=models.Normalization((0.25,), (2.0,)))
    np.testing.assert_array_equal(net.variables["batch_stats"]["normalize"]["mu"], [0.25] * 3)
    assert "as was asked for" in net.notes[0]


def test_the_net_of_mma_standardizes_images_one_by_one(tmp_path):
    net = pretrained.robust_classifier(saved(tmp_path / "Ding2020MMA.safetensors", WEIGHTS))
    assert net.name == "wideresnet10_1_standardizing" and "one by one" in net.notes[0]
    with pytest.raises(WeightsError, match="does not normalize images itself"):
        pretrained.robust_classifier(tmp_path / "Ding2020MMA.safetensors", normalization=CIFAR10)


def test_standardizing_an_image_of_one_value_gives_zeros_and_a_finite_gradient():
    images = jnp.concatenate([jnp.full((1, 4, 4, 3), 0.3), jnp.asarray(IMAGES[:1, :4, :4])])
    result = standardized(images)
    np.testing.assert_allclose(result[0], 0, atol=1e-6)
    expected = (images[1] - images[1].mean()) / np.std(images[1], ddof=1)
    np.testing.assert_allclose(result[1], expected, rtol=1e-5, atol=1e-6)
    assert np.isfinite(jax.grad(lambda x: jnp.sum(standardized(x) ** 2))(images)).all()


FULL = {  # The number of parameters as PyTorch counts them in RobustBench's nets.
    "wideresnet28_10": 36_479_194,
    "wideresnet34_20": 184_531_674,
    "wideresnet28_10_pssilu": 36_479_196,
    "wideresnet_5x320_5x640_5x512_huang2021": 68_116_698,
    "preactresnet18": 11_172_170,
    "preactresnet18_plain": 11_171_146,
    "dm_wideresnet28_10": 36_479_194,
    "dm_wideresnet28_10_meansparse": 36_479_194,
    "dm_preactresnet18": 12_548_426,
    "resnet18_cifar": 11_173_962,
    "resnet50_cifar": 23_520_842,
    "resnet18_normalizing": 11_689_512,
    "resnet50_normalizing": 25_557_032,
    "wide_resnet50_2_normalizing": 68_883_240,
}
OTHERS = (
    "wideresnet70_16",
    "wideresnet34_20_cosine",
    "wideresnet_27x160_28x448_13x384_huang2022",
    "dm_wideresnet94_16",
    "preactresnet34",
    "dm_preactresnet34",
    "resnet34_cifar",
    "resnet101_normalizing",
    "resnet152_cifar",
)


@pytest.mark.parametrize("name", OTHERS)
def test_every_family_recognizes_its_nets_by_stages(name):
    """From the first convolutions of all blocks alone, without tracing large nets."""
    net = models.find(name)
    model, renamed = net.make(), net.torch_layout.renamed
    if hasattr(model, "stages"):
        widths = [features for features, count in model.stages for _ in range(count)]
    else:
        widths = [
            64 * 2**stage * (1 if model.bottleneck_width is None else 4)
            for stage, count in enumerate(model.num_blocks)
            for _ in range(count)
        ]
    blocks = [torchs for ours, torchs in renamed.items() if re.search(r"\d_(block)?\d", ours)]
    convs = {renamed.get(f"conv{i}", f"conv{i}") for i in (1, 2, 3)}
    shapes = {
        f"{block}.{conv}.weight": (width, 3, 3, 3)
        for block, width in zip(blocks, widths, strict=True)
        for conv in convs
    }
    if getattr(model, "bottleneck_width", "none") is None:
        shapes = {entry: shape for entry, shape in shapes.items() if "conv3" not in entry}
    tops = (renamed.get(part, part) for part in ("stem", "conv1", "norm", "head", "fc", "bn1"))
    shapes |= {f"{top}.weight": (64, 3, 3, 3) for top in tops}
    if "cosine" not in name:
        shapes[f"{renamed.get('head', 'fc')}.bias"] = (10,)
    if name.startswith("preactresnet"):
        del shapes["bn1.weight"]
    assert models.detect(shapes) == name


@pytest.mark.parametrize("name", FULL)
def test_nets_of_published_sizes_are_recognized_and_have_their_number_of_parameters(name):
    expected = layouts._expected_shapes(name, None)
    entries = {
        layouts._entry(name, path): layouts._torch_shape(shape) for path, shape in expected.items()
    }
    assert len(entries) == len(expected) and models.detect(entries) == name
    sizes = [math.prod(shape) for path, shape in expected.items() if path[0] == "params"]
    assert sum(sizes) == FULL[name]
    assert set(layouts.check_shapes(name, entries)) == set(expected)
    without = {entry: s for entry, s in entries.items() if entry not in ("mu", "sigma")}
    assert models.detect(without) == name
    with pytest.raises(WeightsError, match="missing: sigma|unknown: mu"):
        layouts.check_shapes(name, without | {"mu": (3,)})


def test_weights_of_no_net_and_impossible_nets_are_sentences(tmp_path):
    path = saved(tmp_path / "net.safetensors", {"features.0.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(
        WeightsError, match=r"net.safetensors: .*no net.*features.0.weight.*dm_wide"
    ):
        pretrained.robust_classifier(path)
    deep = WEIGHTS | {f"block1.layer.{i}.conv1.weight": WEIGHTS["conv1.weight"] for i in range(900)}
    with pytest.raises(WeightsError, match="net.safetensors: "):
        pretrained.robust_classifier(saved(path, deep))
    (tmp_path / "net.mat").write_bytes(b"x")
    with pytest.raises(WeightsError, match="net.mat does not say which net it is"):
        pretrained.robust_classifier(tmp_path / "net.mat")
    for name, words in (
        ("wideresnet30_10", "must be 6 n . 4"),
        ("wide_resnet18_2", "50, 101 or 152"),
        ("vgg", r"choose one of mlp, .*wideresnet\{depth\}_\{width\}"),
    ):
        with pytest.raises(ValueError, match=words):
            models.create(name)
        with pytest.raises(WeightsError, match=words):
            pretrained.load(saved(path, WEIGHTS), name)
    for mu, sigma in ((MU, 0 * SIGMA), (MU * np.nan, SIGMA)):
        bad = WEIGHTS | {"mu": mu, "sigma": sigma}
        with pytest.raises(WeightsError, match=r"net.safetensors: The normalization is mean"):
            pretrained.robust_classifier(saved(path, bad))


def test_a_net_without_normalization_says_which_nets_have_one():
    shapes = layouts._expected_shapes("resnet18", None)
    given = {layouts._entry("resnet18", p): layouts._torch_shape(s) for p, s in shapes.items()}
    colors = {"mu": (1, 3, 1, 1), "sigma": (1, 3, 1, 1)}
    with pytest.raises(
        WeightsError, match=r"unknown: mu .*mu and sigma are for nets.*_normalizing"
    ):
        layouts.check_shapes("resnet18", given | colors)
    assert layouts.check_shapes("resnet18_normalizing", given | colors)


def test_a_classifier_is_a_logits_fn_for_attacks(tmp_path):
    net = pretrained.robust_classifier(saved(tmp_path / "net.safetensors", WEIGHTS))
    labels = jnp.argmax(net(IMAGES), axis=-1)
    result = jax.jit(lambda x, y: dd_jax.deepfool(net, x, y, bounds=(0, 1)))(IMAGES, labels)
    moved = jnp.argmax(net(IMAGES + result.perturbation), axis=-1)
    assert result.success.all() and (moved != labels).all()
    assert "wideresnet10_1: images (batch, 32, 32, 3) to 4 logits. Images are norm" in str(net)


def test_the_command_recognizes_nets_and_writes_their_normalization(tmp_path, monkeypatch, capsys):
    source = write_pth(tmp_path / "Rice2020Overfitting.pt", {"state_dict": prefixed("module.")})
    ten = WEIGHTS | {
        "fc.weight": np.zeros((10, 64), np.float32),
        "fc.bias": np.zeros(10, np.float32),
    }
    write_pth(source, {"state_dict": prefixed("module.", ten)})
    target = tmp_path / "net.safetensors"
    run_command(monkeypatch, source, target)
    assert capsys.readouterr().out == f"{target} holds the 41 arrays of wideresnet10_1.\n"
    arrays = safetensors.numpy.load_file(target)
    np.testing.assert_allclose(arrays["mu"].ravel(), CIFAR10.mean, rtol=1e-6)
    assert not any("sub_block1" in name for name in arrays)
    run_command(monkeypatch, source, "--normalization", "centered", target)
    np.testing.assert_array_equal(safetensors.numpy.load_file(target)["sigma"].ravel(), [0.5] * 3)


@pytest.mark.parametrize("name", ["lenet", "resnet18", "dm_wideresnet10_1_meansparse"])
def test_saving_is_the_inverse_of_loading(name, tmp_path):
    """Distinct numbers, so that every axis must go to its place."""
    entries = {
        layouts._entry(name, path): layouts._torch_shape(shape)
        for path, shape in layouts._expected_shapes(name, 3).items()
    }
    generator = np.random.default_rng(0)
    given = {
        entry: generator.random(shape, np.float32) + np.float32(0.5)
        for entry, shape in entries.items()
    }
    variables = layouts.variables_from_torch(name, given)
    arrays = pretrained.to_torch(name, variables)
    assert set(arrays) == set(given)
    for entry, array in arrays.items():
        np.testing.assert_array_equal(array.reshape(given[entry].shape), given[entry], entry)
    pretrained.save(tmp_path / "net.safetensors", name, variables)
    again = pretrained.load(tmp_path / "net.safetensors", name)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    with pytest.raises(WeightsError, match="missing: .*unknown: "):
        pretrained.to_torch("nin", variables)
    with pytest.raises(WeightsError, match="give it a name that ends in .safetensors"):
        pretrained.save(tmp_path / "net.pth", name, variables)


def test_every_name_of_robustbench_that_lacks_something_is_listed_once():
    names = {name for per_classes in robustbench.UNSTORED.values() for name in per_classes}
    assert not names & set(robustbench.STANDARDIZING) and len(robustbench.UNSTORED[10]) == 17
