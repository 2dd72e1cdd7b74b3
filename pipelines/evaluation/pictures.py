"""The pictures of a report: what was drawn, and what it stands beside."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipelines.evaluation.stored import Pictures

TILE = 96
"""Pixels of a small picture's side on the sheet, at least."""
LARGEST_TILE = 256
GAP, LINE = 4, 17
FONT = ImageFont.load_default(size=13)
LABEL = 150
"""Pixels of a row's label, at most."""


def rows(
    labelled: Sequence[tuple[str, Sequence[Tensor]]], beneath: Sequence[Sequence[str]] | None = None
) -> Image.Image:
    """A row of pictures, uint8 (3, H, W), behind each label. beneath: texts of a line, under each picture."""
    side = _tile(labelled[0][1][0])
    words = [_wrapped(label, LABEL, side // LINE) for label, _ in labelled]
    margin = round(max(FONT.getlength(line) for lines in words for line in lines)) + 3 * GAP
    height = side + GAP + (LINE if beneath is not None else 0)
    width = margin + max(len(pictures) for _, pictures in labelled) * (side + GAP)
    sheet = Image.new("RGB", (width, len(labelled) * height + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (lines, (_, pictures)) in enumerate(zip(words, labelled, strict=True)):
        top = number * height + GAP
        pen.multiline_text((GAP, top + side // 2), "\n".join(lines), "black", FONT, anchor="lm")
        for column, picture in enumerate(pictures):
            left = margin + column * (side + GAP)
            sheet.paste(_enlarged(picture, side), (left, top))
            if beneath is not None:
                pen.text((left + side // 2, top + side + LINE // 2), beneath[number][column], "black", FONT, "mm")
    return sheet


def tiles(pictures: Sequence[Tensor], captions: Sequence[str], columns: int = 8) -> Image.Image:
    """Pictures, uint8 (3, H, W), with their captions beneath."""
    side = _tile(pictures[0], smallest=112)
    lines = [_wrapped(caption, side, 4) for caption in captions]
    height = side + GAP + LINE * max(map(len, lines))
    count = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (min(columns, len(pictures)) * (side + GAP) + GAP, count * height + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (picture, words) in enumerate(zip(pictures, lines, strict=True)):
        left, top = GAP + number % columns * (side + GAP), GAP + number // columns * height
        sheet.paste(_enlarged(picture, side), (left, top))
        pen.multiline_text((left + side // 2, top + side + 1), "\n".join(words), "black", FONT, "ma", 2, "center")
    return sheet


def samples(drawn: Pictures, captions: Sequence[str], shown: int = 40, fewest: int = 4) -> Image.Image:
    """The first pictures, not selected: a row for each caption where these come again and again, or else each with its
    own beneath."""
    of: dict[str, list[int]] = {}
    for number, caption in enumerate(captions):
        of.setdefault(caption, []).append(number)
    if len(of) <= 16 and min(map(len, of.values())) >= fewest:
        return rows([(caption, [drawn[number] for number in of[caption][:10]]) for caption in sorted(of)])
    return tiles(list(drawn.first(shown)), captions[:shown])


def beside(originals: Pictures, restored: Pictures, pairs: int = 10, lines: int = 2) -> Image.Image:
    """Originals, and their reconstructions under them."""
    labelled = []
    for start in range(0, min(pairs * lines, len(originals)), pairs):
        places = range(start, min(start + pairs, len(originals)))
        for label, some in (("original", originals), ("reconstruction", restored)):
            labelled.append((label, [some[place] for place in places]))
    return rows(labelled)


def neighbours(
    drawn: Sequence[Tensor],
    captions: Sequence[str],
    references: Sequence[Sequence[Tensor]],
    distances: Sequence[Sequence[float]],
) -> Image.Image:
    """A row a picture: it, then its nearest training images, their distances beneath."""
    labelled = [(caption, [picture, *near]) for caption, picture, near in zip(captions, drawn, references, strict=True)]
    return rows(labelled, [["drawn", *(f"{value:.3g}" for value in row)] for row in distances])


def curves(varied: dict[str, list[dict[str, float]]]) -> Figure:
    """A row of panels for each thing that was varied, a panel for each figure."""
    names = [list(points[0])[1:] for points in varied.values()]
    figure = Figure((3.4 * max(map(len, names)), 2.8 * len(varied)), layout="constrained")
    panels = figure.subplots(len(varied), max(map(len, names)), squeeze=False)
    for line, (what, points) in zip(panels, varied.items(), strict=True):
        x = next(iter(points[0]))
        for axes, name in zip(line, list(points[0])[1:], strict=False):
            axes.plot([point[x] for point in points], [point[name] for point in points], "o-", color="C0")
            axes.set(title=name, xlabel=what)
            axes.title.set_fontsize(9)
            axes.grid(alpha=0.3)
        for axes in line[len(points[0]) - 1 :]:
            axes.set_visible(False)
    return figure


def side_by_side(left: Path, right: Path, names: tuple[str, str]) -> Image.Image:
    """Two pictures of files, each with its name above."""
    images = [Image.open(path).convert("RGB") for path in (left, right)]
    sheet = Image.new("RGB", (sum(i.width for i in images) + GAP, max(i.height for i in images) + 2 * LINE), "white")
    pen, x = ImageDraw.Draw(sheet), 0
    for image, name in zip(images, names, strict=True):
        pen.text((x + image.width // 2, LINE), name, "black", ImageFont.load_default(size=14), "mm")
        sheet.paste(image, (x, 2 * LINE))
        x += image.width + GAP
    return sheet


def _tile(picture: Tensor, smallest: int = TILE) -> int:
    side = picture.shape[-1]
    return min(LARGEST_TILE, side * max(1, -(-smallest // side)))


def _enlarged(picture: Tensor, side: int) -> Image.Image:
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    whole = side % image.width == 0  # pixels as squares, where they come out even
    return image.resize((side, side), Image.Resampling.NEAREST if whole else Image.Resampling.BICUBIC)


def _wrapped(text: str, width: int, most: int) -> list[str]:
    """At most so many lines, each no wider than `width` pixels, with as many characters as then fit."""
    for count in range(width // 4, 1, -1):
        lines = textwrap.wrap(text, count, max_lines=most, placeholder="…")
        if all(FONT.getlength(line) <= width for line in lines):
            return lines or [""]
    return ["…"]
