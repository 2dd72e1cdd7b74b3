"""How fast train/train_ldm.py trains, beside the loop of diffusers' examples/text_to_image/train_text_to_image.py.

    python tests/benchmarks/train_throughput.py [--config configs/cifar10/ldm.yaml] [--rounds 5] [--steps 4]

Both sides train the same U-Net on the same number of images a step, one optimiser step after the other, in turns. The
other side encodes images and captions in every step and computes in fp32, as that script does unless told otherwise;
it is spared the decoding of image files, and is given the image embeddings, which that script does not know. Weights
are random: time does not depend on them.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel

from ldm import config as configuration
from ldm.config import AutoencoderConfig, ClipConfig, LdmConfig
from ldm.diffusion.embedding_noise import noised_embedding
from ldm.diffusion.objective import dropped, min_snr_weight, squared_error, timesteps
from ldm.diffusion.process import prediction_target, q_sample
from ldm.diffusion.schedule import alphas_bar
from ldm.errors import UserError, exit_code_of
from ldm.training import failure, optim, precision
from ldm.training.randomness import generator, seed_dropout
from pipelines.arguments import ArgumentParser
from train.train_ldm import build_unet

CACHED_IMAGES = 4096
CAPTIONS = 70
ATTENTION = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)

Step = Callable[[int], None]


def diffusers_loop_step(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    noise_scheduler: DDPMScheduler,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    pixel_values: Tensor,
    input_ids: Tensor,
    image_embeds: Tensor,
) -> None:
    """One optimiser step of train_text_to_image.py: encode, noise, predict, mean squared error, clip, AdamW.

    pixel_values (B, 3, H, W) in [-1, 1]; input_ids (B, L); image_embeds (B, 2D), the U-Net's class labels.
    """
    latents = vae.encode(pixel_values).latent_dist.sample() * vae.config.scaling_factor
    noise = torch.randn_like(latents)
    t = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(latents),))
    noisy_latents = noise_scheduler.add_noise(latents, noise, t)
    encoder_hidden_states = text_encoder(input_ids, return_dict=False)[0]
    target = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: noise_scheduler.get_velocity(latents, noise, t),
        "sample": lambda: latents,
    }[noise_scheduler.config.prediction_type]()
    prediction = unet(noisy_latents, t, encoder_hidden_states, class_labels=image_embeds, return_dict=False)[0]
    F.mse_loss(prediction.float(), target.float()).backward()
    torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
    optimizer.step()
    lr_scheduler.step()
    optimizer.zero_grad()


def diffusers_loop(config: LdmConfig, vae: AutoencoderKL, text_encoder: CLIPTextModel) -> Step:
    """That loop, with everything it needs; the number of the step is not used."""
    unet, text = new_unet(config, vae, text_encoder), text_encoder.config
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    lr_scheduler = get_scheduler("constant", optimizer)
    noise_scheduler = DDPMScheduler(beta_schedule=config.beta_schedule, prediction_type=config.prediction_type)
    batch = (
        torch.rand(config.training.batch_size, 3, vae.config.sample_size, vae.config.sample_size) * 2 - 1,
        torch.randint(text.vocab_size, (config.training.batch_size, text.max_position_embeddings)),
        torch.randn(config.training.batch_size, 2 * text.projection_dim),
    )

    def step(_: int) -> None:
        with sdpa_kernel(list(ATTENTION)):  # as torch chooses: precision.prepare switched that off for the process
            diffusers_loop_step(unet, vae, text_encoder, noise_scheduler, optimizer, lr_scheduler, *batch)

    return step


def our_loop(config: LdmConfig, vae: AutoencoderKL, text_encoder: CLIPTextModel) -> Step:
    """The loop of train/train_ldm.py, in its precision, and compiled where the configuration says so: what `main` there
    does in a step, from latents and embeddings held in memory, less the DataLoader's bookkeeping and the log."""
    training, text = config.training, text_encoder.config
    accelerator = Accelerator(mixed_precision=precision.resolve(training.precision))
    unet = new_unet(config, vae, text_encoder).to(memory_format=torch.channels_last)
    precision.prepare(unet, accelerator.mixed_precision, accelerator.device)
    optimizer = optim.adamw(unet, training)
    ema = optim.moving_average(unet, training.ema_decay)
    model, optimizer = accelerator.prepare(unet, optimizer)
    ema.to(accelerator.device)
    if training.compile:
        model.compile()
    guard = failure.Guard(accelerator, optimizer, Path())
    alpha_bar = alphas_bar(config.beta_schedule, config.num_train_timesteps).to(accelerator.device)
    embedding_alpha_bar = alphas_bar("squaredcos_cap_v2", 1000).to(accelerator.device)

    latent_shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    latent_mean, latent_std = torch.randn(2, CACHED_IMAGES, *latent_shape).half().abs()
    image_embeds = torch.randn(CACHED_IMAGES, text.projection_dim)
    hidden_states = torch.randn(CAPTIONS, text.max_position_embeddings, text.hidden_size).half()
    mean, std = torch.zeros(text.projection_dim), torch.ones(text.projection_dim)

    def step(number: int) -> None:
        seed_dropout(config.seed, number, 0)
        rate = optim.set_learning_rate(optimizer, number, training)
        draw, size = generator(config.seed, "ldm", number), training.batch_size
        chosen = torch.randint(CACHED_IMAGES, (size,), generator=draw)
        posterior_noise, noise = torch.randn(2, size, *latent_shape, generator=draw)
        embedding_noise = torch.randn(size, text.projection_dim, generator=draw)
        draws = torch.rand(3, size, generator=draw)
        t = timesteps(draws[0], config.num_train_timesteps, config.timestep_sampling)
        level = timesteps(draws[1], config.max_noise_level + 1, "uniform")
        no_caption, no_image = dropped(
            draws[2], config.caption_dropout, config.image_embedding_dropout, config.joint_dropout
        )
        tokens = hidden_states[chosen % CAPTIONS].float()
        tokens = torch.where(no_caption[:, None, None], hidden_states[:1].float(), tokens)
        condition = noised_embedding(image_embeds[chosen], mean, std, level, embedding_alpha_bar, embedding_noise)
        condition = condition.masked_fill(no_image[:, None], 0.0)
        z_0 = latent_mean[chosen].float() + latent_std[chosen].float() * posterior_noise
        z_t = q_sample(z_0, alpha_bar[t], noise).contiguous(memory_format=torch.channels_last)
        prediction = model(z_t, t, encoder_hidden_states=tokens, class_labels=condition).sample
        target = prediction_target(config.prediction_type, z_0, alpha_bar[t], noise)
        error = squared_error(prediction, target)
        if config.min_snr_gamma is not None:
            error = error * min_snr_weight(alpha_bar[t], config.prediction_type, config.min_snr_gamma).to(error)
        loss = error.mean()
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        guard.saw(loss, chosen)
        guard.check(norm, step=number + 1, learning_rate=rate)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())

    return step


def new_unet(config: LdmConfig, vae: AutoencoderKL, text_encoder: CLIPTextModel) -> UNet2DConditionModel:
    torch.manual_seed(config.seed)
    side = vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1)
    text = text_encoder.config
    return build_unet(config, (vae.config.latent_channels, side, side), text.hidden_size, text.projection_dim)


def frozen_encoders(folder: Path) -> tuple[AutoencoderKL, CLIPTextModel]:
    """The autoencoder and the text tower that autoencoder.yaml and clip.yaml in `folder` describe."""
    vae = AutoencoderKL(**configuration.load(AutoencoderConfig, folder / "autoencoder.yaml").model)
    clip = configuration.load(ClipConfig, folder / "clip.yaml")
    text = CLIPTextConfig(
        vocab_size=clip.vocabulary_size or 49408,
        max_position_embeddings=clip.context_length,
        hidden_size=clip.model["text_width"],
        intermediate_size=4 * clip.model["text_width"],
        num_hidden_layers=clip.model["text_layers"],
        num_attention_heads=clip.model["text_heads"],
        projection_dim=clip.model["embedding_dim"],
    )
    return vae.eval().requires_grad_(False), CLIPTextModel(text).eval().requires_grad_(False)


def interleaved(loops: dict[str, Step], rounds: int, steps: int, batch_size: int) -> dict[str, list[float]]:
    """Images a second of each loop in each round, in turns, so that a busy machine slows all alike."""
    speeds = {name: [] for name in loops}
    for name, loop in loops.items():  # compilation, and first touches of memory
        start = time.perf_counter()
        for number in range(2):
            loop(number)
        print(f"{name}: warmed up in {time.perf_counter() - start:.1f} s", flush=True)
    for turn in range(rounds):
        for name, loop in loops.items():
            start = time.perf_counter()
            for number in range(steps):
                loop(2 + turn * steps + number)
            speeds[name].append(steps * batch_size / (time.perf_counter() - start))
        print(
            f"round {turn + 1}: " + ", ".join(f"{name} {values[-1]:.0f}" for name, values in speeds.items()), flush=True
        )
    return speeds


def main() -> None:
    parser = ArgumentParser(description="Training throughput of the U-Net against diffusers' own training loop.")
    parser.add_argument("--config", type=Path, default=Path("configs/cifar10/ldm.yaml"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps of each side in a round")
    arguments = parser.parse_args()
    check(arguments)
    config = configuration.load(LdmConfig, arguments.config)
    encoders = frozen_encoders(arguments.config.parent)
    ours = f"train_ldm ({precision.resolve(config.training.precision)}, compile {config.training.compile})"
    loops = {"train_text_to_image (fp32)": diffusers_loop(config, *encoders), ours: our_loop(config, *encoders)}
    speeds = interleaved(loops, arguments.rounds, arguments.steps, config.training.batch_size)

    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, batch {config.training.batch_size}; images/s, median"
    )
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name, values in speeds.items():
        print(f"{name:<40}{medians[name]:8.1f}   ({min(values):.1f} … {max(values):.1f})")
    baseline, faster = medians.values()
    print(f"ratio {faster / baseline:.2f}")


def check(arguments: argparse.Namespace) -> None:
    for name in ("rounds", "steps"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: must be at least 1")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
