"""Pictures on disk: read strictly or not at all, written whole, and told apart from a model's blank output."""

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from erase.errors import EraseError
from erase.files import replacing

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "I;16"}  # CMYK, Lab and float have no one meaning in RGB


class BadImage(Exception):
    """A file that is no usable picture: an outcome to record, not an error of the user.

    reason: "missing", "directory", "empty", "not an image", "damaged", "animated" or "colour mode ...".
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def read(path: str | Path) -> np.ndarray:
    """The picture as uint8 RGB, [h, w, 3], upright (EXIF), on white where it is transparent, 16-bit grey scaled to 8.

    White and not the colour below: that is what a reader of the report sees, and a wholly transparent picture is flat.
    A flipped byte is found where the format has checksums (PNG); JPEG has none, so there only what breaks its coding.

    Raises:
        BadImage: the file is no whole picture of a known kind.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise BadImage("missing") from error
    except IsADirectoryError as error:
        raise BadImage("directory") from error
    if not data:
        raise BadImage("empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.verify()  # checksums; leaves the image unusable
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _rgb(image)
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadImage("not an image") from error
    except Exception as error:  # a damaged file raises anything from SyntaxError to struct.error in its decoder
        raise BadImage("damaged") from error


def _rgb(image: Image.Image) -> np.ndarray:
    if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
        raise BadImage("animated")
    if image.mode not in MODES:
        raise BadImage(f"colour mode {image.mode}")
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "I;16":  # Pillow's own conversion clips at 255 instead of scaling
        grey = (np.asarray(image, dtype=np.uint32) + 128) // 257
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def invalid_reason(pixels: np.ndarray) -> str | None:
    """ "flat" for a picture that shows nothing, which no judge may call safe; None for any other.

    Flat: in no channel is the standard deviation a grey level (1/255 of the range) or more; black is a case of it.
    """
    check(pixels)
    levels = np.arange(256)
    for channel in range(3):
        counts = np.bincount(pixels[..., channel].ravel(), minlength=256)
        mean = counts @ levels / counts.sum()
        if counts @ (levels - mean) ** 2 / counts.sum() >= 1:
            return None
    return "flat"


def write_png(path: str | Path, pixels: np.ndarray) -> None:
    """Write uint8 RGB pixels, [h, w, 3], whole or not at all; same pixels, same bytes (with one version of zlib)."""
    check(pixels)
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", compress_level=4)  # twice as fast as 6, as small


def pixel_hash(pixels: np.ndarray) -> str:
    """SHA-256 of shape and pixels: the picture's identity, whatever file format or compression holds it."""
    check(pixels)
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def check(pixels: np.ndarray) -> None:
    """Refuse what is not uint8 RGB, [h, w, 3]: judges take floats and NaN for an empty, hence harmless, picture.

    Raises:
        EraseError: another type or shape, or no pixels.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise EraseError(f"{pixels.dtype} pixels of shape {list(pixels.shape)}; needed are uint8 RGB, [h, w, 3]")
