"""From the bytes of an image file to the uint8 pixels that a net for ImageNet takes, with Pillow
alone.

    pixels = resized(encoded, short_side=256)          # (h, w, 3), the shorter of h and w is 256
    pixels = random_crop(pixels, 224, random)          # for training, mirrored half of the time
    pixels = centre_crop(pixels, 224)                  # for evaluation

Pillow's pixels may differ from those of other decoders by about one gray level.
"""

import io
import math
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from dd_jax import extras

if TYPE_CHECKING:
    import PIL.Image

Pixels = UInt8[np.ndarray, "_ _ 3"]

# The formats that are read, whatever the names of the files are. Pillow knows others, some of which
# run programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
INTERPOLATIONS = ("bilinear", "bicubic")
# A JPEG is decoded to a half, a quarter or an eighth of its size where that still leaves twice the
# pixels that are wanted. This is several times as fast for large photographs, and the antialiased
# reduction that follows hides the difference.
DECODED_TO_WANTED = 2


class DecodeError(ValueError):
    """Bytes that are not an image, or an image that cannot be read completely. The message gives
    the reason, in Pillow's words where there are any.
    """


def resized(encoded: bytes, short_side: int = 256, interpolation: str = "bilinear") -> Pixels:
    """Decodes an image to RGB and resizes it, antialiased, so that its shorter side has a given
    length.

    The longer side becomes `floor(short_side * long / short)`, torchvision's rule. Of a file with
    several frames the first is read. CMYK, gray (1, 8 and 16 bits, of which the upper 8 count) and
    palette images become RGB. An alpha channel is dropped, not blended, and a color profile and the
    orientation in the EXIF data are ignored, as in TensorFlow's and PyTorch's ImageNet pipelines,
    with which the published nets were trained.

    Args:
      encoded: a file of one of `FORMATS`, recognized by its contents.
      short_side: positive number of pixels.
      interpolation: "bilinear" (torchvision's) or "bicubic"; its support grows with the reduction.

    Raises:
      ValueError: a short side that is not positive, or an unknown interpolation.
      DecodeError: a file of another format, a truncated one, one of floating-point values, or one
        so long and narrow that the result would have more pixels than Pillow considers safe.
    """
    with extras.needed("train"):
        import PIL.Image

    if short_side < 1:
        raise ValueError(f"short_side must be a positive number of pixels, got {short_side}")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"unknown interpolation {interpolation!r}: choose one of {', '.join(INTERPOLATIONS)}"
        )
    try:
        with PIL.Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            width, height = image.size
            shorter = min(width, height)
            size = (short_side * width // shorter, short_side * height // shorter)
            if size[0] * size[1] > (PIL.Image.MAX_IMAGE_PIXELS or math.inf):
                raise DecodeError(
                    f"an image of {width}x{height} pixels, which is too long for its width"
                )
            if image.format == "JPEG":
                image.draft(None, (DECODED_TO_WANTED * size[0], DECODED_TO_WANTED * size[1]))
            pixels = _rgb(image)
            if pixels.size != size:
                pixels = pixels.resize(size, PIL.Image.Resampling[interpolation.upper()])
            return np.array(pixels)
    except MemoryError:
        raise  # a problem of the machine, not of the file
    except DecodeError:
        raise
    except Exception as error:  # a damaged file may make Pillow raise nearly anything
        reason = str(error) or type(error).__name__
        # Pillow's message shows the address of the buffer
        if isinstance(error, PIL.UnidentifiedImageError):
            reason = f"not an image of a known format ({', '.join(FORMATS)})"
        raise DecodeError(reason) from error


def centre_crop(pixels: Pixels, size: int) -> Pixels:
    """Returns the middle square, a view. Half of an odd margin is rounded to even, as in
    torchvision.

    Raises:
      ValueError: an image smaller than the square.
    """
    _check_crop(pixels, size)
    top, left = (round((length - size) / 2) for length in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


def random_crop(
    pixels: Pixels, size: int, random: np.random.Generator, flip: bool = True
) -> Pixels:
    """Returns a random square of the image, uniformly distributed; a view.

    Args:
      pixels: `(h, w, 3)`.
      size: the square's side, at most the shorter of h and w.
      random: draws the position and, also without `flip`, a number for the mirroring.
      flip: mirror it left to right with probability 1/2.

    Raises:
      ValueError: an image smaller than the square.
    """
    _check_crop(pixels, size)
    top, left = (int(random.integers(length - size + 1)) for length in pixels.shape[:2])
    crop = pixels[top : top + size, left : left + size]
    return crop[:, ::-1] if random.random() < 0.5 and flip else crop


def _rgb(image: "PIL.Image.Image") -> "PIL.Image.Image":
    """Converts an image of any mode but floating point."""
    with extras.needed("train"):
        import PIL.Image

    if image.mode == "F":
        raise DecodeError("an image of floating-point values, whose range is unknown")
    # 16 bits, which `convert` would clip to 255; some versions hold them in 32
    if image.mode.startswith("I"):
        image = PIL.Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
    elif "transparency" in image.info and image.mode == "P":
        # a direct conversion gives the same, with a warning
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _check_crop(pixels: Pixels, size: int) -> None:
    if not 1 <= size <= min(pixels.shape[:2]):
        raise ValueError(
            f"a crop of {size} pixels cannot be taken from an image of shape {pixels.shape}: "
            f"choose one between 1 and {min(pixels.shape[:2])}, or a longer short_side"
        )
