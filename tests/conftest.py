"""What tests of several folders write: tar shards of captioned pictures."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image


def _write_tar(path: Path, members: dict[str, bytes | str | dict | Image.Image]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            if isinstance(content, Image.Image):
                buffer = io.BytesIO()
                content.save(buffer, "JPEG" if name.endswith("jpg") else "PNG")
                content = buffer.getvalue()
            elif isinstance(content, dict):
                content = json.dumps(content)
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="session")
def write_tar() -> Callable[..., Path]:
    """(path, {name of a member: bytes, text, JSON object or picture}) -> path: writes a tar archive."""
    return _write_tar


@pytest.fixture(scope="session")
def write_shards() -> Callable[..., list[Path]]:
    """(folder, sizes, side) -> paths of shard-000.tar … with so many samples each. Picture k of shard s is of the grey
    10 · s + k, its left half black; its caption is "grey <10 · s + k>"."""

    def write(folder: Path, sizes: list[int], side: int = 8) -> list[Path]:
        paths = []
        for shard, size in enumerate(sizes):
            members = {}
            for number in range(10 * shard, 10 * shard + size):
                picture = Image.new("RGB", (side, side), (number,) * 3)
                picture.paste((0, 0, 0), (0, 0, side // 2, side))
                members |= {f"{number:04d}.png": picture, f"{number:04d}.txt": f"grey {number}"}
            paths.append(_write_tar(folder / f"shard-{shard:03d}.tar", members))
        return paths

    return write
