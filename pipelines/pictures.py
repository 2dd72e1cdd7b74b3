"""Pictures and masks as a caller may give them: PIL, arrays, tensors, or lists of one kind."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.decode import BLACK, WHITE, upright
from ldm.errors import UserError
from pipelines.checks import check_size

Picture = Image.Image | np.ndarray | Tensor
Pictures = Picture | list[Picture]


def read_pictures(name: str, pictures: Pictures) -> list[Image.Image] | Tensor:
    """Pictures of one size -> RGB images, where they are PIL's, or else (N, 3, H, W) in [0, 1].

    Arrays are (H, W, 3) or (N, H, W, 3), tensors (3, H, W) or (N, 3, H, W); in [0, 1], or [-1, 1] where any value is
    negative, or whole numbers 0..255. Raises `UserError` for anything else.
    """
    kind, parts = _of_one_kind(name, pictures)
    if kind is Image.Image:
        return [_upright(name, part, WHITE) for part in parts]
    tensor = _joined(name, kind, parts, "(H, W, 3) or (N, H, W, 3)", "(3, H, W) or (N, 3, H, W)")
    if tensor.shape[1] != 3:
        raise UserError(f"{name} has {tensor.shape[1]} channels; give 3, red, green and blue")
    return (tensor + 1) / 2 if tensor.min() < 0 else tensor


def read_masks(name: str, masks: Pictures) -> list[Image.Image] | Tensor:
    """Masks of one size -> grey images, where they are PIL's, or else (N, 1, H, W) in [0, 1]; 1, white, is painted.

    Arrays and tensors are (H, W), (N, H, W), or with one channel where pictures have three. Raises `UserError` for
    anything else.
    """
    kind, parts = _of_one_kind(name, masks)
    if kind is Image.Image:
        return [_upright(name, part, BLACK).convert("L") for part in parts]
    if kind is np.ndarray:
        parts = [part[..., None] if part.ndim == 2 or part.shape[-1] != 1 else part for part in parts]
    else:
        parts = [part[None] if part.ndim == 2 else part[:, None] if part.ndim == 3 else part for part in parts]
    tensor = _joined(name, kind, parts, "(H, W) or (N, H, W)", "(H, W) or (N, 1, H, W)", mask=True)
    if tensor.shape[1] != 1:
        raise UserError(f"{name} has {tensor.shape[1]} channels; give 1")
    if tensor.min() < 0:
        raise UserError(f"{name} has values down to {tensor.min():g}; give 0, kept, to 1, painted")
    return tensor


def size_of(pictures: list[Image.Image] | Tensor) -> tuple[int, int]:
    """(H, W) in pixels, of what `read_pictures` or `read_masks` gave."""
    return tuple(pictures.shape[2:]) if isinstance(pictures, Tensor) else pictures[0].size[::-1]


def size_to_draw(size: tuple[int, int], height: int | None, width: int | None, multiple: int) -> tuple[int, int]:
    """The height and width asked for, or else the picture's own, rounded down to what the autoencoder's factor divides.

    Raises `UserError` for sizes that cannot be drawn.
    """
    own = (max(multiple, side // multiple * multiple) for side in size)
    height, width = (side if asked is None else asked for asked, side in zip((height, width), own, strict=True))
    return check_size("height", height, multiple), check_size("width", width, multiple)


def as_images(pictures: list[Image.Image] | Tensor) -> list[Image.Image]:
    """What `read_pictures` gave, as images of 8 bits."""
    if not isinstance(pictures, Tensor):
        return pictures
    pixels = (pictures.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(one) for one in pixels]


def _of_one_kind(name: str, pictures: object) -> tuple[type, list]:
    parts = list(pictures) if isinstance(pictures, list | tuple) else [pictures]
    if not parts:
        raise UserError(f"{name} is an empty list; give at least one picture")
    for kind in (Image.Image, np.ndarray, Tensor):
        if all(isinstance(part, kind) for part in parts):
            sizes = sorted({part.size if kind is Image.Image else tuple(part.shape) for part in parts})
            if 0 in sizes[0]:
                raise UserError(f"{name} holds a picture of size {sizes[0]}, without a pixel")
            if len(sizes) > 1:
                raise UserError(
                    f"{name} holds pictures of several sizes, {sizes[0]} and {sizes[1]}; give them one size"
                )
            return kind, parts
    kinds = sorted({type(part).__name__ for part in parts})
    raise UserError(f"{name} is of {' and '.join(kinds)}; give a PIL image, an array, a tensor, or a list of one kind")


def _joined(name: str, kind: type, parts: list, arrays: str, tensors: str, mask: bool = False) -> Tensor:
    """(N, C, H, W), floating, its whole numbers of 8 bits divided by 255; those of a mask may be 0 and 1, too."""
    wanted = arrays if kind is np.ndarray else tensors
    if parts[0].ndim not in (3, 4) or 0 in parts[0].shape:
        raise UserError(f"{name} has shape {tuple(parts[0].shape)}; it must be {wanted}")
    if kind is np.ndarray:
        if parts[0].dtype.kind not in "biuf":
            raise UserError(f"{name} is an array of {parts[0].dtype}; give numbers in [0, 1]")
        parts = [torch.from_numpy(np.array(part)).movedim(-1, -3) for part in parts]
    tensor = torch.stack(parts) if parts[0].ndim == 3 else torch.cat(parts)
    if tensor.is_complex():
        raise UserError(f"{name} is a tensor of {tensor.dtype}; give numbers in [0, 1]")
    whole = not tensor.is_floating_point() and tensor.dtype != torch.bool
    tensor = tensor.float() / 255 if whole and not (mask and tensor.max() <= 1) else tensor.float()
    low, high = tensor.aminmax()
    if not -1 <= low <= high <= 1:  # nor where one is not a number
        raise UserError(
            f"{name} has values from {low:g} to {high:g}; give [0, 1], [-1, 1], or whole numbers from 0 to 255"
        )
    return tensor


def _upright(name: str, image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """RGB, as its EXIF says that it was held."""
    try:
        return upright(image, background)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{name} holds a picture that cannot be read ({' '.join(str(error).split())})") from None
