"""Trains the U-Net: ε_θ(z_t, t, c) in latent space, c = caption tokens and a noised CLIP image embedding.

    accelerate launch train/train_ldm.py --config configs/shapes/ldm.yaml [--resume] [key=value …]

Rombach et al. 2022 with the decoder's conditions of Ramesh et al. 2022, §2.1, as Stable unCLIP joins them. Leaves
`<output_dir>/model/{unet,scheduler,image_normalizer,image_noising_scheduler}`. With `image_conditioning=false`
(configs/shapes/ldm_text.yaml) c is the caption tokens alone, there is no prior, and the last two are not left.

With `autoencoder=none` (configs/digits/ldm.yaml) it is DDPM in pixel space, without a condition or with the caption as
a class (Ho et al. 2020; Ho & Salimans 2022). Leaves in `<output_dir>/model` what stock DDPMPipeline and, where the
variance is not learned, DDIMPipeline open; with classes, their captions in classes.json.

With `lora` (configs/lora.yaml) it trains adapters for a model that there is, on images and captions as they are. Leaves
`<output_dir>/model/pytorch_lora_weights.safetensors`, which `load_lora_weights` opens.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    PriorTransformer,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPTextConfig
from transformers.utils import logging as transformers_logging

from ldm import configuration
from ldm.clip import export
from ldm.clip.parts import ClipParts
from ldm.config import NOISE_LEVELS, LdmConfig
from ldm.data.batches import data_state, micro_batches
from ldm.data.latents import CachedLatents
from ldm.data.order import Share
from ldm.diffusion import importance
from ldm.diffusion.embedding_noise import noised_embedding
from ldm.diffusion.objective import dropped, min_snr_weight, squared_error, timesteps
from ldm.diffusion.process import prediction_target, q_sample
from ldm.diffusion.schedule import alphas_bar
from ldm.diffusion.size_condition import size_condition
from ldm.diffusion.variational_bound import (
    bound_term,
    discretised_log_likelihood,
    gaussian_log_likelihood,
    hybrid_loss,
)
from ldm.errors import UserError, exit_code_of
from ldm.training import averages, checkpoint, failure, lora, memory, optim, precision, run, sharded
from ldm.training.checkpoint import Checkpoint
from ldm.training.interruption import Interruption
from ldm.training.randomness import generator, seed_dropout
from ldm.training.task import (
    Task,
    configured_alpha_bar,
    in_pixel_space,
    solver,
    try_step,
    validation_losses,
)
from ldm.training.tracking import Tracker
from ldm.training.unet import build_unet, image_normalizer, open_unet
from pipelines import LatentDiffusionPipeline, LatentDiffusionVariationPipeline
from pipelines.arguments import parse_training_arguments


@failure.in_words
def main() -> None:
    arguments = parse_training_arguments(__doc__)
    config = configuration.load(LdmConfig, arguments.config, arguments.overrides)
    if config.lora is not None:
        config, base = lora.with_process_of_base(config)
    accelerator, share, resumed = run.start(config, arguments.resume, can_shard=config.lora is None)
    training = config.training
    state_of_base = {} if config.lora is None else lora.state_of_base(config, base, resumed)

    # Where x_0 comes from, the U-Net and its conditions; optimiser, moving average, schedule
    torch.manual_seed(config.seed)
    if config.lora is not None:
        task = lora.on_pipeline(config, share, *opened_pipeline(config, base, accelerator.device))
    elif config.autoencoder == "none":
        task = in_pixel_space(config, share)
    else:
        task = in_latent_space(config, accelerator.device)
    unet = task.unet.to(memory_format=torch.channels_last)
    run.ready(unet, training, accelerator)
    if training.find_micro_batch:
        before = None if "training.find_micro_batch" in config.resume.allow else resumed
        share = memory.fitting_share(accelerator, share, unet, partial(try_step, accelerator, task), before)
    optimizer = optim.build(unet, training)
    alpha_bar = task.alpha_bar.to(accelerator.device, precision.finest(accelerator.device))
    history = importance.empty_history(config.num_train_timesteps)

    model, optimizer = sharded.prepare(
        accelerator,
        unet,
        optimizer,
        precision=precision.resolve(training.precision),
        micro_batch_size=share.micro_batch_size,
        max_grad_norm=training.max_grad_norm,
    )
    ema = optim.moving_average(unet, training.ema_decay)
    power_averages = averages.power_averages(unet, config.average_lengths)
    first_step = 0
    if resumed is not None:
        first_step = resumed.step
        optim.restore(resumed, unet, ema, optimizer)
        averages.restore(resumed, power_averages, unet)
        if config.timestep_sampling == "importance":
            history = resumed.read("importance")["history"]

    # Data: a pure function of the step
    loader = micro_batches(task.data, config, share, resumed)
    folder = run.claim(config, accelerator)
    tracker = Tracker(folder, first_step, training, accelerator.is_main_process)
    interruption = Interruption(accelerator, training.timeout_seconds)
    guard = failure.Guard(accelerator, optimizer, folder, resumed)

    for number, batch in enumerate(loader, start=first_step * share.accumulation):
        step, accumulation_step = divmod(number, share.accumulation)
        seed_dropout(config.seed, step, share.number(accumulation_step))
        rate = optim.set_learning_rate(optimizer, step, training)
        batch = task.encoded(batch)

        # Everything random, drawn once a step for the global batch, of which this process takes its part
        if accumulation_step == 0:
            draw = generator(config.seed, "ldm", step)
            noises = torch.randn(2, share.batch_size, *batch["latent_mean"].shape[1:], generator=draw)
            draws = torch.rand(share.batch_size, generator=draw)
            if config.timestep_sampling == "importance":
                times, weights = importance.draw_timesteps(draws, importance.probabilities(history))
            else:
                times = timesteps(draws, config.num_train_timesteps, config.timestep_sampling)
                weights = torch.ones(len(times))
            after_noises = draw.get_state()
        draw.set_state(after_noises)
        part = share.slice(accumulation_step)
        conditions = task.conditions(batch, draw, share, part)
        conditions = precision.with_tokens_cast(conditions, accelerator.mixed_precision)
        posterior_noise, noise, t, weight = (
            values[part].to(accelerator.device) for values in (*noises, times, weights.float())
        )
        mean, std = batch["latent_mean"].to(accelerator.device), batch["latent_std"].to(accelerator.device)

        with accelerator.accumulate(model):
            z_0 = mean + std * posterior_noise
            z_t = q_sample(z_0, alpha_bar[t], noise).contiguous(memory_format=torch.channels_last)
            output = model(z_t, t, **conditions).sample.float()
            terms = losses(config, output, z_0, z_t, noise, t, alpha_bar)
            loss = (terms * weight.to(terms)).mean()
            accelerator.backward(loss)
            guard.saw(loss, batch["indices"])
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), training.max_grad_norm)
                guard.check(norm, step=step + 1, learning_rate=rate)
            optimizer.step()
            optimizer.zero_grad()

        tracker.collect(loss=loss)
        if config.timestep_sampling == "importance":
            history = importance.remember(history, *(x.cpu() for x in accelerator.gather((t, terms.detach()))))
        if not accelerator.sync_gradients:
            continue
        done = step + 1
        if training.compile and step == first_step:
            memory.give_back()
        if guard.is_update:
            optim.update_average(ema, unet)
            averages.update(power_averages, unet, done)
        tracker.step(done, learning_rate=rate, **guard.metrics())
        if done % config.snapshot_every == 0 or done == training.max_steps:
            averages.write_snapshots(folder / "averages", power_averages, unet, done)
        stopped_by = interruption.requested()
        due = done % training.checkpoint_every == 0 or done == training.max_steps
        if due or stopped_by:
            guard.settle()
            state = guard.state() | share.state() | data_state(accelerator, task.data, batch) | state_of_base
            tensors = {
                "model": optim.weights(unet),
                "ema": optim.ema_tensors(ema, unet),
                "optimizer": optim.optimizer_tensors(optimizer),
            }
            tensors |= {name: optim.ema_tensors(average, unet) for name, average in power_averages.items()}
            if config.timestep_sampling == "importance":
                tensors["importance"] = {"history": history}
            checkpoint.save(folder / "checkpoints", Checkpoint(done, tensors, state), training.keep_checkpoints)
        if stopped_by:
            tracker.close()
            interruption.stop(stopped_by, done)
        if done % training.sample_every == 0 or done == training.max_steps:
            images = None
            with optim.averaged(ema, unet) as network:
                if accelerator.is_main_process:
                    images = task.samples(network)
                    if task.validation is not None:
                        tracker.log(done, **validation_losses(config, network, task, alpha_bar))
            if images is not None:
                tracker.pictures(done, images, columns=10 if config.sample_prompts else 8)
            if training.compile:
                memory.give_back()

    # Export: averaged weights
    with optim.averaged(ema, unet) as network:
        if accelerator.is_main_process:
            task.save(network, folder / "model")
            tracker.say(f"wrote {folder / 'model'}")
    tracker.close()
    interruption.close()
    accelerator.end_training()


def losses(
    config: LdmConfig, output: Tensor, z_0: Tensor, z_t: Tensor, noise: Tensor, t: Tensor, alpha_bar: Tensor
) -> Tensor:
    """What each sample (B,) is to minimise, of the network's output at z_t: `config.objective`."""
    if config.objective == "vlb":
        decoder = discretised_log_likelihood if config.autoencoder == "none" else gaussian_log_likelihood
        term = bound_term(output, z_0, z_t, t, alpha_bar, config.prediction_type, config.variance, decoder)
        return config.num_train_timesteps * term
    target = prediction_target(config.prediction_type, z_0, alpha_bar[t], noise)
    if config.objective == "hybrid":
        return hybrid_loss(output, z_0, z_t, target, t, alpha_bar, config.prediction_type)
    error = squared_error(output, target)
    if config.min_snr_gamma is None:
        return error
    return error * min_snr_weight(alpha_bar[t], config.prediction_type, config.min_snr_gamma).to(error)


def in_latent_space(config: LdmConfig, device: torch.device) -> Task:
    """Cached latents; the U-Net attends to caption tokens and, where so configured, adds the image embedding to that of
    the time."""
    configuration.check_arguments("model", config.model, UNet2DConditionModel)
    vae_folder = run.component_folder(config.autoencoder, "autoencoder", "vae")
    clip = run.clip_parts(config.clip, "clip")
    data = CachedLatents(Path(config.cache), config.seed, vae_folder, clip)
    validation = None
    if config.validation_cache is not None:
        validation = CachedLatents(Path(config.validation_cache), config.seed, vae_folder, clip)
    if config.sample_prompts and config.image_conditioning:
        run.component_folder(config.prior, "prior", "prior")
    text_config = CLIPTextConfig.from_pretrained(clip.text_encoder)
    embedding_dim = text_config.projection_dim
    made = build_unet if config.init == "scratch" else open_unet
    unet = made(config, data.latent_shape, text_config.hidden_size, embedding_dim)
    factor = 2 ** (len(unet.config.block_out_channels) - 1)
    odd = [shape for shape in data.latent_shapes if shape[1] % factor or shape[2] % factor]
    if len(data.latent_shapes) > 1 and odd:
        raise UserError(
            f"cache {config.cache} holds latents of {odd[0][1]} × {odd[0][2]}, but the U-Net halves them to a "
            f"{factor}th; cache with data.bucket_step a multiple of {factor} × the autoencoder's factor"
        )

    # Schedules: of the latents, and of the noise on image embeddings; what sampling needs is saved with the U-Net
    no_caption_states = data.no_text()["hidden_states"].to(device)
    parts = {"scheduler": solver(config)}
    if config.image_conditioning:
        normalizer = image_normalizer(config, *data.embedding_statistics())
        mean, std = (statistic.data[0].to(device) for statistic in (normalizer.mean, normalizer.std))
        embedding_alpha_bar = alphas_bar("squaredcos_cap_v2", NOISE_LEVELS).to(device, precision.finest(device))
        parts["image_noising_scheduler"] = DDPMScheduler(
            num_train_timesteps=NOISE_LEVELS, beta_schedule="squaredcos_cap_v2"
        )
        parts["image_normalizer"] = normalizer

    def conditions(batch: dict[str, Tensor], draw: torch.Generator, share: Share, part: slice) -> dict[str, Tensor]:
        """Caption tokens and, where so configured, noised image embeddings; a dropped one is all zeros, as stock
        pipelines have it."""
        told = {}
        if config.image_conditioning:
            embedding_noise = torch.randn(share.batch_size, embedding_dim, generator=draw)
            draws = torch.rand(2, share.batch_size, generator=draw)
            level = timesteps(draws[0], config.max_noise_level + 1, "uniform")
            no_caption, no_image = dropped(
                draws[1], config.caption_dropout, config.image_embedding_dropout, config.joint_dropout
            )
            embedding_noise, level, no_image = (
                values[part].to(device) for values in (embedding_noise, level, no_image)
            )
            embeds = batch["image_embeds"].to(device)
            condition = noised_embedding(embeds, mean, std, level, embedding_alpha_bar, embedding_noise)
            told["class_labels"] = condition.masked_fill(no_image[:, None], 0.0)
        else:
            no_caption, _ = dropped(torch.rand(share.batch_size, generator=draw), config.caption_dropout, 0.0, 0.0)
        no_caption = no_caption[part].to(device)[:, None, None]
        told["encoder_hidden_states"] = torch.where(no_caption, no_caption_states, batch["hidden_states"].to(device))
        if config.size_conditioning:
            widths = unet.config.projection_class_embeddings_input_dim, unet.config.addition_time_embed_dim
            told["added_cond_kwargs"] = size_condition(batch["sizes"].to(device), *widths)
        return told

    def save(unet: nn.Module, folder: Path) -> None:
        unet.save_pretrained(folder / "unet")
        for name, component in parts.items():
            component.save_pretrained(folder / name)

    def drawn(unet: nn.Module) -> Tensor | None:
        return samples(config, unet, parts, vae_folder, clip) if config.sample_prompts else None

    return Task(data, unet, configured_alpha_bar(config), conditions, drawn, save, validation)


def opened_pipeline(
    config: LdmConfig, folder: Path, device: torch.device
) -> tuple[LatentDiffusionPipeline, Callable[[Tensor], Tensor] | None]:
    """The pipeline of `init`, which `folder` holds, with the parts that the configuration names from elsewhere; and,
    where image embeddings guide its U-Net and it can make them, what gives those of images (B, 3, S, S) in [-1, 1]."""
    parts, tower = {}, {}
    if config.autoencoder:
        parts["vae"] = AutoencoderKL.from_pretrained(run.component_folder(config.autoencoder, "autoencoder", "vae"))
    if config.clip:
        clip_parts = run.clip_parts(config.clip, "clip", images=True)
        clip = export.load(clip_parts)
        parts |= {"tokenizer": clip.tokenizer, "text_encoder": export.text_tower(clip.text_encoder)}
        parts |= {"prior_tokenizer": clip.tokenizer, "prior_text_encoder": clip.text_encoder}
        processor = CLIPImageProcessor.from_pretrained(clip_parts.image_processor)
        tower = {"image_encoder": clip.image_encoder, "feature_extractor": processor}
    if config.prior:
        prior_folder = run.component_folder(config.prior, "prior", "prior")
        parts["prior"] = PriorTransformer.from_pretrained(prior_folder)
        parts["prior_scheduler"] = DDPMScheduler.from_pretrained(prior_folder.parent / "prior_scheduler")
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        pipeline = LatentDiffusionPipeline.from_pretrained(folder, **parts).to(device)
        reader = LatentDiffusionVariationPipeline.from_pipe(pipeline, **tower).to(device)
    except UserError as error:
        raise UserError(f"init {config.init}: {error}") from None
    pipeline.set_progress_bar_config(disable=True)
    if reader.image_encoder is None:
        return pipeline, None
    return pipeline, lambda images: reader.embed_images("images", (images + 1) / 2)


def samples(config: LdmConfig, unet: UNet2DConditionModel, parts: dict, vae: Path, clip: ClipParts) -> torch.Tensor:
    """One image (3, S, S) in [-1, 1] of each of `sample_prompts`, from text alone; the same noise at every call."""
    towers = export.load(clip)
    if config.image_conditioning:
        prior = run.component_folder(config.prior, "prior", "prior")  # again: it may have gone meanwhile
        parts = parts | {
            "prior_tokenizer": towers.tokenizer,
            "prior_text_encoder": towers.text_encoder,
            "prior": PriorTransformer.from_pretrained(prior),
            "prior_scheduler": DDPMScheduler.from_pretrained(prior.parent / "prior_scheduler"),
        }
    pipeline = LatentDiffusionPipeline(
        tokenizer=towers.tokenizer,
        text_encoder=export.text_tower(towers.text_encoder),
        unet=unet,
        vae=AutoencoderKL.from_pretrained(vae),
        **parts,
    ).to(unet.device)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        config.sample_prompts,
        guidance_scale=config.sample_guidance_scale,
        prior_guidance_scale=config.sample_prior_guidance_scale,
        generator=[generator(config.seed, "samples", number) for number in range(len(config.sample_prompts))],
        output_type="pt",
    ).images
    return images * 2 - 1


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
