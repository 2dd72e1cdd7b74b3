"""PatchGAN: a discriminator that judges overlapping patches (Isola et al. 2017), with the weighting of VQGAN."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Logits for patches of an image; group norm instead of batch norm, so that processes need not agree."""

    def __init__(self, channels: int, num_layers: int = 2):
        """num_layers: how often an image is halved; 3 pixels must be left."""
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for number in range(1, num_layers + 1):
            stride = 2 if number < num_layers else 1
            wide = channels * min(2**number, 8)
            narrow = channels * min(2 ** (number - 1), 8)
            layers += [
                nn.Conv2d(narrow, wide, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(math.gcd(min(32, wide // 4), wide), wide),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(wide, 1, 4, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] to logits (B, 1, h, w), high for real."""
        return self.layers(x)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss (Lim & Ye 2017) on logits of real and reconstructed patches."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """What the decoder lowers: minus the mean logit of its patches."""
    return -fake.mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """λ = ‖∇ L_rec‖ / (‖∇ L_adv‖ + δ) at the decoder's last layer, at most 10⁴ (Esser et al. 2021, equation 7)."""
    (of_reconstruction,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (of_adversarial,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (of_reconstruction.norm() / (of_adversarial.norm() + 1e-4)).clamp(max=1e4).detach()
