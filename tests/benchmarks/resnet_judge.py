"""A second judge of the bundled model: a ResNet in transformers' layout, with which nothing of it was chosen.

    python tests/benchmarks/resnet_judge.py --data FOLDER [--resume]

Trained from scratch on CIFAR-10's training images, read as `cifar10_classifier.py` reads them; architecture, seed and
augmentation are others than that judge's. The folder it writes is what `ldm evaluate --classifier` takes.
"""

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import Tensor
from tqdm import tqdm
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from cifar10_classifier import CLASSES, HUB, read_split
from ldm.errors import UserError, exit_code_of
from ldm.evaluation.features import Classifier, open_classifier, resized
from ldm.files import make_readable
from ldm.training import checkpoint, optim, randomness
from pipelines.arguments import ArgumentParser
from pipelines.evaluation.networks import apply

FOLDER = Path(__file__).with_suffix("")
SIZE = 64  # pixels a side that the network sees, of which its stem leaves a quarter
EARLY_SIZE, EARLY = 48, 0.6  # what it sees in that fraction of the steps, at half the cost
MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)  # of the training images' pixels in [0, 1]
BATCH_SIZE = 256
MARGIN = 4  # pixels by which a crop may move
HOLE = 8  # pixels a side of the square that is cut out
MOMENTUM, WEIGHT_DECAY, LABEL_SMOOTHING = 0.9, 5e-4, 0.1
WARM_UP = 0.15  # fraction of the steps in which the learning rate rises
CHECKPOINT_EVERY = 50  # steps


def new_model() -> ResNetForImageClassification:
    """(B, 3, 64, 64), normalised -> logits (B, 10); 1.96 million parameters, drawn from the global generator."""
    config = ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 160, 256], depths=[2, 2, 1], layer_type="basic",
        id2label=dict(enumerate(CLASSES)), label2id={name: number for number, name in enumerate(CLASSES)},
    )  # fmt: skip
    return ResNetForImageClassification(config)


def augmented(pixels: Tensor, seed: int, epoch: int, index: Tensor) -> Tensor:
    """Images (B, 3, 32, 32) in [0, 1] of samples `index` (B,) of uint8 `pixels` (N, 3, 32, 32): each moved, mirrored or
    not, a square of it grey. What becomes of a sample is a function of (seed, epoch, sample)."""
    side, draw = pixels.shape[-1], randomness.generator(seed, "augmentation", epoch)
    moved = torch.randint(2 * MARGIN + 1, (len(pixels), 2), generator=draw)[index]
    mirrored = (torch.rand(len(pixels), generator=draw) < 0.5)[index]
    hole = torch.randint(side, (len(pixels), 2), generator=draw)[index]

    padded = F.pad(pixels[index].float() / 255, (MARGIN,) * 4, mode="reflect")
    crops = padded.unfold(2, side, 1).unfold(3, side, 1)[torch.arange(len(index)), :, moved[:, 0], moved[:, 1]]
    images = torch.where(mirrored[:, None, None, None], crops.flip(3), crops)
    near = (torch.arange(side) - hole[:, :, None] + HOLE // 2).div(HOLE, rounding_mode="floor") == 0  # (B, 2, side)
    return torch.where((near[:, 0, :, None] & near[:, 1, None, :])[:, None], _column(MEAN), images)


def normalised(images: Tensor, size: int = SIZE) -> Tensor:
    """Images in [0, 1] as the network wants them, as `open_classifier` prepares them by the folder's settings."""
    return ((resized(images, size) - _column(MEAN)) / _column(STD)).contiguous(memory_format=torch.channels_last)


def _column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values)[:, None, None]


def learning_rate_factor(done: float) -> float:
    """Of the peak, at the fraction `done` of the steps: one cycle of two straight lines, from a tenth and to 0."""
    return 0.1 + 0.9 * done / WARM_UP if done < WARM_UP else (1 - done) / (1 - WARM_UP)


def train(
    pixels: Tensor, labels: Tensor, epochs: int, seed: int, peak_lr: float, run: Path, resume: bool
) -> tuple[ResNetForImageClassification, float]:
    """The trained network, and the minutes of processor time that it took. Checkpoints are kept in `run`."""
    torch.manual_seed(randomness.key(seed, "weights"))
    model = new_model().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=peak_lr, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    first, spent = 0, 0.0
    if resume:
        saved = checkpoint.load(checkpoint.newest(run))
        model.load_state_dict(saved.read("model"))
        optim.load_optimizer(optimizer, saved.read("optimizer"))
        first, spent = saved.step, saved.state["seconds"]

    steps_an_epoch, begin = len(pixels) // BATCH_SIZE, time.process_time() - spent
    steps = epochs * steps_an_epoch
    bar = tqdm(range(first, steps), initial=first, total=steps, unit=" steps", desc="training")
    for step in bar:
        epoch, place = divmod(step, steps_an_epoch)
        order = torch.randperm(len(pixels), generator=randomness.generator(seed, "order", epoch))
        index = order[place * BATCH_SIZE : (place + 1) * BATCH_SIZE]
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * learning_rate_factor(step / steps)
        images = normalised(augmented(pixels, seed, epoch, index), EARLY_SIZE if step / steps < EARLY else SIZE)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(pixel_values=images).logits
        loss = F.cross_entropy(logits.float(), labels[index], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            tensors = {"model": model.state_dict(), "optimizer": optim.optimizer_tensors(optimizer)}
            state = {"seconds": time.process_time() - begin}
            checkpoint.save(run, checkpoint.Checkpoint(step + 1, tensors, state), keep=2)
    return model, (time.process_time() - begin) / 60


def write(model: ResNetForImageClassification, folder: Path) -> None:
    """The network in fp16, and how pixels are prepared for it, as transformers reads them."""
    model.eval().half().save_pretrained(folder)
    ViTImageProcessor(
        size={"height": SIZE, "width": SIZE}, resample=3, image_mean=list(MEAN), image_std=list(STD)
    ).save_pretrained(folder)
    for path in folder.iterdir():
        make_readable(path)


def class_accuracy(classifier: Classifier, pixels: Tensor, labels: Tensor) -> dict[str, float]:
    """The share of uint8 images (N, 3, 32, 32) that a classifier reads right, of each class and of `all`."""
    right = apply(classifier, pixels, "test images").argmax(1) == labels
    found = {name: right[labels == number] for number, name in enumerate(CLASSES)} | {"all": right}
    return {name: some.double().mean().item() for name, some in found.items()}


def stated_accuracy() -> float:
    """Of the committed network, in 0..1, as its card has it."""
    return ModelCard.load(FOLDER / "README.md").data.eval_results[0].metric_value


def card(accuracy: dict[str, float], epochs: int, seed: int, peak_lr: float, steps: int, minutes: float) -> ModelCard:
    """What the network is and how it came about, with the test accuracy of each class and of all."""
    result = EvalResult(
        task_type="image-classification", dataset_type=HUB, dataset_name="CIFAR-10", dataset_split="test",
        metric_type="accuracy", metric_value=round(accuracy["all"], 4),
    )  # fmt: skip
    data = ModelCardData(
        license="apache-2.0", library_name="transformers", pipeline_tag="image-classification", datasets=[HUB],
        model_name="resnet_judge", eval_results=[result],
    )  # fmt: skip
    rows = "\n".join(f"| {name} | {share:.1%} |" for name, share in accuracy.items())
    command = f"python tests/benchmarks/resnet_judge.py --epochs {epochs} --seed {seed} --peak-lr {peak_lr}"
    processor = f"{torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}"
    return ModelCard(f"""---
{data.to_yaml()}
---

# A second judge of CIFAR-10's pictures

A small ResNet that reads which of CIFAR-10's ten classes a picture of 32 × 32 pixels shows. No generator was trained
against it and no setting of one was chosen with it: it checks what `cifar10_classifier.py`, with which the bundled
model's settings were chosen, says of that model's pictures.

```bash
ldm evaluate --data uoft-cs/cifar10 --output report --classifier tests/benchmarks/resnet_judge
```

`ResNetForImageClassification`: a stem of 7 × 7 with stride 2 and pooling, then 2, 2 and 1 basic layers of 64, 160 and
256 channels; 1.96 million parameters, stored in fp16. Pictures are resized whole to {SIZE} × {SIZE}, bicubic.

## Training

`{command}`

From scratch, on CIFAR-10's 50,000 training images (JPEG copies of quality 75).

- Augmentation: moves of up to {MARGIN} pixels (reflected margins), mirroring, a square of {HOLE} × {HOLE} cut out.
- SGD, Nesterov momentum {MOMENTUM}, weight decay {WEIGHT_DECAY}, label smoothing {LABEL_SMOOTHING}.
- {steps:,} steps of {BATCH_SIZE} images, {EARLY:.0%} of them at {EARLY_SIZE} pixels a side, the rest at {SIZE}.
- The learning rate rises to {peak_lr} in the first {WARM_UP:.0%} of the steps, then falls to 0, in straight lines.
- {minutes:.0f} minutes of processor time, bfloat16 autocast ({processor}).

## Accuracy

Of the 10,000 test images, prepared as `ldm evaluate` prepares them.

| class | read right |
| --- | --- |
{rows}
""")


def main() -> None:
    parser = ArgumentParser(description="Train the second judge of the bundled model.")
    parser.add_argument("--data", default=HUB, help="folder with train.parquet and test.parquet; without it, the Hub")
    parser.add_argument("--epochs", type=int, default=18)
    parser.add_argument("--seed", type=int, default=11, help="of the first weights, the order and the augmentation")
    parser.add_argument("--peak-lr", type=float, default=0.2, help="learning rate at the height of its cycle")
    parser.add_argument("--run", type=Path, default=Path("runs/resnet_judge"), help="folder of checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of --run")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the network")
    args = parser.parse_args()
    if args.epochs < 1:
        raise UserError(f"--epochs {args.epochs}: must be at least 1")
    if args.resume != (checkpoint.newest(args.run) is not None):
        fault = "no checkpoint there; leave --resume out" if args.resume else "checkpoints there; add --resume"
        raise UserError(f"--run {args.run}: {fault}, or name another folder")

    pixels, labels = read_split(args.data, "train")
    settings = {name: getattr(args, name) for name in ("epochs", "seed", "peak_lr")}
    model, minutes = train(pixels, labels, **settings, run=args.run, resume=args.resume)
    write(model, args.output)
    accuracy = class_accuracy(open_classifier(args.output), *read_split(args.data, "test"))
    steps = args.epochs * (len(pixels) // BATCH_SIZE)
    card(accuracy, **settings, steps=steps, minutes=minutes).save(args.output / "README.md")
    print("\n".join(f"{name:<12}{share:>8.2%}" for name, share in accuracy.items()))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
