"""Schedules, forward process and objectives against closed forms and diffusers' schedulers."""

import pytest
import torch
from diffusers import DDPMScheduler

from ldm.diffusion import objective, process, schedule
from ldm.diffusion.embedding_noise import level_embedding, noised_embedding

SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_those_of_the_schedulers_that_sample(name):
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule=name)
    torch.testing.assert_close(schedule.alphas_bar(name, 1000).float(), scheduler.alphas_cumprod, atol=2e-6, rtol=1e-4)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="got 'cosine'"):
        schedule.betas("cosine", 10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_forward_process_and_velocity_invert(name):
    torch.manual_seed(0)
    x_0, noise = torch.randn(2, 8, 3, 4, 4, dtype=torch.float64)
    alpha_bar_t = schedule.alphas_bar(name, 1000)[torch.linspace(0, 999, 8).long()]
    x_t = process.q_sample(x_0, alpha_bar_t, noise)
    v = process.prediction_target("v_prediction", x_0, alpha_bar_t, noise)
    a, s = alpha_bar_t.sqrt().view(-1, 1, 1, 1), (1 - alpha_bar_t).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(a * x_t - s * v, x_0, atol=1e-12, rtol=0)
    torch.testing.assert_close(s * x_t + a * v, noise, atol=1e-12, rtol=0)
    assert process.prediction_target("epsilon", x_0, alpha_bar_t, noise) is noise
    assert process.prediction_target("sample", x_0, alpha_bar_t, noise) is x_0


def test_process_agrees_with_the_scheduler():
    torch.manual_seed(0)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    x_0, noise = torch.randn(2, 6, 4, 8, 8)
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    alpha_bar_t = schedule.alphas_bar("squaredcos_cap_v2", 1000)[t]
    torch.testing.assert_close(
        process.q_sample(x_0, alpha_bar_t, noise).float(), scheduler.add_noise(x_0, noise, t), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(
        process.velocity(x_0, alpha_bar_t, noise).float(), scheduler.get_velocity(x_0, noise, t), atol=1e-3, rtol=0
    )


def test_timesteps_cover_their_range():
    u = (torch.arange(1000) + 0.5) / 1000
    assert torch.equal(objective.timesteps(u, 1000, "uniform").sort().values, torch.arange(1000))
    assert objective.timesteps(torch.tensor([0.0, 1 - 1e-7]), 10, "uniform").tolist() == [0, 9]
    normal = objective.timesteps(u, 1000, "logit_normal")
    assert normal.min() >= 0 and normal.max() <= 999
    # The share between the quantiles sigmoid(±1) of a logit-normal is that of a normal within one deviation.
    inside = ((normal / 1000 > 0.26894) & (normal / 1000 < 0.73106)).float().mean()
    assert inside == pytest.approx(0.6827, abs=0.01)


def test_min_snr_is_one_loss_on_x_0_whatever_is_predicted():
    torch.manual_seed(0)
    x_0, error = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    noise = torch.randn_like(x_0)
    alpha_bar_t = schedule.alphas_bar("linear", 1000)[[5, 100, 300, 600, 900]]
    x_t = process.q_sample(x_0, alpha_bar_t, noise)
    a, s = alpha_bar_t.sqrt().view(-1, 1, 1, 1), (1 - alpha_bar_t).sqrt().view(-1, 1, 1, 1)
    x_0_hat = x_0 + 0.1 * error
    noise_hat = (x_t - a * x_0_hat) / s
    losses = []
    for kind in ("sample", "epsilon", "v_prediction"):
        predicted = process.prediction_target(kind, x_0_hat, alpha_bar_t, noise_hat)
        target = process.prediction_target(kind, x_0, alpha_bar_t, noise)
        weight = objective.min_snr_weight(alpha_bar_t, kind, gamma=5.0)
        per_sample = ((predicted - target) ** 2).flatten(1).mean(1) * weight
        losses.append(per_sample)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-9, atol=0)
    ratio = alpha_bar_t / (1 - alpha_bar_t)
    torch.testing.assert_close(losses[0], ratio.clamp(max=5) * 0.01 * (error**2).flatten(1).mean(1))


def test_squared_error_by_hand():
    prediction, target = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.zeros(2, 2)
    assert objective.squared_error(prediction, target).tolist() == [5.0, 0.0]


def test_dropped_shares():
    u = (torch.arange(1000) + 0.5) / 1000
    caption, image = objective.dropped(u, caption=0.2, image=0.15, both=0.1)
    assert caption.sum() == 200 and image.sum() == 150 and (caption & image).sum() == 100
    caption, image = objective.dropped(u, caption=0.1, image=0.1, both=0.1)
    assert torch.equal(caption, image) and caption.sum() == 100
    caption, image = objective.dropped(u, caption=0.1, image=1.0, both=0.05)  # captions alone guide
    assert caption.sum() == 100 and image.all()
    caption, image = objective.dropped(u, caption=0.5, image=0.75, both=0.0)
    assert caption.sum() == 500 and image.sum() == 750 and (caption & image).sum() == 250


def test_embedding_noise_is_that_of_the_stock_pipeline():
    from diffusers import StableUnCLIPPipeline
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    torch.manual_seed(0)
    mean, std, embeds = torch.randn(16), torch.rand(16) + 0.5, torch.randn(3, 16)
    normalizer = StableUnCLIPImageNormalizer(16)
    normalizer.mean.data.copy_(mean[None])
    normalizer.std.data.copy_(std[None])

    class Parts:
        image_normalizer = normalizer
        image_noising_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")

    for level in (0, 300, 999):
        noise = torch.randn(3, 16, generator=torch.Generator().manual_seed(level))
        stock = StableUnCLIPPipeline.noise_image_embeddings(Parts, embeds.clone(), level, noise)
        ours = noised_embedding(
            embeds, mean, std, torch.full((3,), level), schedule.alphas_bar("squaredcos_cap_v2", 1000), noise
        )
        torch.testing.assert_close(ours.float(), stock.detach(), atol=1e-3, rtol=1e-3)


def test_level_embedding_at_zero():
    assert torch.equal(level_embedding(torch.tensor([0]), 6), torch.tensor([[1.0, 1, 1, 0, 0, 0]]))
