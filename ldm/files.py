"""Files that are whole or absent: written under another name, forced to disk, then renamed."""

import hashlib
import os
from pathlib import Path
from typing import Any


def expanded(name: str | Path) -> Path:
    """A path with ~ as the user's folder, and as it stands where there is no such user; `Path.expanduser` raises."""
    return Path(os.path.expanduser(name))


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Forces a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_readable(path: Path) -> None:
    """Gives a file the mode that the umask asks for: safetensors writes 0600, which other users cannot read."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def publish(temporary: Path, final: Path) -> None:
    """Renames a finished file of the same folder to its own name; both file and name are on disk when this returns."""
    make_readable(temporary)
    flush(temporary)
    temporary.replace(final)
    flush(final.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a text file that is never seen half-written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    publish(temporary, path)


def write_image(image: Any, path: Path) -> None:
    """Saves an image of PIL, in the format that the file's ending names, so that it is never seen half-written."""
    temporary = path.with_stem(f".{path.stem}.{os.getpid()}")
    try:
        image.save(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
