"""The examples of a run, in memory and from image files. A run on image files, one of them corrupt,
is stopped by SIGTERM on four devices, resumed on one device, and measured.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from dd_jax import data, parallel
from dd_jax.data import pipeline
from dd_jax.experiment import build, configuration, measuring

ROOT = pathlib.Path(__file__).parent.parent
NUM_CLASSES, PER_CLASS = 3, 7
OVERRIDES = (
    "data.name=image_folder",
    "data.preprocessing=torchvision",
    "data.flip=True",
    "data.num_workers=0",
    "model.name=convnet",
    "reference.num_epochs=1",
    "reference.batch_size=5",
    "reference.max_gradient_norm=1",
    "fine_tuning.num_epochs=2",
    "fine_tuning.batch_size=5",
    "fine_tuning.accumulation_steps=2",
    "fine_tuning.max_gradient_norm=1",
    "defense.num_steps=2",
    "defense.num_candidates=2",
    "defense.class_chunk_size=1",
    "evaluation.batch_size=4",
    "evaluation.num_steps=3",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Noisy images, each class in one color; the last image of class b is truncated."""
    random, root = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for split, count in (("train", PER_CLASS), ("val", 2)):
        for label in range(NUM_CLASSES):
            directory = root / split / "abc"[label]
            directory.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 120, (40, 48, 3)).astype(np.uint8)
                pixels[..., label] += 120
                Image.fromarray(pixels).save(directory / f"{i}.png")
    cut = root / "train/b/6.png"
    cut.write_bytes(cut.read_bytes()[:200])
    return root


def built(folder, workdir, *more):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        overrides = [f"--config.{x}" for x in (*OVERRIDES, f"data.dir={folder}", *more)]
        config = configuration.read(str(ROOT / "configs/default.py"), overrides)
        return build.build_run(config, workdir)


def test_image_files_feed_a_run_as_arrays_do(folder, tmp_path):
    parts = built(folder, tmp_path)
    assert isinstance(parts.feed, pipeline.Streamed) and (
        parts.feed.num_train,
        parts.feed.num_classes,
    ) == (21, 3)
    assert "21 train images, 6 test images" in parts.feed.description
    with parts.feed.training(batch_size=5, num_steps=4, seed=0) as batch_of_step:
        batches = [batch_of_step(step) for step in range(4)]
        failures = list(batch_of_step.failures)
    assert {batch["image"].shape for batch in batches} == {(5, 32, 32, 3)} and batches[0][
        "image"
    ].dtype == np.float32
    assert all("b/6.png" in name for name in failures)
    examples = parts.feed.test_examples()
    assert (examples.count, examples.shape) == (
        6,
        (32, 32, 3),
    ) and examples.limits == pytest.approx((-2.1179, 2.64), abs=1e-4)
    masks = [batch["mask"].tolist() for batch in examples.batches(5, 4)]
    assert masks == [[1, 1, 1, 1], [1, 0, 0, 0]]
    state = parallel.replicate(parts.stages["reference"].make_state())
    found = measuring.measure_state(parts.evaluator, state, limit=5, quiet=True)
    assert found["num_examples"] == 5 and found["rho_l2"] > 0


def test_test_images_that_cannot_be_decoded_are_left_out_and_named(folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "images")
    (copy / "val/a/1.png").write_bytes(b"no image")
    parts = built(copy, tmp_path / "run")
    masks = [batch["mask"].tolist() for batch in parts.feed.test_examples().batches(6, 4)]
    assert sum(map(sum, masks)) == 5
    said = capsys.readouterr().err
    assert (
        "1 test images cannot be decoded and are left out of the figures: " in said
        and "a/1.png (" in said
    )
    many = pipeline.left_out({f"{i}.jpg": "cut short" for i in range(7)})
    assert many.startswith("7 test images") and many.endswith("4.jpg (cut short) and 2 more")


def test_a_folder_of_one_class_is_refused(folder, tmp_path):
    (tmp_path / "images/train").mkdir(parents=True)
    for split in ("train", "val"):
        shutil.copytree(folder / split / "a", tmp_path / "images" / split / "a")
    with pytest.raises(
        configuration.ConfigurationError,
        match="There is one class only in .*; there must be two or more",
    ):
        built(tmp_path / "images", tmp_path / "run")


def test_images_in_memory_are_cropped_with_their_own_value_of_black():
    digits = data.load("digits", (8, 8, 1), train_limit=30, test_limit=3)
    inputs, labels = digits.train_images / np.float32(255), digits.train_labels
    options = dict(batch_size=10, seed=4)
    batches = {}
    for padding, black in ((0, 0.0), (2, 0.0), (2, 0.75)):
        feed = pipeline.InMemory(digits, inputs, digits.test_images, False, padding, black)
        with feed.training(num_steps=3, **options) as batch_of_step:
            batches[padding, black] = batch_of_step(2)["image"]
        expected = data.training_batch(
            inputs, labels, step=2, crop_padding=padding, padding_value=black, **options
        )
        np.testing.assert_array_equal(batches[padding, black], expected["image"])
    assert not np.array_equal(batches[0, 0], batches[2, 0])
    assert not np.array_equal(batches[2, 0], batches[2, 0.75])


def command(folder, workdir, num_devices, *more):
    arguments = [
        sys.executable,
        "train.py",
        "--config",
        "configs/default.py",
        "--workdir",
        str(workdir),
    ]
    arguments += ["--data_dir", str(folder), *(f"--config.{x}" for x in (*OVERRIDES, *more))]
    flags = f"--xla_force_host_platform_device_count={num_devices}"
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_asked_to_end_on_four_devices_goes_on_on_one(folder, tmp_path):
    long = "fine_tuning.num_epochs=2000"
    first = command(folder, tmp_path / "run", 4, long)
    journal, patience = tmp_path / "run/metrics.jsonl", time.monotonic() + 300
    while not (journal.exists() and '"stage": "defended"' in journal.read_text()):
        assert first.poll() is None and time.monotonic() < patience, first.communicate()[1]
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=120)
    assert first.returncode == 143 and "is saved. Rerun the command to resume." in said, said[
        -2000:
    ]
    saved = max(
        int(path.name)
        for path in (tmp_path / "run/checkpoints/defended").iterdir()
        if path.name.isdigit()
    )
    assert saved % 50 or saved >= 50
    again = command(folder, tmp_path / "run", 1, long)
    while (
        f'"step": {(saved // 50 + 1) * 50}'
        not in journal.read_text().split('"stage": "defended"')[-1]
    ):
        assert again.poll() is None and time.monotonic() < patience, again.communicate()[1]
        time.sleep(0.1)
    again.send_signal(signal.SIGTERM)
    assert again.wait(timeout=120) == 143
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    steps = [line["step"] for line in lines if line["stage"] == "defended" and "loss" in line]
    assert steps == sorted(set(steps)) and all(
        np.isfinite(line["loss"]) for line in lines if "loss" in line
    )
    assert lines[-1]["input"]["images_per_second"] > 0 and lines[-1]["input"]["failures"] == 1


WANT_ALL_IMAGES_FIRST = {
    "data.preprocessing=mean_image": "of images that are streamed it can be none, caffe, torchv",
    "reference.center_on=20": "reference.center_on is 20, which needs images in memory",
    "data.crop_padding=4": "data.crop_padding is 4, which needs images in memory",
    "data.validation_images=1": "data.validation_images is 1, which needs images in memory",
}


@pytest.mark.parametrize("override, said", WANT_ALL_IMAGES_FIRST.items())
def test_what_wants_all_images_first_is_refused(override, said, folder, tmp_path):
    with pytest.raises(configuration.ConfigurationError, match=said):
        built(folder, tmp_path, override)
    assert not any(tmp_path.iterdir())
