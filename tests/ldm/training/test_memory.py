"""Micro-batches in as much memory as there is: a real limit, set by the system."""

import gc
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel

from ldm.data.order import Share
from ldm.errors import RunError, UserError
from ldm.training import memory

LIMITED = """
import resource
import torch
from accelerate import Accelerator
from ldm.data.order import Share
from ldm.training.memory import fitting_share

accelerator, model = Accelerator(cpu=True), torch.nn.Linear(1, 1)
def trial(micro_batch_size):
    torch.empty(micro_batch_size * 2**22, dtype=torch.uint8).fill_(1)  # 4 MiB a sample
trial(1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20, resource.RLIM_INFINITY))
share = fitting_share(accelerator, Share(96, 2), model, trial)
print(share.accumulation, share.micro_batch_size, accelerator.gradient_accumulation_steps)
"""


def test_the_largest_micro_batch_that_fits():
    said = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True, timeout=120,
                          env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert said.stdout.split() == ["4", "24", "4"]  # of 48 · 4 MiB, 100 are there: 24 · 4 = 96


def short_of_memory(largest):
    def trial(micro_batch_size):
        if micro_batch_size > largest:
            torch.empty(2**60, dtype=torch.uint8)  # more than any machine has: the allocator's own error

    return trial


@pytest.mark.parametrize(("largest", "accumulation"), [(64, 1), (63, 2), (20, 4), (1, 64)])
def test_accumulation_divides_the_batch(largest, accumulation):
    share = memory.fitting_share(Accelerator(cpu=True), Share(64), torch.nn.Linear(1, 1), short_of_memory(largest))
    assert share.accumulation == accumulation and share.micro_batch_size * accumulation == 64


def test_not_even_one():
    with pytest.raises(RunError, match="not even one sample fits"):
        memory.fitting_share(Accelerator(cpu=True), Share(8), torch.nn.Linear(1, 1), short_of_memory(0))


def test_other_failures_of_the_trial_are_told():
    def trial(_):
        raise RuntimeError("shapes disagree")

    with pytest.raises(RuntimeError, match="shapes disagree"):
        memory.fitting_share(Accelerator(cpu=True), Share(8), torch.nn.Linear(1, 1), trial)


def test_gradients_are_the_same_with_activations_computed_twice():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    x, gradients, saved = torch.randn(2, 3, 8, 8), [], []

    for twice in (False, True):
        if twice:
            memory.checkpoint_gradients(unet)
        kept = 0

        def keep(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            unet(x, 5).sample.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in unet.parameters()])
        saved.append(kept)
        unet.zero_grad()
    for once, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, once)
    assert saved[1] < 0.5 * saved[0]


def test_networks_that_cannot():
    with pytest.raises(UserError, match="Linear cannot do it"):
        memory.checkpoint_gradients(torch.nn.Linear(1, 1))


def test_memory_that_is_no_longer_used_is_given_back():
    """64 MiB in reference cycles, between blocks that stay."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    gc.disable()  # so that the cycles are there until they are asked for
    try:
        kept = []
        for _ in range(2**10):
            cycle = [b"x" * 2**16]
            cycle.append(cycle)
            kept.append(b"x" * 1000)
        del cycle
        before = resident()
        memory.give_back()
    finally:
        gc.enable()
    assert len(kept) == 2**10 and resident() < before - 48
