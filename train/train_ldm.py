"""Trains the U-Net: ε_θ(z_t, t, c) in latent space, c = caption tokens and a noised CLIP image embedding.

    accelerate launch train/train_ldm.py --config configs/shapes/ldm.yaml [--resume] [key=value …]

Rombach et al. 2022 with the decoder's conditions of Ramesh et al. 2022, §2.1, as Stable unCLIP joins them. Leaves
`<output_dir>/model/{unet,scheduler,image_normalizer,image_noising_scheduler}`.
"""

import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PriorTransformer,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from torch.utils.data import DataLoader
from transformers import CLIPTextConfig

from ldm import config as configuration
from ldm.clip import export
from ldm.config import LdmConfig
from ldm.data.captions import as_is
from ldm.data.latents import CachedLatents
from ldm.data.order import MicroBatches
from ldm.diffusion.embedding_noise import noised_embedding
from ldm.diffusion.objective import dropped, min_snr_weight, timesteps, weighted_mse
from ldm.diffusion.process import prediction_target, q_sample
from ldm.diffusion.schedule import alphas_bar
from ldm.errors import exit_code_of
from ldm.training import checkpoint, optim, precision, run
from ldm.training.checkpoint import Checkpoint
from ldm.training.randomness import generator, seed_dropout
from ldm.training.tracking import Tracker
from pipelines import LatentDiffusionPipeline
from pipelines.arguments import parse_training_arguments


def main() -> None:
    arguments = parse_training_arguments(__doc__)
    config = configuration.load(LdmConfig, arguments.config, arguments.overrides)
    configuration.check_arguments("model", config.model, UNet2DConditionModel)
    accelerator, share, resumed = run.start(config, arguments.resume)
    training = config.training
    vae_folder = run.component_folder(config.autoencoder, "autoencoder", "vae")
    clip_folder = run.component_folder(config.clip, "clip", "text_encoder").parent
    data = CachedLatents(Path(config.cache), config.seed, vae_folder, clip_folder)
    if config.sample_prompts:
        run.component_folder(config.prior, "prior", "prior")
    text_config = CLIPTextConfig.from_pretrained(clip_folder / "text_encoder")
    embedding_dim = text_config.projection_dim

    # U-Net, optimiser, moving average
    torch.manual_seed(config.seed)
    if config.init == "scratch":
        unet = build_unet(config, data.index.latent_shape, text_config.hidden_size, embedding_dim)
    else:
        unet = UNet2DConditionModel.from_pretrained(run.component_folder(config.init, "init", "unet"))
        run.check_fits(
            "init",
            config.init,
            "U-Net",
            unet.config,
            in_channels=data.index.latent_shape[0],
            cross_attention_dim=text_config.hidden_size,
            projection_class_embeddings_input_dim=2 * embedding_dim,
        )
    unet.to(memory_format=torch.channels_last)
    precision.prepare(unet, accelerator.mixed_precision, accelerator.device)
    optimizer = optim.adamw(unet, training)
    ema = optim.moving_average(unet, training.ema_decay)

    # Schedules: of the latents, and of the noise on image embeddings; what sampling needs is saved with the U-Net
    mean, std = (statistic.to(accelerator.device) for statistic in data.embedding_statistics())
    alpha_bar = alphas_bar(config.beta_schedule, config.num_train_timesteps).to(accelerator.device)
    embedding_alpha_bar = alphas_bar("squaredcos_cap_v2", 1000).to(accelerator.device)
    parts = {
        "scheduler": DPMSolverMultistepScheduler(
            num_train_timesteps=config.num_train_timesteps,
            beta_schedule=config.beta_schedule,
            beta_start=1e-4,
            beta_end=0.02,
            prediction_type=config.prediction_type,
        ),
        "image_noising_scheduler": DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2"),
        "image_normalizer": StableUnCLIPImageNormalizer(embedding_dim),
    }
    parts["image_normalizer"].mean.data.copy_(mean[None])
    parts["image_normalizer"].std.data.copy_(std[None])

    first_step = 0
    if resumed is not None:
        first_step = resumed.step
        unet.load_state_dict(resumed.tensors["model"])
        optim.load_optimizer(optimizer, resumed.tensors["optimizer"])
        optim.load_ema(ema, unet, resumed.tensors["ema"], first_step)
    model, optimizer = accelerator.prepare(unet, optimizer)
    ema.to(accelerator.device)
    if training.compile:
        model.compile()

    # Data: a pure function of the step
    loader = DataLoader(
        data,
        batch_sampler=MicroBatches(len(data), share, config.seed, first_step, training.max_steps),
        num_workers=config.data.num_workers,
        collate_fn=as_is,
    )
    no_caption_states = data.text(torch.zeros(1, dtype=torch.long))["hidden_states"]
    folder = run.claim(config, accelerator)
    tracker = Tracker(folder, first_step, training, accelerator.is_main_process)

    for number, batch in enumerate(loader, start=first_step * share.accumulation):
        step, accumulation_step = divmod(number, share.accumulation)
        seed_dropout(config.seed, step, share.rank)
        rate = optim.set_learning_rate(optimizer, step, training)

        # Everything random, drawn for the global batch, of which this process takes its part
        draw = generator(config.seed, "ldm", step)
        part = share.slice(accumulation_step)
        posterior_noise, noise = torch.randn(2, share.batch_size, *data.index.latent_shape, generator=draw)
        embedding_noise = torch.randn(share.batch_size, embedding_dim, generator=draw)
        draws = torch.rand(3, share.batch_size, generator=draw)
        t = timesteps(draws[0], config.num_train_timesteps, config.timestep_sampling)
        level = timesteps(draws[1], config.max_noise_level + 1, "uniform")
        no_caption, no_image = dropped(
            draws[2], config.caption_dropout, config.image_embedding_dropout, config.joint_dropout
        )
        posterior_noise, noise, embedding_noise, t, level, no_caption, no_image = (
            values[part].to(accelerator.device)
            for values in (posterior_noise, noise, embedding_noise, t, level, no_caption, no_image)
        )
        batch = {name: values.to(accelerator.device) for name, values in batch.items()}

        # Conditions; a dropped image embedding is all zeros, as stock pipelines have it
        tokens = torch.where(
            no_caption[:, None, None], no_caption_states.to(accelerator.device), batch["hidden_states"]
        )
        condition = noised_embedding(batch["image_embeds"], mean, std, level, embedding_alpha_bar, embedding_noise)
        condition = condition.masked_fill(no_image[:, None], 0.0)

        with accelerator.accumulate(model):
            z_0 = batch["latent_mean"] + batch["latent_std"] * posterior_noise
            z_t = q_sample(z_0, alpha_bar[t], noise).contiguous(memory_format=torch.channels_last)
            prediction = model(z_t, t, encoder_hidden_states=tokens, class_labels=condition).sample
            target = prediction_target(config.prediction_type, z_0, alpha_bar[t], noise)
            weight = None
            if config.min_snr_gamma is not None:
                weight = min_snr_weight(alpha_bar[t], config.prediction_type, config.min_snr_gamma)
            loss = weighted_mse(prediction, target, weight)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), training.max_grad_norm)
                optim.check_finite(loss, norm, step=step, learning_rate=rate)
            optimizer.step()
            optimizer.zero_grad()

        tracker.collect(loss=loss)
        if not accelerator.sync_gradients:
            continue
        ema.step(unet.parameters())
        done = step + 1
        tracker.step(done, learning_rate=rate)
        if accelerator.is_main_process and (done % training.checkpoint_every == 0 or done == training.max_steps):
            tensors = {
                "model": unet.state_dict(),
                "ema": optim.ema_tensors(ema, unet),
                "optimizer": optim.optimizer_tensors(optimizer),
            }
            checkpoint.save(folder / "checkpoints", Checkpoint(done, tensors, {}), training.keep_checkpoints)
        sampling = config.sample_prompts and (done % training.sample_every == 0 or done == training.max_steps)
        if accelerator.is_main_process and sampling:
            with optim.averaged(ema, unet):
                tracker.pictures(done, samples(config, unet, parts, vae_folder, clip_folder), columns=10)

    # Export: averaged weights
    if accelerator.is_main_process:
        ema.copy_to(unet.parameters())
        unet.save_pretrained(folder / "model" / "unet")
        for name, component in parts.items():
            component.save_pretrained(folder / "model" / name)
        tracker.say(f"wrote {folder / 'model'}")
    tracker.close()
    accelerator.end_training()


def build_unet(
    config: LdmConfig, latent_shape: tuple[int, int, int], text_width: int, embedding_dim: int
) -> UNet2DConditionModel:
    """The U-Net of `config.model`, with the shapes that follow from the other stages."""
    return UNet2DConditionModel(
        **config.model,
        sample_size=latent_shape[1],
        in_channels=latent_shape[0],
        out_channels=latent_shape[0],
        cross_attention_dim=text_width,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * embedding_dim,
    )


def samples(
    config: LdmConfig, unet: UNet2DConditionModel, parts: dict, vae_folder: Path, clip_folder: Path
) -> torch.Tensor:
    """One image (3, S, S) in [-1, 1] of each of `sample_prompts`, from text alone; the same noise at every call."""
    clip = export.load(clip_folder)
    prior_folder = run.component_folder(config.prior, "prior", "prior")
    pipeline = LatentDiffusionPipeline(
        prior_tokenizer=clip.tokenizer,
        prior_text_encoder=clip.text_encoder,
        prior=PriorTransformer.from_pretrained(prior_folder),
        prior_scheduler=DDPMScheduler.from_pretrained(prior_folder.parent / "prior_scheduler"),
        tokenizer=clip.tokenizer,
        text_encoder=export.text_tower(clip.text_encoder),
        unet=unet,
        vae=AutoencoderKL.from_pretrained(vae_folder),
        **parts,
    ).to(unet.device)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        config.sample_prompts,
        guidance_scale=config.sample_guidance_scale,
        generator=[generator(config.seed, "samples", number) for number in range(len(config.sample_prompts))],
        output_type="pt",
    ).images
    return images * 2 - 1


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
