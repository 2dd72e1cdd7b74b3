"""Compiled blocks compute what they did, under the names they had."""

import os
import sys
from pathlib import Path

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from ldm.training.compiled import compile_blocks, discard_unfinished, outermost


def test_blocks_are_compiled_in_place():
    torch.manual_seed(0)
    model = nn.Sequential(
        ResnetBlock2D(in_channels=4, out_channels=4, groups=2, temb_channels=None), nn.Conv2d(4, 1, 1)
    )
    names, x = list(model.state_dict()), torch.randn(2, 4, 8, 8)

    def computed():
        hidden = model[0](x, None)
        model[1](hidden).sum().backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        return hidden.detach(), gradients

    eager = computed()
    compile_blocks(model)
    torch._dynamo.utils.counters.clear()
    compiled = computed()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # the block's; the convolution is none
    assert list(model.state_dict()) == names
    torch.testing.assert_close(compiled, eager)


def test_less_is_kept_for_the_backward_pass_and_the_gradients_stay():
    kept, gradients = {}, {}
    for share in (1.0, 0.2):
        torch.manual_seed(0)
        block = ResnetBlock2D(in_channels=16, out_channels=16, groups=2, temb_channels=None)
        compile_blocks(block, share)
        torch._dynamo.reset()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x):
            block(torch.randn(2, 16, 32, 32), None).square().sum().backward()
        kept[share], gradients[share] = sum(sizes), [parameter.grad for parameter in block.parameters()]
    torch._functorch.config.activation_memory_budget = 1.0
    assert kept[0.2] < 0.8 * kept[1.0]
    torch.testing.assert_close(gradients[0.2], gradients[1.0])


def test_a_block_inside_another_is_part_of_it():
    model = nn.Sequential(nn.Sequential(Transformer2DModel(2, 4, in_channels=8, norm_num_groups=2)), nn.Conv2d(8, 1, 1))
    assert outermost(model) == [model[0][0]]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere libraries are no ELF files")
def test_libraries_that_a_killed_run_left_half_linked_are_removed(tmp_path):
    library = (Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so").read_bytes()
    folder = tmp_path / "ab"
    folder.mkdir()
    half = {
        "empty": b"",
        "header": library[:40],
        "half": library[: len(library) // 2],
        "unwritten_header": bytes(64) + library[64:],
    }
    for name, content in (half | {"whole": library, "being_linked": b""}).items():
        (folder / f"{name}.so").write_bytes(content)
        if name != "being_linked":
            os.utime(folder / f"{name}.so", (0, 0))
    assert {path.stem for path in discard_unfinished(tmp_path)} == set(half)
    assert {path.stem for path in folder.iterdir()} == {"whole", "being_linked"}
