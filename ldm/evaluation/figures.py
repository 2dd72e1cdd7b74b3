"""The figures of the two source documents, redrawn from formulas, samplers and autoencoders trained on digits.

Those of trained models read the run folders that `TRAINED_BY` names; where one is missing, its figure is left out.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from matplotlib.figure import Figure
from torch import Tensor

from ldm.autoencoders.denoising import DenoisingAutoencoder
from ldm.autoencoders.k_sparse import KSparseAutoencoder
from ldm.autoencoders.sparse import bernoulli_kl
from ldm.autoencoders.variational import VariationalAutoencoder
from ldm.config import DataConfig
from ldm.data.captions import open_images
from ldm.diffusion import schedule
from ldm.diffusion.mixture import two_in_the_plane
from ldm.diffusion.process import q_sample
from ldm.errors import UserError
from ldm.training.randomness import generator

SPARSITIES = (70, 40, 25, 10)
TRAINED_BY = {
    **{f"k_sparse_{k}": f"configs/digits/k_sparse.yaml model.k={k}" for k in SPARSITIES},
    "denoising": "configs/digits/denoising.yaml",
    "variational": "configs/digits/variational.yaml",
    "variational_2d": "configs/digits/variational.yaml model.code_size=2",
}
"""Run folder to what train/train_autoencoder.py is given after --config to make it."""
T = 1000
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled linear", "squaredcos_cap_v2": "cosine"}
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SAMPLERS: dict[str, tuple[Callable, int]] = {
    "DDPM, 1000 steps": (lambda: DDPMScheduler(**LINEAR, clip_sample=False), 1000),
    "DDIM, 50 steps": (lambda: DDIMScheduler(**LINEAR, clip_sample=False, timestep_spacing="trailing"), 50),
    "Euler, 50 steps": (lambda: EulerDiscreteScheduler(**LINEAR, timestep_spacing="trailing"), 50),
    "DPM-Solver++ 2M, 20 steps": (lambda: DPMSolverMultistepScheduler(**LINEAR, timestep_spacing="trailing"), 20),
    "UniPC, 20 steps": (lambda: UniPCMultistepScheduler(**LINEAR, timestep_spacing="trailing"), 20),
    "Heun, 20 steps": (lambda: HeunDiscreteScheduler(**LINEAR, timestep_spacing="trailing"), 20),
}


def draw_all(output: Path, runs: Path) -> Iterator[tuple[Path | None, str]]:
    """Draws figure after figure into `output`; yields each one's path and name, or None and why it is left out."""
    output.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Callable[[], Figure]] = {
        "sparsity_kl": sparsity_kl,
        "schedules": schedules,
        "forward_process": forward_process,
        "samplers": samplers,
        "k_sparse_filters": lambda: k_sparse_filters(
            {k: _open(KSparseAutoencoder, runs, f"k_sparse_{k}") for k in SPARSITIES}
        ),
        "denoising": lambda: denoising(_open(DenoisingAutoencoder, runs, "denoising")),
        "vae_samples": lambda: vae_samples(_open(VariationalAutoencoder, runs, "variational")),
        "vae_manifold": lambda: vae_manifold(_open(VariationalAutoencoder, runs, "variational_2d")),
    }
    for name, draw in figures.items():
        try:
            figure = draw()
        except UserError as missing:
            yield None, f"{name}: {missing}"
            continue
        path = output / f"{name}.png"
        figure.savefig(path, dpi=110, bbox_inches="tight")
        yield path, name


def sparsity_kl(rho: float = 0.25) -> Figure:
    """KL(ρ ‖ ρ̂) over ρ̂: the sparse autoencoder's penalty on one unit."""
    rho_hat = torch.linspace(0.005, 0.995, 400, dtype=torch.float64)
    figure = Figure((5, 3.2))
    axes = figure.subplots()
    axes.plot(rho_hat, bernoulli_kl(rho, rho_hat))
    axes.axvline(rho, linestyle=":", color="grey")
    axes.set(xlabel=r"$\hat\rho$", ylabel=r"KL$(\rho\,\|\,\hat\rho)$ in nats", title=rf"$\rho$ = {rho:g}")
    return figure


def schedules() -> Figure:
    """β_t and ᾱ_t of each schedule; dashed, rescaled to zero terminal SNR."""
    figure = Figure((10, 3.4))
    left, right = figure.subplots(1, 2)
    t = np.arange(1, T + 1)
    for number, (name, label) in enumerate(SCHEDULES.items()):
        alpha_bar = schedule.alphas_bar(name, T)
        rescaled = schedule.zero_terminal_snr(alpha_bar)
        colour = f"C{number}"
        left.semilogy(t, schedule.betas(name, T), color=colour, label=label)
        left.semilogy(t, schedule.betas_of(rescaled), "--", color=colour, linewidth=0.8)
        right.plot(t, alpha_bar, color=colour, label=label)
        right.plot(t, rescaled, "--", color=colour, linewidth=0.8)
    left.set(xlabel="t", ylabel=r"$\beta_t$")
    right.set(xlabel="t", ylabel=r"$\bar\alpha_t$")
    right.legend(title="dashed: zero terminal SNR", fontsize="small", title_fontsize="small")
    return figure


def forward_process(shown: int = 9) -> Figure:
    """A digit, and what q(x_t | x_0) leaves of it: the same noise at rising t, under two schedules."""
    x_0 = _digits("test", 1)[:1] * 2 - 1
    noise = torch.randn(x_0.shape, generator=generator(0, "figure", 0))
    times = torch.linspace(0, T - 1, shown).long()
    figure = Figure((shown * 0.9, 2.2))
    rows = figure.subplots(2, shown)
    for axes, t in zip(rows[0], times, strict=True):
        axes.set_title(f"t = {t + 1}", fontsize=8)
    for row, name in zip(rows, ("linear", "squaredcos_cap_v2"), strict=True):
        alpha_bar = schedule.alphas_bar(name, T)
        for axes, t in zip(row, times, strict=True):
            _picture(axes, q_sample(x_0, alpha_bar[t].float().view(1), noise)[0, 0], -1.5, 1.5)
        row[0].set_ylabel(SCHEDULES[name], fontsize=8)
    return figure


def samplers(paths: int = 40) -> Figure:
    """Diffusers' samplers with an exact network: from the same noise to a mixture of two Gaussians in the plane."""
    mixture = two_in_the_plane()
    first = torch.randn(400, 2, generator=generator(0, "figure", 1), dtype=torch.float64)
    figure = Figure((10, 6.4))
    for axes, (name, (make, steps)) in zip(figure.subplots(2, 3).flat, SAMPLERS.items(), strict=True):
        path = sampled_path(make(), steps, first, mixture.epsilon)
        for line in path[:, :paths].unbind(1):
            axes.plot(line[:, 0], line[:, 1], color="C0", linewidth=0.4, alpha=0.5)
        axes.scatter(*path[-1].T, s=3, color="C3", zorder=3)
        axes.set(title=name, xlim=(-3.5, 3.5), ylim=(-3, 3))
        axes.set_aspect("equal")
    return figure


def sampled_path(scheduler, steps: int, x: Tensor, epsilon: Callable[[Tensor, float], Tensor]) -> Tensor:
    """x_t (evaluations + 1, B, …) along a scheduler of diffusers, from standard normal x (B, …), with a network that
    gives ε at (x_t, ᾱ_t). Schedulers that count in σ move x_t / √ᾱ_t, which is undone."""
    alpha_bar = schedule.alphas_bar("linear", T)
    draw = {"generator": generator(0, "figure", 2)} if isinstance(scheduler, DDPMScheduler) else {}
    scheduler.set_timesteps(steps)
    scaled = isinstance(scheduler, (EulerDiscreteScheduler, HeunDiscreteScheduler))
    x, path = x * scheduler.init_noise_sigma, [x]
    for number, t in enumerate(scheduler.timesteps):
        level = alpha_bar[int(t)].item()
        if hasattr(scheduler, "sigmas"):
            level = 1 / (1 + scheduler.sigmas[number].item() ** 2)
        x = scheduler.step(
            epsilon(scheduler.scale_model_input(x, t).double(), level), t, x, **draw
        ).prev_sample.double()
        sigma = scheduler.sigmas[number + 1].item() if scaled else 0.0
        path.append(x / (1 + sigma**2) ** 0.5)
    return torch.stack(path)


@torch.no_grad()
def k_sparse_filters(models: dict[int, KSparseAutoencoder], side: int = 8) -> Figure:
    """The decoder's columns of the most used units, k by k: the smaller k, the larger the features (Makhzani & Frey
    2013, figure 1)."""
    x = _digits("train")
    figure = Figure((3 * len(models), 3.2))
    for axes, (k, model) in zip(np.atleast_1d(figure.subplots(1, len(models))), models.items(), strict=True):
        used = (model.encode(x) != 0).sum(dim=0).argsort(descending=True)[: side**2]
        weight = model.decoder.output[0].weight
        filters = weight[:, used].T.reshape(-1, *model.image_shape)[:, 0]
        filters = filters / filters.flatten(1).abs().amax(dim=1)[:, None, None].clamp(min=1e-8)
        _picture(axes, _grid(filters, side, padding=-1.0), -1, 1)
        axes.set_title(f"k = {k}")
    return figure


@torch.no_grad()
def denoising(model: DenoisingAutoencoder, shown: int = 12) -> Figure:
    """Clean, corrupted and restored digits that were not trained on."""
    x = _digits("test")[:shown]
    noise = torch.randn(shown, *model.noise_shape, generator=generator(0, "figure", 3))
    corrupted = model.corrupt(x, noise)
    figure = Figure((shown * 0.7, 2.4))
    rows = figure.subplots(3, shown)
    for row, label, images in zip(
        rows, ("clean", "corrupted", "restored"), (x, corrupted, model.decode(model.encode(corrupted))), strict=True
    ):
        for axes, image in zip(row, images, strict=True):
            _picture(axes, image[0], 0, 1)
        row[0].set_ylabel(label, fontsize=8)
    return figure


@torch.no_grad()
def vae_samples(model: VariationalAutoencoder, side: int = 12) -> Figure:
    """Means of p(x | z) for z from the prior."""
    z = torch.randn(side**2, model.code_size, generator=generator(0, "figure", 4))
    figure = Figure((5, 5))
    _picture(figure.subplots(), _grid(model.decode(z)[:, 0], side, padding=1.0), 0, 1)
    return figure


@torch.no_grad()
def vae_manifold(model: VariationalAutoencoder, side: int = 20) -> Figure:
    """Means of p(x | z) over the plane of a two-dimensional code, at the normal's quantiles; beside it, where the
    digits' posteriors lie (Kingma & Welling 2014, figure 4)."""
    if model.code_size != 2:
        raise UserError(f"the manifold wants a code of 2 units, not {model.code_size}; train with model.code_size=2")
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(side) + 0.5) / side)
    rows, columns = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    decoded = model.decode(torch.stack([columns, rows], dim=-1).view(-1, 2))[:, 0]
    figure = Figure((11, 5.2))
    left, right = figure.subplots(1, 2)
    _picture(left, _grid(decoded, side, padding=None), 0, 1)
    data = _open_digits("test")
    codes = model.encode(_digits("test"))
    labels = [int(data.captions(index)[0].rpartition(" ")[2]) for index in range(len(data))]
    points = right.scatter(*codes.T, c=labels, cmap="tab10", s=8, vmin=-0.5, vmax=9.5)
    figure.colorbar(points, ax=right, ticks=range(10))
    right.set(xlabel="$z_1$", ylabel="$z_2$", title="posterior means of test digits")
    return figure


def _open(kind: type, runs: Path, name: str):
    folder = runs / name / "model" / "autoencoder"
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} missing; python train/train_autoencoder.py --config {TRAINED_BY[name]} output_dir={runs / name}"
        )
    return kind.from_pretrained(folder).eval()


def _open_digits(split: str):
    return open_images(DataConfig(source="digits", split=split, image_size=8), seed=0)


def _digits(split: str, count: int | None = None) -> Tensor:
    """(N, 1, 8, 8) in [0, 1]."""
    data = _open_digits(split)
    x = data.__getitems__([(0, index) for index in range(count or len(data))])["images"]
    return (x[:, :1] + 1) / 2


def _grid(images: Tensor, columns: int, padding: float | None) -> Tensor:
    """(N, H, W) as one picture, `columns` in a row, with lines of value `padding` between, or none."""
    if padding is not None:
        images = torch.nn.functional.pad(images, (0, 1, 0, 1), value=padding)
    rows = [torch.cat(list(images[i : i + columns]), dim=1) for i in range(0, len(images), columns)]
    return torch.cat(rows, dim=0)


def _picture(axes, image: Tensor, low: float, high: float) -> None:
    axes.imshow(image.numpy(), cmap="gray", vmin=low, vmax=high)
    axes.set(xticks=[], yticks=[])
