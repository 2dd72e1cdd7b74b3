"""Optimisation: schedules have their closed form, and state survives a round trip exactly."""

import math
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel

from ldm.config import TrainingConfig
from ldm.errors import UserError
from ldm.training import optim


def test_warm_up_then_cosine():
    config = TrainingConfig(max_steps=110, warmup_steps=10)
    factors = [optim.learning_rate_factor(step, config) for step in range(110)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[60] == pytest.approx(0.5) and factors[35] == pytest.approx(0.5 + math.sqrt(0.5) / 2)
    assert factors[10:] == sorted(factors[10:], reverse=True) and 0 < factors[-1] < 1e-3


def test_constant_after_warm_up():
    config = TrainingConfig(max_steps=20, warmup_steps=4, learning_rate_schedule="constant")
    assert [optim.learning_rate_factor(step, config) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def step_once(model, optimizer, ema, step):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    optim.update_average(ema, model)


def new(optimizer="adamw"):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
    config = TrainingConfig(learning_rate=0.01, weight_decay=0.1, optimizer=optimizer)
    return model, optim.build(model, config), optim.moving_average(model, 0.9)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_restored_state_goes_on_bit_for_bit(name):
    model, optimizer, ema = new(name)
    for step in range(5):
        step_once(model, optimizer, ema, step)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    kept = {name: value.clone() for name, value in optim.optimizer_tensors(optimizer).items()}
    averages = {name: value.clone() for name, value in optim.ema_tensors(ema, model).items()}
    for step in range(5, 9):
        step_once(model, optimizer, ema, step)

    other, other_optimizer, other_ema = new(name)
    other.load_state_dict(weights)
    optim.load_optimizer(other_optimizer, kept)
    optim.load_ema(other_ema, other, averages, 5)
    for step in range(5, 9):
        step_once(other, other_optimizer, other_ema, step)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(ema.shadow_params, other_ema.shadow_params, strict=True):
        assert torch.equal(a, b)


def test_the_average_is_diffusers_own():
    model, optimizer, ema = new()
    theirs = EMAModel(model.parameters(), decay=0.9)
    for step in range(12):  # past the warm-up of the decay
        step_once(model, optimizer, ema, step)
        theirs.step(model.parameters())
    assert ema.cur_decay_value == theirs.cur_decay_value and ema.optimization_step == 12
    torch.testing.assert_close(ema.shadow_params, theirs.shadow_params, rtol=1e-6, atol=1e-7)


def test_an_average_of_decay_0_is_the_weights_and_no_copy():
    model, optimizer, _ = new()
    ema = optim.moving_average(model, 0)
    for step in range(3):
        step_once(model, optimizer, ema, step)
    weights = list(model.parameters())
    for weight, average in zip(weights, ema.shadow_params, strict=True):
        assert average.data_ptr() == weight.data_ptr() and not average.requires_grad
    saved = {name: value.clone() for name, value in optim.ema_tensors(ema, model).items()}
    before = [weight.detach().clone() for weight in weights]
    with optim.averaged(ema, model):
        optim.load_ema(ema, model, saved, 3)
    ema.copy_to(weights)
    assert all(torch.equal(*pair) for pair in zip(weights, before, strict=True))


def test_vectors_are_not_decayed():
    model, optimizer, _ = new()
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(decays[id(p)] == (0.1 if p.ndim > 1 else 0.0) for p in model.parameters())


def test_averaged_weights_are_there_only_inside():
    model, optimizer, ema = new()
    for step in range(3):
        step_once(model, optimizer, ema, step)
    before = model[0].weight.detach().clone()
    with optim.averaged(ema, model):
        assert torch.equal(model[0].weight, ema.shadow_params[0]) and not model.training
        assert not torch.equal(model[0].weight, before)
    assert torch.equal(model[0].weight, before) and model.training


class Nested(torch.optim.SGD):
    """Keeps its state as bitsandbytes does: a count that is no tensor, and tensors one level down."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                moments = state.setdefault("quantised", {"levels": torch.zeros_like(parameter, dtype=torch.uint8)})
                moments["levels"] += 1
        super().step(closure)


def test_nested_state_goes_through_tensors():
    model = torch.nn.Linear(3, 2)
    optimizer = Nested(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    tensors = optim.optimizer_tensors(optimizer)
    assert set(tensors) == {"0.step", "0.quantised.levels", "1.step", "1.quantised.levels"}
    other = Nested(model.parameters(), lr=0.1)
    optim.load_optimizer(other, tensors)
    restored = other.state[model.weight]
    assert restored["step"] == 3 and type(restored["step"]) is int
    assert torch.equal(restored["quantised"]["levels"], torch.full((2, 3), 3, dtype=torch.uint8))


def test_8_bits_need_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        optim.build(torch.nn.Linear(1, 1), TrainingConfig(optimizer="adamw_8bit"))


def test_muon_is_for_matrices_in_blocks_and_adamw_for_the_rest():
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    names = {parameter: name for name, parameter in unet.named_parameters()}
    config = TrainingConfig(learning_rate=0.01, weight_decay=0.0, optimizer="muon")
    optimizer = optim.build(unet, config)
    first, *others = ({names[p] for p in group["params"]} for group in optimizer.param_groups)
    assert "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight" in first
    assert first.isdisjoint({"conv_in.weight", "time_embedding.linear_1.weight", "mid_block.resnets.0.conv1.weight"})
    assert first.union(*others) == set(names.values()) and len(first) + sum(map(len, others)) == len(names)

    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    for parameter in unet.parameters():
        parameter.grad = torch.randn_like(parameter)
    rate = optim.set_learning_rate(optimizer, 0, TrainingConfig(learning_rate=0.01))
    optimizer.step()
    for name, parameter in unet.named_parameters():
        change = (parameter.detach() - before[name]).float()
        if name in first:  # near to orthogonal, of AdamW's usual size
            values = torch.linalg.svdvals(change) / (rate * 0.2 * max(change.shape) ** 0.5)
            assert values.mean() > 0.7 and values.max() < 1.4, name
        else:
            torch.testing.assert_close(change.abs(), torch.full_like(change, rate), rtol=1e-2, atol=1e-5)


def test_muon_needs_matrices():
    with pytest.raises(UserError, match="Conv2d has no linear layers in its blocks; take adamw"):
        optim.build(torch.nn.Conv2d(1, 1, 1), TrainingConfig(optimizer="muon"))
