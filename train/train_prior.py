"""Trains the prior: from a caption to the CLIP embedding of an image of it (Ramesh et al. 2022, §2.2).

    accelerate launch train/train_prior.py --config configs/shapes/prior.yaml [--resume] [key=value …]

Leaves `<output_dir>/model/{prior,prior_scheduler}`.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, PriorTransformer
from transformers import CLIPTextModelWithProjection

from ldm import configuration
from ldm.config import PriorConfig
from ldm.data.batches import data_state, micro_batches
from ldm.data.latents import CachedLatents
from ldm.data.order import global_batch
from ldm.diffusion.objective import dropped, squared_error, timesteps
from ldm.diffusion.process import q_sample
from ldm.diffusion.schedule import alphas_bar
from ldm.errors import UserError, exit_code_of
from ldm.training import checkpoint, failure, memory, optim, precision, run
from ldm.training.checkpoint import Checkpoint
from ldm.training.interruption import Interruption
from ldm.training.randomness import generator, seed_dropout
from ldm.training.tracking import Tracker
from pipelines.arguments import parse_training_arguments

NUM_TIMESTEPS = 1000
EVALUATED = 512
EVALUATION_STEPS = 25


@failure.in_words
def main() -> None:
    arguments = parse_training_arguments(__doc__)
    config = configuration.load(PriorConfig, arguments.config, arguments.overrides)
    configuration.check_arguments("model", config.model, PriorTransformer)
    memory.refuse_search(config.training, "the prior is small")
    accelerator, share, resumed = run.start(config, arguments.resume)
    training = config.training
    clip = run.clip_parts(config.clip, "clip")
    data = CachedLatents(Path(config.cache), config.seed, None, clip)
    text_config = CLIPTextModelWithProjection.config_class.from_pretrained(clip.text_encoder)
    if text_config.hidden_size != text_config.projection_dim:
        raise UserError(
            f"clip {config.clip}: its text tower is {text_config.hidden_size} wide and its embeddings "
            f"{text_config.projection_dim}; PriorTransformer needs both equal, so train CLIP with "
            f"model.text_width={text_config.projection_dim}"
        )
    embedding_dim = text_config.projection_dim

    # Network, optimiser, moving average
    torch.manual_seed(config.seed)
    shape = {"embedding_dim": embedding_dim, "num_embeddings": text_config.max_position_embeddings}
    if config.init == "scratch":
        prior = configuration.built("model", PriorTransformer, config.model, shape)
        # It predicts standardised embeddings; stock pipelines undo that with these two, of which its weights are a
        # function: a prior that was trained already keeps its own.
        mean, std = data.embedding_statistics()
        prior.clip_mean.data.copy_(mean[None])
        prior.clip_std.data.copy_(std[None])
    else:
        prior = PriorTransformer.from_pretrained(run.component_folder(config.init, "init", "prior"))
        run.check_agrees(config.init, "prior", prior.config, config.model)
        run.check_fits("init", config.init, "prior", prior.config, **shape)
    prior.clip_mean.requires_grad_(False)
    prior.clip_std.requires_grad_(False)
    scheduler = DDPMScheduler(  # not UnCLIPScheduler: stock pipelines never tell it which step comes next
        num_train_timesteps=NUM_TIMESTEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        clip_sample_range=5.0,
        timestep_spacing="trailing",
    )
    alpha_bar = alphas_bar("squaredcos_cap_v2", NUM_TIMESTEPS).to(
        accelerator.device, precision.finest(accelerator.device)
    )
    run.ready(prior, training, accelerator)
    optimizer = optim.build(prior, training)

    model, optimizer = accelerator.prepare(prior, optimizer)
    ema = optim.moving_average(prior, training.ema_decay)
    first_step = 0
    if resumed is not None:
        first_step = resumed.step
        optim.restore(resumed, prior, ema, optimizer)

    # Data: a pure function of the step
    loader = micro_batches(data, config, share, resumed)
    no_text = data.no_text()
    folder = run.claim(config, accelerator)
    tracker = Tracker(folder, first_step, training, accelerator.is_main_process)
    interruption = Interruption(accelerator, training.timeout_seconds)
    guard = failure.Guard(accelerator, optimizer, folder, resumed)

    for number, batch in enumerate(loader, start=first_step * share.accumulation):
        step, accumulation_step = divmod(number, share.accumulation)
        seed_dropout(config.seed, step, share.number(accumulation_step))
        rate = optim.set_learning_rate(optimizer, step, training)

        # Noise, timesteps and dropped captions: drawn for the global batch, of which this process takes its part
        draw = generator(config.seed, "prior", step)
        part = share.slice(accumulation_step)
        noise = torch.randn(share.batch_size, embedding_dim, generator=draw)[part].to(accelerator.device)
        t = timesteps(torch.rand(share.batch_size, generator=draw), NUM_TIMESTEPS, "uniform")[part]
        no_caption, _ = dropped(torch.rand(share.batch_size, generator=draw), config.caption_dropout, 0.0, 0.0)
        t, no_caption = t.to(accelerator.device), no_caption[part]
        for name, empty in no_text.items():
            batch[name][no_caption] = empty
        batch = {name: values.to(accelerator.device) for name, values in batch.items()}

        with accelerator.accumulate(model):
            x_0 = (batch["image_embeds"] - prior.clip_mean) / prior.clip_std
            x_t = q_sample(x_0, alpha_bar[t], noise)
            x_0_hat = model(
                x_t,
                timestep=t,
                proj_embedding=batch["text_embeds"],
                encoder_hidden_states=batch["hidden_states"],
                attention_mask=batch["attention_mask"],
            ).predicted_image_embedding
            loss = squared_error(x_0_hat, x_0).mean()
            accelerator.backward(loss)
            guard.saw(loss, batch["indices"])
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), training.max_grad_norm)
                guard.check(norm, step=step + 1, learning_rate=rate)
            optimizer.step()
            optimizer.zero_grad()

        tracker.collect(loss=loss)
        if not accelerator.sync_gradients:
            continue
        if training.compile and step == first_step:
            memory.give_back()
        if guard.is_update:
            optim.update_average(ema, prior)
        done = step + 1
        tracker.step(done, learning_rate=rate, **guard.metrics())
        stopped_by = interruption.requested()
        due = done % training.checkpoint_every == 0 or done == training.max_steps
        if due or stopped_by:
            guard.settle()
            tensors = {
                "model": prior.state_dict(),
                "ema": optim.ema_tensors(ema, prior),
                "optimizer": optim.optimizer_tensors(optimizer),
            }
            state = guard.state() | data_state(accelerator, data, batch)
            checkpoint.save(folder / "checkpoints", Checkpoint(done, tensors, state), training.keep_checkpoints)
        if stopped_by:
            tracker.close()
            interruption.stop(stopped_by, done)
        if done % training.sample_every == 0 or done == training.max_steps:
            with optim.averaged(ema, prior):
                tracker.log(done, **cosines(prior, scheduler, data, config.seed, accelerator.device))

    # Export: averaged weights
    if accelerator.is_main_process:
        ema.copy_to(optim.trained(prior).values())
        prior.save_pretrained(folder / "model" / "prior")
        scheduler.save_pretrained(folder / "model" / "prior_scheduler")
        tracker.say(f"wrote {folder / 'model'}")
    tracker.close()
    interruption.close()
    accelerator.end_training()


@torch.no_grad()
def cosines(
    prior: PriorTransformer, scheduler: DDPMScheduler, data: CachedLatents, seed: int, device: torch.device
) -> dict[str, float]:
    """Mean cosine to the true image embedding: of the prior's samples (without guidance), of the text embedding
    itself, and of the mean image embedding, which a prior that learned nothing would give."""
    places = global_batch(0, min(EVALUATED, len(data)), len(data), seed)
    batch = {name: values.to(device) for name, values in data.__getitems__(places).items()}
    draw = generator(seed, "prior samples")
    x = torch.randn(batch["image_embeds"].shape, generator=draw).to(device)
    scheduler.set_timesteps(EVALUATION_STEPS, device=device)
    for t in scheduler.timesteps:
        x_0_hat = prior(
            x,
            timestep=t,
            proj_embedding=batch["text_embeds"],
            encoder_hidden_states=batch["hidden_states"],
            attention_mask=batch["attention_mask"],
        ).predicted_image_embedding
        x = scheduler.step(x_0_hat, t, x, generator=draw).prev_sample
    true, sampled = batch["image_embeds"], prior.post_process_latents(x)
    return {
        "cosine_prior": F.cosine_similarity(sampled, true).mean().item(),
        "cosine_text": F.cosine_similarity(batch["text_embeds"], true).mean().item(),
        "cosine_mean": F.cosine_similarity(data.embedding_statistics()[0].to(device)[None], true).mean().item(),
    }


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
