"""What training minimises: timesteps drawn, weights on them, and the conditions that are dropped."""

import torch
from torch import Tensor

from ldm.diffusion.schedule import snr


def timesteps(draws: Tensor, num_timesteps: int, sampling: str) -> Tensor:
    """Timesteps (B,) in 0 … T-1 from uniform numbers (B,) in [0, 1).

    `uniform` (Ho et al. 2020, algorithm 1), or `logit_normal`: the sigmoid of a standard normal (Esser et al. 2024,
    equation 19), which visits the middle more often.
    """
    if sampling == "logit_normal":
        draws = torch.sigmoid(torch.special.ndtri(draws.double().clamp(1e-6, 1 - 1e-6)))
    return (draws * num_timesteps).long().clamp(max=num_timesteps - 1)


def min_snr_weight(alpha_bar_t: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """Weight (B,) on the squared error of the prediction that makes it min(SNR, γ) on that of x_0
    (Hang et al. 2023, §3.4): ‖ε̂ - ε‖² = SNR ‖x̂_0 - x_0‖², ‖v̂ - v‖² = (SNR + 1) ‖x̂_0 - x_0‖²."""
    ratio = snr(alpha_bar_t)
    weight = ratio.clamp(max=gamma)
    if prediction_type == "epsilon":
        return weight / ratio
    if prediction_type == "v_prediction":
        return weight / (ratio + 1)
    return weight


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Each sample's mean squared error (B,): L_simple (Ho et al. 2020, equation 14)."""
    return ((prediction.float() - target.float()) ** 2).flatten(1).mean(dim=1)


def dropped(draws: Tensor, caption: float, image: float, both: float) -> tuple[Tensor, Tensor]:
    """Which samples lose their caption and which their image embedding, from uniform numbers (B,) in [0, 1).

    A caption is dropped with probability `caption`, an image embedding with `image`, and, as a part of these, both
    together with `both`, or as often as those two leave no other place: the condition that classifier-free guidance
    starts from (Ho & Salimans 2022, algorithm 1). Returns two boolean masks (B,).
    """
    both = max(both, caption + image - 1)
    both_dropped = draws < both
    caption_only = (draws >= both) & (draws < caption)
    image_only = (draws >= caption) & (draws < caption + image - both)
    return both_dropped | caption_only, both_dropped | image_only
