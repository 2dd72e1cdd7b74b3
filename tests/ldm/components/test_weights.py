"""Headers of safetensors files, whole and damaged in every bit; shards, variants; numbers that are not finite."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ldm
from ldm.components.weights import check_finite, read_header, read_headers
from ldm.errors import UserError

TENSORS = {"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.ones(3, dtype=torch.float16)}
STEM = "diffusion_pytorch_model"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "unet" / f"{STEM}.safetensors"
    path.parent.mkdir()
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def line(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_file_tells_its_tensors(file):
    tensors = read_header(file)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} == {
        "weight": ("F32", (3, 4)),
        "bias": ("F16", (3,)),
    }
    content = file.read_bytes()
    stored = torch.frombuffer(bytearray(content[tensors["weight"].begin : tensors["weight"].end]), dtype=torch.float32)
    assert torch.equal(stored.reshape(3, 4), TENSORS["weight"])
    check_finite("unet", read_headers(file.parent, STEM))


@pytest.mark.parametrize("kept", [0, 5, 8, 20, -1])
def test_a_file_cut_anywhere_promises_more_than_it_has(file, kept):
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    size = len(whole[:kept])
    length = int.from_bytes(whole[:8], "little")
    promised = 8 if size < 8 else 8 + length if size < 8 + length else len(whole)
    assert line(read_header, file) == (
        f"unet/{STEM}.safetensors is damaged: its header promises {promised} bytes, the file has {size}. "
        "Download it again."
    )


def test_bytes_too_many_are_noticed(file):
    whole = file.read_bytes()
    file.write_bytes(whole + b"more")
    assert f"promises {len(whole)} bytes, the file has {len(whole) + 4}" in line(read_header, file)


@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html><html><body>404</body></html>", b"\xff" * 64, b"version https://git-lfs.github.com/"]
)
def test_what_is_something_else_promises_what_it_has_not(file, content):
    file.write_bytes(content)
    promised = 8 + int.from_bytes(content[:8], "little")
    assert f"promises {promised} bytes, the file has {len(content)}. Download it again." in line(read_header, file)


def test_any_bit_of_a_header_that_flips_is_noticed_or_renames_a_tensor(file):
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    expected = read_header(file)
    for position in range(8 + length):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            file.write_bytes(damaged)
            try:
                found = read_header(file)
            except UserError as error:
                assert "is damaged" in str(error)
            else:
                assert set(found) != set(expected)  # which the comparison with the configuration tells


@pytest.mark.parametrize(
    "change",
    [
        {"weight": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 40]}},
        {"weight": {"dtype": "F32", "shape": [-3, -4], "data_offsets": [6, 54]}},
        {"weight": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}},
        {"weight": {"dtype": "F32", "shape": [True, 12], "data_offsets": [6, 54]}},
        {"weight": {"dtype": "F99", "shape": [3, 4], "data_offsets": [6, 54]}},
        {"weight": 5},
        {"__metadata__": {"format": "tf"}},
        {"weight": json.loads("[" * 400 + "]" * 400)},
    ],
)
def test_a_header_that_contradicts_itself_cannot_be_read(file, change):
    content = {"bias": {"dtype": "F16", "shape": [3], "data_offsets": [0, 6]}}
    content["weight"] = {"dtype": "F32", "shape": [3, 4], "data_offsets": [6, 54]}
    for given, good in ((content, True), (content | change, False)):
        header = json.dumps(given).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(54))
        if good:
            assert len(read_header(file)) == 2
        else:
            assert "its header cannot be read" in line(read_header, file)


def test_shards_are_read_together_and_one_that_is_missing_is_named(file):
    folder = file.parent
    file.unlink()
    save_file({"weight": TENSORS["weight"]}, folder / "a.safetensors")
    save_file({"bias": TENSORS["bias"]}, folder / "b.safetensors")
    index = folder / f"{STEM}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": "a.safetensors", "bias": "b.safetensors"}}))
    assert set(read_headers(folder, STEM)) == {"weight", "bias"}
    (folder / "b.safetensors").unlink()
    assert line(read_headers, folder, STEM) == f"component 'unet' missing: expected {folder / 'b.safetensors'}"
    for outside in ("../secret.safetensors", "b.bin"):
        index.write_text(json.dumps({"weight_map": {"weight": outside}}))
        assert "no safetensors file beside it" in line(read_headers, folder, STEM)
    index.write_text(json.dumps({"weight_map": {"weight": ["a"]}}))
    assert "does not say which file" in line(read_headers, folder, STEM)


def test_a_variant_is_taken_where_it_is_and_told_where_it_is_all_there_is(file):
    half = {name: tensor.half() for name, tensor in TENSORS.items()}
    save_file(half, file.with_name(f"{STEM}.fp16.safetensors"))
    assert {tensor.dtype for tensor in read_headers(file.parent, STEM, "fp16").values()} == {"F16"}
    assert {tensor.dtype for tensor in read_headers(file.parent, STEM).values()} == {"F16", "F32"}
    assert len(read_headers(file.parent, STEM, "ema")) == 2  # falls back, as Diffusers does
    file.unlink()
    assert line(read_headers, file.parent, STEM) == (
        f"component 'unet' missing: expected {file}; only the variant 'fp16' is there: open it with variant='fp16'"
    )


def test_pickles_are_not_opened(file):
    file.rename(file.with_suffix(".bin"))
    assert line(read_headers, file.parent, STEM) == "unet: only a pickle (.bin) is there; convert it to safetensors"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_found_wherever_it_is(file, dtype, value):
    largest = torch.finfo(dtype).max
    good = torch.full((2**18 + 7,), largest, dtype=dtype)
    good[::2] = -largest
    for place in (None, 0, 2**18 - 1, len(good) - 1):
        tensor = good.clone()
        if place is not None:
            tensor[place] = value
        save_file({"a": torch.zeros(0), "ids": torch.arange(3), "b": tensor}, file)
        tensors = read_headers(file.parent, STEM)
        if place is None:
            check_finite("unet", tensors)
        else:
            assert line(check_finite, "unet", tensors).startswith("unet: 'b' is not finite")


def test_weights_are_looked_through_in_little_memory(file):
    """The mapped file counts in the address space; beyond it there is room for half as much again."""
    size = 2**26
    save_file({"weight": torch.zeros(size // 4)}, file)
    script = f"""
import resource, sys
from pathlib import Path
import numpy
from ldm.components import weights

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {size} + {size // 2},) * 2)
weights.check_finite("unet", weights.read_headers(Path(sys.argv[1]), "{STEM}"))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(ldm.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", script, str(file.parent)], check=True, env=environment)
