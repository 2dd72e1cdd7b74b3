"""What the bundled model draws, judged: do its pictures show what was asked for, and do they look like photographs?

    python tests/benchmarks/bundled_model.py [--model FOLDER] [--images-per-class 50] [--data FOLDER] [--output FOLDER]

Draws "a photo of a <class>" for the ten classes of CIFAR-10 and has them read by two classifiers that no part of the
model was trained against: cifar10_classifier.py, with which its settings were chosen, and resnet_judge.py, with which
nothing was. Accuracy alone is fooled by textures, so it stands beside the Fréchet distance between the features that
either one has of these pictures and of the training photographs, and the floor of that distance: the same for as many
real test photographs. Both are biased alike, since few samples are compared with many.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

import cifar10_classifier
import resnet_judge
from cifar10_classifier import CLASSES
from ldm.errors import UserError, exit_code_of
from ldm.evaluation.distances import Gaussian, frechet_distance, gaussian_of, nearest
from ldm.evaluation.features import open_classifier, open_features
from ldm.training import randomness
from pipelines import LatentDiffusionPipeline
from pipelines.arguments import ArgumentParser

FLOOR_SUBSETS = 10
BATCH = 100
GRID_COLUMNS = 10


@dataclass(frozen=True)
class Photographs:
    """What a judge makes of real photographs; what pictures are compared with is computed once."""

    train_features: Tensor  # (50000, F)
    test_features: Tensor  # (10000, F)
    test_labels: Tensor  # (10000,)

    @cached_property
    def known(self) -> Gaussian:
        """The training photographs', for Fréchet distances to them."""
        return gaussian_of(self.train_features)

    @cached_property
    def median_nearest(self) -> float:
        """Distance of a test photograph to its nearest training photograph, the median."""
        return nearest(self.test_features, self.train_features)[0].median().item()

    def floors(self, counts: Tensor) -> Tensor:
        """Fréchet distances (FLOOR_SUBSETS,) of `counts[c]` random test photographs of each class c."""
        key = tuple(counts.tolist())
        if key not in self._floors:
            subsets = (floor_subset(self.test_labels, counts, number) for number in range(FLOOR_SUBSETS))
            self._floors[key] = torch.tensor([frechet_distance(self.test_features[s], self.known) for s in subsets])
        return self._floors[key]

    @cached_property
    def _floors(self) -> dict[tuple[int, ...], Tensor]:
        return {}


def read_photographs(source: str, features: Callable[[Tensor, str], Tensor] | None = None) -> Photographs:
    """Features of CIFAR-10, read from `source`: a folder of parquet files, or a repository of the Hub. `features`: what
    makes them of images and a name for the progress bar; the first judge's if None."""
    read = features or (lambda images, name: features_of(cifar10_classifier.load(), images, name)[1])
    splits = {split: cifar10_classifier.read_split(source, split) for split in ("train", "test")}
    train, test = (read(images, f"{split} photographs") for split, (images, _) in splits.items())
    return Photographs(train, test, splits["test"][1])


def features_of(classifier: torch.nn.Module, images: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Logits (N, 10) and features (N, F) of images (N, 3, 32, 32): uint8, or float in [-1, 1]."""
    read = (cifar10_classifier.features(classifier, part) for part in in_parts(images, name))
    logits, features = zip(*read, strict=True)
    return torch.cat(logits), torch.cat(features)


def second_features_of(images: Tensor, name: str) -> Tensor:
    """The second judge's features (N, F) of images as `features_of` has them."""
    network = open_features(resnet_judge.FOLDER)
    return torch.cat([network((part + 1) / 2) for part in in_parts(images, name)])


def in_parts(images: Tensor, name: str) -> Iterator[Tensor]:
    """Float images in [-1, 1], some hundred at a time, with a progress bar where there are many."""
    with tqdm(total=len(images), desc=name, unit=" images", disable=len(images) < 2000) as bar:
        for part in images.split(500):
            yield cifar10_classifier.to_unit_range(part) if part.dtype == torch.uint8 else part
            bar.update(len(part))


def judge(images: Tensor, labels: Tensor, photographs: Photographs, by_second: Photographs | None = None) -> dict:
    """Reads pictures (N, 3, 32, 32) in [-1, 1] that should show `labels` (N,), each class in 0..9 at least once.

    Returns what `reading` and `distances` do by the first judge and, under `second_judge`, by the second; the distances
    of that only where `by_second`, its photographs, is given.
    """
    logits, features = features_of(cifar10_classifier.load(), images, "pictures")
    second = reading(open_classifier(resnet_judge.FOLDER)((images + 1) / 2), labels)
    if by_second is not None:
        second |= distances(second_features_of(images, "pictures"), labels, by_second)
    return {
        "images": len(images),
        **reading(logits, labels),
        **distances(features, labels, photographs),
        "second_judge": second,
    }


def distances(features: Tensor, labels: Tensor, photographs: Photographs) -> dict:
    """From a judge's features (N, F) of pictures that should show `labels` (N,), and those of photographs:
    `frechet_distance` to the training photographs, `frechet_floor` and `frechet_floor_std` over random subsets of the
    test photographs with the same labels, `frechet_ratio`, the distance in units of the floor, and `nearest_ratio`: the
    median distance of a picture to its nearest training photograph, in units of that of a test photograph."""
    floors = photographs.floors(labels.bincount(minlength=10))
    distance = frechet_distance(features, photographs.known)
    return {
        "frechet_distance": distance,
        "frechet_floor": floors.mean().item(),
        "frechet_floor_std": floors.std().item(),
        "frechet_ratio": distance / floors.mean().item(),
        "nearest_ratio": nearest(features, photographs.train_features)[0].median().item() / photographs.median_nearest,
    }


def reading(logits: Tensor, labels: Tensor) -> dict:
    """From logits (N, 10) of pictures that should show `labels` (N,): `accuracy` and `class_accuracy` in 0..1, and
    `confusion`, 10 × 10 counts, a row for each class asked for."""
    confusion = torch.zeros(10, 10, dtype=torch.long)
    confusion.index_put_((labels, logits.argmax(1)), torch.tensor(1), accumulate=True)
    right = confusion.diagonal()
    return {
        "accuracy": right.sum().item() / len(labels),
        "class_accuracy": dict(zip(CLASSES, (right / confusion.sum(1)).tolist(), strict=True)),
        "confusion": confusion.tolist(),
    }


def floor_subset(labels: Tensor, counts: Tensor, number: int) -> Tensor:
    """Indices of `counts[c]` random samples of each class c; a function of `number`."""
    order = torch.randperm(len(labels), generator=randomness.generator(0, "floor", number))
    return torch.cat([order[labels[order] == c][:count] for c, count in enumerate(counts.tolist())])


def prompt_of(name: str) -> str:
    return f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}"


def draw(
    pipeline: LatentDiffusionPipeline, images_per_class: int, seed: int, **settings: float
) -> tuple[Tensor, Tensor, list[int]]:
    """Pictures (N, 3, H, W) in [-1, 1], what they should show (N,), and the seed of each; class by class."""
    pipeline.set_progress_bar_config(disable=True)
    pictures, seeds = [], []
    with tqdm(total=10 * images_per_class, desc="drawing", unit=" images") as bar:
        for c, name in enumerate(CLASSES):
            of_class = [randomness.key(seed, "benchmark", c, number) for number in range(images_per_class)]
            seeds += of_class
            for start in range(0, images_per_class, BATCH):
                generators = [torch.Generator().manual_seed(s) for s in of_class[start : start + BATCH]]
                prompts = [prompt_of(name)] * len(generators)
                drawn = pipeline(prompt=prompts, generator=generators, output_type="pt", **settings).images
                pictures.append(drawn.float().cpu() * 2 - 1)
                bar.update(len(drawn))
    return torch.cat(pictures), torch.arange(10).repeat_interleave(images_per_class), seeds


def table(report: dict) -> str:
    """The report as lines of text."""
    judges = (report, report["second_judge"])
    lines = [f"{'class':<12}{'cifar10_classifier, misread as':<32}resnet_judge, misread as"]
    for c, name in enumerate(CLASSES):
        cells = []
        for read in judges:
            wrong = [0 if other == c else count for other, count in enumerate(read["confusion"][c])]
            worst = f"{CLASSES[wrong.index(max(wrong))]} ({max(wrong)})" if max(wrong) else ""
            cells.append(f"{read['class_accuracy'][name]:>7.1%}  {worst:<23}")
        lines.append(f"{name:<12}{''.join(cells)}".rstrip())
    overall = "".join(f"{read['accuracy']:>7.1%}{'':<25}" for read in judges).rstrip()
    lines.append(f"{'all':<12}{overall}   of {report['images']} pictures")
    named = {
        "frechet_distance": "Fréchet distance to the training photographs",
        "frechet_floor": "  of as many test photographs (the floor)",
        "frechet_ratio": "  in units of the floor",
        "nearest_ratio": "median distance to the nearest of them, by photographs'",
    }
    for key, name in named.items():
        lines.append(f"{name:<56}" + "".join(f"{read[key]:>9.3f}" for read in judges if key in read))
    return "\n".join(lines)


def grid(images: Tensor, labels: Tensor) -> Image.Image:
    """The first pictures of each class, a labelled row for each, every pixel doubled. `images` as `judge` has them."""
    size, margin = 2 * images.shape[-1], 90
    sheet = Image.new("RGB", (margin + GRID_COLUMNS * (size + 2), 10 * (size + 2)), "white")
    pen = ImageDraw.Draw(sheet)
    for c, name in enumerate(CLASSES):
        top = c * (size + 2)
        pen.text((6, top + size // 2), name, fill="black", anchor="lm", font=ImageFont.load_default(size=14))
        for column, picture in enumerate(images[labels == c][:GRID_COLUMNS]):
            pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            tile = Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)
            sheet.paste(tile, (margin + column * (size + 2), top))
    return sheet


def main() -> None:
    parser = ArgumentParser(description="Judge what the bundled model, or another of CIFAR-10's classes, draws.")
    parser.add_argument("--model", help="a pipeline folder or Hub repository; without it, the bundled model")
    parser.add_argument("--images-per-class", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, help="without it, the model's own setting")
    parser.add_argument("--num-inference-steps", type=int, help="without it, the model's own setting")
    parser.add_argument("--seed", type=int, default=0, help="key of the seeds of all pictures")
    parser.add_argument("--data", default=cifar10_classifier.HUB, help="folder with {train,test}.parquet of CIFAR-10")
    parser.add_argument("--output", type=Path, help="new folder for report.json and grid.png; without it, none")
    arguments = parser.parse_args()
    check(arguments)

    pipeline = (
        LatentDiffusionPipeline.default()
        if arguments.model is None
        else LatentDiffusionPipeline.from_pretrained(arguments.model)
    )
    given = {name: getattr(arguments, name) for name in ("guidance_scale", "num_inference_steps")}
    settings = {name: value for name, value in given.items() if value is not None}
    photographs = read_photographs(arguments.data)  # before pictures are drawn, which takes longest
    by_second = read_photographs(arguments.data, second_features_of)
    images, labels, seeds = draw(pipeline, arguments.images_per_class, arguments.seed, **settings)
    if images.shape[1:] != (3, 32, 32):
        raise UserError(f"--model {arguments.model} draws {tuple(images.shape[1:])}; the judge reads (3, 32, 32)")

    report = judge(images, labels, photographs, by_second)
    report = {"model": arguments.model or "bundled", "settings": pipeline.default_settings | settings, **report}
    print(f"picture k of class c has seed key({arguments.seed}, 'benchmark', c, k): {seeds[0]} … {seeds[-1]}")
    first, second = json.loads(cifar10_classifier.RECORD.read_text())["test_accuracy"], resnet_judge.stated_accuracy()
    print(f"the first judge reads {first:.2%} of real test images, the second {second:.2%}")
    print("settings: " + ", ".join(f"{name} {value}" for name, value in report["settings"].items()))
    print(table(report))
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "report.json").write_text(json.dumps({**report, "seeds": seeds}, indent=2) + "\n")
        grid(images, labels).save(arguments.output / "grid.png")
        print(f"wrote {arguments.output}/report.json and grid.png")


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError, before anything is drawn, for what cannot be used."""
    if arguments.images_per_class < 1:
        raise UserError(f"--images-per-class {arguments.images_per_class}: must be at least 1")
    if arguments.images_per_class > 1000:
        raise UserError(f"--images-per-class {arguments.images_per_class}: the test set has 1000, for the floor")
    output = arguments.output
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: already in use; name a new folder")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
