"""Laws of reading images: a damaged file never passes, a blank one has a name, the same pixels have one identity."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erase.data.images import BadImage, image_files, invalid_reason, list_files, pixel_hash, read, square, write_png
from erase.errors import EraseError


def image(seed: int = 0, size: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray | Image.Image, image_format: str, **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def animation(image_format: str) -> bytes:
    first, second = Image.fromarray(image(0)), Image.fromarray(image(1))
    return encoded(first, image_format, save_all=True, append_images=[second], lossless=True)


def with_chunk(png: bytes, kind: bytes, content: bytes) -> bytes:
    """A PNG with one chunk more, whole in itself, after its header."""
    chunk = struct.pack(">I", len(content)) + kind + content
    chunk += struct.pack(">I", zlib.crc32(chunk[4:]))
    return png[:33] + chunk + png[33:]


PNG = encoded(image(), "PNG")
JPEG = encoded(image(), "JPEG")
WEBP = encoded(image(), "WEBP")
TIFF = encoded(image(), "TIFF")
BAD_FILES = {
    "empty": (b"", "empty"),
    "text": (b"not an image\n" * 20, "not an image"),
    "zeros": (bytes(1000), "not an image"),
    "gif": (encoded(image(), "GIF"), "not an image"),
    "png header only": (PNG[:20], "damaged"),
    "png cut in half": (PNG[: len(PNG) // 2], "damaged"),
    "png without its end": (PNG[:-12], "damaged"),
    "png flipped byte": (flipped(PNG, len(PNG) // 2), "damaged"),
    "png with its body zeroed": (PNG[:60] + bytes(len(PNG) - 60), "damaged"),
    "jpeg cut in half": (JPEG[: len(JPEG) // 2], "damaged"),
    "jpeg cut at 90 percent": (JPEG[: len(JPEG) * 9 // 10], "damaged"),
    "jpeg without its last bytes": (JPEG[:-4], "damaged"),
    "webp cut in half": (WEBP[: len(WEBP) // 2], "damaged"),
    "animated png": (animation("PNG"), "animated"),
    "animated webp": (animation("WEBP"), "animated"),
    "tiff of two pages": (animation("TIFF"), "several pages"),
    "tiff cut in half": (TIFF[: len(TIFF) // 2], "damaged"),
    "png with a short tRNS chunk": (with_chunk(encoded(image(), "PNG"), b"tRNS", b"\0\0\0"), "damaged"),
    "png with a short cHRM chunk": (with_chunk(encoded(image(), "PNG"), b"cHRM", b"\0\0\0"), "damaged"),
    "float tiff": (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "colour mode F"),
    "cmyk jpeg": (encoded(Image.fromarray(image()).convert("CMYK"), "JPEG"), "colour mode CMYK"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_with_its_reason(case: str, tmp_path: Path) -> None:
    data, reason = BAD_FILES[case]
    path = tmp_path / "image.png"
    path.write_bytes(data)
    with pytest.raises(BadImage) as caught:
        read(path)
    assert caught.value.reason == str(caught.value) == reason


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none.png", "missing"), (tmp_path, "directory")):
        with pytest.raises(BadImage, match=reason):
            read(path)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_a_cut_file_is_refused_wherever_it_is_cut(image_format: str, tmp_path: Path) -> None:
    """A PNG's last four bytes are the checksum of an empty chunk: nothing is missing without them."""
    path = tmp_path / "image"
    data = encoded(image(size=8), image_format)
    for length in range(len(data) - 4 * (image_format == "PNG")):
        path.write_bytes(data[:length])
        with pytest.raises(BadImage):
            read(path)
    path.write_bytes(data)
    assert read(path).shape == (8, 8, 3)


def test_no_flipped_byte_of_a_png_changes_a_pixel(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    pixels = image(size=8)
    data = encoded(pixels, "PNG")
    refused = 0
    for at in range(len(data)):
        path.write_bytes(flipped(data, at))
        try:
            assert np.array_equal(read(path), pixels)
        except BadImage:
            refused += 1
    assert refused >= len(data) - 12  # the last chunk is empty: no flip there touches the image


def test_png_round_trip_is_exact_and_its_bytes_repeat(tmp_path: Path) -> None:
    pixels = image(1, 40)[:, :25]  # neither square nor contiguous
    for name in ("a.png", "b.png"):
        write_png(tmp_path / name, pixels)
    assert np.array_equal(read(tmp_path / "a.png"), pixels)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_modes_become_the_rgb_that_a_viewer_shows(tmp_path: Path) -> None:
    """16-bit grey v is v / 257 in 8 bits; half-transparent black on white is grey; grey has three equal channels."""
    grey16 = np.array([[0, 257, 32896, 65535]], np.uint16)
    half = np.array([[[0, 0, 0, 0], [0, 0, 0, 128], [200, 10, 20, 255]]], np.uint8)
    grey = np.array([[0, 7, 255]], np.uint8)
    palette = Image.fromarray(image()).quantize(16)
    hole = Image.new("P", (2, 1))
    hole.putpalette([9, 9, 9, 50, 60, 70])
    hole.putpixel((1, 0), 1)
    cases = {
        "16-bit": (encoded(Image.fromarray(grey16), "PNG"), np.stack([[[0, 1, 128, 255]]] * 3, axis=-1)),
        "alpha": (encoded(Image.fromarray(half), "PNG"), [[[255, 255, 255], [127, 127, 127], [200, 10, 20]]]),
        "16-bit TIFF": (encoded(Image.fromarray(grey16), "TIFF"), np.stack([[[0, 1, 128, 255]]] * 3, axis=-1)),
        "16-bit with a clear level": (
            with_chunk(encoded(Image.fromarray(grey16), "PNG"), b"tRNS", struct.pack(">H", 257)),
            np.stack([[[0, 255, 128, 255]]] * 3, axis=-1),
        ),
        "grey": (encoded(Image.fromarray(grey), "PNG"), np.stack([grey] * 3, axis=-1)),
        "palette": (encoded(palette, "PNG"), np.asarray(palette.convert("RGB"))),
        "palette with a hole": (encoded(hole, "PNG", transparency=0), [[[255, 255, 255], [50, 60, 70]]]),
        "1 bit": (encoded(Image.fromarray(grey > 5), "PNG"), np.stack([(grey > 5) * 255] * 3, axis=-1)),
    }
    for name, (data, expected) in cases.items():
        (tmp_path / name).write_bytes(data)
        pixels = read(tmp_path / name)
        assert pixels.dtype == np.uint8, name
        assert np.array_equal(pixels, np.asarray(expected)), name


def test_a_file_and_its_content_are_read_alike(tmp_path: Path) -> None:
    """One reader for files and for the rows of a data set (3.1)."""
    (tmp_path / "a.png").write_bytes(PNG)
    assert np.array_equal(read(PNG), read(tmp_path / "a.png"))
    with pytest.raises(BadImage, match="^damaged$"):
        read(PNG[:-12])


@pytest.mark.parametrize("times", [1, 3])
def test_a_decompression_bomb_has_its_reason_and_leaves_no_warning(times: int, monkeypatch) -> None:
    """Pillow warns above its limit and refuses above twice that; both are refused here (3.5)."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32 // times - 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(BadImage, match="^more than [0-9,]+ pixels$"):
            read(PNG)
    assert caught == []
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32)
    assert read(PNG).shape == (32, 32, 3)  # control


def resized_then_cut(pixels: np.ndarray, size: int) -> np.ndarray:
    """The plain way: resize the whole image, then cut out the centre."""
    image = Image.fromarray(pixels)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    whole = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(whole.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("shape", [(64, 64), (48, 64), (100, 67), (31, 47), (20, 201), (512, 3), (640, 480)])
@pytest.mark.parametrize("size", [16, 64, 40])
def test_only_the_centre_is_resized_and_its_pixels_are_those_of_the_whole(shape, size) -> None:
    """Within two grey levels up to the border (3.5).

    Pillow resizes rows and columns one after the other, in the order that is cheaper, and rounds in between. Levels
    from 64 to 191 leave room for the filter's overshoot, which is otherwise cut off in between as well.
    """
    pixels = np.random.default_rng(0).integers(64, 192, (*shape, 3), dtype=np.uint8)
    ours, plain = square(pixels, size).astype(int), resized_then_cut(pixels, size).astype(int)
    assert ours.shape == (size, size, 3)
    assert np.abs(ours - plain).max() <= 2


def test_a_very_long_image_costs_no_more_than_its_centre(monkeypatch) -> None:
    """2 x 20,000 pixels at 512 would be 512 x 5,120,000, or 7.9 GB; no array of more than 512 x 512 is made (3.5)."""
    pixels = np.zeros((20_000, 2, 3), np.uint8)
    pixels[9_999:10_001] = 255
    made: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def spy(self, size, *rest, **options):
        made.append(size)
        return resize(self, size, *rest, **options)

    monkeypatch.setattr(Image.Image, "resize", spy)
    assert square(pixels, 512)[100:400].min() > 200 and square(pixels.transpose(1, 0, 2), 512).shape == (512, 512, 3)
    assert made == [(512, 512)] * 2


def test_a_link_to_nothing_is_listed_and_found_missing(tmp_path: Path) -> None:
    """Data sets with files elsewhere (git-annex) hold such links; leaving them out silently would shrink the set."""
    (tmp_path / "a.png").symlink_to("gone.png")
    assert image_files(tmp_path) == [tmp_path / "a.png"]
    with pytest.raises(BadImage, match="missing"):
        read(tmp_path / "a.png")


def test_hidden_files_and_those_of_operating_systems_are_no_images(tmp_path: Path) -> None:
    """(3.5)"""
    hidden = [".DS_Store", "Thumbs.db", "sub/._b.png", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/sub/b.png"]
    for name in ["sub/b.png", "a.JPG", "notes.txt", *hidden]:
        (tmp_path / ".home" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".home" / name).write_bytes(b"")
    folder = tmp_path / ".home"  # a folder that is named by the user may itself be hidden
    assert [path.relative_to(folder).as_posix() for path in list_files(folder)] == ["a.JPG", "notes.txt", "sub/b.png"]
    assert [path.name for path in image_files(folder)] == ["a.JPG", "b.png"]
    (folder / "sub" / "c.gif").write_bytes(b"")
    with pytest.raises(EraseError, match=r"c\.gif: \.gif images are not read; save it as PNG, or remove it$"):
        image_files(folder)


def test_no_changed_bytes_end_in_anything_but_an_image_or_a_reason(mutants) -> None:
    """100 mutants of each format, with a fixed seed: bytes replaced, removed and repeated (4.10)."""
    refused = 0
    for image_format in ("PNG", "JPEG", "WEBP", "BMP", "TIFF"):
        for mutant in mutants(encoded(image(size=8), image_format), 100):
            try:
                pixels = read(mutant)
            except BadImage:
                refused += 1
            else:
                assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    assert refused > 200  # control: mutants do damage


def test_a_rotated_photograph_is_read_upright(tmp_path: Path) -> None:
    pixels = image()[:20]
    rotated = Image.Exif()
    rotated[0x0112] = 6  # "turn clockwise by 90 degrees to view"
    for name, options in (("plain.png", {}), ("rotated.png", {"exif": rotated})):
        (tmp_path / name).write_bytes(encoded(pixels, "PNG", **options))
    assert np.array_equal(read(tmp_path / "plain.png"), pixels)
    assert np.array_equal(read(tmp_path / "rotated.png"), np.rot90(pixels, -1))


def test_flat_is_a_spread_below_one_grey_level_in_every_channel() -> None:
    """A half of the pixels at v and a half at v + 2 have a standard deviation of 1, at v and v + 1 of a half."""
    shape = (16, 16, 3)
    grey = np.full(shape, 128, np.uint8)
    one, two, one_channel = grey.copy(), grey.copy(), grey.copy()
    one[::2] += 1
    two[::2] += 2
    one_channel[::2, :, 2] += 2
    rare = grey.copy()
    rare[0, 0] = 140  # one pixel of 256: a standard deviation of 0.75
    for pixels in (np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8), grey, one, rare):
        assert invalid_reason(pixels) == "flat"
    assert invalid_reason(np.broadcast_to(np.array([200, 30, 4], np.uint8), shape)) == "flat"  # a plain red
    for pixels in (two, one_channel, image()):
        assert invalid_reason(pixels) is None


def test_hash_is_of_pixels_and_shape_whatever_the_file_format(tmp_path: Path) -> None:
    pixels = image()
    write_png(tmp_path / "a.png", pixels)
    (tmp_path / "a.bmp").write_bytes(encoded(pixels, "BMP"))
    assert pixel_hash(read(tmp_path / "a.png")) == pixel_hash(read(tmp_path / "a.bmp")) == pixel_hash(pixels)
    assert pixel_hash(np.asfortranarray(pixels)) == pixel_hash(pixels)
    other = pixels.copy()
    other[0, 0, 0] ^= 1
    assert len({pixel_hash(pixels), pixel_hash(other), pixel_hash(pixels.reshape(16, 64, 3))}) == 3


@pytest.mark.parametrize("function", [invalid_reason, pixel_hash, lambda pixels: write_png("never.png", pixels)])
def test_only_uint8_rgb_is_taken(function) -> None:
    for pixels in (image() / 255, np.full((8, 8, 3), np.nan), image()[..., 0], np.zeros((0, 8, 3), np.uint8)):
        with pytest.raises(EraseError, match=r"needed are uint8 RGB, \[h, w, 3\]"):
            function(pixels)
