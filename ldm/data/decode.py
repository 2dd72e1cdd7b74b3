"""From a stored picture, whatever its kind, to upright RGB of a fixed size.

Handled: EXIF rotation, transparency (becomes white), palettes, grey, CMYK, 16 bits a channel (scaled to 8), animations
(their first frame). Refused: pictures of more pixels than Pillow deems safe, before they are decoded.
"""

import hashlib
import io

import numpy as np
from PIL import Image, ImageOps

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def open_picture(stored: bytes | str) -> Image.Image:
    """A picture from its file's bytes, or its path; nothing but the header is read.

    Raises:
        ValueError: a decompression bomb. Whatever else Pillow raises where it knows no such file.
    """
    try:
        image = Image.open(io.BytesIO(stored) if isinstance(stored, bytes) else stored)
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} × {image.height} pixels are more than {Image.MAX_IMAGE_PIXELS:,}")
    return image


def digest(image: Image.Image) -> bytes:
    """sha256 of the file that a picture not decoded yet was opened from; of a drawn one, of its pixels."""
    if getattr(image, "fp", None) is None:
        return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).digest()
    image.fp.seek(0)
    return hashlib.sha256(image.fp.read()).digest()


def upright(image: Image.Image, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """RGB, as a viewer would show it, with `background` where it is transparent.

    Raises:
        ValueError: floating-point values, whose range is anyone's guess.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in SIXTEEN_BITS:  # Pillow's own conversion would cut all but the lowest 8 bits' worth to white
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray(np.clip(values // 257 if values.max() > 255 else values, 0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its values are floating-point numbers; store it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def cropped(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scaled until it covers height × width pixels, of which the middle is kept."""
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def to_square(image: Image.Image, size: int) -> Image.Image:
    """Upright RGB of size × size: the shorter side scaled, the middle kept. Raises as `upright` does."""
    return cropped(upright(image), size, size)
