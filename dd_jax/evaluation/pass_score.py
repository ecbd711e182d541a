"""PASS, the perceptual adversarial similarity score (Rozsa, Rudd, Boult, CVPR Workshops 2016).

    PASS(x', x) = SSIM(warp(x'), x)

A small shift of an image is hardly seen, but costs much structural similarity. So the adversarial
image x' is first aligned to the original x, by the homography that maximizes the enhanced
correlation coefficient (ECC; Evangelidis, Psarakis, TPAMI 2008). SSIM (Wang et al., TIP 2004) has
its published window, 11 x 11 and Gaussian with standard deviation 1.5; it is averaged over the
places where the window fits and over the channels. 1: no difference is seen.
"""

import numpy as np
from jaxtyping import Bool, Float

from dd_jax import extras

with extras.needed("evaluate"):
    import cv2
    from skimage.metrics import structural_similarity

Images = Float[np.ndarray, "n h w c"]

MOST_ITERATIONS, LEAST_INCREASE = (
    100,
    1e-6,
)  # Of the correlation coefficient; scores then are within 1e-4 of their limit.
# Of the correlation, by smoothing and rounding; a search that loses more has gone astray.
MOST_LOST = 1e-3
SMOOTHING = 5  # The Gaussian filter's size in ECC, OpenCV's own choice.
WINDOW, WINDOW_DEVIATION = 11, 1.5


def pass_scores(
    images: Images, adversarial: Images
) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """PASS of each adversarial image, and whether it could be aligned.

    Args:
      images: the originals, `(n, h, w, c)` floating, 0..1, h and w at least 11, c 1 (gray) or 3
        (red, green, blue).
      adversarial: of the same shape; may be out of 0..1, and is taken as it is.

    Returns:
      (scores, aligned): float64 in -1..1, and bool. Where the search for a homography does not
      converge (images without structure, or that are not finite) or goes astray, aligned is False
      and the score is that of the image as it is; NaN where that is not finite.

    Raises:
      ValueError: images that differ in shape, are too small for the window, or have other than 1 or
        3 channels.
    """
    if images.shape != adversarial.shape:
        raise ValueError(
            f"images have the shape {images.shape}, adversarial ones {adversarial.shape}; make "
            f"them equal."
        )
    if min(images.shape[1:3]) < WINDOW or images.shape[3] not in (1, 3):
        raise ValueError(
            f"images have the shape {images.shape}; PASS needs (n, h, w, c) with h and w at least "
            f"{WINDOW} and 1 or 3 "
            "channels: enlarge the images, or leave PASS out."
        )
    scores, aligned = np.zeros(len(images)), np.zeros(len(images), bool)
    for i, (image, other) in enumerate(zip(images, adversarial, strict=True)):
        warped = align(image, other)
        aligned[i] = warped is not None
        scores[i] = similarity(image, other if warped is None else warped)
    return scores, aligned


def align(
    image: Float[np.ndarray, "h w c"], other: Float[np.ndarray, "h w c"]
) -> Float[np.ndarray, "h w c"] | None:
    """Moves `other` to where it correlates best with `image`; None where the search does not
    converge, or ends where the two correlate less than at its start.

    Both are compared in gray. What comes in from outside repeats the edge.
    """
    height, width = image.shape[:2]
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, MOST_ITERATIONS, LEAST_INCREASE)
    identity = np.eye(3, dtype=np.float32)
    try:
        pair = gray(image), gray(other)
        correlation, homography = cv2.findTransformECC(  # type: ignore[call-overload]
            *pair, identity, cv2.MOTION_HOMOGRAPHY, criteria, None, SMOOTHING
        )
    except cv2.error:
        return None
    if not (np.isfinite(correlation) and np.isfinite(homography).all()):
        return None
    warped = cv2.warpPerspective(
        other.astype(np.float32),
        homography,
        (width, height),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    ).reshape(image.shape)
    before, after = (cv2.computeECC(gray(image), gray(moved)) for moved in (other, warped))
    return warped if after >= before - MOST_LOST else None


def gray(image: Float[np.ndarray, "h w c"]) -> Float[np.ndarray, "h w"]:
    """The brightness of an image, float32; of a colored one by the weights of ITU-R BT.601."""
    floats = image.astype(np.float32)
    return floats[..., 0] if image.shape[-1] == 1 else cv2.cvtColor(floats, cv2.COLOR_RGB2GRAY)


def similarity(image: Float[np.ndarray, "h w c"], other: Float[np.ndarray, "h w c"]) -> float:
    """SSIM of two images whose pixels range over 0..1."""
    window = dict(
        win_size=WINDOW, gaussian_weights=True, sigma=WINDOW_DEVIATION, use_sample_covariance=False
    )
    pair = np.float64(image), np.float64(other)
    return float(structural_similarity(*pair, data_range=1.0, channel_axis=-1, **window))
