"""Data sets of image files. Their batches are the same for any number of workers and of processes."""

import argparse
import dataclasses
import io
import multiprocessing
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import PIL.Image
import pytest

from dd_jax import data
from dd_jax.data import image_batches, image_files, workers
from dd_jax.data.preprocessing import Preprocessing

# What the package itself says of wrong arguments.
pytestmark = pytest.mark.usefixtures("unchecked")

ROOT = pathlib.Path(__file__).parent.parent
SAMPLES = "IMAGENET_SAMPLES"  # A directory of JPEG files of ImageNet, named by synset.
SIZES = {"crop_size": 6, "short_side": 8}
DAMAGED = "broken.jpg"


def picture(path, number):
    """Writes an image whose red is the number of the image and whose green the column."""
    pixels = np.full((8, 10, 3), number, np.uint8)
    pixels[..., 1] = 20 * np.arange(10)
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(path, "PNG")  # Whatever its name.


def numbers(batch):
    """The numbers of the images of a batch; -1 for an empty row."""
    return [
        int(image[0, 0, 0]) if mask else -1
        for image, mask in zip(batch["image"], batch["mask"], strict=True)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes, 13 training images (one of them damaged) and 7 validation images."""
    root = tmp_path_factory.mktemp("images")
    for number in range(12):
        picture(root / "train" / f"n{number % 3}" / f"{number:02}.JPEG", 10 + number)
    (root / "train" / "n1" / DAMAGED).write_text("not an image")
    (root / "train" / "n1" / "boxes.xml").write_text("passed over")
    for number in range(7):
        picture(root / "val" / f"n{number % 3}" / "images" / f"{number}.png", 100 + number)
    return root


@pytest.fixture(scope="module")
def files(folder):
    return data.open_images("image_folder", data_dir=folder)


def training(files, **options):
    options = {"batch_size": 4, "num_steps": 9, "seed": 3, **SIZES} | options
    return data.training_stream(files.train, **options)


def assert_equal(batch, other):
    assert batch.keys() == other.keys()
    for key, value in batch.items():
        assert value.dtype == other[key].dtype
        np.testing.assert_array_equal(value, other[key])


# Data sets


def test_a_folder_with_a_training_and_a_validation_part(files, folder):
    assert (files.num_classes, len(files.train), len(files.test)) == (3, 13, 7)
    assert (
        files.description == f"image_folder (3 classes in {folder}; 13 train images, 7 test images)"
    )
    for part, name in ((files.train, "train"), (files.test, "val")):
        read = [part[row] for row in range(len(part))]
        assert sorted(image.name for image in read) == sorted(
            str(path.relative_to(folder / name))
            for path in (folder / name).rglob("*.*")
            if path.suffix != ".xml"
        )
        for image in read:
            assert image.encoded == (
                folder / name / image.name
            ).read_bytes() and image.label == int(image.name[1])
        checksums = [zlib.crc32(image.name.encode()) for image in read]
        assert checksums == sorted(checksums)


def test_limits_take_the_first_images(files, folder):
    few = data.open_images("image_folder", data_dir=str(folder), train_limit=4, test_limit=99)
    assert (len(few.train), len(few.test), few.num_classes) == (4, 7, 3)
    assert [few.train[row].name for row in range(4)] == [files.train[row].name for row in range(4)]
    assert "first 4 of 13 train images, 7 test images" in few.description


def test_a_folder_of_classes_alone_is_divided(tmp_path):
    for number in range(23):
        picture(tmp_path / f"class {number % 2}" / f"{number:02}.jpg", number)
    files = data.open_images("image_folder", data_dir=tmp_path)
    tested, trained = (
        [part[row].name for row in range(len(part))] for part in (files.test, files.train)
    )
    # Twelve images of class 0, then eleven of class 1: the 1st, 11th and 21st.
    assert sorted(tested) == ["class 0/00.jpg", "class 0/20.jpg", "class 1/17.jpg"]
    assert len(trained) == 20 and not set(tested) & set(trained)
    assert all(files.train[row].label == int(name[6]) for row, name in enumerate(trained))


def test_a_folder_that_will_not_do(tmp_path):
    opened = lambda folder: data.open_images("image_folder", data_dir=folder)
    with pytest.raises(data.DataError, match="is not there"):
        opened(tmp_path / "absent")
    with pytest.raises(data.DataError, match="needs --data_dir"):
        opened(None)
    with pytest.raises(
        data.DataError,
        match="has no images to spare for testing: it must hold a directory for each",
    ):
        opened(tmp_path)
    picture(tmp_path / "train" / "a" / "1.png", 1)
    with pytest.raises(data.DataError, match="but none named val or validation"):
        opened(tmp_path)
    picture(tmp_path / "validation" / "b" / "1.png", 1)
    with pytest.raises(data.DataError, match="has classes that .*train has not: b"):
        opened(tmp_path)
    (tmp_path / "validation" / "b").rename(tmp_path / "validation" / "a")
    assert len(opened(tmp_path).test) == 1
    (tmp_path / "validation" / "a" / "1.png").unlink()
    with pytest.raises(data.DataError, match="validation has no images: "):
        opened(tmp_path)
    with pytest.raises(ValueError, match="choose one of imagenet2012, image_folder"):
        data.open_images("imagenet")
    with pytest.raises(ValueError, match="test_limit must be a positive number"):
        data.open_images("image_folder", data_dir=tmp_path, test_limit=0)


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """ImageNet as TFDS prepares it, of eight training and three validation images."""
    import tensorflow_datasets as tfds

    def examples(split, count):
        for number in range(count):
            file = io.BytesIO()
            PIL.Image.fromarray(np.full((9, 9, 3), number, np.uint8)).save(file, "PNG")
            name = f"{split}_{number}.JPEG"
            yield name, {"image": file.getvalue(), "label": number + 500, "file_name": name}

    with tfds.core.registered.skip_registration():

        class Imagenet2012(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("5.1.0")

            def _info(self):
                label = tfds.features.ClassLabel(num_classes=1000)
                features = {
                    "image": tfds.features.Image(),
                    "label": label,
                    "file_name": tfds.features.Text(),
                }
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, _):
                return {"train": examples("train", 8), "validation": examples("validation", 3)}

            def _generate_examples(self):
                raise NotImplementedError

    directory = tmp_path_factory.mktemp("tfds")
    Imagenet2012(data_dir=directory, file_format="array_record").download_and_prepare(
        file_format="array_record"
    )
    return directory


def test_imagenet_as_tfds_prepared_it(tfds_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    files = data.open_images("imagenet2012", train_limit=6)
    assert (
        files.description == "imagenet2012 (TFDS 5.1.0; first 6 of 8 train images, 3 test images)"
    )
    assert files.num_classes == 1000
    # A worker opens the files for itself.
    sent = pickle.loads(pickle.dumps(files.test))
    monkeypatch.setattr(image_files, "_open_records", {})
    read = [sent[row] for row in range(len(sent))]
    assert sorted(image.name for image in read) == [
        f"validation_{number}.JPEG" for number in range(3)
    ]
    for image in read:
        assert image.label == 500 + int(image.name[11])
        assert np.asarray(PIL.Image.open(io.BytesIO(image.encoded)))[0, 0, 0] == image.label - 500
    (batch,) = data.evaluation_stream(files.test, batch_size=4, **SIZES)
    assert list(batch["label"][:3] - 500) == numbers(batch)[:3] and list(batch["mask"]) == [
        1,
        1,
        1,
        0,
    ]
    with pytest.raises(image_files.UnreadableError):
        files.test[99]


def test_imagenet_that_is_not_there(tmp_path, tfds_dir):
    with pytest.raises(
        data.DataError,
        match=r"5.1.0 has no imagenet2012-train.array_record\* .* image-net.org .*folder",
    ):
        data.open_images("imagenet2012", data_dir=tmp_path)
    copied = tmp_path / "imagenet2012" / "5.1.0"
    copied.mkdir(parents=True)
    (copied / "dataset_info.json").write_text("{}")
    with pytest.raises(data.DataError, match="5.1.0 lacks imagenet2012-train"):
        data.open_images("imagenet2012", data_dir=tmp_path)
    for split in ("train", "validation"):
        (copied / f"imagenet2012-{split}.array_record-00000-of-00001").write_bytes(b"nonsense")
    with pytest.raises(data.DataError, match="cannot be read"):
        data.open_images("imagenet2012", data_dir=tmp_path)


# Batches


def test_an_epoch_takes_every_image_at_most_once_and_labels_stay_with_them(files):
    stream, seen = training(files, crop_size=8), []
    for step in range(3):  # 12 of 13 images.
        batch = stream(step)
        assert batch["image"].shape == (4, 8, 8, 3) and batch["image"].dtype == np.uint8
        assert (batch["label"].dtype, batch["mask"].dtype) == (np.int32, np.float32)
        for number, label, mask in zip(numbers(batch), batch["label"], batch["mask"], strict=True):
            assert label == ((number - 10) % 3 if mask else 0)
        seen += numbers(batch)
    assert len(set(seen)) == 12 and set(seen) <= {-1, *range(10, 22)}
    later = [number for step in range(3, 6) for number in numbers(stream(step))]
    assert len(set(later)) == 12 and later != seen


def test_a_batch_depends_on_the_seed_and_its_number_alone(files):
    in_order = list(training(files))
    assert len(in_order) == len(training(files)) == 9
    stream = training(files)
    for step in (8, 2, 5):
        assert_equal(stream(step), in_order[step])
    other = list(training(files, seed=4))
    assert any(numbers(batch) != numbers(same) for batch, same in zip(other, in_order, strict=True))
    # The same image is cropped in another way in another epoch, and mirrored or not.
    crops = {bytes(image[0, :, 1]) for batch in in_order for _, image in by_number(batch)}
    assert len(crops) > 6
    upright = [batch["image"] for batch in training(files, flip=False)]
    assert all(
        (np.diff(image[0, :, 1].astype(int)) > 0).all()
        for batch in upright
        for image in batch
        if image.any()
    )


def test_crops_belong_to_the_image_and_not_to_its_place(files):
    whole = {
        number: image
        for batch in training(files, num_steps=3)
        for number, image in by_number(batch)
    }
    others = {
        number: image
        for batch in training(files, num_steps=2, batch_size=6)
        for number, image in by_number(batch)
    }
    common = set(whole) & set(others)
    assert len(common) > 9
    for number in common:
        np.testing.assert_array_equal(whole[number], others[number])


def by_number(batch):
    return [
        (number, image)
        for number, image in zip(numbers(batch), batch["image"], strict=True)
        if number >= 0
    ]


@pytest.mark.parametrize("num_shards", [2, 4])
def test_processes_share_the_same_global_batches(files, num_shards):
    preprocessing = Preprocessing("torchvision")
    for make in (
        training,
        lambda files, **options: data.evaluation_stream(
            files.test, batch_size=4, **SIZES, **options
        ),
    ):
        shards = [
            make(files, preprocessing=preprocessing, shard_index=i, num_shards=num_shards)
            for i in range(num_shards)
        ]
        whole = list(make(files, preprocessing=preprocessing))
        assert {len(shard) for shard in shards} == {len(whole)}
        for batch, *parts in zip(whole, *shards, strict=True):
            assert_equal(
                batch, {key: np.concatenate([part[key] for part in parts]) for key in batch}
            )


def test_each_process_reads_its_own_images_only(files):
    rows_read = []

    class Recorded:
        def __len__(self):
            return len(files.train)

        def __getitem__(self, row):
            rows_read.append(row)
            return files.train[row]

    whole = image_batches.epoch_order(13, 3, 0)[:4].tolist()
    data.training_stream(
        Recorded(), batch_size=4, num_steps=9, seed=3, shard_index=1, num_shards=2, **SIZES
    )(0)
    assert rows_read == whole[2:]


def test_evaluation_takes_all_images_in_order_and_fills_up_the_last_batch(files):
    expected = [files.test[row] for row in range(7)]
    for batch_size, count in ((3, 3), (7, 1), (10, 1)):
        stream = data.evaluation_stream(files.test, batch_size=batch_size, **SIZES)
        batches = list(stream)
        assert len(batches) == len(stream) == count and {
            batch["image"].shape[0] for batch in batches
        } == {batch_size}
        joined = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
        assert list(joined["mask"]) == [1] * 7 + [0] * (count * batch_size - 7)
        assert (
            list(joined["label"][:7]) == [image.label for image in expected]
            and not joined["image"][7:].any()
        )
        # The center: columns 2 to 7 of 10.
        for image, pixels in zip(expected, joined["image"], strict=False):
            assert pixels[0, 0, 0] == 100 + int(image.name.split("/")[-1][0])
            np.testing.assert_array_equal(pixels[0, :, 1], 20 * np.arange(2, 8))


def test_inputs_are_preprocessed_and_empty_places_stay_zeros(files):
    plain = data.evaluation_stream(files.test, batch_size=10, **SIZES)(0)
    for name in data.UNFITTED:
        batch = data.evaluation_stream(
            files.test, batch_size=10, preprocessing=Preprocessing(name), **SIZES
        )(0)
        np.testing.assert_array_equal(batch["image"][:7], Preprocessing(name)(plain["image"][:7]))
        assert batch["image"].dtype == np.float32 and not batch["image"][7:].any()


def test_damaged_images_leave_their_place_empty_and_are_named(files, tmp_path):
    stream = training(files, num_steps=30)
    batches = list(stream)
    (name,) = stream.failures
    assert name == f"n1/{DAMAGED}" and "not an image" in stream.failures[name]
    empty = [batch for batch in batches if not batch["mask"].all()]
    assert 0 < len(empty) <= 10  # Once in an epoch of 3 steps, unless it is left over.
    for batch in empty:
        assert sum(batch["mask"]) == 3 and not batch["image"][batch["mask"] == 0].any()
    # The other images are what they would be without it.
    mended = dataclasses.replace(files.train, folder=str(tmp_path))
    for row in range(13):
        image = files.train[row]
        path = tmp_path / image.name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(
            image.encoded if image.name != name else files.train[(row + 1) % 13].encoded
        )
    for batch, other in zip(
        batches, training(files._replace(train=mended), num_steps=30), strict=True
    ):
        np.testing.assert_array_equal(
            batch["image"][batch["mask"] > 0], other["image"][batch["mask"] > 0]
        )
        assert other["mask"].all()


def test_an_image_that_vanished_is_like_a_damaged_one(files, tmp_path):
    stream = training(
        files._replace(train=dataclasses.replace(files.train, folder=str(tmp_path))), num_steps=9
    )
    with pytest.raises(
        data.DataError,
        match="none of the first 12 images could be decoded .*No such file.* JPEG, PNG",
    ):
        list(stream)
    assert len(stream.failures) == 12


def test_arguments_that_do_not_fit_are_refused(files):
    with pytest.raises(ValueError, match="multiple of the number of processes, got 4 for 3"):
        training(files, num_shards=3)
    with pytest.raises(ValueError, match="between 0 and 1, got 2"):
        training(files, num_shards=2, shard_index=2)
    with pytest.raises(ValueError, match="crop_size must be between 1 and short_side"):
        training(files, crop_size=9)
    with pytest.raises(ValueError, match="choose one of bilinear, bicubic"):
        training(files, interpolation="lanczos")
    with pytest.raises(ValueError, match="only 13 training examples"):
        training(files, batch_size=14)
    with pytest.raises(ValueError, match="must not be negative"):
        training(files, seed=-1)
    with pytest.raises(ValueError, match="num_workers must not be negative"):
        training(files, num_workers=-1)
    with pytest.raises(ValueError, match="positive multiple"):
        data.evaluation_stream(files.test, batch_size=0, **SIZES)
    with pytest.raises(IndexError, match="numbered 0 to 8"):
        training(files)(9)


def test_the_pace_tells_who_waits_for_whom(files):
    stream = training(files)
    list(map(stream, range(6)))
    starved = stream.pace()
    assert starved.waiting > 0.8
    assert 0.5 < starved.images_per_second / starved.pipeline_images_per_second <= 1
    stream(6)
    time.sleep(0.5)
    fed = stream.pace()
    assert 3 / 2 < fed.images_per_second < 4 / 0.5 and fed.waiting < 0.5
    assert fed.pipeline_images_per_second > 2 * fed.images_per_second
    assert stream.pace().images_per_second == 0


# Workers


class Spying:
    """Images that fail with a message that says what the worker has loaded."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        if row != 0:
            return self.images[row]
        bridge = sys.modules.get("jax._src.xla_bridge")
        started = bridge is not None and bridge.backends_are_initialized()
        raise image_files.UnreadableError("spy", f"process {os.getpid()}, XLA started: {started}")


def test_workers_make_the_same_batches_wherever_a_run_goes_on(files):
    spying = files._replace(train=Spying(files.train))
    options = {"preprocessing": Preprocessing("caffe"), "num_steps": 12}
    here, elsewhere = training(spying, **options), training(spying, **options, num_workers=2)
    expected = list(here)
    with elsewhere as stream:
        for step in (5, 6, 7, 8, 9, 10, 11):  # Resumed at 5.
            assert_equal(stream(step), expected[step])
        assert 0 < stream.pace().waiting <= 1
        for step in (0, 1, 2, 3):
            assert_equal(stream(step), expected[step])
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        assert elsewhere.failures.keys() <= here.failures.keys() == {"spy", f"n1/{DAMAGED}"}
        assert "XLA started: False" in elsewhere.failures["spy"]
        assert f"process {os.getpid()}," in here.failures["spy"]
        assert f"process {os.getpid()}," not in elsewhere.failures["spy"]
        for worker in workers:
            worker.kill()
        with pytest.raises(data.DataError, match="an input worker died"):
            for step in range(4, 12):
                stream(step)
    assert not multiprocessing.active_children()


def test_too_little_shared_memory_is_said_and_not_died_of(files, monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "SHARED_MEMORY", str(tmp_path))
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: argparse.Namespace(free=3455))
    with pytest.raises(
        data.DataError, match="2 input workers need 0 MB of .* smaller num_workers or batch_size"
    ):
        # 2 workers, 4 batches of 4 images of 6 x 6 x 3 each: 3456 bytes.
        training(files, num_workers=2)(0)
    assert not multiprocessing.active_children()


PROGRAM = """
import multiprocessing, os, signal, sys
from dd_jax import data

if __name__ == "__main__":
    files = data.open_images("image_folder", data_dir=sys.argv[1])
    options = dict(crop_size=6, short_side=8, batch_size=2, num_steps=10**6, seed=0, num_workers=2)
    stream = data.training_stream(files.train, **options)
    stream(0), stream(1)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/stat").exists(), reason="needs /proc to see whether a process runs"
)
def test_workers_end_with_a_killed_program(folder, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, program, folder],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while (alive := [pid for pid in workers if runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive


def runs(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_images_of_imagenet(tmp_path):
    if not os.environ.get(SAMPLES):
        pytest.skip(f"${SAMPLES} does not name a directory of ImageNet's JPEG files")
    paths = sorted(pathlib.Path(os.environ[SAMPLES]).rglob("*.jp*g"))
    for path in paths:
        (tmp_path / path.stem).mkdir()
        (tmp_path / path.stem / path.name).symlink_to(path)
    files = data.open_images("image_folder", data_dir=tmp_path)
    assert (files.num_classes, len(files.train) + len(files.test)) == (len(paths), len(paths))
    options = {"crop_size": 224, "batch_size": 8, "preprocessing": Preprocessing("torchvision")}
    stream = data.training_stream(files.train, num_steps=3, seed=0, **options)
    for batch in stream:
        assert (
            batch["mask"].all()
            and batch["image"].shape == (8, 224, 224, 3)
            and abs(batch["image"].mean()) < 1.5
        )
    assert not stream.failures
