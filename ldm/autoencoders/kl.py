"""AutoencoderKL as the first stage: its losses and the statistics of its latents (Rombach et al. 2022, §3.1, G)."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn


class Reconstruction(nn.Module):
    """Encoder, posterior sample and decoder in one forward pass, so that a wrapper around it sees every gradient."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, 3, H, W) in [-1, 1]; noise (B, C, h, w) ~ N(0, I). Returns x̂ like x, and the posterior's mean and
        log-variance (B, C, h, w)."""
        posterior = self.vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * noise
        return self.vae.decode(z).sample, posterior.mean, posterior.logvar


def latent_shape(vae: AutoencoderKL, image_size: int) -> tuple[int, int, int]:
    """(C, h, w) of the latents of square images."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return vae.config.latent_channels, image_size // factor, image_size // factor


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) ‖ N(0, 1)), the mean over all elements in nats (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mean**2 + logvar.expm1() - logvar).mean()


def psnr(x_hat: Tensor, x: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], the mean over the batch."""
    mse = ((x_hat.float().clamp(-1, 1) - x.float()) ** 2).flatten(1).mean(dim=1)
    return (10 * torch.log10(4 / mse.clamp(min=1e-10))).mean()


@dataclass(frozen=True)
class LatentStatistics:
    """Mean of each latent channel, standard deviation about those means, and how many channels carry anything."""

    mean: Tensor  # (C,)
    std: float
    active_channels: int


def latent_statistics(batches: Iterable[tuple[Tensor, Tensor]]) -> LatentStatistics:
    """From batches of posterior means and log-variances (B, C, h, w), in float64.

    The standard deviation is that of samples z: Var[z] = Var[mean] + E[exp(logvar)]. A channel is active if the
    variance of its posterior mean over the data exceeds 0.01 (Burda et al. 2016, appendix C).
    """
    count, total, squares, posterior_variance = 0, 0.0, 0.0, 0.0
    for mean, logvar in batches:
        mean, logvar = mean.double(), logvar.double()
        count += mean.shape[0] * mean[0, 0].numel()
        total = total + mean.sum(dim=(0, 2, 3))
        squares = squares + (mean**2).sum(dim=(0, 2, 3))
        posterior_variance = posterior_variance + logvar.exp().sum(dim=(0, 2, 3))
    mean = total / count
    variance_of_mean = squares / count - mean**2
    std = (variance_of_mean + posterior_variance / count).mean().sqrt().item()
    return LatentStatistics(mean.float(), std, int((variance_of_mean > 0.01).sum()))


@torch.no_grad()
def standardise(vae: AutoencoderKL, statistics: LatentStatistics) -> None:
    """Makes the latents' channels zero-mean and stores scaling_factor = 1/std; reconstructions do not change.

    Stock pipelines know a scale but no shift, so the mean goes into the biases of the two 1×1 convolutions that
    the latents pass: out of the first, and, through its weights, into the second.
    """
    mean = statistics.mean.to(vae.quant_conv.bias.device)
    vae.quant_conv.bias[: len(mean)] -= mean
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.register_to_config(scaling_factor=1 / statistics.std)
