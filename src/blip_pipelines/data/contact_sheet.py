"""One picture of a data set: a few of its images with their captions, to look at before anything trains on them."""

import io
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from blip_pipelines.data.images import decode
from blip_pipelines.data.pairs import Pairs

SIDE, TEXT, MARGIN, COLUMNS = 96, 46, 8, 8
LETTERS, LINES = 18, 4


def contact_sheet(pairs: Path, images: Path, count: int = 32, split: str = "train") -> bytes:
    """A PNG of `count` rows of a split, spread evenly over the table; equal data give equal bytes."""
    table = Pairs.open(pairs, images).select(split=split)
    rows = np.unique(np.linspace(0, max(len(table) - 1, 0), min(count, len(table))).round().astype(np.int64))
    sheet = Image.new(
        "RGB", (COLUMNS * (SIDE + MARGIN) + MARGIN, -(-len(rows) // COLUMNS) * (SIDE + TEXT) + MARGIN), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for place, (row, caption) in enumerate(zip(rows, table.captions(rows), strict=True)):
        left = MARGIN + place % COLUMNS * (SIDE + MARGIN)
        top = MARGIN + place // COLUMNS * (SIDE + TEXT)
        picture = decode(table.image_bytes(int(row)), limits=None)
        picture.thumbnail((SIDE, SIDE))
        sheet.paste(picture, (left + (SIDE - picture.width) // 2, top + (SIDE - picture.height) // 2))
        lines = textwrap.wrap(caption, LETTERS, max_lines=LINES, placeholder="…")
        draw.multiline_text((left, top + SIDE), "\n".join(lines), "black", font, spacing=0)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()
