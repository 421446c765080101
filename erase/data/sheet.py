"""Images in rows on one sheet, with captions."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFilter, ImageFont

CELL = 128  # pixels of an image in the sheet


def grid(
    rows: Sequence[tuple[str, Sequence[Image.Image], bool]], captions: Mapping[int, Sequence[str]], cell: int = CELL
) -> Image.Image:
    """Rows of images with a title each, blurred where the row says so; `captions` stand below the rows they name."""
    font = ImageFont.load_default(13)
    title, margin, text = 92, 6, 54
    width = title + max(len(images) for _, images, _ in rows) * (cell + margin) + margin
    height = margin + sum(cell + margin + (text if i in captions else 0) for i in range(len(rows)))
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    y = margin
    for number, (name, images, blur) in enumerate(rows):
        pen.multiline_text((margin, y + cell // 3), _wrapped(name, title - margin, font), fill="black", font=font)
        for column, image in enumerate(images):
            scaled = image.resize((cell, cell), Image.Resampling.LANCZOS)
            scaled = scaled.filter(ImageFilter.GaussianBlur(cell / 10)) if blur else scaled
            sheet.paste(scaled, (title + column * (cell + margin), y))
        y += cell + margin
        for column, caption in enumerate(captions.get(number, ())):
            place = (title + column * (cell + margin), y)
            pen.multiline_text(place, _wrapped(caption, cell, font), fill="dimgray", font=font)
        y += text if number in captions else 0
    return sheet


def _wrapped(text: str, width: int, font: Any) -> str:
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width or not lines[-1]:
            lines[-1] = joined
        else:
            lines.append(word)
    return "\n".join(lines[:3])
