"""Likelihoods of a diffusion model: exact ones by the probability-flow ODE (Song et al. 2021, §4.3 and appendix D.2),
and the variational bound of one in pixel space."""

import math
from collections.abc import Callable

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from ldm.diffusion.sde import Score, VariancePreserving, divergence, flow_drift
from ldm.diffusion.variational_bound import VARIANCES, variational_bound
from ldm.errors import RunError, UserError
from ldm.training.randomness import generator


def log_likelihood(
    process: VariancePreserving,
    score: Score,
    x: Tensor,
    start: float = 0.0,
    tolerance: float = 1e-6,
    probes: Tensor | None = None,
) -> Tensor:
    """log p(x) (B,) in nats of samples x (B, …), in float64.

    log p_0(x(0)) = log p_1(x(1)) + ∫ ∇·f dt along the flow (equation 39), p_1 a standard normal, by SciPy's adaptive
    Runge–Kutta of order 5(4). `start` > 0 for a score that is not finite at 0; `probes` (K, B, …) for Hutchinson's
    estimate of the divergence instead of the exact one. What the process leaves of the data at t = 1 is an error of
    about √ᾱ(1), as x(1) is taken for normal.

    Raises:
        RunError: the solver gave up.
        UserError: SciPy is not installed.
    """
    try:
        from scipy.integrate import solve_ivp
    except ImportError:
        raise UserError('log-likelihoods need SciPy; pip install "ldm[mathematics]"') from None
    shape, size = x.shape, x.numel()

    def derivative(t: float, state):
        y = torch.from_numpy(state[:size]).view(shape).to(x.device)
        time = torch.full((shape[0],), t, dtype=torch.float64, device=x.device)
        value, trace = divergence(lambda z: flow_drift(process, score, z, time), y, probes)
        return torch.cat([value.flatten(), trace]).cpu().numpy()

    first = torch.cat([x.double().flatten().cpu(), torch.zeros(shape[0], dtype=torch.float64)]).numpy()
    solution = solve_ivp(derivative, (start, 1.0), first, method="RK45", rtol=tolerance, atol=tolerance)
    if not solution.success:
        raise RunError(f"log-likelihood: the ODE solver stopped: {solution.message}; raise tolerance ({tolerance:g})")
    last = torch.from_numpy(solution.y[:, -1])
    z, change = last[:size].view(shape).flatten(1), last[size:]
    log_normal = -0.5 * (z**2).sum(dim=1) - 0.5 * z.shape[1] * math.log(2 * math.pi)
    return (log_normal + change).to(x.device)


def bits_per_dim(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    images: Tensor,
    seed: int,
    class_labels: Tensor | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda images: None,
) -> Tensor:
    """The variational bound on -log₂ p(x) / dimensions (N,) of images (N, C, H, W) in [0, 1], of 256 grey levels.

    Ho et al. 2020, equation 5, all T terms, each with one draw of noise (`variational_bound`): T evaluations of the
    network an image. unet, scheduler: of a run of train_ldm.py with autoencoder=none, as its `model/` has them;
    class_labels (N,) int64, their number in classes.json, where the U-Net has classes (0: none). `progress` is told how
    many images are done. The noise of image n is a function of (seed, n // batch_size).

    Raises:
        UserError: images that the U-Net does not draw, missing class labels, or a scheduler without a bound.
        RunError: the bound is not finite.
    """
    config, process = unet.config, scheduler.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    if images.ndim != 4 or tuple(images.shape[1:]) != shape or not len(images):
        raise UserError(
            f"this U-Net draws images {shape}, so that no others have a likelihood; got {tuple(images.shape)}"
        )
    low, high = images.min().item(), images.max().item()
    if not (low >= -1e-4 and high <= 1 + 1e-4):
        raise UserError(f"images must be in [0, 1], got {low:.4g} to {high:.4g}")
    if process.variance_type not in VARIANCES:
        raise UserError(f"variance_type must be one of {', '.join(VARIANCES)} for a bound, got {process.variance_type}")
    if (config.num_class_embeds is not None) != (class_labels is not None):
        raise UserError("class_labels must be given for a U-Net with classes, and for no other")
    alpha_bar = torch.cumprod(1 - scheduler.betas.double(), dim=0).to(unet.device)
    x_0 = ((images.clamp(0, 1) * 255).round() / 127.5 - 1).float()
    bounds = []
    for start in range(0, len(x_0), batch_size):
        part = slice(start, start + batch_size)
        labels = {} if class_labels is None else {"class_labels": class_labels[part].to(unet.device)}
        draw = generator(seed, "bits per dimension", start // batch_size)
        bounds.append(
            variational_bound(
                lambda x_t, t, labels=labels: unet(x_t, t, **labels).sample.float(),
                x_0[part].to(unet.device),
                alpha_bar,
                process.prediction_type,
                draw,
                process.variance_type,
            ).cpu()
        )
        if not torch.isfinite(bounds[-1]).all():
            raise RunError(f"bits per dimension: the bound of image {start} or one after it is not finite; the weights "
                           "are damaged, or were trained for another process")  # fmt: skip
        progress(min(start + batch_size, len(x_0)))
    return torch.cat(bounds)
