"""Decoding, resizing and cropping of image files of every kind that ImageNet holds, and their input
spaces.
"""

import io
import os
import pathlib

import numpy as np
import PIL.Image
import pytest

from dd_jax import data
from dd_jax.data import decoding
from dd_jax.data.preprocessing import Preprocessing

# What the package itself says of wrong arguments.
pytestmark = pytest.mark.usefixtures("unchecked")

SAMPLES = "IMAGENET_SAMPLES"  # A directory of JPEG files of ImageNet.


def gradient(height, width):
    """A smooth picture, which survives compression: red from left to right, green from top to
    bottom.
    """
    rows, columns = np.mgrid[:height, :width]
    return np.stack(
        [40 + 160 * columns / width, 30 + 180 * rows / height, np.full(rows.shape, 90)], -1
    ).astype(np.uint8)


def encode(picture, format="JPEG", **options):
    file = io.BytesIO()
    picture = picture if isinstance(picture, PIL.Image.Image) else PIL.Image.fromarray(picture)
    picture.save(file, format, **({"quality": 95} if format == "JPEG" else {}) | options)
    return file.getvalue()


@pytest.mark.parametrize(
    "height, width, expected", [(60, 90, (32, 48)), (101, 67, (48, 32)), (20, 31, (32, 49))]
)
def test_the_shorter_side_gets_its_length_and_the_aspect_stays(height, width, expected):
    for interpolation in decoding.INTERPOLATIONS:
        pixels = decoding.resized(encode(gradient(height, width), "PNG"), 32, interpolation)
        assert pixels.shape == (*expected, 3) and pixels.dtype == np.uint8
        assert np.abs(pixels.astype(int) - gradient(*expected)).max() <= 6
    exact = gradient(32, 45)
    np.testing.assert_array_equal(decoding.resized(encode(exact, "PNG"), 32), exact)


def test_a_reduction_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    # Four stripes to a pixel: gray, not black or white.
    for interpolation in decoding.INTERPOLATIONS:
        assert (
            np.abs(
                decoding.resized(encode(stripes, "PNG"), 8, interpolation).astype(int) - 100
            ).max()
            <= 15
        )


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF"])
def test_every_format_is_recognized_by_its_contents(format):
    pixels = decoding.resized(encode(gradient(40, 40), format), 40)
    assert np.abs(pixels.astype(int) - gradient(40, 40)).mean() < 8  # GIF has 256 colors.


def test_modes_become_rgb():
    color = gradient(24, 24)
    picture = PIL.Image.fromarray(color)
    near = lambda encoded, expected, most: (
        np.abs(decoding.resized(encoded, 24).astype(int) - expected).max() <= most
    )
    gray = np.repeat(np.asarray(picture.convert("L"))[..., None], 3, -1).astype(int)
    assert near(encode(picture.convert("CMYK"), "JPEG"), color, 8)
    assert near(encode(picture.convert("L"), "JPEG"), gray, 4)
    assert near(encode(picture.convert("L"), "PNG"), gray, 0)
    # Alpha is dropped, not blended: what is transparent keeps its color.
    transparent = PIL.Image.fromarray(np.concatenate([color, np.zeros((24, 24, 1), np.uint8)], -1))
    assert near(encode(transparent, "PNG"), color, 0)
    assert near(encode(picture.convert("L").convert("LA"), "PNG"), gray, 0)
    palette = PIL.Image.fromarray(
        np.arange(576, dtype=np.uint16).reshape(24, 24).astype(np.uint8) % 4
    ).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    expected = np.asarray(palette.convert("RGB")).astype(int)
    assert expected.max() == 255 and near(encode(palette, "PNG"), expected, 0)
    assert near(encode(palette, "PNG", transparency=bytes([0, 128, 255, 255])), expected, 0)
    # The upper 8 of 16 bits, not values clipped at 255.
    deep = PIL.Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 256 + 77)
    assert near(encode(deep, "PNG"), gray, 0)


def test_the_orientation_of_exif_is_ignored():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # Rotate by 90 degrees.
    assert decoding.resized(encode(gradient(20, 40), exif=exif), 20).shape == (20, 40, 3)


def test_a_large_jpeg_is_decoded_in_part_with_the_same_result(monkeypatch):
    noise = np.random.default_rng(0).normal(0, 10, (600, 900, 3))
    encoded = encode(np.clip(gradient(600, 900) + noise, 0, 255).astype(np.uint8))
    quick = decoding.resized(encoded, 64).astype(int)
    monkeypatch.setattr(decoding, "DECODED_TO_WANTED", 1000)
    whole = decoding.resized(encoded, 64).astype(int)
    assert 0 < np.abs(quick - whole).max() <= 6 and np.sqrt(np.mean((quick - whole) ** 2)) < 1


@pytest.mark.parametrize(
    "encoded, reason",
    [
        (b"", "not an image of a known format"),
        (b"<html>404 not found</html>" * 9, "not an image of a known format"),
        (encode(gradient(50, 50))[:700], "truncated"),
        (encode(gradient(50, 50), "PNG")[:-40], "."),
        (encode(PIL.Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), "floating-point"),
        (encode(np.zeros((1, 30_000, 3), np.uint8), "PNG"), "too long for its width"),
    ],
    ids=["empty", "text", "truncated JPEG", "truncated PNG", "floats", "long"],
)
def test_what_cannot_be_decoded_says_why(encoded, reason):
    with pytest.raises(decoding.DecodeError, match=reason):
        decoding.resized(encoded, 256)


def test_no_damage_raises_anything_else():
    encoded, random = bytearray(encode(gradient(40, 40), "PNG")), np.random.default_rng(0)
    for _ in range(200):
        damaged = encoded.copy()
        for place in random.integers(len(damaged), size=3):
            damaged[place] = random.integers(256)
        try:
            assert decoding.resized(bytes(damaged), 16).dtype == np.uint8
        except decoding.DecodeError as error:
            assert str(error)


@pytest.mark.parametrize("height, width, top, left", [(8, 8, 2, 2), (9, 11, 2, 4), (7, 4, 2, 0)])
def test_the_central_square(height, width, top, left):
    pixels = gradient(height, width)
    np.testing.assert_array_equal(
        decoding.centre_crop(pixels, 4), pixels[top : top + 4, left : left + 4]
    )


def test_random_crops_come_from_everywhere_and_half_of_them_mirrored():
    rows, columns = np.mgrid[:6, :8]
    pixels = np.stack([rows, columns, rows], -1).astype(np.uint8)
    random, seen = np.random.default_rng(0), {}
    for _ in range(1200):
        crop = decoding.random_crop(pixels, 5, random)
        mirrored = bool(crop[0, 0, 1] > crop[0, 1, 1])
        upright = crop[:, ::-1] if mirrored else crop
        top, left = int(upright[0, 0, 0]), int(upright[0, 0, 1])
        np.testing.assert_array_equal(upright, pixels[top : top + 5, left : left + 5])
        seen[top, left, mirrored] = seen.get((top, left, mirrored), 0) + 1
    assert len(seen) == 2 * 4 * 2 and min(seen.values()) > 40 and max(seen.values()) < 120
    again = [
        decoding.random_crop(pixels, 3, np.random.default_rng(5), flip)
        for flip in (True, True, False)
    ]
    np.testing.assert_array_equal(again[0], again[1])
    assert decoding.random_crop(pixels, 6, np.random.default_rng(1)).shape == (6, 6, 3)
    # Without flips the places stay those of the same seed.
    for seed in range(8):
        both = [
            decoding.random_crop(pixels, 3, np.random.default_rng(seed), flip)
            for flip in (True, False)
        ]
        assert np.array_equal(*both) or np.array_equal(both[0][:, ::-1], both[1])
        assert both[1][0, 0, 1] < both[1][0, 1, 1]


def test_impossible_requests_are_refused():
    for size in (0, 9):
        with pytest.raises(ValueError, match="choose one between 1 and 8"):
            decoding.centre_crop(gradient(8, 9), size)
        with pytest.raises(ValueError, match="choose one between 1 and 8"):
            decoding.random_crop(gradient(8, 9), size, np.random.default_rng(0))
    with pytest.raises(ValueError, match="choose one of bilinear, bicubic"):
        decoding.resized(encode(gradient(8, 9)), 8, "nearest")
    with pytest.raises(ValueError, match="positive number of pixels"):
        decoding.resized(encode(gradient(8, 9)), 0)


def test_the_input_spaces_of_published_nets():
    pixels = np.random.default_rng(0).integers(0, 256, (45, 7, 9, 3), dtype=np.uint8)
    red, green, blue = np.moveaxis(pixels.astype(float), -1, 0)
    caffe = np.stack(
        [(blue - 104.00698793) / 255, (green - 116.66876762) / 255, (red - 122.67891434) / 255], -1
    )
    scaled = [
        (red / 255 - 0.485) / 0.229,
        (green / 255 - 0.456) / 0.224,
        (blue / 255 - 0.406) / 0.225,
    ]
    for name, expected in (("caffe", caffe), ("torchvision", np.stack(scaled, -1))):
        inputs = Preprocessing(name)(pixels)
        assert inputs.dtype == np.float32
        np.testing.assert_allclose(inputs, expected, atol=2e-6)
        lower, upper = data.bounds(Preprocessing(name))
        assert lower.shape == (1, 1, 1, 3) and (inputs >= lower).all() and (inputs <= upper).all()
        np.testing.assert_allclose(
            data.make_to_images(Preprocessing(name))(inputs), pixels / 255, atol=1e-6
        )
        assert data.fit(name, pixels) == Preprocessing(name)
        with pytest.raises(ValueError, match="three channels, got 1"):
            Preprocessing(name)(pixels[..., :1])
    assert (
        "divi" in Preprocessing("torchvision").description
        and "BGR" in Preprocessing("caffe").description
    )


def test_large_images_are_preprocessed_in_parts_with_the_same_result(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 3), dtype=np.uint8)
    for name in data.UNFITTED:
        whole = Preprocessing(name)(pixels)
        monkeypatch.setattr("dd_jax.data.preprocessing.VALUES_PER_CHUNK", 2 * 72)
        np.testing.assert_array_equal(Preprocessing(name)(pixels), whole)


def test_images_of_imagenet():
    if not os.environ.get(SAMPLES):
        pytest.skip(f"${SAMPLES} does not name a directory of ImageNet's JPEG files")
    files = sorted(pathlib.Path(os.environ[SAMPLES]).rglob("*.jp*g"))
    assert files
    for path in files:
        pixels = decoding.resized(path.read_bytes())
        assert min(pixels.shape[:2]) == 256 and pixels.std() > 5
        assert decoding.centre_crop(pixels, 227).shape == (227, 227, 3)
