"""PASS: its ends, what alignment forgives, and where there is nothing to align."""

import cv2
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from dd_jax.evaluation import pass_score
from dd_jax.evaluation.pass_score import pass_scores


def textures(num_images, size=28, channels=1, seed=0):
    """Smooth random images in 0..1, whose structure fills them."""
    noise = (
        np.random.default_rng(seed)
        .uniform(size=(num_images, size, size, channels))
        .astype(np.float32)
    )
    smooth = np.stack(
        [cv2.GaussianBlur(image, (0, 0), 2.0).reshape(image.shape) for image in noise]
    )
    low, high = smooth.min(axis=(1, 2, 3), keepdims=True), smooth.max(axis=(1, 2, 3), keepdims=True)
    return (smooth - low) / (high - low)


def plain_similarity(image, other):
    options = dict(
        win_size=11, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0
    )
    return structural_similarity(image, other, channel_axis=-1, **options)


def textbook_similarity(x, y):
    """SSIM of one-channel images as published, in plain NumPy, averaged over the places where the
    window fits.
    """
    steps = np.arange(11) - 5
    line = np.exp(-(steps**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    mean = lambda image: (np.lib.stride_tricks.sliding_window_view(image, (11, 11)) * window).sum(
        axis=(2, 3)
    )
    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (numerator / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))).mean()


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_just_like_itself(channels):
    images = textures(3, channels=channels)
    scores, aligned = pass_scores(images, images.copy())
    np.testing.assert_allclose(scores, 1.0, atol=1e-5)
    assert scores.shape == (3,) and aligned.tolist() == [True] * 3


def test_similarity_is_ssim_as_published():
    x, y = np.float64(textures(2))
    np.testing.assert_allclose(
        pass_score.similarity(x, y), textbook_similarity(x[..., 0], y[..., 0]), rtol=1e-6
    )
    assert pass_score.similarity(x, y) < 0.5


@pytest.mark.parametrize("channels", [1, 3])
def test_a_shift_is_forgiven(channels):
    wide = textures(4, size=32, channels=channels)
    images, shifted = wide[:, 2:30, 2:30], wide[:, 3:31, 1:29]
    scores, aligned = pass_scores(images, shifted)
    plain = np.array([plain_similarity(*pair) for pair in zip(images, shifted, strict=True)])
    assert aligned.all() and (plain < 0.85).all() and (scores > 0.95).all()


def test_it_is_the_adversarial_image_that_is_moved():
    """Alignment undoes the shift of what it moves, up to the edge; the original stays where it is."""
    wide = textures(1, size=32)
    image, shifted = wide[0, 2:30, 2:30], wide[0, 2:30, 4:32]
    moved = pass_score.align(image, shifted)
    np.testing.assert_allclose(moved[3:-3, 3:-3], image[3:-3, 3:-3], atol=0.03)
    assert np.abs(moved - shifted)[3:-3, 3:-3].max() > 0.1


def test_the_original_comes_first():
    """A dull image, aligned to a shifted one, is moved; the other way round the bright one is: not
    the same score.
    """
    wide = textures(1, size=32)
    first, second = wide[:, 2:30, 2:30], 0.5 * wide[:, 4:32, 3:31]
    (there,), (back,) = pass_scores(first, second)[0], pass_scores(second, first)[0]
    moved = pass_score.align(first[0], second[0])
    assert (
        there == plain_similarity(np.float64(first[0]), np.float64(moved))
        and abs(there - back) > 1e-4
    )


def test_noise_is_not_forgiven_and_more_of_it_less():
    images = textures(3)
    noise = np.random.default_rng(0).normal(size=images.shape).astype(np.float32)
    scores = np.array([pass_scores(images, images + size * noise)[0] for size in (0.01, 0.05, 0.2)])
    assert (
        (np.diff(scores, axis=0) < 0).all() and (scores[0] > 0.9).all() and (scores[-1] < 0.7).all()
    )


def test_what_has_no_structure_is_taken_as_it_is_and_counted():
    images = textures(3)
    flat = np.full_like(images[:1], 0.25)
    first = np.concatenate([images[:1], flat, images[2:]])
    second = np.concatenate([images[:1], flat, flat])
    scores, aligned = pass_scores(first, second)
    assert aligned.tolist() == [True, False, False]
    np.testing.assert_allclose(scores[:2], 1.0, atol=1e-5)
    assert scores[2] == plain_similarity(np.float64(first[2]), np.float64(second[2])) < 0.5


def test_a_search_that_ends_in_nan_is_not_followed(monkeypatch):
    images = textures(1)
    nowhere = np.full((3, 3), np.nan, np.float32)
    monkeypatch.setattr(cv2, "findTransformECC", lambda *_: (np.nan, nowhere))
    scores, aligned = pass_scores(images, images)
    assert scores.tolist() == [1.0] and aligned.tolist() == [False]


def test_a_search_that_goes_astray_is_not_followed(monkeypatch):
    """ECC does so on images as rough as noise; here it is told to."""
    images = textures(1)
    others = images + 0.1 * textures(1, seed=1)
    far_away = np.array([[1, 0, 9], [0, 1, 9], [0, 0, 1]], np.float32)
    honest, _ = pass_scores(images, others)
    monkeypatch.setattr(cv2, "findTransformECC", lambda *_: (0.9, far_away))
    scores, aligned = pass_scores(images, others)
    plain = plain_similarity(np.float64(images[0]), np.float64(others[0]))
    assert (
        scores.tolist() == [plain] and aligned.tolist() == [False] and abs(honest[0] - plain) > 1e-6
    )


def test_grey_and_colored_images_agree():
    images = textures(2)
    others = images + 0.3 * textures(2, seed=1)
    gray, _ = pass_scores(images, others)
    colored, _ = pass_scores(np.repeat(images, 3, axis=-1), np.repeat(others, 3, axis=-1))
    assert (gray < 0.99).all()
    np.testing.assert_allclose(gray, colored, atol=2e-3)


@pytest.mark.parametrize(
    "images, adversarial, message",
    [
        ((2, 28, 28, 1), (2, 28, 28, 3), "have the shape .* make them equal"),
        ((2, 28, 10, 1), (2, 28, 10, 1), "at least 11 and 1 or 3 channels"),
        ((2, 28, 28, 2), (2, 28, 28, 2), "at least 11 and 1 or 3 channels"),
    ],
)
def test_what_cannot_be_compared_is_refused(unchecked, images, adversarial, message):
    with pytest.raises(ValueError, match=message):
        pass_scores(np.zeros(images, np.float32), np.zeros(adversarial, np.float32))
