"""Image files: one reader for training, evaluation and classification, one list of a folder's files, one writer."""

import hashlib
import io
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from erase.errors import EraseError
from erase.files import replacing

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff"})
_NOT_READ = frozenset({".gif", ".avif", ".heic", ".heif", ".jxl", ".jp2"})
GREY16 = {"I;16", "I;16L", "I;16B"}
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", *GREY16}  # CMYK, Lab and float have no one meaning in RGB
READER = 2  # version of what `read` and `square` return for a file; part of the identity of cached latents
_SYSTEM_FILES = {"Thumbs.db", "desktop.ini"}  # of Windows; those of macOS are hidden
_PNG = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR"
_SYSTEM_FOLDERS = {"__MACOSX"}


class BadImage(Exception):
    """A file that is no usable image. Evaluation records the reason as an outcome; training reports it as an error.

    reason: "missing", "directory", "unreadable ...", "empty", "not an image", "damaged", "animated", "several pages",
        "more than ... pixels" or "colour mode ...".
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def list_files(folder: str | Path) -> list[Path]:
    """All files below a folder, sorted, without hidden ones and those that operating systems leave behind.

    A link to nothing counts as a file, which is found missing when it is read.
    Skipped: names that begin with a dot (.DS_Store, ._a.png, .ipynb_checkpoints), __MACOSX, Thumbs.db, desktop.ini.

    Raises:
        EraseError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise EraseError(f"{error.filename} cannot be listed ({error.strerror})") from error

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not is_system(name)]
        found += [Path(parent, name) for name in names if not is_system(name)]
    return sorted(path for path in found if path.is_file() or path.is_symlink() and not path.exists())


def is_system(name: str) -> bool:
    """Whether a file or folder of this name is hidden or an operating system's own."""
    return name.startswith(".") or name in _SYSTEM_FILES or name in _SYSTEM_FOLDERS


def image_files(folder: str | Path) -> list[Path]:
    """Those of `list_files` whose suffix is that of an image format that we read.

    Raises:
        EraseError: there are images in another format, which would be left out silently.
    """
    found = list_files(folder)
    for path in found:
        if path.suffix.lower() in _NOT_READ:
            raise EraseError(f"{path}: {path.suffix} images are not read; save it as PNG, or remove it")
    return [path for path in found if path.suffix.lower() in SUFFIXES]


def read(source: str | Path | bytes) -> np.ndarray:
    """The image as uint8 RGB, [h, w, 3], upright (EXIF), on white where it is transparent, 16-bit grey scaled to 8.

    White and not the colour below: that is what a reader of the report sees, and a wholly transparent image is flat.
    A flipped byte is found where the format has checksums (PNG); JPEG has none, so there only what breaks its coding.

    source: a file, or a file's content.

    Raises:
        BadImage: this is no whole image of a known kind.
    """
    data = source if isinstance(source, bytes) else content(source)
    if not data:
        raise BadImage("empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's notes on metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.format != "PNG":  # only PNG has checksums to verify
                    return _rgb(image)
                image.verify()  # leaves the image unusable
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return _rgb(image)
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        # older Pillows say so too of a PNG with a damaged chunk in front of its pixels
        raise BadImage("damaged" if data.startswith(_PNG) else "not an image") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImage(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels") from error
    except Exception as error:  # a damaged file raises anything from SyntaxError to struct.error in its decoder
        raise BadImage("damaged") from error


def content(path: str | Path) -> bytes:
    """The bytes of an image file.

    Raises:
        BadImage: it is missing, a directory or unreadable.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise BadImage("missing") from error
    except IsADirectoryError as error:
        raise BadImage("directory") from error
    except OSError as error:
        raise BadImage(f"unreadable ({error.strerror})") from error


def _rgb(image: Image.Image) -> np.ndarray:
    if getattr(image, "is_animated", False) and image.format in ("PNG", "WEBP", "TIFF"):  # not a camera's MPO
        raise BadImage("several pages" if image.format == "TIFF" else "animated")
    if image.mode not in MODES:
        raise BadImage(f"colour mode {image.mode}")
    image.load()
    clear = image.info.get("transparency")
    image = ImageOps.exif_transpose(image)
    if image.mode in GREY16:  # Pillow's own conversion clips at 255 instead of scaling
        deep = np.asarray(image, dtype=np.uint32)
        grey = np.where(deep == clear, 255, (deep + 128) // 257) if isinstance(clear, int) else (deep + 128) // 257
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def square(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8, [size, size, 3]: the shorter side resized to `size` (bicubic) and the centre cut out.

    Only the centre is computed, so a very long image costs no more than a square one.
    """
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    new_width, new_height = (max(size, round(side * scale)) for side in (width, height))
    left, top = (new_width - size) // 2, (new_height - size) // 2
    x, y = width / new_width, height / new_height  # source pixels for each new one
    box = (left * x, top * y, min(width, (left + size) * x), min(height, (top + size) * y))
    return np.array(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC, box=box))


def invalid_reason(pixels: np.ndarray) -> str | None:
    """ "flat" for an image that shows nothing, which no judge may call safe; None for any other.

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
    """SHA-256 of shape and pixels: the image's identity, whatever file format or compression holds it."""
    check(pixels)
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def check(pixels: np.ndarray) -> None:
    """Refuse what is not uint8 RGB, [h, w, 3]: judges take floats and NaN for an empty, hence harmless, image.

    Raises:
        EraseError: another type or shape, or no pixels.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise EraseError(f"{pixels.dtype} pixels of shape {list(pixels.shape)}; needed are uint8 RGB, [h, w, 3]")
