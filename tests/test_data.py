"""Data sets, input spaces and batches. The TFDS sets are tiny ones that the tests write themselves."""

import functools
import gzip
import http.server
import io
import pathlib
import subprocess
import sys
import tarfile
import threading
import time

import jax
import numpy as np
import PIL.Image
import pytest
import scipy.io

from dd_jax import data, deepfool
from dd_jax.attacks import carlini_wagner_l2, fgsm, fgsm_success_curve, minimal_fgsm, pgd
from dd_jax.data import archives, catalog, preprocessing
from dd_jax.data import download as downloads

# What the package itself says of wrong arguments.
pytestmark = pytest.mark.usefixtures("unchecked")

ATTACKS = (
    deepfool,
    carlini_wagner_l2,
    functools.partial(fgsm, epsilon=0.1),
    functools.partial(pgd, epsilon=0.1, step_size=0.01),
    functools.partial(minimal_fgsm, max_epsilon=1.0),
    functools.partial(fgsm_success_curve, epsilons=(0.1, 0.2)),
)
SHAPES = {name: data.DATA_SETS[name].image_shape for name in ("mnist", "cifar10")}


def random_images(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def by_label(images, labels):
    """TFDS shuffles what it prepares; the tests give every image a label of its own and sort by it."""
    return images[np.argsort(labels)]


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A TFDS directory with ten training and five test images of each set, and those images."""
    import tensorflow_datasets as tfds

    directory, written = tmp_path_factory.mktemp("tfds"), {}

    def png(image):
        file = io.BytesIO()
        PIL.Image.fromarray(image.squeeze()).save(file, "PNG")
        return file.getvalue()

    for base in (tfds.image_classification.MNIST, tfds.image_classification.Cifar10):
        shape = SHAPES[base.name]
        images = {"train": random_images((10, *shape), 1), "test": random_images((5, *shape), 2)}
        ids = {"id": "any"} if base.name == "cifar10" else {}

        def examples(split, images=images, ids=ids):
            yield from (
                (i, {"image": png(x), "label": i, **ids}) for i, x in enumerate(images[split])
            )

        def generators(self, _, examples=examples):
            return {split: examples(split) for split in ("train", "test")}

        with tfds.core.registered.skip_registration():
            builder_class = type(
                base.__name__, (base,), {"_split_generators": generators, "__module__": __name__}
            )
        builder_class(data_dir=directory, file_format="array_record").download_and_prepare(
            file_format="array_record"
        )
        written[base.name] = images
    return directory, written


# Sources


def test_importing_loads_neither_tfds_nor_tensorflow():
    code = "import sys, dd_jax.data; sys.exit(any(m in sys.modules for m in ('tensorflow_datasets', 'tensorflow')))"
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=pathlib.Path(downloads.__file__).parents[2]
    )


def test_digits_are_a_fixed_even_split_of_scikit_learns():
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    digits = data.load("digits", (8, 8, 1))
    assert digits.description == "digits (scikit-learn, 8x8x1)"
    assert (digits.num_classes, len(digits.train_labels), len(digits.test_labels)) == (
        10,
        1437,
        360,
    )
    assert digits.train_images.dtype == digits.test_images.dtype == np.uint8
    assert digits.train_labels.dtype == digits.test_labels.dtype == np.int32
    assert (digits.train_images.min(), digits.train_images.max()) == (0, 255)
    # Train and test together are the original, each digit as often: hence disjoint.
    originals = np.concatenate([np.rint(pixels * 255 / 16), labels[:, None]], axis=1)
    parts = [(digits.train_images, digits.train_labels), (digits.test_images, digits.test_labels)]
    loaded = np.concatenate(
        [np.concatenate([x.reshape(-1, 64), y[:, None]], axis=1) for x, y in parts]
    )
    np.testing.assert_array_equal(loaded[np.lexsort(loaded.T)], originals[np.lexsort(originals.T)])
    share = np.bincount(digits.test_labels) / np.bincount(labels)
    assert share.min() > 0.19 and share.max() < 0.21
    np.testing.assert_array_equal(
        digits.test_labels[:10], data.load("digits", (28, 28, 1), test_limit=10).test_labels
    )


def test_digits_take_any_shape_and_limits():
    digits = data.load("digits", (32, 30, 3), train_limit=7, test_limit=10_000)
    assert digits.train_images.shape == (7, 32, 30, 3) and digits.test_images.shape == (
        360,
        32,
        30,
        3,
    )
    assert digits.description == (
        "digits (scikit-learn, 8x8x1 enlarged to 32x30x3, gray in each channel; first 7 of 1437 "
        "train images)"
    )
    np.testing.assert_array_equal(digits.train_images[..., 0], digits.train_images[..., 2])
    small = data.load("digits", (8, 8, 1), train_limit=7)
    # Enlarged fourfold in both directions, the picture is still the same: block means are the old
    # pixels, nearly.
    large = (
        data.load("digits", (32, 32, 1), train_limit=7)
        .train_images.reshape(7, 8, 4, 8, 4)
        .mean(axis=(2, 4))
    )
    assert np.corrcoef(large.ravel(), small.train_images.ravel())[0, 1] > 0.98


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_tfds_sets_are_read_back_exactly(tfds_dir, name):
    directory, written = tfds_dir
    messages = []
    loaded = data.load(name, SHAPES[name], data_dir=directory, progress=messages.append)
    for split, images, labels in (
        ("train", loaded.train_images, loaded.train_labels),
        ("test", loaded.test_images, loaded.test_labels),
    ):
        assert sorted(labels) == list(range(len(labels))) and labels.dtype == np.int32
        np.testing.assert_array_equal(by_label(images, labels), written[name][split])
    assert loaded.num_classes == 10 and loaded.description.startswith(f"{name} (TFDS 3.0.")
    assert messages == [f"{name} train: 10 of 10 images read", f"{name} test: 5 of 5 images read"]
    limited = data.load(name, SHAPES[name], data_dir=str(directory), train_limit=4)
    np.testing.assert_array_equal(limited.train_images, loaded.train_images[:4])
    assert limited.description.endswith("; first 4 of 10 train images)")


def test_mnist_gets_a_black_margin_and_three_channels(tfds_dir, monkeypatch):
    directory, written = tfds_dir
    monkeypatch.setenv("TFDS_DATA_DIR", str(directory))
    mnist = data.load("mnist", (32, 32, 3))
    assert "28x28x1 padded with black to 32x32x3, gray in each channel" in mnist.description
    images = by_label(mnist.train_images, mnist.train_labels)
    for channel in range(3):
        np.testing.assert_array_equal(
            images[:, 2:30, 2:30, channel], written["mnist"]["train"][..., 0]
        )
    # nothing but black around it
    assert images.sum() == 3 * written["mnist"]["train"].sum(dtype=np.int64)
    assert "enlarged to 64x64x1" in data.load("mnist", (64, 64, 1)).description


def test_cifar10_becomes_small_and_grey(tfds_dir):
    directory, written = tfds_dir
    cifar10 = data.load("cifar10", (32, 32, 1), data_dir=directory)
    red, green, blue = np.moveaxis(written["cifar10"]["test"].astype(float), -1, 0)
    gray = by_label(cifar10.test_images, cifar10.test_labels)[..., 0]
    assert np.abs(gray - (0.299 * red + 0.587 * green + 0.114 * blue)).max() < 0.5 + 1e-9
    small = data.load("cifar10", (28, 28, 1), data_dir=directory)
    assert small.train_images.shape == (10, 28, 28, 1)
    assert "32x32x3 resized to 28x28x1, colors to their luma" in small.description


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_missing_data_costs_one_sentence_at_once(tmp_path, name):
    start = time.monotonic()
    with pytest.raises(data.DataError) as caught:
        data.load(name, SHAPES[name], data_dir=tmp_path / "with space")
    assert time.monotonic() - start < 1
    message = str(caught.value)
    assert f"{tmp_path}/with space/{name}/3.0." in message and "*.array_record*" in message
    assert f"`python -m dd_jax.data {name} --data_dir '{tmp_path}/with space'`" in message
    assert (
        message.endswith("--config.data.name=digits, which needs no download")
        and "\n" not in message
    )


def test_other_formats_and_broken_files_cost_one_sentence(tmp_path):
    folder = tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "mnist-train.tfrecord-00000-of-00001").touch()
    with pytest.raises(
        data.DataError,
        match="another file format.*python -m dd_jax.data mnist --data_dir OTHER_DIR",
    ):
        data.load("mnist", (28, 28, 1), data_dir=tmp_path)
    for split in ("train", "test"):
        (folder / f"mnist-{split}.array_record-00000-of-00001").touch()
    with pytest.raises(data.DataError, match="cannot be read.*delete that directory"):
        data.load("mnist", (28, 28, 1), data_dir=tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("svhn", (28, 28, 1)), "'svhn'.*digits, mnist, cifar10"),
        (("digits", (28, 28)), "image_shape"),
        (("digits", (28, 28, 2)), "image_shape"),
        (("digits", (0, 28, 1)), "image_shape"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.load(*arguments)
    with pytest.raises(ValueError, match="test_limit must be a positive"):
        data.load("digits", (28, 28, 1), test_limit=0)


def tar_gz(path, contents):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def lines(words, count):
    """Names of classes as in CIFAR's archives, with an empty line at the end."""
    return "".join(f"{words}{i}\n" for i in range(count)).encode() + b"\n"


def moved(monkeypatch, name, url):
    """Lets a data set be downloaded from another address."""
    entry = data.DATA_SETS[name]
    entry = entry._replace(download=entry.download._replace(url=url))
    monkeypatch.setitem(catalog.DATA_SETS, name, entry)


@pytest.fixture
def website(tmp_path, monkeypatch):
    """A local server of the official files, each with few images; MNIST lacks its test labels."""
    for name, header in (
        ("train-images-idx3", 16),
        ("train-labels-idx1", 8),
        ("t10k-images-idx3", 16),
    ):
        content = random_images((3, 28, 28)).tobytes() if header == 16 else bytes([0, 1, 2])
        (tmp_path / f"{name}-ubyte.gz").write_bytes(gzip.compress(bytes(header) + content))
    planes = random_images((12, 3, 32, 32))
    record = lambda row, *labels: bytes(labels) + planes[row].tobytes()
    parts = {f"data_batch_{i + 1}": (2 * i, 2 * i + 1) for i in range(5)} | {"test_batch": (10, 11)}
    cifar10 = {"batches.meta.txt": lines("class", 10)}
    for name, rows in parts.items():
        cifar10[f"{name}.bin"] = b"".join(record(row, row % 10) for row in rows)
    # the coarse label first, then the fine one
    cifar100 = {
        "train.bin": b"".join(record(row, 19 - row, 89 + row) for row in range(10)),
        "test.bin": b"".join(record(row, 0, row) for row in (10, 11)),
        "fine_label_names.txt": lines("fine", 100),
        "coarse_label_names.txt": lines("coarse", 20),
    }
    for folder, file, contents in (
        ("cifar-10-batches-bin", "cifar-10-binary.tar.gz", cifar10),
        ("cifar-100-binary", "cifar-100-binary.tar.gz", cifar100),
    ):
        tar_gz(tmp_path / file, {f"{folder}/{name}": x for name, x in contents.items()})
    images = planes.transpose(2, 3, 1, 0)
    labels = (np.arange(12) % 10 + 1).astype(np.uint8)[:, None]  # 10 stands for the digit 0
    for split, part in (("train", slice(10)), ("test", slice(10, 12))):
        arrays = {"X": images[..., part], "y": labels[part]}
        scipy.io.savemat(tmp_path / f"{split}_32x32.mat", arrays)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        for name in catalog.DOWNLOADS:
            moved(monkeypatch, name, f"http://127.0.0.1:{server.server_port}/")
        yield planes
        server.shutdown()


def test_download_prepares_what_load_reads(website, tmp_path, monkeypatch, capsys):
    cifar10 = data.load("cifar10", (32, 32, 3), data_dir=tmp_path / "tfds", download=True)
    np.testing.assert_array_equal(
        by_label(cifar10.train_images, cifar10.train_labels), website[:10].transpose(0, 2, 3, 1)
    )
    assert sorted(cifar10.test_labels) == [0, 1]
    monkeypatch.setattr(sys, "argv", ["data", "cifar10", "--data_dir", str(tmp_path / "tfds")])
    downloads.main()
    assert f"cifar10 is ready in {tmp_path}/tfds/cifar10/3.0.2" in capsys.readouterr().out
    paths = [tmp_path / file for file in data.DATA_SETS["mnist"].download.files["train"]]
    examples = list(archives.mnist_examples("train", paths))
    assert [(key, example["label"]) for key, example in examples] == [(0, 0), (1, 1), (2, 2)]
    decoded = [np.asarray(PIL.Image.open(io.BytesIO(example["image"]))) for _, example in examples]
    np.testing.assert_array_equal(decoded, random_images((3, 28, 28)))


@pytest.mark.parametrize(
    ("name", "version", "num_classes", "train_labels", "test_labels"),
    [
        ("cifar100", "3.0.2", 100, range(89, 99), [10, 11]),
        ("svhn_cropped", "3.1.0", 10, [1, 2, 3, 4, 5, 6, 7, 8, 9, 0], [1, 2]),
    ],
)
def test_new_sets_are_prepared_and_read_back_exactly(
    website, tmp_path, name, version, num_classes, train_labels, test_labels
):
    import tensorflow_datasets as tfds

    loaded = data.load(name, (32, 32, 3), data_dir=tmp_path / "tfds", download=True)
    assert loaded.description == f"{name} (TFDS {version}, 32x32x3)"
    assert loaded.num_classes == num_classes and data.paper_preprocessing(name) == "none"
    originals = website.transpose(0, 2, 3, 1)
    for images, labels, expected, rows in (
        (loaded.train_images, loaded.train_labels, train_labels, originals[:10]),
        (loaded.test_images, loaded.test_labels, test_labels, originals[10:]),
    ):
        assert sorted(labels) == sorted(expected) and labels.dtype == np.int32
        np.testing.assert_array_equal(
            by_label(images, labels), rows[np.argsort(list(expected), kind="stable")]
        )
    info = tfds.builder_from_directory(tmp_path / "tfds" / name / version).info
    assert info.full_name == f"{name}/{version}"
    assert set(info.splits) == {"train", "test"}
    if name == "cifar100":
        assert info.features["label"].int2str(99) == "fine99"
        assert info.features["coarse_label"].int2str(19) == "coarse19"


@pytest.mark.parametrize("name", catalog.DOWNLOADS)
def test_entries_are_those_of_tfds_and_its_checksums_cover_every_file(name):
    """TFDS refuses a file of another checksum, before anything parses it."""
    builder, entry = downloads._builder_class(name), data.DATA_SETS[name]
    assert (builder.name, str(builder.VERSION)) == (name, entry.version)
    addresses = {entry.download.url + x for files in entry.download.files.values() for x in files}
    assert addresses <= set(builder.url_infos)
    assert set(entry.download.files) == {"train", "test"}


def test_a_file_of_another_checksum_is_refused_before_it_is_parsed(website, tmp_path, monkeypatch):
    builder = downloads._builder_class("svhn_cropped")
    url = data.DATA_SETS["svhn_cropped"].download.url + "train_32x32.mat"
    official = next(info for address, info in builder.url_infos.items() if "train_" in address)
    monkeypatch.setattr(builder, "url_infos", {url: official})
    monkeypatch.setattr(downloads, "_builder_class", lambda name: builder)
    monkeypatch.setattr(scipy.io, "loadmat", lambda *_, **__: pytest.fail("the file was parsed"))
    with pytest.raises(data.DataError, match="could not be downloaded.*NonMatchingChecksumError"):
        data.load("svhn_cropped", (32, 32, 3), data_dir=tmp_path / "tfds", download=True)


def test_every_entry_is_complete():
    assert data.SOURCES == ("digits", "mnist", "cifar10", "cifar100", "svhn_cropped")
    preprocessings = {name: data.paper_preprocessing(name) for name in data.SOURCES}
    used_by_the_paper = {"mnist": "mean_image", "cifar10": "contrast_whiten"}
    assert {k: v for k, v in preprocessings.items() if v != "none"} == used_by_the_paper
    assert set(preprocessings.values()) <= set(data.PREPROCESSINGS)
    with pytest.raises(ValueError, match="'svhn'.*digits, mnist, cifar10, cifar100, svhn_cropped"):
        data.paper_preprocessing("svhn")


def test_failed_downloads_cost_one_sentence(website, tmp_path, monkeypatch):
    with pytest.raises(
        data.DataError, match="mnist could not be downloaded from http://127.*DownloadError"
    ):
        data.load("mnist", (28, 28, 1), data_dir=tmp_path / "tfds", download=True)
    moved(monkeypatch, "mnist", "http://127.0.0.1:1/")
    monkeypatch.setattr(sys, "argv", ["data", "mnist", "--data_dir", str(tmp_path / "tfds")])
    with pytest.raises(SystemExit, match="^error: mnist could not be downloaded.*no network"):
        downloads.main()


@pytest.mark.parametrize("name", ["svhn", "imagenet2012", "CIFAR10", "digits"])
def test_another_set_is_refused_in_one_sentence_and_not_taken_for_cifar10(
    tmp_path, monkeypatch, name
):
    said = f"{name!r} cannot be downloaded: choose one of mnist, cifar10, cifar100, svhn_cropped"
    with pytest.raises(data.DataError, match=f"^{said}"):
        downloads.download(name, tmp_path)
    with pytest.raises(data.DataError, match=f"^{said}"):
        downloads._builder_class(name)
    monkeypatch.setattr(sys, "argv", ["data", name, "--data_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match=rf"^error: {said} \(digits needs no download.*\)$"):
        downloads.main()
    assert not list(tmp_path.iterdir())


# Preprocessing


def test_none_and_mean_image():
    train = np.array([0, 100, 200, 250], np.uint8).reshape(2, 1, 2, 1)
    test = np.array([255, 0], np.uint8).reshape(1, 1, 2, 1)
    none, mean_image = data.fit("none", train), data.fit("mean_image", train)
    np.testing.assert_array_equal(none(test).ravel(), np.float32([1, 0]))
    np.testing.assert_allclose(mean_image(test).ravel(), [155 / 255, -175 / 255], rtol=1e-6)
    assert none(test).dtype == mean_image(test).dtype == np.float32
    assert data.bounds(none) == (0, 1)
    lower, upper = data.bounds(mean_image)
    np.testing.assert_array_equal(lower, mean_image(np.zeros_like(test)))
    np.testing.assert_array_equal(upper, mean_image(np.full_like(test, 255)))
    for attack in ATTACKS:
        for fitted in (none, mean_image):
            run = functools.partial(
                attack, lambda x: x.reshape(len(x), -1), bounds=data.bounds(fitted)
            )
            # The attacks take these bounds.
            jax.eval_shape(run, np.zeros((3, *train.shape[1:]), np.float32))
    for fitted in (none, mean_image):
        back = data.make_to_images(fitted)(fitted(test))
        np.testing.assert_allclose(back, test / 255, atol=1e-6)
    assert "minus the mean training image" in mean_image.description


def test_contrast_whiten_on_two_pixels_by_hand():
    # Around the mean image (100, 100) lie +-(100, -100), of standard deviation 100 sqrt(2), and
    # +-(20, -20), whose 20 sqrt(2) is below 40. Their mean, 60 sqrt(2), makes them +-(60, -60) and
    # +-(30, -30) sqrt(2). Along (1, -1) the eigenvalue is (2 * 60^2 + 4 * 30^2) / 2 = 5400, along
    # (1, 1) it is 0: the gain is sqrt(2700 / 5400).
    train = np.uint8([[200, 0], [0, 200], [120, 80], [80, 120]]).reshape(4, 1, 2, 1)
    fitted = data.fit("contrast_whiten", train)
    np.testing.assert_allclose(fitted.mean_contrast, 60 * np.sqrt(2), rtol=1e-6)
    expected = np.array(
        [
            [60, -60],
            [-60, 60],
            [30 * np.sqrt(2), -30 * np.sqrt(2)],
            [-30 * np.sqrt(2), 30 * np.sqrt(2)],
        ]
    )
    np.testing.assert_allclose(fitted(train).reshape(4, 2), expected / np.sqrt(2) / 255, rtol=1e-5)
    flat = fitted(np.full((1, 1, 2, 1), 77, np.uint8))
    np.testing.assert_allclose(flat, 0, atol=1e-6)
    assert data.bounds(fitted) is None and data.make_to_images(fitted) is None


def test_whitening_floors_the_small_eigenvalues():
    # cnn_cifar.m divides the covariance by 60,000 for 50,000 images, and floors the roots at 10.
    eigenvalues = np.array([0, 25, 144, 400.0])
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    seen_by_cnn_cifar = eigenvalues * 50_000 / 60_000
    gains = np.sqrt(seen_by_cnn_cifar.mean()) / np.maximum(np.sqrt(seen_by_cnn_cifar), 10)
    whitening = preprocessing._whitening((basis * eigenvalues) @ basis.T)
    np.testing.assert_allclose(whitening, (basis * gains) @ basis.T, atol=1e-6)
    np.testing.assert_allclose(gains[2:], np.sqrt(142.25) / np.array([12, 20]))


def test_whitening_whitens_the_training_images_and_keeps_their_energy():
    mixing = 0.8 * np.eye(12) + np.random.default_rng(3).normal(size=(12, 12)) / 10
    train = (
        np.clip((random_images((5000, 12)) - 127.5) @ mixing + 128, 0, 255)
        .astype(np.uint8)
        .reshape(-1, 2, 2, 3)
    )
    inputs = data.fit("contrast_whiten", train)(train).reshape(-1, 12).astype(np.float64) * 255
    second_moment = inputs.T @ inputs / len(inputs)
    # All eigenvalues are above the floor but one: the mean of each image was taken away, so (1,
    # ..., 1) is empty.
    kept = np.eye(12) - 1 / 12
    energy = second_moment.trace() / 11
    np.testing.assert_allclose(second_moment, energy * kept, atol=1e-4 * energy)
    levels, _ = preprocessing._normalized_contrast(
        train, train.mean(axis=0, dtype=np.float64).astype(np.float32)
    )
    levels *= data.fit("contrast_whiten", train).mean_contrast
    np.testing.assert_allclose(energy, (levels**2).sum() / len(levels) / 12, rtol=1e-4)


@pytest.mark.parametrize("name", data.PREPROCESSINGS)
def test_preprocessing_survives_a_file_and_knows_no_test_image(tmp_path, monkeypatch, name):
    monkeypatch.setattr(preprocessing, "IMAGES_PER_CHUNK", 16)  # several chunks
    train, test = random_images((50, 4, 4, 3)), random_images((40, 4, 4, 3), seed=1)
    fitted = data.fit(name, train)
    inputs = fitted(test)
    assert inputs.dtype == np.float32 and fitted(test[:0]).shape == (0, 4, 4, 3)
    np.testing.assert_allclose(
        np.concatenate([fitted(image[None]) for image in test]), inputs, atol=1e-5
    )
    fitted.save(tmp_path / "preprocessing.npz")
    restored = data.Preprocessing.load(tmp_path / "preprocessing.npz")
    np.testing.assert_array_equal(restored(test), inputs)
    assert restored.name == name and [path.name for path in tmp_path.iterdir()] == [
        "preprocessing.npz"
    ]
    monkeypatch.undo()
    np.testing.assert_allclose(data.fit(name, train)(test), inputs, atol=1e-5)


def test_impossible_preprocessing(tmp_path):
    images = random_images((3, 2, 2, 1))
    with pytest.raises(ValueError, match="'zca'.*none, mean_image, contrast_whiten"):
        data.fit("zca", images)
    with pytest.raises(ValueError, match="without training images"):
        data.fit("mean_image", images[:0])
    with pytest.raises(ValueError, match="uint8.*float64"):
        data.fit("none", images / 255)
    with pytest.raises(
        ValueError, match=r"fitted on images of shape \(2, 2, 1\), got images of shape \(1, 2, 1\)"
    ):
        data.fit("mean_image", images)(images[:, :1])
    np.savez(tmp_path / "other.npz", weights=np.ones(3))
    with pytest.raises(ValueError, match="not a file that Preprocessing.save wrote"):
        data.Preprocessing.load(tmp_path / "other.npz")


# Batches


def numbered(count):
    """Images whose pixels tell their row: 2 pixels, (row, -row - 1)."""
    rows = np.arange(count)
    return np.stack([rows, -rows - 1], axis=1).reshape(count, 1, 2, 1).astype(
        np.float32
    ), rows.astype(np.int32)


def test_an_epoch_shows_every_example_once_and_the_next_in_another_order():
    images, labels = numbered(23)
    assert data.steps_per_epoch(23, 5) == 4
    batch_of = functools.partial(data.training_batch, images, labels, batch_size=5)
    steps = [batch_of(seed=3, step=step) for step in range(8)]
    for batch in steps:
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])
        np.testing.assert_array_equal(batch["mask"], np.ones(5, np.float32))
        assert batch["image"].dtype == np.float32 and batch["label"].dtype == np.int32
    first, second = (np.concatenate([batch["label"] for batch in steps[i : i + 4]]) for i in (0, 4))
    assert len(set(first)) == len(set(second)) == 20  # 3 of the 23 sit an epoch out
    assert list(first) != list(second) and list(first) != sorted(first)
    assert list(batch_of(seed=4, step=0)["label"]) != list(steps[0]["label"])
    full = np.concatenate(
        [data.training_batch(images, labels, batch_size=23, seed=0, step=7)["label"]]
    )
    assert sorted(full) == list(range(23))


@pytest.mark.parametrize("flip", [False, True])
def test_a_training_batch_depends_on_seed_and_step_alone(flip):
    images, labels = numbered(40)
    batch_of = functools.partial(
        data.training_batch, images, labels, batch_size=8, seed=1, flip=flip
    )
    in_order = [batch_of(step=step) for step in range(20)]
    for step in (19, 3, 11, 4):
        again = batch_of(step=step)
        for key, value in again.items():
            np.testing.assert_array_equal(value, in_order[step][key])
        again["image"][:] = 0  # a copy: the data are not touched
    np.testing.assert_array_equal(images, numbered(40)[0])


def test_flips_mirror_half_of_the_images():
    images, labels = numbered(1000)
    batch = data.training_batch(images, labels, batch_size=1000, seed=0, step=0, flip=True)
    expected, row = images[batch["label"]], np.arange(1000)
    mirrored = batch["image"][row, 0, 0, 0] != expected[row, 0, 0, 0]
    assert 400 < mirrored.sum() < 600
    np.testing.assert_array_equal(batch["image"][mirrored], expected[mirrored][:, :, ::-1])
    np.testing.assert_array_equal(batch["image"][~mirrored], expected[~mirrored])


def crops(step=0, flip=False, value=-1.0):
    """A batch of 600 images of 3 x 4 distinct pixels, cropped with a margin of 2, and the images."""
    images = np.arange(600 * 12, dtype=np.float32).reshape(600, 3, 4, 1)
    options = dict(batch_size=600, seed=5, step=step, flip=flip)
    batch = data.training_batch(
        images, np.arange(600, dtype=np.int32), crop_padding=2, padding_value=value, **options
    )
    return batch, images


def test_padded_crops_are_every_offset_equally_often():
    batch, images = crops()
    padded = np.pad(images, [(0, 0), (2, 2), (2, 2), (0, 0)], constant_values=-1.0)
    found = np.zeros((5, 5), int)
    for image, label in zip(batch["image"], batch["label"], strict=True):
        offsets = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if np.array_equal(padded[label, top : top + 3, left : left + 4], image)
        ]
        assert len(offsets) == 1
        found[offsets[0]] += 1
    assert found.sum() == 600 and found.min() >= 8 and found.max() <= 45  # 24 each on average


def test_padded_crops_depend_on_seed_and_step_alone_and_leave_order_and_flips_as_they_are():
    for flip in (False, True):
        (batch, images), (again, _) = crops(3, flip), crops(3, flip)
        np.testing.assert_array_equal(batch["image"], again["image"])
        assert not np.array_equal(batch["image"], crops(4, flip)[0]["image"])
        plain = data.training_batch(
            images, np.arange(600, dtype=np.int32), batch_size=600, seed=5, step=3, flip=flip
        )
        np.testing.assert_array_equal(batch["label"], plain["label"])
        assert batch["image"].dtype == np.float32 and batch["image"].shape == plain["image"].shape
    flipped, straight = crops(3, True)[0]["image"], crops(3)[0]["image"]
    is_flipped = np.random.default_rng((2, 5, 3)).random(600) < 0.5
    np.testing.assert_array_equal(flipped[is_flipped], straight[is_flipped][:, :, ::-1])
    np.testing.assert_array_equal(flipped[~is_flipped], straight[~is_flipped])


@pytest.mark.parametrize("name", data.UNFITTED)
def test_padding_inputs_is_padding_pixels_with_black(name):
    images, labels = random_images((4, 5, 5, 3)), np.arange(4, dtype=np.int32)
    preprocess = data.Preprocessing(name)
    options = dict(batch_size=4, seed=0, step=1, crop_padding=3)
    of_pixels = data.training_batch(images, labels, **options)["image"]
    black = data.value_of_black(preprocess)
    of_inputs = data.training_batch(preprocess(images), labels, padding_value=black, **options)
    np.testing.assert_array_equal(of_inputs["image"], preprocess(of_pixels))


def test_padding_is_the_mean_image_where_black_depends_on_the_place():
    images = random_images((20, 2, 2, 1))
    for name in ("mean_image", "contrast_whiten"):
        assert data.value_of_black(data.fit(name, images)) == 0


def test_evaluation_batches_keep_order_and_are_filled_up():
    images, labels = numbered(7)
    labels = labels + 1
    batches = list(data.evaluation_batches(images, labels, 3))
    assert [list(batch["label"]) for batch in batches] == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]
    assert [list(batch["mask"]) for batch in batches] == [[1, 1, 1], [1, 1, 1], [1, 0, 0]]
    for batch in batches:
        assert batch["image"].shape == (3, 1, 2, 1)
        assert (batch["image"].dtype, batch["label"].dtype, batch["mask"].dtype) == (
            np.float32,
            np.int32,
            np.float32,
        )
    np.testing.assert_array_equal(np.concatenate([batch["image"] for batch in batches])[:7], images)
    assert not batches[2]["image"][1:].any()
    assert len(list(data.evaluation_batches(images, labels, 7))) == 1
    assert list(data.evaluation_batches(images[:0], labels[:0], 3)) == []


def test_impossible_batches():
    images, labels = numbered(4)
    with pytest.raises(ValueError, match="batch_size is 5, but there are only 4 training examples"):
        data.training_batch(images, labels, batch_size=5, seed=0, step=0)
    with pytest.raises(ValueError, match="must not be negative"):
        data.training_batch(images, labels, batch_size=2, seed=0, step=-1)
    with pytest.raises(ValueError, match="crop_padding must be .* 0 or more, got -1"):
        data.training_batch(images, labels, batch_size=2, seed=0, step=0, crop_padding=-1)
    with pytest.raises(ValueError, match="4 images and 3 labels"):
        data.training_batch(images, labels[:3], batch_size=2, seed=0, step=0)
    with pytest.raises(ValueError, match="batch_size must be positive"):
        data.evaluation_batches(images, labels, 0)
    with pytest.raises(ValueError, match="batch_size must be positive"):
        data.steps_per_epoch(4, 0)


def test_held_out_images_are_the_last_training_images_and_no_test_image():
    images, labels = random_images((9, 2, 2, 1)), np.arange(9, dtype=np.int32)
    whole = data.DataSet("mine", "mine (4x4)", images[:7], labels[:7], images[7:], labels[7:], 10)
    held = data.hold_out(whole, 3)
    np.testing.assert_array_equal(held.train_images, images[:4])
    np.testing.assert_array_equal(held.test_images, images[4:7])
    assert held.train_labels.tolist() == [0, 1, 2, 3] and held.test_labels.tolist() == [4, 5, 6]
    assert held.num_classes == 10
    said = "mine (4x4; the last 3 of 7 training images in place of the test images)"
    assert held.description == said
    for count in (0, 7):
        with pytest.raises(ValueError, match=f"leave training images; got {count} of 7"):
            data.hold_out(whole, count)
