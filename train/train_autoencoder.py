"""Trains the first stage: an AutoencoderKL that compresses images into latents (Rombach et al. 2022, §3.1).

    accelerate launch train/train_autoencoder.py --config configs/shapes/autoencoder.yaml [--resume] [key=value …]

L1 + perceptual + KL, and a PatchGAN term after a delay. Leaves `<output_dir>/model/vae`, whose latents have zero
channel means and, times its scaling_factor, unit variance.
"""

import sys

import torch
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader

from ldm import config as configuration
from ldm.autoencoders import kl
from ldm.autoencoders.discriminator import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from ldm.autoencoders.perceptual import PerceptualDistance
from ldm.clip import export
from ldm.config import AutoencoderConfig
from ldm.data.captions import CaptionedImages, as_is, open_images
from ldm.data.order import MicroBatches, global_batch
from ldm.errors import exit_code_of
from ldm.training import checkpoint, optim, precision, run
from ldm.training.checkpoint import Checkpoint
from ldm.training.randomness import generator, seed_dropout
from ldm.training.tracking import Tracker
from pipelines.arguments import parse_training_arguments

GRID_IMAGES = 16


def main() -> None:
    arguments = parse_training_arguments(__doc__)
    config = configuration.load(AutoencoderConfig, arguments.config, arguments.overrides)
    configuration.check_arguments("model", config.model, AutoencoderKL)
    accelerator, share, resumed = run.start(config, arguments.resume)
    training = config.training
    data = open_images(config.data, config.seed)

    # Networks, optimisers, moving average
    torch.manual_seed(config.seed)
    if config.init == "scratch":
        vae = AutoencoderKL(**config.model)
    else:
        vae = AutoencoderKL.from_pretrained(run.component_folder(config.init, "init", "vae"))
    vae.to(memory_format=torch.channels_last)
    precision.prepare(vae, accelerator.mixed_precision, accelerator.device)
    latent_shape = kl.latent_shape(vae, config.data.image_size)
    model = kl.Reconstruction(vae)
    discriminator = PatchDiscriminator(config.discriminator_channels)
    optimizer = optim.adamw(model, training)
    discriminator_optimizer = optim.adamw(discriminator, training)
    ema = optim.moving_average(vae, training.ema_decay)
    perceptual = None
    if config.perceptual_weight:
        clip_folder = run.component_folder(config.perceptual_clip, "perceptual_clip", "image_encoder").parent
        perceptual = PerceptualDistance(export.load(clip_folder).image_encoder)

    first_step = 0
    if resumed is not None:
        first_step = resumed.step
        vae.load_state_dict(resumed.tensors["model"])
        discriminator.load_state_dict(resumed.tensors["discriminator"])
        optim.load_optimizer(optimizer, resumed.tensors["optimizer"])
        optim.load_optimizer(discriminator_optimizer, resumed.tensors["discriminator_optimizer"])
        optim.load_ema(ema, vae, resumed.tensors["ema"], first_step)
    model, discriminator, optimizer, discriminator_optimizer = accelerator.prepare(
        model, discriminator, optimizer, discriminator_optimizer
    )
    ema.to(accelerator.device)
    if perceptual is not None:
        perceptual.to(accelerator.device)
    if training.compile:
        model.compile()

    # Data: a pure function of the step
    loader = DataLoader(
        data,
        batch_sampler=MicroBatches(len(data), share, config.seed, first_step, training.max_steps),
        num_workers=config.data.num_workers,
        collate_fn=as_is,
    )
    folder = run.claim(config, accelerator)
    tracker = Tracker(folder, first_step, training, accelerator.is_main_process)

    for number, batch in enumerate(loader, start=first_step * share.accumulation):
        step, accumulation_step = divmod(number, share.accumulation)
        seed_dropout(config.seed, step, share.rank)
        rate = optim.set_learning_rate(optimizer, step, training)
        optim.set_learning_rate(discriminator_optimizer, step, training)
        x = batch["images"].to(accelerator.device, memory_format=torch.channels_last)
        noise = torch.randn(share.batch_size, *latent_shape, generator=generator(config.seed, "posterior", step))
        noise = noise[share.slice(accumulation_step)].to(accelerator.device)
        adversarial = config.adversarial_weight > 0 and step >= config.adversarial_start

        # Autoencoder
        with accelerator.accumulate(model, discriminator):
            x_hat, mean, logvar = model(x, noise)
            l1 = (x_hat - x).abs().mean()
            kl_loss = kl.kl_divergence(mean, logvar)
            metrics = {"l1": l1, "kl": kl_loss, "psnr": kl.psnr(x_hat, x)}
            reconstruction = l1
            if perceptual is not None:
                metrics["perceptual"] = perceptual(x_hat, x)
                reconstruction = l1 + config.perceptual_weight * metrics["perceptual"]
            loss = reconstruction + config.kl_weight * kl_loss
            if adversarial:
                discriminator.requires_grad_(False)
                metrics["adversarial"] = generator_loss(discriminator(x_hat))
                weight = adaptive_weight(reconstruction, metrics["adversarial"], vae.decoder.conv_out.weight)
                loss = loss + config.adversarial_weight * weight * metrics["adversarial"]
                discriminator.requires_grad_(True)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), training.max_grad_norm)
                optim.check_finite(loss, norm, step=step, learning_rate=rate)
            optimizer.step()
            optimizer.zero_grad()

            # Discriminator
            if adversarial:
                judged = discriminator_loss(discriminator(x), discriminator(x_hat.detach()))
                accelerator.backward(judged)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(discriminator.parameters(), training.max_grad_norm)
                discriminator_optimizer.step()
                discriminator_optimizer.zero_grad()
                metrics["discriminator"] = judged

        tracker.collect(**metrics)
        if not accelerator.sync_gradients:
            continue
        ema.step(vae.parameters())
        done = step + 1
        tracker.step(done, learning_rate=rate)
        if done % training.sample_every == 0 or done == training.max_steps:
            with optim.averaged(ema, vae):
                tracker.pictures(done, reconstructions(vae, data, accelerator.device), columns=GRID_IMAGES // 2)
        if accelerator.is_main_process and (done % training.checkpoint_every == 0 or done == training.max_steps):
            tensors = {
                "model": vae.state_dict(),
                "ema": optim.ema_tensors(ema, vae),
                "optimizer": optim.optimizer_tensors(optimizer),
                "discriminator": accelerator.unwrap_model(discriminator).state_dict(),
                "discriminator_optimizer": optim.optimizer_tensors(discriminator_optimizer),
            }
            checkpoint.save(folder / "checkpoints", Checkpoint(done, tensors, {}), training.keep_checkpoints)

    # Export: averaged weights, standardised latents
    if accelerator.is_main_process:
        ema.copy_to(vae.parameters())
        vae.eval()
        statistics = kl.latent_statistics(posteriors(vae, data, config, accelerator.device))
        channels = len(statistics.mean)
        tracker.log(training.max_steps, latent_std=statistics.std, active_channels=statistics.active_channels)
        if statistics.active_channels < channels:
            tracker.say(
                f"warning: collapse: {channels - statistics.active_channels} of {channels} latent channels carry "
                f"nothing; lower kl_weight ({config.kl_weight})"
            )
        kl.standardise(vae, statistics)
        vae.save_pretrained(folder / "model" / "vae")
        tracker.say(f"wrote {folder / 'model' / 'vae'} (scaling_factor {vae.config.scaling_factor:.4f})")
    tracker.close()
    accelerator.end_training()


@torch.no_grad()
def reconstructions(vae: AutoencoderKL, data: CaptionedImages, device: torch.device) -> torch.Tensor:
    """Rows of originals, each above its reconstruction from the posterior's mean: (N, 3, S, S) in [-1, 1]."""
    indices = range(min(GRID_IMAGES, len(data)))
    x = data.__getitems__([(0, index) for index in indices])["images"].to(device)
    x_hat = vae.decode(vae.encode(x).latent_dist.mean).sample
    half = GRID_IMAGES // 2
    return torch.cat([part for i in range(0, len(x), half) for part in (x[i : i + half], x_hat[i : i + half])])


@torch.no_grad()
def posteriors(vae: AutoencoderKL, data: CaptionedImages, config: AutoencoderConfig, device: torch.device):
    """Posterior means and log-variances of `statistics_images` images, batch by batch."""
    size = min(config.training.batch_size, len(data))
    for step in range(max(1, min(config.statistics_images, len(data)) // size)):
        x = data.__getitems__(global_batch(step, size, len(data), config.seed))["images"].to(device)
        posterior = vae.encode(x).latent_dist
        yield posterior.mean, posterior.logvar


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
