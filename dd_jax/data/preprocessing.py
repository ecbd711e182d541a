"""The paper's input spaces: from uint8 pixels to the float32 inputs of the network.

The size of a perturbation and rho have a meaning only together with the space in which they are
measured. A run therefore saves its `Preprocessing` and uses the saved one in later measurements.
Everything is fitted on training images alone.
"""

import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from dd_jax.data.datasets import Images

Inputs = Float32[np.ndarray, "_ _ _ _"]

DESCRIPTIONS = {
    "none": "pixels as they are",
    "mean_image": "minus the mean training image",
    "contrast_whiten": "minus the mean training image, contrast-normalized per image, ZCA-whitened "
    "as in cnn_cifar.m",
    "caffe": "BGR, minus Caffe's mean ImageNet color",
    "torchvision": "RGB, minus torchvision's mean ImageNet color, divided by its standard "
    "deviations",
}
PREPROCESSINGS = tuple(DESCRIPTIONS)
# Gray levels to a unit of the input. ||perturbation||_2 in the input space then equals the paper's
# l_2.
PIXEL_SCALE = np.float32(255)
# cnn_cifar.m: an image of a lower standard deviation (gray levels) counts as flat, and its noise is
# not amplified.
LOWEST_CONTRAST = np.float32(40)
# cnn_cifar.m floors the roots of the eigenvalues at 10 gray levels, but of a covariance that it
# divides by all 60,000 images although it sums only the 50,000 for training. With the true
# covariance that is this floor (and no other difference: the scale cancels everywhere else).
EIGENVALUE_ROOT_FLOOR = 10 * np.sqrt(60_000 / 50_000)
# Those with fixed constants: `Preprocessing(name)` is complete, and no training images are needed.
UNFITTED = ("none", "caffe", "torchvision")
# Gray levels, in the order of the net's channels: https://github.com/BVLC/caffe,
# models/bvlc_alexnet (the mean of imagenet_mean.binaryproto over the pixels: blue, green, red), and
# https://docs.pytorch.org/vision, models (red, green, blue; given there for pixels in 0..1).
CAFFE_MEAN = np.array([104.00698793, 116.66876762, 122.67891434], np.float32)
TORCHVISION_MEAN = np.array([0.485, 0.456, 0.406], np.float32) * PIXEL_SCALE
TORCHVISION_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
# Images held as float32 at once, 25 MB of CIFAR-10; or fewer, by the number of values, of larger
# images.
IMAGES_PER_CHUNK = 2_000
VALUES_PER_CHUNK = IMAGES_PER_CHUNK * 32 * 32 * 3


class Preprocessing(NamedTuple):
    """A fitted map from uint8 images to float32 inputs, which can be saved in a file.

    Attributes:
      name: one of `PREPROCESSINGS`.
      mean_image: float32 `(h, w, c)`, the mean training image in gray levels; None for those of
        `UNFITTED`.
      mean_contrast: float32 `()`, the mean over the training images of their standard deviations,
        in gray levels; only for "contrast_whiten".
      whitening: float32 `(h*w*c, h*w*c)`, symmetric; only for "contrast_whiten".
    """

    name: str
    mean_image: np.ndarray | None = None
    mean_contrast: np.ndarray | None = None
    whitening: np.ndarray | None = None

    def __call__(self, images: Images) -> Inputs:
        """Maps uint8 images `(n, h, w, c)`, 0..255, to float32 inputs of the same shape; n may be
        0.

        Raises:
          ValueError: images that are not uint8, that have another shape than those it was fitted
            on, or that have not three channels for "caffe" and "torchvision".
        """
        _check_images(images)
        _check_colors(self.name, images)
        if self.mean_image is not None and images.shape[1:] != self.mean_image.shape:
            raise ValueError(
                f"the preprocessing {self.name!r} was fitted on images of shape "
                f"{self.mean_image.shape}, got images of shape {images.shape[1:]}: fit it on "
                "training images of this shape"
            )
        inputs = np.empty(images.shape, np.float32)
        images_per_chunk = min(
            IMAGES_PER_CHUNK, max(VALUES_PER_CHUNK // max(inputs[:1].size, 1), 1)
        )
        for start in range(0, len(images), images_per_chunk):
            chunk = slice(start, start + images_per_chunk)
            inputs[chunk] = self._levels(images[chunk]) / PIXEL_SCALE
        return inputs

    @property
    def description(self) -> str:
        """One line for a report: the steps of the preprocessing, and the unit of its inputs."""
        unit = "0..255 becomes 0..1" + " before the division" * (self.name == "torchvision")
        return f"{self.name} ({DESCRIPTIONS[self.name]}; {unit})"

    def save(self, path: str | os.PathLike) -> None:
        """Writes an .npz file, completely or not at all: 38 MB for whitened CIFAR-10, a few kB
        otherwise.
        """
        arrays = {key: value for key, value in self._asdict().items() if value is not None}
        path = pathlib.Path(path)
        partial = path.with_name(path.name + ".partial")
        # an open file, because np.savez would append .npz to the name
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        partial.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Preprocessing":
        """Reads a file that `save` wrote. The result maps images to exactly the same inputs.

        Raises:
          FileNotFoundError: no such file.
          ValueError: the file holds something else.
        """
        with np.load(path) as file:
            arrays = dict(file)
        name = str(arrays.pop("name", None))
        if name not in PREPROCESSINGS or set(arrays) - set(cls._fields):
            raise ValueError(
                f"{path} is not a file that Preprocessing.save wrote: it holds {name!r}, "
                f"{sorted(arrays)}"
            )
        return cls(name, **arrays)

    def _levels(self, images: Images) -> Inputs:
        """Everything but the division by 255."""
        if self.name == "none":
            return images.astype(np.float32)
        if self.name == "caffe":
            return _by_color(np.subtract, images[..., ::-1], CAFFE_MEAN)
        if self.name == "torchvision":
            return _by_color(
                np.divide, _by_color(np.subtract, images, TORCHVISION_MEAN), TORCHVISION_DEVIATION
            )
        assert self.mean_image is not None  # Fitted, as the name says.
        if self.name == "mean_image":
            return images - self.mean_image
        levels = _normalized_contrast(images, self.mean_image)[0] * self.mean_contrast
        return (levels @ self.whitening).reshape(images.shape)


def fit(name: str, train_images: Images) -> Preprocessing:
    r"""Fits one of the paper's input spaces on training images.

    - "none": `x / 255`. Nothing is fitted.
    - "caffe" (the paper's ImageNet): `(x - mean) / 255` of the channels in the order blue, green,
      red, with the mean color 104.00698793, 116.66876762, 122.67891434. Nothing is fitted.
    - "torchvision": `(x / 255 - mean) / std`, with the mean .485, .456, .406 and the std .229,
      .224, .225 of red, green and blue. Nothing is fitted. A unit of the input is std times a
      pixel's range here.
    - "mean_image" (the paper's MNIST): `(x - mean) / 255` with the mean training image.
    - "contrast_whiten" (the paper's CIFAR-10), on gray levels and, from the second step on, on an
      image as one vector of d = h*w*c values:

          z_i = x_i - mean image
          z_i = z_i - mean(z_i)                                       of its own d values
          z_i = z_i / max(std(z_i), 40) * mean_j std(z_j)    std: over d - 1
          C   = (1/n) sum_i z_i z_i^T = V diag(lambda) V^T            z is not centered again
          x'_i = V diag(sqrt(mean(lambda)) / max(sqrt(lambda), floor)) V^T z_i / 255

      Whitening keeps the mean energy `trace(C)/d` where no eigenvalue is below the floor. The steps
      and their order are those of MatConvNet's `examples/cifar/cnn_cifar.m`, but for the 255. Its
      floor of 10 belongs to a covariance that is scaled by 50,000/60,000, so that here `floor = 10
      sqrt(6/5)`. One difference remains: its mean of the standard deviations includes the test
      images, this one does not (on CIFAR-10 a factor within 0.02 % of 1).

    Sums over images and the eigenvectors are float64; the arrays that are kept are float32.

    Args:
      name: one of `PREPROCESSINGS`.
      train_images: uint8 `(n, h, w, c)`, 0..255. Flat images (all pixels equal) are mapped to zero
        by "contrast_whiten" unless the mean image tells them apart.

    Raises:
      ValueError: unknown name, images that are not uint8 of rank 4, no images, or a number of
        channels for which the preprocessing has no constants.
    """
    if name not in PREPROCESSINGS:
        raise ValueError(
            f"unknown preprocessing {name!r}: choose one of {', '.join(PREPROCESSINGS)}"
        )
    _check_images(train_images)
    if len(train_images) == 0:
        raise ValueError(f"the preprocessing {name!r} cannot be fitted without training images")
    _check_colors(name, train_images)
    if name in UNFITTED:
        return Preprocessing(name)
    mean_image = train_images.mean(axis=0, dtype=np.float64).astype(np.float32)
    if name == "mean_image":
        return Preprocessing(name, mean_image)

    num_values = mean_image.size
    contrast_sum, product_sum = 0.0, np.zeros((num_values, num_values))
    for start in range(0, len(train_images), IMAGES_PER_CHUNK):
        levels, contrasts = _normalized_contrast(
            train_images[start : start + IMAGES_PER_CHUNK], mean_image
        )
        contrast_sum += contrasts.sum(dtype=np.float64)
        product_sum += levels.T @ levels
    mean_contrast = np.float32(contrast_sum / len(train_images))
    covariance = product_sum * (float(mean_contrast) ** 2 / len(train_images))
    return Preprocessing(name, mean_image, np.asarray(mean_contrast), _whitening(covariance))


def bounds(preprocessing: Preprocessing) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the least and the greatest input of each pixel, or None for "contrast_whiten", which
    mixes the pixels.

    "none" has the bounds 0 and 1, of shape `()`. "mean_image" has `-mean/255` and `1 - mean/255`,
    float32 of shape `(1, h, w, c)` that broadcasts against a batch. "caffe" and "torchvision" have
    the inputs of black and white, `(1, 1, 1, 3)`.
    """
    if preprocessing.name == "contrast_whiten":
        return None
    if preprocessing.name == "none":
        return np.asarray(np.float32(0)), np.asarray(np.float32(1))
    if preprocessing.name in UNFITTED:
        black, white = (np.full((1, 1, 1, 3), level, np.uint8) for level in (0, 255))
        return preprocessing(black), preprocessing(white)
    assert preprocessing.mean_image is not None  # Fitted, as the name says.
    mean_image = preprocessing.mean_image[None]
    return (0 - mean_image) / PIXEL_SCALE, (PIXEL_SCALE - mean_image) / PIXEL_SCALE


def value_of_black(preprocessing: Preprocessing) -> np.ndarray:
    """Returns the input of a black pixel where it is the same everywhere in the image, else zero;
    the margin of padded random crops.

    "none" gives 0 of shape `()`; "caffe" and "torchvision" give a color, `(1, 1, 1, 3)`, so that
    padding inputs equals padding the images with black. "mean_image" has no mean outside the image,
    and "contrast_whiten" mixes the pixels; both give 0, the value of the mean training image.
    """
    limits = bounds(preprocessing) if preprocessing.name in UNFITTED else None
    if limits is not None:
        return limits[0]
    return np.zeros((), np.float32)


def make_to_images(preprocessing: Preprocessing) -> Callable[[np.ndarray], np.ndarray] | None:
    """Returns the inverse map, from inputs `(n, h, w, c)` to images in RGB with 0..1 for
    black..white, or None where `bounds` is None.

    Inputs outside of the bounds become values outside of 0..1.
    """
    limits = bounds(preprocessing)
    if limits is None:
        return None
    lower, upper = limits
    order = -1 if preprocessing.name == "caffe" else 1
    return lambda inputs: ((inputs - lower) / (upper - lower))[..., ::order]


def _normalized_contrast(images: Images, mean_image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(x - mean) / max(std, 40)` of each image as a vector `(n, d)`, and the stds `(n,)`
    in gray levels.
    """
    levels = (images - mean_image).reshape(len(images), -1)
    levels -= levels.mean(axis=1, keepdims=True)
    # An image of one value has no spread; with d - 1 = 0 that would be 0/0.
    contrasts = np.sqrt(np.einsum("nd,nd->n", levels, levels) / max(levels.shape[1] - 1, 1))
    levels /= np.maximum(contrasts, LOWEST_CONTRAST)[:, None]
    return levels, contrasts


def _by_color(operation: np.ufunc, images: np.ndarray, color: np.ndarray) -> np.ndarray:
    """Returns `operation(images, color)`, computed in rows of pixels: NumPy takes three times as
    long for an inner axis of three values.
    """
    rows = images.reshape(*images.shape[:2], -1)
    return operation(rows, np.tile(color, images.shape[2])).reshape(images.shape)


def _whitening(covariance: np.ndarray) -> np.ndarray:
    """Returns `V diag(sqrt(mean(lambda)) / max(sqrt(lambda), floor)) V^T` of `C = V diag(lambda)
    V^T`, as float32.
    """
    import scipy.linalg  # JAX brings it.

    # Divide and conquer is the fastest LAPACK driver for all eigenvectors: 3072 x 3072 takes 3 s on
    # two idle cores.
    eigenvalues, vectors = scipy.linalg.eigh(covariance, driver="evd")
    # rounding makes those of the null space slightly negative
    eigenvalues = np.maximum(eigenvalues, 0)
    gains = np.sqrt(eigenvalues.mean()) / np.maximum(np.sqrt(eigenvalues), EIGENVALUE_ROOT_FLOOR)
    return ((vectors * gains) @ vectors.T).astype(np.float32)


def _check_images(images: np.ndarray) -> None:
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(
            f"expected uint8 images (n, h, w, c) in 0..255, got {images.dtype} of shape "
            f"{images.shape}"
        )


def _check_colors(name: str, images: np.ndarray) -> None:
    if name in ("caffe", "torchvision") and images.shape[-1] != 3:
        raise ValueError(
            f"the preprocessing {name!r} is for images of three channels, got {images.shape[-1]}: "
            'use "none" or "mean_image"'
        )
