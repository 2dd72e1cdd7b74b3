"""Power-function averages: closed forms, and an average put together afterwards is the one that was not tracked."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.errors import UserError
from ldm.training import averages


@pytest.mark.parametrize("length", [0.02, 0.05, 0.1, 0.15, 0.25])
def test_gamma_inverts_length(length):
    assert averages.length_of(averages.gamma_of(length)) == pytest.approx(length, rel=1e-9)


def test_length_is_the_standard_deviation_of_the_profile():
    gamma, t = averages.gamma_of(0.1), torch.linspace(0, 1, 200_001, dtype=torch.float64)
    p = (gamma + 1) * t**gamma
    mean = torch.trapezoid(p * t, t)
    assert torch.trapezoid(p * (t - mean) ** 2, t).sqrt().item() == pytest.approx(0.1, rel=1e-6)


def test_products_of_profiles_are_their_integrals():
    a, b = (30.0, 5.0), (50.0, 11.0)
    tau = torch.linspace(0, 30, 300_001, dtype=torch.float64)
    profiles = [(gamma + 1) * tau**gamma / t ** (gamma + 1) for t, gamma in (a, b)]
    given = (torch.tensor(value, dtype=torch.float64) for value in (*a, *b))
    expected = torch.trapezoid(profiles[0] * profiles[1], tau).item()
    assert averages.profile_product(*given).item() == pytest.approx(expected, rel=1e-6)


def trained(steps, lengths, folder, every):
    """A weight that wanders, and its averages."""
    model = nn.Linear(8, 1, bias=False)
    draw = torch.Generator().manual_seed(0)
    nn.init.zeros_(model.weight)
    kept = averages.power_averages(model, lengths)
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight += 0.05 * torch.randn(1, 8, generator=draw) + 0.01
        averages.update(kept, model, step)
        if step % every == 0:
            averages.write_snapshots(folder, kept, model, step)
    return {name: average.shadow_params[0].clone() for name, average in kept.items()}


def test_an_average_put_together_is_the_one_tracked(tmp_path):
    trained(2000, [0.05, 0.1], tmp_path / "few", every=100)
    tracked = trained(2000, [0.03, 0.075, 0.12], tmp_path / "all", every=2000)
    for name, expected in tracked.items():
        step, weights = averages.combined(tmp_path / "few", float(name.removeprefix("average-")))
        assert step == 2000
        wandered = expected.abs().max()
        assert (weights["weight"] - expected).abs().max() < 0.01 * wandered, name
    _, same = averages.combined(tmp_path / "few", 0.1)
    stored = averages.snapshots(tmp_path / "few")[-1]
    assert stored.length == 0.1
    torch.testing.assert_close(same["weight"], trained(2000, [0.1], tmp_path / "one", 2000)["average-0.100"],
                               rtol=1e-3, atol=1e-3)  # fmt: skip


def test_weights_sum_to_one_and_prefer_the_snapshot_itself():
    weights = averages.combination([100, 200, 300], [0.1, 0.1, 0.1], 300, 0.1)
    torch.testing.assert_close(weights, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("length", [0, -0.1, 0.0009, 0.5, float("nan")])
def test_lengths_that_are_none(tmp_path, length):
    with pytest.raises(UserError, match="length must be in"):
        averages.combined(tmp_path, length)


def test_snapshots_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="holds no snapshots"):
        averages.combined(tmp_path, 0.1)
    trained(20, [0.1], tmp_path, every=10)
    for step in (0, 15):
        with pytest.raises(UserError, match=f"step {step}: .* has snapshots of the steps 10, 20"):
            averages.combined(tmp_path, 0.1, step=step)


def test_snapshots_that_are_damaged_or_of_another_network(tmp_path):
    trained(20, [0.1], tmp_path, every=10)
    path = tmp_path / "step-000020-0.100.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"step-000020-0.100.safetensors is damaged; remove it"):
        averages.combined(tmp_path, 0.1)
    for weight, words in ((torch.zeros(1, 9), "is of another network"), (torch.full((1, 8), torch.nan), "not finite")):
        save_file({"weight": weight}, path)
        with pytest.raises(UserError, match=words):
            averages.combined(tmp_path, 0.1)
