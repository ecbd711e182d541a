"""From a configuration to a run's examples: the data set, its preprocessing, and its batches."""

from collections.abc import Callable

from ml_collections import ConfigDict

from dd_jax import data, models
from dd_jax.data import Preprocessing
from dd_jax.data.pipeline import InMemory, Streamed
from dd_jax.experiment.configuration import ConfigurationError

Feed = InMemory | Streamed
CAFFE_NETS = ("alexnet",)


def open_inputs(config: ConfigDict, fitted: Preprocessing | None) -> tuple[Feed, Preprocessing]:
    """The examples as the net takes them, and the preprocessing, fitted unless it is given.

    DataError, within a second, where the data is missing; ConfigurationError for a data set of one
    class, and for options that images on disk do not allow.
    """
    is_streamed = config.data.name in data.STREAMED_SOURCES
    feed, preprocessing = (_open_images if is_streamed else _open_in_memory)(config, fitted)
    if feed.num_classes < 2:
        raise ConfigurationError(
            f"There is one class only in {feed.description}; there must be two or more (a folder "
            "needs train/CLASS/*)."
        )
    return feed, preprocessing


def _open_in_memory(
    config: ConfigDict, fitted: Preprocessing | None
) -> tuple[InMemory, Preprocessing]:
    data_set = _load(config, data.load, image_shape=models.input_shape(config.model.name))
    if config.data.validation_images:
        data_set = _hold_out(data_set, config.data.validation_images)
    preprocessing = fitted or data.fit(preprocessing_name(config), data_set.train_images)
    inputs = preprocessing(data_set.train_images), preprocessing(data_set.test_images)
    options = dict(flip=config.data.flip, crop_padding=config.data.crop_padding)
    if config.data.crop_padding:
        options["padding_value"] = data.value_of_black(preprocessing)
    return InMemory(data_set, *inputs, **options), preprocessing


def _hold_out(data_set: data.DataSet, count: int) -> data.DataSet:
    if count >= len(data_set.train_labels):
        raise ConfigurationError(
            f"data.validation_images is {count}; it must be below the number of training images, "
            f"{len(data_set.train_labels)}."
        )
    return data.hold_out(data_set, count)


def _open_images(
    config: ConfigDict, fitted: Preprocessing | None
) -> tuple[Streamed, Preprocessing]:
    images = _load(config, data.open_images)
    for field, value in (
        ("reference.center_on", config.reference.center_on),
        ("data.crop_padding", config.data.crop_padding),
        ("data.validation_images", config.data.validation_images),
    ):
        if value:
            raise ConfigurationError(
                f"{field} is {value}, which needs images in memory; it must be 0 for images that "
                "are streamed."
            )
    name = preprocessing_name(config)
    if name not in data.UNFITTED:
        raise ConfigurationError(
            f"data.preprocessing is {name!r}; of images that are streamed it can be "
            f"{', '.join(data.UNFITTED)}."
        )
    preprocessing = fitted or Preprocessing(name)
    crop_size = models.input_shape(config.model.name)[0]
    options = dict(flip=config.data.flip, num_workers=config.data.num_workers)
    return Streamed(images, preprocessing, crop_size, **options), preprocessing


def _load(config: ConfigDict, load: Callable, **options: object):
    return load(
        config.data.name,
        data_dir=config.data.dir or None,
        train_limit=config.data.train_limit or None,
        test_limit=config.data.test_limit or None,
        **options,
    )


def preprocessing_name(config: ConfigDict) -> str:
    """The preprocessing that a configuration stands for, "paper" resolved by data set and net."""
    name = config.data.preprocessing
    if name != "paper":
        return name
    if config.data.name in data.STREAMED_SOURCES:
        return "caffe" if config.model.name in CAFFE_NETS else "torchvision"
    return data.paper_preprocessing(config.data.name)
