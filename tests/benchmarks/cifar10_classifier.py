"""The judge of the bundled model: a small classifier of CIFAR-10 that no generator is trained against.

    python tests/benchmarks/cifar10_classifier.py --data FOLDER --epochs 12 [--resume]

FOLDER holds train.parquet and test.parquet (columns `img`, `label`); without it, the Hub's `uoft-cs/cifar10` is read.
The network and its recipe follow Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU": a frozen whitening
layer, three blocks of two convolutions, no trained normalisation scales, a scaled linear head, fast biases, alternating
flips. Departures: ReLU, a moving average in place of lookahead, no test-time augmentation.
"""

import argparse
import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import load_dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from tqdm import tqdm

from ldm.errors import UserError, exit_code_of
from ldm.evaluation import features as evaluation

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
HUB = "uoft-cs/cifar10"
WEIGHTS = Path(__file__).with_suffix(".safetensors")
RECORD = Path(__file__).with_suffix(".json")
BATCH_SIZE = 512
BIAS_LR_FACTOR = 64  # only the normalisations have biases worth training, and those learn fast
WEIGHT_DECAY = 1.3e-3
EMA_DECAY = 0.995
WARM_UP = 0.2  # fraction of the steps in which the learning rate rises


class Block(nn.Module):
    """conv, halve, norm, ReLU, conv, norm, ReLU: (B, c_in, H, W) -> (B, c_out, H // 2, W // 2)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(c_out, momentum=0.4)
        self.norm2 = nn.BatchNorm2d(c_out, momentum=0.4)
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            nn.init.dirac_(conv.weight[: conv.in_channels])  # the first channels start as the identity
            norm.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.relu(self.norm2(self.conv2(x)))


class Classifier(nn.Module):
    """(B, 3, 32, 32) in [-1, 1] -> logits (B, 10) and the features they are read from, (B, 256)."""

    def __init__(self):
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        self.blocks = nn.Sequential(Block(24, 64), Block(64, 256), Block(256, 256))
        self.head = nn.Linear(256, 10, bias=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.whiten(images))  # (B, 24, 31, 31)
        x = F.max_pool2d(self.blocks(x), 3).flatten(1)  # (B, 256, 3, 3), then (B, 256)
        return self.head(x) / 9, x


def load() -> Classifier:
    """The trained judge, in eval mode and float32 (the file holds float16)."""
    model = Classifier()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval().requires_grad_(False)


def feature_network() -> evaluation.FeatureNetwork:
    """The judge, as what the measures of `ldm.evaluation` take for features: (N, 256)."""
    model = load()
    return evaluation.FeatureNetwork(**_told(), size=256, read=lambda images: model(_of_unit_interval(images))[1])


def reader() -> evaluation.Classifier:
    """The judge, as what reads pictures there."""
    model = load()
    return evaluation.Classifier(**_told(), names=CLASSES, read=lambda images: model(_of_unit_interval(images))[0])


def _told() -> dict:
    return {
        "name": "cifar10_classifier",
        "weights": f"{WEIGHTS.name}, {evaluation.fingerprint([WEIGHTS])}",
        "image_size": 32,
    }


def _of_unit_interval(images: Tensor) -> Tensor:
    return (evaluation.resized(images, 32) * 2 - 1).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def features(model: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, 10) and penultimate features (B, 256) of images (B, 3, 32, 32) in [-1, 1]."""
    return model(images)


def read_split(source: str, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) of `train` or `test`, from a folder or the Hub. Raises UserError."""
    try:
        table = load_dataset(source, split=split).with_format("arrow")[:]
        encoded, labels = table["img"].to_pylist(), table["label"].to_pylist()
    except Exception as error:  # every fault of the files or of the network, in one line
        raise UserError(f"--data {source}: no readable {split} set of img and label ({type(error).__name__})") from None
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in encoded])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1], channels last (which AMX convolutions want)."""
    return (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def whitening_filters(images: Tensor) -> Tensor:
    """Filters (24, 3, 2, 2) whose responses to `images` (N, 3, H, W) are uncorrelated, variance 1, in both signs."""
    patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12).double()
    eigenvalues, eigenvectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (eigenvectors / (eigenvalues + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
    return torch.cat([filters, -filters]).float()


def batches(pixels: Tensor, labels: Tensor, epochs: int, seed: int, shift: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented batches: every image moved by up to `shift` pixels, and mirrored in every second epoch."""
    mirrored = torch.rand(len(pixels), generator=torch.Generator().manual_seed(seed)) < 0.5
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        order = torch.randperm(len(pixels), generator=generator)
        shifts = torch.randint(2 * shift + 1, (len(pixels), 2), generator=generator)
        for index in order[: len(order) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE):
            crops = F.pad(pixels[index].float(), (shift,) * 4, mode="reflect").unfold(2, 32, 1).unfold(3, 32, 1)
            images = crops[torch.arange(len(index)), :, shifts[index, 0], shifts[index, 1]]  # of (B, 3, dy, dx, 32, 32)
            yield to_unit_range(torch.where(mirrored[index, None, None, None], images.flip(3), images)), labels[index]
        mirrored = ~mirrored


def train(
    model: nn.Module, pixels: Tensor, labels: Tensor, epochs: int, seed: int, peak_lr: float, shift: int, warm_up: float
) -> nn.Module:
    """One cycle of the learning rate: from a fifth of its peak up in the fraction `warm_up` of the steps, then to 0.
    Returns the moving average of the weights, with statistics of the normalisations measured anew for it."""
    model.to(memory_format=torch.channels_last).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    groups = []
    for factor, fast in ((1, False), (BIAS_LR_FACTOR, True)):
        chosen = [p for name, p in model.named_parameters() if p.requires_grad and ("norm" in name) == fast]
        groups.append({"params": chosen, "peak": peak_lr * factor, "weight_decay": WEIGHT_DECAY / factor})
    optimizer = torch.optim.SGD(groups, lr=peak_lr, momentum=0.9, nesterov=True)

    steps = epochs * (len(pixels) // BATCH_SIZE)
    bar = tqdm(batches(pixels, labels, epochs, seed, shift), unit=" images", unit_scale=BATCH_SIZE, total=steps)
    for step, (images, target) in enumerate(bar):
        done = step / steps
        factor = 0.2 + 0.8 * done / warm_up if done < warm_up else (1 - done) / (1 - warm_up)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        with torch.autocast("cpu", torch.bfloat16):
            logits, _ = model(images)
        loss = F.cross_entropy(logits.float(), target, label_smoothing=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        bar.set_postfix(loss=f"{loss.item():.3f}")
    with torch.autocast("cpu", torch.bfloat16):
        update_bn(batches(pixels, labels, 1, seed, shift), average)
    return average.module


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the classifier that reads the bundled model's pictures.")
    parser.add_argument("--data", default=HUB, help="folder with train.parquet and test.parquet; without it, the Hub")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0, help="of the first weights, the order and the augmentation")
    parser.add_argument("--peak-lr", type=float, default=0.5, help="learning rate at the height of its cycle")
    parser.add_argument("--shift", type=int, default=2, help="largest translation of the augmentation, in pixels")
    parser.add_argument("--resume", action="store_true", help="train on from the stored weights")
    args = parser.parse_args()

    pixels, labels = read_split(args.data, "train")
    torch.manual_seed(args.seed)
    model, runs = Classifier(), []
    model.whiten.weight.copy_(whitening_filters(to_unit_range(pixels[:2000])))
    if args.resume:
        model.load_state_dict(load_file(WEIGHTS))
        runs = json.loads(RECORD.read_text())["runs"]
    start, settings = time.monotonic(), {name: getattr(args, name) for name in ("epochs", "seed", "peak_lr", "shift")}
    model = train(model, pixels, labels, **settings, warm_up=0 if args.resume else WARM_UP)
    steps, minutes = args.epochs * (len(pixels) // BATCH_SIZE), round((time.monotonic() - start) / 60, 1)
    runs.append({**settings, "batch_size": BATCH_SIZE, "steps": steps, "minutes": minutes})
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, WEIGHTS)
    WEIGHTS.chmod(0o644)

    (pixels, labels), judge = read_split(args.data, "test"), load()
    read = torch.cat([features(judge, to_unit_range(part))[0].argmax(1) for part in pixels.split(1000)])
    record = {
        "data": "CIFAR-10, 50,000 training images",
        "test_accuracy": (read == labels).double().mean().item(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "runs": runs,
        "hardware": f"{torch.get_num_threads()} CPU cores, bfloat16 autocast",
    }
    print(text := json.dumps(record, indent=2))
    RECORD.write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
