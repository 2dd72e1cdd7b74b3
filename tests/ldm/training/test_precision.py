import pytest
import torch
from torch import nn

from ldm.training import precision


@pytest.fixture(autouse=True)
def attention_as_it_was():
    before = torch.backends.cuda.flash_sdp_enabled()
    yield
    torch.backends.cuda.enable_flash_sdp(before)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 5), nn.LayerNorm(5)
    )


@pytest.mark.parametrize(("name", "theirs"), [("fp32", "no"), ("bf16", "bf16"), ("fp16", "fp16")])
def test_a_named_precision_is_taken(name, theirs):
    assert precision.resolve(name) == theirs


def test_auto_is_something_this_machine_computes():
    name = precision.resolve("auto")
    assert name in ("no", "bf16", "fp16")
    if not torch.cuda.is_available():
        assert (name == "bf16") == precision.cpu_multiplies_bf16()


def test_norms_take_and_give_what_autocast_computes_in():
    model, x = network(), torch.randn(2, 3, 6, 6)
    exact, seen = model(x), []
    precision.prepare(model, "bf16", torch.device("cpu"))
    for module in (model[1], model[5]):
        module.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        close = model(x)
    assert seen == [(torch.bfloat16, torch.bfloat16)] * 2
    torch.testing.assert_close(close.float(), exact, rtol=0.1, atol=0.05)


def test_fp32_is_left_alone():
    model, before = network(), torch.backends.cuda.flash_sdp_enabled()
    precision.prepare(model, "no", torch.device("cpu"))
    assert [type(module) for module in model] == [type(module) for module in network()]
    assert torch.backends.cuda.flash_sdp_enabled() == before


def test_a_schedule_is_as_fine_as_a_device_has_it():
    assert precision.finest(torch.device("mps")) is torch.float32  # which refuses float64
    assert precision.finest(torch.device("cpu")) is precision.finest(torch.device("cuda")) is torch.float64
