"""Variational autoencoder: likelihoods, the ELBO and the importance-weighted bound (Kingma & Welling 2014).

All in nats, with every constant; `bits_per_dim` converts. q_φ(z | x) is a diagonal Gaussian, the prior standard normal.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ldm.autoencoders import networks

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
LIKELIHOODS = ("bernoulli", "fixed_gaussian", "learned_gaussian")
LOGVAR_RANGE = (-8.0, 4.0)  # pixels that never change would drive a learned variance to 0, and the density to infinity
BOUND_SAMPLES = 500


def reparameterise(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """z = μ + σ ε (Kingma & Welling 2014, §2.4); noise standard normal, like mean."""
    return mean + (0.5 * logvar).exp() * noise


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, I)) (B,) (Kingma & Welling 2014, appendix B). mean, logvar (B, …)."""
    return 0.5 * (mean**2 + logvar.expm1() - logvar).flatten(1).sum(dim=1)


def bernoulli_log_likelihood(x: Tensor, logits: Tensor) -> Tensor:
    """log p(x) (B,) of independent Bernoullis; x (B, …) in {0, 1}, or, as is usual for grey levels, in [0, 1].

    Between 0 and 1 it is no density (Loaiza-Ganem & Cunningham 2019), and comparable with nothing else.

    Raises:
        ValueError: x outside [0, 1].
    """
    if len(outside := x[(x < 0) | (x > 1)]):
        raise ValueError(f"x must be in [0, 1] for a Bernoulli likelihood, got {outside[0].item():g}")
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(dim=1)


def gaussian_log_likelihood(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """log N(x; mean, exp(logvar)) (B,) of independent elements; logvar as x, or one for all.

    Raises:
        ValueError: x is not finite.
    """
    if not torch.isfinite(x).all():
        raise ValueError("x must be finite for a Gaussian likelihood, got NaN or infinity")
    return (-0.5 * ((x - mean) ** 2 * (-logvar).exp() + logvar) - HALF_LOG_2PI).flatten(1).sum(dim=1)


def elbo(log_likelihood: Tensor, kl: Tensor, beta: float = 1.0) -> Tensor:
    """E_q log p_θ(x | z) - β KL(q_φ(z | x) ‖ p(z)) (B,); the bound on log p(x) for β = 1, β-VAE's objective otherwise
    (Higgins et al. 2017, equation 4). Training minimises its negative.

    Raises:
        ValueError: beta < 0.
    """
    if beta < 0:
        raise ValueError(f"beta must be >= 0, got {beta:g}")
    return log_likelihood - beta * kl


def importance_weighted_bound(log_likelihoods: Tensor, z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """log 1/K Σ p(x | z_k) p(z_k) / q(z_k | x) (B,): between ELBO and log p(x), and no lower on average with more
    samples (Burda et al. 2016, equation 8 and theorem 1).

    log_likelihoods (K, B) of the samples z (K, B, D) from the posterior mean, logvar (B, D).
    """
    log_prior = (-0.5 * z**2 - HALF_LOG_2PI).sum(dim=-1)
    log_posterior = (-0.5 * ((z - mean) ** 2 * (-logvar).exp() + logvar) - HALF_LOG_2PI).sum(dim=-1)
    return torch.logsumexp(log_likelihoods + log_prior - log_posterior, dim=0) - math.log(len(z))


def bits_per_dim(log_likelihood: Tensor, dimensions: int, levels: int | None = None) -> Tensor:
    """-log p in bits for each of x's dimensions. With `levels`, x was grey levels scaled to [0, 1], for which a density
    counts the levels: log2(levels) is added (Theis et al. 2016, §3.1)."""
    bits = -log_likelihood / (dimensions * math.log(2))
    return bits if levels is None else bits + math.log2(levels)


class VariationalAutoencoder(ModelMixin, ConfigMixin):
    """Loss -ELBO, in nats an image, with a diagonal Gaussian posterior over codes (Kingma & Welling 2014).

    likelihood: `bernoulli`, `fixed_gaussian` of standard deviation `deviation`, or `learned_gaussian`, whose decoder
    gives the log-variance of each element too. binarise: images become 0 or 1, about 0.5, as Bernoullis want them.
    """

    @register_to_config
    def __init__(
        self,
        image_shape: Sequence[int] = (1, 8, 8),
        architecture: str = "mlp",
        hidden_sizes: Sequence[int] = (128,),
        code_size: int = 8,
        activation: str = "relu",
        likelihood: str = "bernoulli",
        deviation: float = 0.1,
        beta: float = 1.0,
        binarise: bool = False,
    ):
        super().__init__()
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood must be one of {', '.join(LIKELIHOODS)}, got {likelihood!r}")
        if not deviation > 0:
            raise ValueError(f"deviation must be > 0, got {deviation:g}")
        elbo(torch.zeros(1), torch.zeros(1), beta)  # refuses what is no β
        channels, height, width = self.image_shape = tuple(image_shape)
        decoded = (2 * channels if likelihood == "learned_gaussian" else channels, height, width)
        self.encoder = networks.encoder(architecture, image_shape, hidden_sizes, 2 * code_size, activation)
        self.decoder = networks.decoder(architecture, decoded, hidden_sizes, code_size, activation)
        self.likelihood, self.logvar, self.beta = likelihood, 2 * math.log(deviation), beta
        self.binarise, self.code_size = binarise, code_size

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the standard normal noise that `forward` takes for each image."""
        return (self.code_size,)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, code_size) of q_φ(z | x)."""
        mean, logvar = self.encoder(x)[0].chunk(2, dim=1)
        return mean, logvar

    def encode(self, x: Tensor) -> Tensor:
        """The posterior's means (B, code_size) of images (B, C, H, W) in [0, 1]."""
        return self.posterior(self.observed(x))[0]

    def decode(self, code: Tensor) -> Tensor:
        """The mean of p_θ(x | z)."""
        output = self.decoder(code)[0]
        if self.likelihood == "bernoulli":
            return output.sigmoid()
        return output if self.likelihood == "fixed_gaussian" else output.chunk(2, dim=1)[0]

    def observed(self, x: Tensor) -> Tensor:
        """The images that the likelihood is of: as they are, or binary."""
        return (x > 0.5).to(x.dtype) if self.binarise else x

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p_θ(x | z) (B,)."""
        output = self.decoder(z)[0]
        if self.likelihood == "bernoulli":
            return bernoulli_log_likelihood(x, output)
        if self.likelihood == "fixed_gaussian":
            return gaussian_log_likelihood(x, output, torch.full_like(output, self.logvar))
        mean, logvar = output.chunk(2, dim=1)
        return gaussian_log_likelihood(x, mean, logvar.clamp(*LOGVAR_RANGE))

    def forward(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """`loss`, and its parts in nats, of a batch; noise (B, code_size)."""
        x = self.observed(x)
        mean, logvar = self.posterior(x)
        log_likelihood = self.log_likelihood(x, reparameterise(mean, logvar, noise))
        kl = kl_to_standard_normal(mean, logvar)
        loss = -elbo(log_likelihood, kl, self.beta).mean()
        return {"loss": loss, "log_likelihood": log_likelihood.mean(), "kl": kl.mean()}

    @torch.no_grad()
    def measure(self, x: Tensor, generator: torch.Generator) -> dict[str, float]:
        """ELBO (β = 1) and the importance-weighted bound of 500 samples, in nats an image, and bits/dim of the second;
        and active units, those whose posterior mean varies by more than 0.01 (Burda et al. 2016, appendix C)."""
        x = self.observed(x)
        mean, logvar = self.posterior(x)
        noise = torch.randn(BOUND_SAMPLES, *mean.shape, generator=generator).to(x.device)
        z = reparameterise(mean, logvar, noise)
        likelihoods = torch.stack([self.log_likelihood(x, sample) for sample in z])
        bound = importance_weighted_bound(likelihoods, z, mean, logvar).mean()
        return {
            "elbo": elbo(likelihoods.mean(dim=0), kl_to_standard_normal(mean, logvar)).mean().item(),
            f"iwae_{BOUND_SAMPLES}": bound.item(),
            "bits_per_dim": bits_per_dim(bound, x[0].numel()).item(),
            "active_units": int((mean.var(dim=0) > 0.01).sum()),
        }
