"""Folders with the caption of `name.png` in `name.txt` beside it, in sub-folders or not."""

from pathlib import Path

from ldm.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
NOT_TRAINED_ON = ("test", "validation", "valid", "val", "dev")
"""Names of splits, the one that is preferred first."""
COLUMNS = ("image", "text")
"""What such a folder holds, as tables name it."""


def is_folder_of_text_files(source: str) -> bool:
    """Whether captions lie in .txt files beside images; a lone LICENSE.txt is no caption."""
    folder = Path(source)
    if not folder.is_dir() or any(folder.glob("metadata.*")):
        return False
    suffixes = {*IMAGE_SUFFIXES, *(suffix.upper() for suffix in IMAGE_SUFFIXES)}
    return any(path.with_suffix(suffix).is_file() for path in folder.rglob("*.txt") for suffix in suffixes)


def split_folders(folder: Path) -> dict[str, Path]:
    """Name -> folder of each split: of the sub-folders, where all images lie in some that are named as splits are. Else
    there are none: a `train` among others holds pictures of trains."""
    there = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    parts = {path.name: path for path in there if path.is_dir()}
    loose = any(path.suffix.lower() in IMAGE_SUFFIXES for path in there)
    return {} if loose or not {"train", *NOT_TRAINED_ON}.issuperset(parts) else parts


def images_in(folder: Path, split: str) -> tuple[list[Path], list[Path]]:
    """The images of a split, those with a caption and those without, in the order of their paths.

    Raises:
        UserError: no such split, or no image with a caption in it.
    """
    there = split_folders(folder) or {"train": folder}
    if split not in there:
        raise UserError(f"data.split {split}: {folder} has {', '.join(there)}, by the names of its sub-folders")
    paths = [path for path in sorted(there[split].rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES]
    captioned, others = [], []
    for path in paths:
        (captioned if path.with_suffix(".txt").is_file() else others).append(path)
    if not captioned:
        raise UserError(f"data.source {there[split]}: no image there has a .txt file of the same name beside it")
    return captioned, others


def caption_of(image: Path) -> str:
    """Raises UserError where its file is no text."""
    path = image.with_suffix(".txt")
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise UserError(f"data.source: caption {path} cannot be read: {reason}; mend it, or remove its image") from None
