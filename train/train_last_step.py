"""Trains a U-Net that draws to take its last step at once, and to deceive a discriminator with what it gives.

    accelerate launch train/train_last_step.py --config configs/shapes/last_step.yaml [--resume] [key=value …]

From the pipeline in `init`, which then draws from noise down to `last_sigma` and from there to the picture in one step.
At all timesteps the U-Net goes on learning what it did; at that one it has, besides, an adversarial loss in the eyes of
CLIP and of convolutions that learn with it (Jolicoeur-Martineau et al. 2021, arXiv:2009.05475; Sauer et al. 2021,
arXiv:2111.01007). The step begins with noised photographs, and where drawing from text comes to. Leaves
`<output_dir>/model/{unet,scheduler,…,settings.json}`, which `ldm assemble --unet` puts in the place of those in `init`.
"""

import json
import sys
from dataclasses import replace
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from ldm import configuration, files, hub
from ldm.autoencoders.discriminator import discriminator_loss, generator_loss
from ldm.clip import export
from ldm.clip.discriminator import FeatureDiscriminator, gradient_penalty, image_features, mean_over_heads, shifted
from ldm.data.batches import data_state, micro_batches, open_data
from ldm.diffusion.guidance import classifier_free_guidance
from ldm.diffusion.objective import squared_error, timesteps
from ldm.diffusion.process import clean_and_noise, prediction_target, q_sample
from ldm.errors import UserError, exit_code_of
from ldm.last_step_config import LastStepConfig
from ldm.training import checkpoint, failure, last_step, memory, optim, precision, run
from ldm.training.checkpoint import Checkpoint
from ldm.training.compiled import compile_blocks
from ldm.training.interruption import Interruption
from ldm.training.last_step import Told
from ldm.training.randomness import generator, seed_dropout
from ldm.training.tracking import Tracker
from pipelines import LatentDiffusionPipeline
from pipelines.arguments import parse_training_arguments
from pipelines.settings import DEFAULT_SETTINGS, SETTINGS_FILE

BEGUN, SQUARED = slice(0, None, 2), slice(1, None, 2)
"""Of a batch, the photographs that the last step begins with, and those of the squared error."""
PENALTY_EVERY = 4
"""Updates of the discriminator: R1 is lazy (Karras et al. 2020, appendix B)."""


@failure.in_words
def main() -> None:
    arguments = parse_training_arguments(__doc__)
    config = configuration.load(LastStepConfig, arguments.config, arguments.overrides)
    memory.refuse_search(config.training, "two networks are trained in turns")
    accelerator, share, resumed = run.start(config, arguments.resume)
    training, device = config.training, accelerator.device
    if share.micro_batch_size % 2:
        raise UserError(
            f"training.batch_size {training.batch_size}: every process halves its photographs between two losses; "
            f"take a multiple of {2 * share.num_processes}"
        )
    data = open_data(config.data, config.seed, share.num_processes)
    loader = micro_batches(data, config, share, resumed)
    pipe, clip = opened(config, device)
    pipe.default_settings = settings = drawing(config, pipe)
    folder = run.claim(config, accelerator)
    stored = folder / "states.safetensors"
    if resumed is None:
        last_step.draw_states(stored, config.num_states, config.seed, accelerator, pipe, data)
    states = last_step.open_states(stored, resumed)

    # Networks, optimisers, moving average
    torch.manual_seed(config.seed)
    unet, vae, tower = pipe.unet.to(memory_format=torch.channels_last), pipe.vae, clip.image_encoder
    run.ready(unet, training, accelerator)
    for frozen in (vae, tower):
        precision.prepare(frozen, accelerator.mixed_precision, device)
        if training.compile:
            compile_blocks(frozen, training.activation_memory)
    embedding_dim, layers = clip.text_encoder.config.projection_dim, tower.config.num_hidden_layers
    discriminator = FeatureDiscriminator(
        [tower.config.hidden_size] * layers, 2 * embedding_dim, config.discriminator_channels
    )
    of_discriminator = replace(training, learning_rate=config.discriminator_learning_rate, betas=[0.0, 0.99])
    optimizer, discriminator_optimizer = optim.build(unet, training), optim.build(discriminator, of_discriminator)

    model, discriminator, optimizer, discriminator_optimizer = accelerator.prepare(
        unet, discriminator, optimizer, discriminator_optimizer
    )
    ema = optim.moving_average(unet, training.ema_decay)
    first_step = 0
    if resumed is not None:
        first_step = resumed.step
        optim.restore(resumed, unet, ema, optimizer)
        optim.load_weights(resumed, "discriminator", accelerator.unwrap_model(discriminator))
        optim.load_optimizer(discriminator_optimizer, resumed.read("discriminator_optimizer"))

    tracker = Tracker(folder, first_step, training, accelerator.is_main_process)
    interruption = Interruption(accelerator, training.timeout_seconds)
    guard = failure.Guard(accelerator, optimizer, folder, resumed)
    discriminator_guard = failure.Guard(accelerator, discriminator_optimizer, folder, of="discriminator")
    alpha_bar = pipe.scheduler.alphas_cumprod.to(device, precision.finest(device))
    pipe.scheduler.set_timesteps(config.num_inference_steps)
    last, kind = int(pipe.scheduler.timesteps[-1]), pipe.scheduler.config.prediction_type
    statistics = last_step.embedding_statistics(pipe, embedding_dim)
    no_text = last_step.read(pipe, [""]).detach()

    for step, batch in enumerate(loader, start=first_step):
        seed_dropout(config.seed, step, share.number(0))
        rate = optim.set_learning_rate(optimizer, step, training)
        optim.set_learning_rate(discriminator_optimizer, step, of_discriminator)
        trains_unet, metrics = step >= config.adversarial_start, {}

        # Everything random is drawn of (seed, step) for the global batch, of which this process takes its part
        draw, part, size = generator(config.seed, "last step", step), share.slice(0), share.batch_size
        latent_size = (size, *states.z_t.shape[1:])
        noise, posterior_noise = (torch.randn(latent_size, generator=draw)[part].to(device) for _ in range(2))
        embedding_noise = torch.randn(size, embedding_dim, generator=draw)[part].to(device)
        uniform = torch.rand(4 + 2 * config.discriminator_updates, size, generator=draw)
        times, drops, *moves = uniform[:, part].to(device)
        moves = torch.stack(moves).unflatten(0, (-1, 2))  # of photographs, for each look at them
        moves_of_drawn = torch.cat([moves[..., BEGUN], moves[..., SQUARED]], dim=-1)
        chosen = torch.randint(len(states.z_t), (size,), generator=draw)[part][BEGUN]

        # Photographs, and what is told of them and of the states of drawing
        x = batch["images"].to(device, memory_format=torch.channels_last)
        captions = [states.captions[number] for number in chosen]
        with torch.no_grad(), accelerator.autocast():
            posterior, embeds = vae.encode(x).latent_dist, clip.image_embeds(x).float()
            z_0 = (posterior.mean + posterior.std * posterior_noise).float() * vae.config.scaling_factor
            told = Told(last_step.read(pipe, batch["captions"]), last_step.class_labels(pipe, embeds, embedding_noise))
            labels = None if states.class_labels is None else states.class_labels[chosen].to(device)
            told_last = told.of(BEGUN).and_of(Told(last_step.read(pipe, captions), labels))
            told_squared = told.of(SQUARED).without(drops[SQUARED] < config.condition_dropout, no_text)
            is_known = torch.arange(len(x), device=device) % 2 == 0
            of_real = last_step.told_to_judge(clip, batch["captions"], embeds, is_known, statistics)
            is_unknown = torch.zeros(len(captions), device=device)
            of_states = last_step.told_to_judge(clip, captions, embeds[BEGUN], is_unknown, statistics)
            of_drawn = torch.cat([of_real[BEGUN], of_states])
            of_others = of_real.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)  # of each photograph its neighbour's
            kept = vae.decode(z_0 / vae.config.scaling_factor).sample.float()  # all that a picture can be

        # U-Net: one pass for the last step and for the squared error
        t_last = torch.full((len(of_drawn),), last, device=device)
        z_last = q_sample(z_0[BEGUN], alpha_bar[t_last[: len(chosen)]], noise[BEGUN])
        z_last = torch.cat([z_last, states.z_t[chosen].to(device)]).contiguous(memory_format=torch.channels_last)
        t = timesteps(times, len(alpha_bar), config.timestep_sampling)[SQUARED]
        z_t = q_sample(z_0[SQUARED], alpha_bar[t], noise[SQUARED]).contiguous(memory_format=torch.channels_last)
        if config.sample_guidance_scale > 1:  # as pipelines have it
            told_nothing = told_last.without(torch.ones_like(t_last, dtype=torch.bool), no_text)
            with torch.no_grad():
                unguided = unet(z_last, t_last, **told_nothing.arguments()).sample.float()
        with torch.set_grad_enabled(trains_unet):
            told_both = told_last.and_of(told_squared)
            output = model(torch.cat([z_last, z_t]), torch.cat([t_last, t]), **told_both.arguments()).sample.float()
            prediction = output[: len(z_last)]
            if config.sample_guidance_scale > 1:
                prediction = classifier_free_guidance(unguided, prediction, config.sample_guidance_scale)
            z_0_hat, _ = clean_and_noise(prediction, kind, z_last, alpha_bar[t_last])
            with accelerator.autocast():
                x_hat = vae.decode(z_0_hat / vae.config.scaling_factor).sample.float()
                seen = image_features(clip, shifted(x_hat, moves_of_drawn[0]))
        if trains_unet:
            target = prediction_target(kind, z_0[SQUARED], alpha_bar[t], noise[SQUARED])
            metrics["squared_error"] = squared_error(output[len(z_last) :], target).mean()
            discriminator.requires_grad_(False)
            metrics["adversarial"] = mean_over_heads(generator_loss(y.float()) for y in discriminator(seen, of_drawn))
            discriminator.requires_grad_(True)
            loss = metrics["squared_error"] + config.adversarial_weight * metrics["adversarial"]
            accelerator.backward(loss)
            guard.saw(loss, batch["indices"])
            norm = optim.clip_gradients(accelerator, optimizer, model, training.max_grad_norm)
            guard.check(norm, step=step + 1, learning_rate=rate)
            optimizer.step()
            optimizer.zero_grad()

        # Discriminator: photographs beside what was drawn, moved anew for each update
        for update in range(config.discriminator_updates):
            with torch.no_grad(), accelerator.autocast():
                looks = shifted(kept, moves[1 + update]), shifted(x_hat, moves_of_drawn[1 + update])
                features = image_features(clip, torch.cat(looks))
            number = step * config.discriminator_updates + update
            penalised = config.gradient_penalty > 0 and number % PENALTY_EVERY == 0
            features = [layer.requires_grad_(penalised) for layer in features]
            judged = discriminator(features, torch.cat([of_real, of_drawn]), of_others)
            sizes = len(of_real), len(of_drawn), len(of_others)
            real, drawn, others = zip(*(logits.float().split(sizes) for logits in judged), strict=True)
            loss = metrics["discriminator"] = mean_over_heads(map(discriminator_loss, real, drawn))
            metrics["matching"] = mean_over_heads(map(discriminator_loss, real, others))
            loss = loss + config.matching_weight * metrics["matching"]
            real_mean, drawn_mean = (mean_over_heads(y.mean(dim=1) for y in heads) for heads in (real, drawn))
            metrics["told_apart"] = torch.cat([real_mean > 0, drawn_mean < 0]).float().mean()
            if penalised:
                loss = loss + PENALTY_EVERY * config.gradient_penalty * gradient_penalty(real, features)
            accelerator.backward(loss)
            discriminator_guard.saw(loss, batch["indices"])
            norm = optim.clip_gradients(accelerator, discriminator_optimizer, discriminator, training.max_grad_norm)
            discriminator_guard.check(norm, step=step + 1, learning_rate=rate)
            discriminator_optimizer.step()
            discriminator_optimizer.zero_grad()

        tracker.collect(**metrics)
        if training.compile and step == first_step:
            memory.give_back()
        if guard.is_update:
            optim.update_average(ema, unet)
        done = step + 1
        tracker.step(done, learning_rate=rate, **guard.metrics())
        stopped_by = interruption.requested()
        due = done % training.checkpoint_every == 0 or done == training.max_steps
        if due or stopped_by:
            guard.settle()
            discriminator_guard.settle()
            tensors = {
                "model": optim.weights(unet),
                "ema": optim.ema_tensors(ema, unet),
                "optimizer": optim.optimizer_tensors(optimizer),
                "discriminator": accelerator.unwrap_model(discriminator).state_dict(),
                "discriminator_optimizer": optim.optimizer_tensors(discriminator_optimizer),
            }
            state = guard.state() | share.state() | data_state(accelerator, data, batch)
            state |= {last_step.SHA256: states.sha256}
            checkpoint.save(folder / "checkpoints", Checkpoint(done, tensors, state), training.keep_checkpoints)
        if stopped_by:
            tracker.close()
            interruption.stop(stopped_by, done)
        if (done % training.sample_every == 0 or done == training.max_steps) and config.sample_prompts:
            with optim.averaged(ema, unet):
                if accelerator.is_main_process:
                    tracker.pictures(done, samples(config, pipe), columns=10)

    # Export: averaged weights
    with optim.averaged(ema, unet):
        if accelerator.is_main_process:
            for name in ("unet", "scheduler", "image_normalizer", "image_noising_scheduler"):
                if getattr(pipe, name) is not None:
                    getattr(pipe, name).save_pretrained(folder / "model" / name)
            files.write_text(folder / "model" / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")
            tracker.say(f"wrote {folder / 'model'}")
    tracker.close()
    interruption.close()
    accelerator.end_training()


def opened(config: LastStepConfig, device: torch.device) -> tuple[LatentDiffusionPipeline, export.ClipTowers]:
    """The pipeline of `init` with the scheduler that it is to draw with, and its CLIP; all frozen but the U-Net.

    Raises:
        UserError: there is none, it has no image tower, or its U-Net does not draw from text alone; or images of
            data.image_size are not what it draws.
    """
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        folder = hub.resolve(config.init)
        clip = export.load(run.clip_parts(str(folder), "init", images=True))
        pipe = LatentDiffusionPipeline.from_pretrained(folder).to(device)
    except UserError as error:
        raise UserError(f"init {config.init}: {error}") from None
    unet, latents = pipe.unet.config, pipe.vae.config.latent_channels
    if {unet.in_channels, unet.out_channels} != {latents} or unet.addition_embed_type not in (None, "text"):
        raise UserError(f"init {config.init}: its U-Net reads more than latents and captions; take another model")
    if unet.class_embed_type is not None and pipe.prior is None:
        raise UserError(f"init {config.init}: image embeddings guide its U-Net, and it has no prior to make them")
    if config.data.image_size != unet.sample_size * pipe.vae_scale_factor:
        drawn = unet.sample_size * pipe.vae_scale_factor
        raise UserError(f"data.image_size {config.data.image_size}: init {config.init} draws {drawn} pixels; take that")
    pipe.set_progress_bar_config(disable=True)
    for part in (clip.text_encoder, clip.image_encoder):
        part.to(device)
    sigmas = {"use_exponential_sigmas": True, "sigma_min": config.last_sigma, "sigma_max": config.first_sigma}
    others = {"use_karras_sigmas": False, "use_beta_sigmas": False, "use_flow_sigmas": False}
    pipe.scheduler = UniPCMultistepScheduler.from_config(
        pipe.scheduler.config, **sigmas, **others, final_sigmas_type="zero", lower_order_final=True
    )
    for part in (pipe.vae, pipe.text_encoder, pipe.prior):
        if part is not None:
            part.requires_grad_(False)
    return pipe, clip


def drawing(config: LastStepConfig, pipe: LatentDiffusionPipeline) -> dict[str, Any]:
    """The settings with which it is to draw, in training and in the pipeline that `ldm assemble` makes of this run:
    those of the configuration, and what `init` says of its prior's samples."""
    settings = {"num_inference_steps": config.num_inference_steps, "guidance_scale": config.sample_guidance_scale}
    if pipe.prior is None:
        return settings
    scale = config.sample_prior_guidance_scale
    settings["prior_guidance_scale"] = DEFAULT_SETTINGS["prior_guidance_scale"] if scale is None else scale
    settings["num_prior_samples"] = config.num_prior_samples
    return settings | {name: pipe.default_settings[name] for name in ("prior_num_inference_steps", "noise_level")}


def samples(config: LastStepConfig, pipe: LatentDiffusionPipeline) -> Tensor:
    """One picture (3, S, S) in [-1, 1] of each of `sample_prompts`; the same noise at every call."""
    numbers = range(len(config.sample_prompts))
    generators = [generator(config.seed, "samples", number) for number in numbers]
    return pipe(config.sample_prompts, generator=generators, output_type="pt").images * 2 - 1


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
