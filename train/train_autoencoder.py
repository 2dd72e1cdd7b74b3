"""Trains the first stage: an AutoencoderKL that compresses images into latents (Rombach et al. 2022, §3.1).

    accelerate launch train/train_autoencoder.py --config configs/shapes/autoencoder.yaml [--resume] [key=value …]

L1 + perceptual + KL, and a PatchGAN term after a delay. Leaves `<output_dir>/model/vae`, whose latents have zero
channel means and, times its scaling_factor, unit variance.

With another `kind` than `kl` (configs/digits), it trains the plain, denoising, sparse, k-sparse or variational
autoencoder of `ldm.autoencoders`, measures it on `test_split` and leaves `<output_dir>/model/autoencoder`.
"""

import sys
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import nn

from ldm import configuration
from ldm.autoencoders import kl
from ldm.autoencoders.denoising import DenoisingAutoencoder
from ldm.autoencoders.discriminator import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from ldm.autoencoders.k_sparse import KSparseAutoencoder
from ldm.autoencoders.perceptual import PerceptualDistance
from ldm.autoencoders.plain import Autoencoder
from ldm.autoencoders.sparse import SparseAutoencoder
from ldm.autoencoders.variational import VariationalAutoencoder
from ldm.clip import export
from ldm.config import AutoencoderConfig
from ldm.data.batches import data_state, micro_batches, open_data
from ldm.data.captions import CaptionedImages
from ldm.data.order import global_batch
from ldm.errors import UserError, exit_code_of
from ldm.training import checkpoint, failure, memory, optim, run
from ldm.training.checkpoint import Checkpoint
from ldm.training.interruption import Interruption
from ldm.training.randomness import generator, seed_dropout
from ldm.training.tracking import Tracker
from pipelines.arguments import parse_training_arguments

GRID_IMAGES = 16
TEST_IMAGES = 2_000
CLASSES = {
    "kl": AutoencoderKL,
    "plain": Autoencoder,
    "denoising": DenoisingAutoencoder,
    "sparse": SparseAutoencoder,
    "k_sparse": KSparseAutoencoder,
    "variational": VariationalAutoencoder,
}


@failure.in_words
def main() -> None:
    arguments = parse_training_arguments(__doc__)
    config = configuration.load(AutoencoderConfig, arguments.config, arguments.overrides)
    configuration.check_arguments("model", config.model, CLASSES[config.kind])
    accelerator, share, resumed = run.start(config, arguments.resume)
    training = config.training
    data = open_data(config.data, config.seed, share.num_processes)
    test_data = None
    if config.test_split is not None:
        most = None if config.data.streaming else TEST_IMAGES
        test_data = open_data(replace(config.data, split=config.test_split, max_images=most), config.seed)

    # Networks, optimisers, moving average
    torch.manual_seed(config.seed)
    autoencoder = build(config)
    autoencoder.to(memory_format=torch.channels_last)
    run.ready(autoencoder, training, accelerator)
    if config.kind == "kl":
        noise_shape = kl.latent_shape(autoencoder, config.data.image_size)
        model = kl.Reconstruction(autoencoder)
    else:
        noise_shape = autoencoder.noise_shape
        model = autoencoder
    discriminator = PatchDiscriminator(config.discriminator_channels, config.discriminator_layers)
    perceptual = None
    if config.perceptual_weight:
        clip = run.clip_parts(config.perceptual_clip, "perceptual_clip", images=True)
        perceptual = PerceptualDistance(export.load(clip)).to(accelerator.device)
    if training.find_micro_batch:
        before = None if "training.find_micro_batch" in config.resume.allow else resumed
        share = memory.fitting_share(
            accelerator, share, model, partial(try_step, config, accelerator, model, perceptual, noise_shape), before
        )
    optimizer = optim.build(model, training)
    discriminator_optimizer = optim.build(discriminator, training)

    model, discriminator, optimizer, discriminator_optimizer = accelerator.prepare(
        model, discriminator, optimizer, discriminator_optimizer
    )
    ema = optim.moving_average(autoencoder, training.ema_decay)
    first_step = 0
    if resumed is not None:
        first_step = resumed.step
        optim.restore(resumed, autoencoder, ema, optimizer)
        optim.load_weights(resumed, "discriminator", accelerator.unwrap_model(discriminator))
        optim.load_optimizer(discriminator_optimizer, resumed.read("discriminator_optimizer"))

    # Data: a pure function of the step
    loader = micro_batches(data, config, share, resumed)
    folder = run.claim(config, accelerator)
    tracker = Tracker(folder, first_step, training, accelerator.is_main_process)
    interruption = Interruption(accelerator, training.timeout_seconds)
    guard = failure.Guard(accelerator, optimizer, folder, resumed)
    discriminator_guard = failure.Guard(accelerator, discriminator_optimizer, folder, of="discriminator")

    for number, batch in enumerate(loader, start=first_step * share.accumulation):
        step, accumulation_step = divmod(number, share.accumulation)
        seed_dropout(config.seed, step, share.number(accumulation_step))
        rate = optim.set_learning_rate(optimizer, step, training)
        optim.set_learning_rate(discriminator_optimizer, step, training)
        x = batch["images"].to(accelerator.device, memory_format=torch.channels_last)
        noise = torch.randn(share.batch_size, *noise_shape, generator=generator(config.seed, "posterior", step))
        noise = noise[share.slice(accumulation_step)].to(accelerator.device)
        adversarial = config.adversarial_weight > 0 and step >= config.adversarial_start

        # Autoencoder
        with accelerator.accumulate(model, discriminator):
            if config.kind == "kl":
                x_hat, mean, logvar = model(x, noise)
                l1, kl_loss = (x_hat - x).abs().mean(), kl.kl_divergence(mean, logvar)
                metrics = {"l1": l1, "kl": kl_loss, "psnr": kl.psnr(x_hat, x)}
                reconstruction = l1
                if perceptual is not None:
                    metrics["perceptual"] = perceptual(x_hat, x)
                    reconstruction = l1 + config.perceptual_weight * metrics["perceptual"]
                loss = reconstruction + config.kl_weight * kl_loss
            else:
                metrics = model(in_unit_range(x, autoencoder), noise)
                loss = metrics["loss"]
            if adversarial:
                discriminator.requires_grad_(False)
                metrics["adversarial"] = generator_loss(discriminator(x_hat))
                weight = adaptive_weight(reconstruction, metrics["adversarial"], autoencoder.decoder.conv_out.weight)
                loss = loss + config.adversarial_weight * weight * metrics["adversarial"]
                discriminator.requires_grad_(True)
            accelerator.backward(loss)
            guard.saw(loss, batch["indices"])
            if accelerator.sync_gradients:
                norm = optim.clip_gradients(accelerator, optimizer, model, training.max_grad_norm)
                guard.check(norm, step=step + 1, learning_rate=rate)
            optimizer.step()
            optimizer.zero_grad()

            # Discriminator
            if adversarial:
                judged = discriminator_loss(discriminator(x), discriminator(x_hat.detach()))
                accelerator.backward(judged)
                discriminator_guard.saw(judged, batch["indices"])
                if accelerator.sync_gradients:
                    norm = optim.clip_gradients(
                        accelerator, discriminator_optimizer, discriminator, training.max_grad_norm
                    )
                    discriminator_guard.check(norm, step=step + 1, learning_rate=rate)
                discriminator_optimizer.step()
                discriminator_optimizer.zero_grad()
                metrics["discriminator"] = judged

        tracker.collect(**metrics)
        if not accelerator.sync_gradients:
            continue
        if training.compile and step == first_step:
            memory.give_back()
        if guard.is_update:
            optim.update_average(ema, autoencoder)
        done = step + 1
        tracker.step(done, learning_rate=rate, **guard.metrics())
        stopped_by = interruption.requested()
        due = done % training.checkpoint_every == 0 or done == training.max_steps
        if due or stopped_by:
            guard.settle()
            discriminator_guard.settle()
            state = guard.state() | share.state() | data_state(accelerator, data, batch)
            tensors = {
                "model": autoencoder.state_dict(),
                "ema": optim.ema_tensors(ema, autoencoder),
                "optimizer": optim.optimizer_tensors(optimizer),
                "discriminator": accelerator.unwrap_model(discriminator).state_dict(),
                "discriminator_optimizer": optim.optimizer_tensors(discriminator_optimizer),
            }
            checkpoint.save(folder / "checkpoints", Checkpoint(done, tensors, state), training.keep_checkpoints)
        if stopped_by:
            tracker.close()
            interruption.stop(stopped_by, done)
        if done % training.sample_every == 0 or done == training.max_steps:
            with optim.averaged(ema, autoencoder):
                if accelerator.is_main_process:
                    pictures = reconstructions(autoencoder, data.excerpt(GRID_IMAGES), accelerator.device)
                    tracker.pictures(done, pictures, columns=GRID_IMAGES // 2)

    # Export: averaged weights
    if accelerator.is_main_process:
        ema.copy_to(optim.trained(autoencoder).values())
        autoencoder.eval()
        if test_data is not None and config.kind != "kl":
            tracker.log(
                training.max_steps, **measured(autoencoder, test_data.excerpt(TEST_IMAGES), config, accelerator.device)
            )
        exported = folder / "model" / ("vae" if config.kind == "kl" else "autoencoder")
        if config.kind == "kl":
            standardise(autoencoder, data.excerpt(config.statistics_images), config, accelerator.device, tracker)
        autoencoder.save_pretrained(exported)
        tracker.say(f"wrote {exported}")
    tracker.close()
    interruption.close()
    accelerator.end_training()


def build(config: AutoencoderConfig) -> nn.Module:
    """The autoencoder of `config.kind`, from scratch or from `config.init`."""
    kind = CLASSES[config.kind]
    if config.init != "scratch":
        component = "vae" if config.kind == "kl" else "autoencoder"
        autoencoder = kind.from_pretrained(run.component_folder(config.init, "init", component, (kind.__name__,)))
        run.check_agrees(config.init, "autoencoder", autoencoder.config, config.model)
    else:
        side = config.data.image_size
        sizes = {} if config.kind == "kl" else {"image_shape": (1 if config.greyscale else 3, side, side)}
        autoencoder = configuration.built("model", kind, {**sizes, **config.model})
    if config.kind == "kl":
        factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
        if config.data.image_size % factor:
            raise UserError(
                f"data.image_size {config.data.image_size}: the autoencoder halves images to a {factor}th; take a "
                f"multiple of {factor}"
            )
        if autoencoder.quant_conv is None or autoencoder.post_quant_conv is None:
            raise UserError(
                "model.use_quant_conv and use_post_quant_conv must be true, also of init: those layers take the means "
                "of the latents"
            )
    else:
        channels, *sides = autoencoder.image_shape
        if channels not in (1, 3) or sides != [config.data.image_size] * 2:
            raise UserError(
                f"model.image_shape {list(autoencoder.image_shape)}: must be 1 or 3 channels of data.image_size "
                f"{config.data.image_size}"
            )
    return autoencoder


def try_step(
    config: AutoencoderConfig,
    accelerator: Accelerator,
    model: nn.Module,
    perceptual: nn.Module | None,
    noise_shape: tuple[int, ...],
    micro_batch_size: int,
) -> None:
    """The gradients of so many samples, for the memory they take; the discriminator's is little."""
    side = config.data.image_size
    x = torch.zeros(micro_batch_size, 3, side, side, device=accelerator.device)
    noise = torch.zeros(micro_batch_size, *noise_shape, device=accelerator.device)
    with accelerator.autocast():
        if config.kind == "kl":
            x_hat, _, _ = model(x.contiguous(memory_format=torch.channels_last), noise)
            loss = x_hat.float().mean() + (0 if perceptual is None else perceptual(x_hat, x))
        else:
            loss = model(in_unit_range(x, model), noise)["loss"]
    loss.backward()


def in_unit_range(x: torch.Tensor, autoencoder: nn.Module) -> torch.Tensor:
    """Images (B, 3, S, S) in [-1, 1] as the autoencoders of vectors want them: in [0, 1], grey where they have one
    channel."""
    x = (x + 1) / 2
    return x.mean(dim=1, keepdim=True) if autoencoder.image_shape[0] == 1 else x


def measured(
    autoencoder: nn.Module, data: CaptionedImages, config: AutoencoderConfig, device: torch.device
) -> dict[str, float]:
    """What the autoencoder's kind measures on images it was not trained on."""
    x = data.__getitems__([(0, index) for index in range(len(data))])["images"].to(device)
    values = autoencoder.measure(in_unit_range(x, autoencoder), generator(config.seed, "measure"))
    return {f"test_{name}": value for name, value in values.items()}


def standardise(
    vae: AutoencoderKL, data: CaptionedImages, config: AutoencoderConfig, device: torch.device, tracker: Tracker
) -> None:
    """Gives the latents zero channel means and the scaling_factor that makes their variance 1; warns of collapse."""
    statistics = kl.latent_statistics(posteriors(vae, data, config, device))
    channels = len(statistics.mean)
    tracker.log(config.training.max_steps, latent_std=statistics.std, active_channels=statistics.active_channels)
    if statistics.active_channels < channels:
        tracker.say(
            f"warning: collapse: {channels - statistics.active_channels} of {channels} latent channels carry "
            f"nothing; lower kl_weight ({config.kl_weight})"
        )
    kl.standardise(vae, statistics)


@torch.no_grad()
def reconstructions(autoencoder: nn.Module, data: CaptionedImages, device: torch.device) -> torch.Tensor:
    """Rows of originals, each above its reconstruction (from a posterior's mean): (N, 3, S, S) in [-1, 1]."""
    indices = range(min(GRID_IMAGES, len(data)))
    x = data.__getitems__([(0, index) for index in indices])["images"].to(device)
    if isinstance(autoencoder, AutoencoderKL):
        x_hat = autoencoder.decode(autoencoder.encode(x).latent_dist.mean).sample
    else:
        restored = autoencoder.decode(autoencoder.encode(in_unit_range(x, autoencoder)))
        x_hat = (restored * 2 - 1).expand_as(x)
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
