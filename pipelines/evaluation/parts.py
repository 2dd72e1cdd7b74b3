"""Each part of a model alone: the autoencoder, the prior, and the likelihood that a model of pixels gives to images."""

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.errors import UserError
from ldm.evaluation.distances import bootstrap, frechet_distance
from ldm.evaluation.likelihood import bits_per_dim
from ldm.evaluation.prior import prior_cosines
from ldm.evaluation.reconstruction import lpips_weights, open_lpips, psnr, ssim
from ldm.evaluation.report import Figure
from pipelines.evaluation.drawing import picture_generator
from pipelines.evaluation.images import also_saying, few_rounds, frechet_interval, frechet_name, mean_interval
from pipelines.evaluation.model import PixelSpace, TextToImage
from pipelines.evaluation.stored import Pictures

LIKELIHOOD_IMAGES = 64
"""Each takes as many evaluations of the network as there are timesteps."""


@torch.no_grad()
def reconstructed(painter: TextToImage, images: Pictures, batch_size: int) -> Pictures:
    """What the autoencoder makes of the mean of their posterior. Kept in memory, 8 bits a channel."""
    vae, parts = painter.pipe.vae, []
    with tqdm(total=len(images), desc="reconstructing", unit=" images", leave=False, disable=None) as bar:
        for part in images.split(batch_size):
            x = part.to(painter.device, vae.dtype) / 127.5 - 1
            y = vae.decode(vae.encode(x).latent_dist.mode()).sample.float().cpu()
            parts.append(((y.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
            bar.update(len(part))
    whole = torch.cat(parts)
    return Pictures(lambda numbers: whole[list(numbers)], range(len(whole)))


def autoencoder_figures(
    originals: Pictures, restored: Pictures, seed: int, device: torch.device
) -> tuple[list[Figure], list[str]]:
    """PSNR, SSIM and LPIPS; and why one of them is left out."""
    figures, left_out = [], []
    lpips = open_lpips(device)
    if lpips is None:
        left_out.append(f"no LPIPS: it needs torchmetrics, and AlexNet's weights as '{lpips_weights()}'")
    for name, unit, better, measure in (("PSNR", "dB", "higher", psnr), ("SSIM", "", "higher", ssim),
                                        ("LPIPS", "", "lower", lpips)):  # fmt: skip
        if measure is None:
            continue
        pairs = zip(originals.split(128), restored.split(128), strict=True)
        try:
            values = torch.cat([measure(a.float() / 255, b.float() / 255) for a, b in pairs])
        except UserError as error:  # of what is not installed, or of images too small for its windows
            left_out.append(f"no {name}: {error}")
            continue
        figures.append(
            Figure(
                part="Autoencoder", name=name, unit=unit, better=better, value=values.mean().item(),
                images=len(originals), interval=mean_interval(values, seed),
                **({"network": "AlexNet", "weights": lpips_weights().name} if name == "LPIPS" else {}),
            )
        )  # fmt: skip
    return figures, left_out


def reconstruction_distance(originals: Tensor, restored: Tensor, seed: int, **said: str) -> Figure:
    """Fréchet distance of features (N, F) of reconstructions to those of the same images. An image is resampled with
    its reconstruction: between them, which images there are makes no difference."""
    both, width = torch.cat([originals, restored], dim=1), originals.shape[1]
    return Figure(
        part="Autoencoder", name=f"reconstruction {frechet_name(said['network'])}", better="lower",
        value=frechet_distance(originals, restored), images=len(restored),
        interval=frechet_interval(both, lambda some: frechet_distance(*some.split(width, dim=1)), width, seed),
        **also_saying(few_rounds(width), said),
    )  # fmt: skip


def prior_embeddings(painter: TextToImage, captions: list[str], seed: int, batch_size: int) -> Tensor:
    """What the prior samples for the captions, (N, D), by the model's own settings; a function of (seed, number)."""
    names = {"prior_num_inference_steps": "num_inference_steps", "prior_guidance_scale": "guidance_scale",
             "num_prior_samples": "num_samples"}  # fmt: skip
    settings = {short: painter.settings[name] for name, short in names.items()}
    parts = []
    for start in tqdm(range(0, len(captions), batch_size), desc="prior", leave=False, disable=None):
        some = captions[start : start + batch_size]
        generators = [picture_generator(seed, start + number) for number in range(len(some))]
        parts.append(painter.pipe.sample_image_embeds(some, generator=generators, **settings).float().cpu())
    return torch.cat(parts)


def prior_figures(sampled: Tensor, texts: Tensor, true: Tensor, mean: Tensor, seed: int, **said: str) -> list[Figure]:
    """Cosines to the embeddings of the images that the captions are of, all (N, D), mean (D,)."""
    width = true.shape[1]
    joined = torch.cat([sampled, texts, true], dim=1)

    def cosines(rows: Tensor) -> dict[str, float]:
        return prior_cosines(*rows.split(width, dim=1), mean)

    found = cosines(joined)
    names = {
        "prior": ("cosine to the true image embedding, of the prior's", "higher"),
        "text": ("cosine to the true image embedding, of the text's", ""),
        "mean": ("cosine to the true image embedding, of the mean image's", ""),
    }
    return [
        Figure(
            part="Prior", name=name, better=better, value=found[key], images=len(true),
            interval=bootstrap(lambda rows, key=key: cosines(rows)[key], joined, 100, seed), **said,
        )
        for key, (name, better) in names.items()
    ]  # fmt: skip


def likelihood_figure(painter: PixelSpace, images: Pictures, captions: list[str], seed: int) -> Figure:
    """The variational bound on -log p of the first images, of these captions."""
    x = images.first(LIKELIHOOD_IMAGES).tensor().float() / 255
    x = x.mean(dim=1, keepdim=True) if painter.channels == 1 else x
    labels = (
        torch.tensor([painter.classes.index(caption) for caption in captions[: len(x)]]) if painter.classes else None
    )
    values = bits_per_dim(painter.unet, painter.scheduler, x, seed, labels)
    return Figure(
        part="Likelihood", name="variational bound on -log p (VLB)", unit="bits/dim", better="lower",
        value=values.mean().item(),
        images=len(x), interval=mean_interval(values, seed),
        remark=f"all {painter.scheduler.config.num_train_timesteps:,} terms, one draw of noise for each",
    )  # fmt: skip
