"""Trains CLIP, open_clip's model and loss, on captioned images (Radford et al. 2021).

    accelerate launch train/train_clip.py --config configs/shapes/clip.yaml [--resume] [key=value …]

Leaves `<output_dir>/model/{text_encoder,image_encoder,tokenizer,image_processor}` for transformers.
"""

import itertools
import math
import sys
from typing import Any

import torch
from open_clip import ClipLoss
from open_clip.loss import gather_features
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from ldm import configuration
from ldm.clip import augment, export
from ldm.clip.model import build, captioned_loss, clamp_temperature, retrieval_at_1
from ldm.clip.slip import Slip, image_image_loss
from ldm.clip.tokenizer import clip_tokenizer, encode, lengths, train_tokenizer
from ldm.config import ClipConfig
from ldm.data.batches import data_state, micro_batches, open_data
from ldm.data.captions import CaptionedImages
from ldm.data.stream import CaptionedStream
from ldm.errors import UserError, exit_code_of
from ldm.training import checkpoint, failure, memory, optim, run
from ldm.training.checkpoint import Checkpoint
from ldm.training.interruption import Interruption
from ldm.training.randomness import generator, seed_dropout
from ldm.training.tracking import Tracker
from pipelines.arguments import parse_training_arguments

TOKENIZER_CAPTIONS = 50_000
MEASURED_CAPTIONS = 1_000
GRID_CAPTIONS = 16
GRID_AMONG = 512


@failure.in_words
def main() -> None:
    arguments = parse_training_arguments(__doc__)
    config = configuration.load(ClipConfig, arguments.config, arguments.overrides)
    configuration.check_arguments("model", config.model, build)
    if config.training.gradient_accumulation_steps > 1:
        raise UserError(
            f"training.gradient_accumulation_steps {config.training.gradient_accumulation_steps}: the contrastive loss "
            "compares a whole batch at once; set 1 and lower training.batch_size, or use more processes"
        )
    memory.refuse_search(config.training, "the contrastive loss compares a whole batch at once")
    accelerator, share, resumed = run.start(config, arguments.resume)
    training = config.training
    data = open_data(config.data, config.seed, share.num_processes)

    # Tokenizer, towers, optimiser, moving average
    torch.manual_seed(config.seed)
    if config.init == "scratch":
        tokenizer = make_tokenizer(config, data)
        sizes = {
            "image_size": config.data.image_size,
            "vocabulary_size": len(tokenizer),
            "context_length": config.context_length,
        }
        clip = configuration.built("model", build, config.model, sizes)
    else:
        parts = run.clip_parts(config.init, "init", images=True)
        sizes = export.arguments_of(
            CLIPTextConfig.from_pretrained(parts.text_encoder), CLIPVisionConfig.from_pretrained(parts.image_encoder)
        )
        run.check_fits("init", config.init, "image tower", sizes, image_size=config.data.image_size)
        check_agrees(config, sizes)
        started_from = export.load(parts)
        if not started_from.reads_plain_pixels:
            raise UserError(
                f"init {config.init}: its image tower reads pixels of mean {started_from.image_mean}, not in [-1, 1]; "
                "take a run of train_clip.py"
            )
        tokenizer = started_from.tokenizer
        clip = export.from_transformers(started_from.text_encoder, started_from.image_encoder)
    if accelerator.is_main_process:
        warn_of_unread_captions(tokenizer, data)
    embedding_dim = clip.text_projection.shape[1]
    run.ready(clip, training, accelerator)
    model = Slip(clip, embedding_dim)
    optimizer = optim.build(model, training)
    contrastive_loss = ClipLoss(
        local_loss=True, gather_with_grad=True, rank=share.rank, world_size=accelerator.num_processes
    )

    wrapped, optimizer = accelerator.prepare(model, optimizer)
    ema = optim.moving_average(model, training.ema_decay)
    first_step = 0
    if resumed is not None:
        first_step = resumed.step
        optim.restore(resumed, model, ema, optimizer)

    # Data: a pure function of the step
    loader = micro_batches(data, config, share, resumed)
    folder = run.claim(config, accelerator)
    tracker = Tracker(folder, first_step, training, accelerator.is_main_process)
    interruption = Interruption(accelerator, training.timeout_seconds)
    guard = failure.Guard(accelerator, optimizer, folder, resumed)
    augmentation = {
        "least_area": config.random_crop,
        "jitter": config.colour_jitter,
        "mirror": config.data.horizontal_flip,
    }
    token_ids: dict[str, torch.Tensor] = {}

    for step, batch in enumerate(loader, start=first_step):
        seed_dropout(config.seed, step, share.number(0))
        rate = optim.set_learning_rate(optimizer, step, training)
        if len(token_ids) > TOKENIZER_CAPTIONS:  # streams bring new captions without end
            token_ids.clear()
        for caption in set(batch["captions"]) - token_ids.keys():
            token_ids[caption] = encode(tokenizer, [caption])[0][0]
        input_ids = torch.stack([token_ids[caption] for caption in batch["captions"]]).to(accelerator.device)
        images, second_views = batch["images"], None
        draws = torch.rand(2, share.batch_size, augment.NUM_DRAWS, generator=generator(config.seed, "views", step))
        draws = draws[:, share.slice(0)]
        if config.image_image_weight:
            second_views = augment.augment(images, draws[1], **augmentation).to(accelerator.device)
        if config.random_crop < 1 or config.colour_jitter:
            images = augment.augment(images, draws[0], **augmentation)

        image, text, scale, projected = wrapped(images.to(accelerator.device), input_ids, second_views)
        caption_lengths = torch.tensor([len(caption.strip()) for caption in batch["captions"]])
        captioned = accelerator.gather(caption_lengths.to(accelerator.device)) > 0
        clip_loss = captioned_loss(*contrastive_loss.get_logits(image, text, scale), captioned, share.slice(0))
        loss = clip_loss
        if projected is not None:
            if accelerator.num_processes > 1:  # every view of the global batch is told from all others
                projected = torch.stack(
                    gather_features(
                        *projected, gather_with_grad=True, rank=share.rank, world_size=accelerator.num_processes
                    )
                )
            pair_loss = image_image_loss(projected)
            tracker.collect(image_image_loss=pair_loss)
            loss = loss + config.image_image_weight * pair_loss
        accelerator.backward(loss)
        guard.saw(loss, batch["indices"])
        norm = accelerator.clip_grad_norm_(wrapped.parameters(), training.max_grad_norm)
        guard.check(norm, step=step + 1, learning_rate=rate)
        optimizer.step()
        optimizer.zero_grad()
        clamp_temperature(clip)
        if guard.is_update:
            optim.update_average(ema, model)
        tracker.collect(clip_loss=clip_loss)
        if training.compile and step == first_step:
            memory.give_back()

        done = step + 1
        if tracker.logs(done):
            numbers = {caption: number for number, caption in enumerate(dict.fromkeys(batch["captions"]))}
            caption_ids = torch.tensor([numbers[caption] for caption in batch["captions"]], device=image.device)
            to_text, to_image = retrieval_at_1(image.detach(), text.detach(), caption_ids)
            means = tracker.step(
                done,
                learning_rate=rate,
                temperature=1 / scale.item(),
                image_to_text=to_text,
                text_to_image=to_image,
                **guard.metrics(),
            )
            chance = math.log(share.batch_size)
            if done >= max(100, 2 * training.warmup_steps) and means["clip_loss"] > 0.98 * chance:
                tracker.say(
                    f"warning: step {done}: the loss {means['clip_loss']:.3f} sits at ln({share.batch_size}) = "
                    f"{chance:.3f}, which is chance; lower training.learning_rate or look at the captions"
                )
        else:
            tracker.step(done, learning_rate=rate, **guard.metrics())
        stopped_by = interruption.requested()
        due = done % training.checkpoint_every == 0 or done == training.max_steps
        if due or stopped_by:
            guard.settle()
            state = guard.state() | data_state(accelerator, data, batch)
            tensors = {
                "model": model.state_dict(),
                "ema": optim.ema_tensors(ema, model),
                "optimizer": optim.optimizer_tensors(optimizer),
            }
            checkpoint.save(folder / "checkpoints", Checkpoint(done, tensors, state), training.keep_checkpoints)
        if stopped_by:
            tracker.close()
            interruption.stop(stopped_by, done)
        if done % training.sample_every == 0 or done == training.max_steps:
            with optim.averaged(ema, model):
                if accelerator.is_main_process:
                    pictures = retrieved(model, tokenizer, data.excerpt(GRID_AMONG), accelerator.device)
                    tracker.pictures(done, pictures, columns=9)

    # Export: averaged weights as transformers' towers
    if accelerator.is_main_process:
        ema.copy_to(optim.trained(model).values())
        export.save(clip, tokenizer, folder / "model")
        tracker.say(f"wrote {folder / 'model'}")
    tracker.close()
    interruption.close()
    accelerator.end_training()


def check_agrees(config: ClipConfig, sizes: dict[str, Any]) -> None:
    """Raises UserError where the configuration describes another CLIP than that of `init`, of these sizes. The default
    context_length describes none, and vocabulary_size is what there may be at most."""
    given = {}
    if config.context_length != ClipConfig.context_length:
        given["context_length"] = config.context_length
    if config.vocabulary_size is not None and config.vocabulary_size < sizes["vocabulary_size"]:
        given["vocabulary_size"] = config.vocabulary_size
    run.check_agrees(config.init, "CLIP", sizes, given, section="")
    model = dict(config.model)
    for ratio, width in (("mlp_ratio", "vision_width"), ("text_mlp_ratio", "text_width")):
        if ratio in model:  # which open_clip cuts to a whole number of units
            model[ratio] = int(sizes[width] * model[ratio]) / sizes[width]
    run.check_agrees(config.init, "CLIP", sizes, model)


def make_tokenizer(config: ClipConfig, data: CaptionedImages | CaptionedStream) -> CLIPTokenizer:
    """CLIP's own tokenizer, or a BPE of `vocabulary_size` trained on the captions."""
    if config.vocabulary_size is None:
        return clip_tokenizer(config.context_length)
    return train_tokenizer(data.some_captions(TOKENIZER_CAPTIONS), config.vocabulary_size, config.context_length)


def warn_of_unread_captions(tokenizer: CLIPTokenizer, data: CaptionedImages | CaptionedStream) -> None:
    """Tells how many captions have an end that CLIP does not read, and how many nothing that it could."""
    captions = list(itertools.islice(data.some_captions(MEASURED_CAPTIONS), MEASURED_CAPTIONS))
    tokens, most = lengths(tokenizer, captions), tokenizer.model_max_length
    if cut := sum(length > most for length in tokens):
        tqdm.write(
            f"warning: {cut} of {len(captions)} captions looked at are longer than context_length {most}, up to "
            f"{max(tokens)} tokens; the rest of them is not read: raise context_length, or shorten them",
            file=sys.stderr,
        )
    if empty := sum(not caption.strip() for caption in captions):
        tqdm.write(
            f"warning: {empty} of {len(captions)} captions looked at are empty: with one an image is in no pair, and "
            "its like teach CLIP nothing of texts; write them captions, or leave them out",
            file=sys.stderr,
        )


@torch.no_grad()
def retrieved(model: Slip, tokenizer, data: CaptionedImages, device: torch.device) -> torch.Tensor:
    """Rows of an image and the eight images nearest to its caption, among the first: (N · 9, 3, S, S)."""
    images = data.__getitems__([(0, index) for index in range(min(GRID_AMONG, len(data)))])["images"]
    embeddings = model.clip.encode_image(images.to(device), normalize=True)
    rows: dict[str, int] = {}
    for index in range(len(images)):
        rows.setdefault(data.captions(index)[0], index)
    rows = dict(list(rows.items())[:GRID_CAPTIONS])
    text = model.clip.encode_text(encode(tokenizer, list(rows))[0].to(device), normalize=True)
    nearest = (text @ embeddings.T).topk(min(8, len(images)), dim=1).indices.cpu()
    return torch.cat(
        [torch.cat([images[own, None], images[near]]) for own, near in zip(rows.values(), nearest, strict=True)]
    )


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
