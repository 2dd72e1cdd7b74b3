"""One evaluation from end to end: opened, drawn, judged, written."""

import argparse
import hashlib
import importlib.metadata
import platform
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ldm import hub
from ldm.errors import UserError
from ldm.evaluation.alignment import accuracy, clip_score, named_labels, read_right
from ldm.evaluation.distances import Gaussian, frechet_distance, gaussian_of
from ldm.evaluation.report import REPORT, Report, as_json, as_markdown
from ldm.files import write_text
from ldm.training.run import lock
from pipelines.evaluation import pictures
from pipelines.evaluation.data import Judged, open_judged
from pipelines.evaluation.drawing import draw
from pipelines.evaluation.images import NEIGHBOURS, frechet_name, shapes_figures
from pipelines.evaluation.judgement import Images, Judgement, images_of, judge
from pipelines.evaluation.model import PixelSpace, TextToImage, check_settings, open_painter
from pipelines.evaluation.networks import Judges, apply, open_judges
from pipelines.evaluation.settings import claim
from pipelines.evaluation.stored import Pictures, written

DRAWN, PAGE = "drawn", "report.md"
SAMPLES, RESTORED, NEAREST, CURVES = "samples.png", "reconstructions.png", "neighbours.png", "curves.png"
CURVE_IMAGES = 200
VARIED = {"num_inference_steps": "steps", "guidance_scale": "guidance scale"}
PACKAGES = ("torch", "diffusers", "transformers")


def evaluate(arguments: argparse.Namespace, name: str, folder: Path, output: Path) -> Path:
    """Evaluates the model in `folder`, called `name`, by the arguments of `ldm evaluate` into the folder `output`.
    Returns its page, report.md.

    Raises:
        UserError: a model, data or network that cannot be used, or another evaluation's folder; nothing is written.
        RunError: drawing failed; what has been drawn is kept, and the same command goes on.
    """
    begin = perf_counter()
    asked = {"num_inference_steps": arguments.num_inference_steps, "guidance_scale": arguments.guidance_scale}
    given = {name: value for name, value in asked.items() if value is not None}
    painter = open_painter(folder, given)
    own_steps, own_scale = painter.settings["num_inference_steps"], painter.settings["guidance_scale"]
    check_settings(
        painter,
        {"--num-inference-steps": [own_steps], "--steps": arguments.steps or []},
        {"--guidance-scale": [own_scale], "--guidance-scales": arguments.guidance_scales or []},
    )
    judges = open_judges(
        folder, arguments.features, arguments.clip, arguments.classifier, painter.side, painter.device
    )  # fmt: skip
    data = open_judged(
        arguments.data, arguments.split, arguments.against, painter.side, arguments.num_images,
        arguments.reference_images, arguments.seed, arguments.caption_column, arguments.caption_template,
        arguments.label_names or (),
    )  # fmt: skip
    painter.check_captions(data.captions)
    _check_judges(arguments, painter, data, judges)
    _check_enough(arguments, data)
    settings = _settings(arguments, name, folder, painter, data, judges)
    claim(output, settings)
    lock(output, "written", "--output")
    if data.doubt is not None:
        print(f"warning: --data {arguments.data}: {data.doubt}", file=sys.stderr)
    seconds = {"opening": round(perf_counter() - begin, 1)}

    begin = perf_counter()
    drawing = (arguments.seed, arguments.batch_size)
    drawn = draw(painter, data.captions, output / DRAWN, *drawing, painter.settings if _is_pixels(painter) else given)
    seconds["drawing"] = round(perf_counter() - begin, 1)
    images = images_of(data, drawn)
    found = judge(painter, data, images, judges, *drawing)
    found.warnings += [data.doubt] if data.doubt is not None else []

    begin = perf_counter()
    curves = _curves(arguments, painter, data, images, judges, found, given, output)
    seconds |= found.seconds | ({"curves": round(perf_counter() - begin, 1)} if curves else {})
    begin = perf_counter()
    with written(output):
        shown = _draw_pictures(output, data, images, found, curves)
    seconds["pictures"] = round(perf_counter() - begin, 1)
    for split, of_split in {data.split: data.images, data.reference_split: data.reference}.items():
        if count := of_split.unreadable:
            found.warnings.append(f"of the images of {split}, {count} cannot be decoded: the next stands in for each")
    report = Report(
        model=name,
        settings=settings,
        figures=found.figures,
        warnings=found.warnings,
        pictures=shown,
        curves=curves,
        details={"classification accuracy of each caption, %": found.per_caption} if found.per_caption else {},
        made_with={
            **{name: importlib.metadata.version(name) for name in PACKAGES},
            "device": torch.cuda.get_device_name() if painter.device.type == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
            "seconds": seconds,
        },
    )
    with written(output):
        write_text(output / REPORT, as_json(report))
        write_text(output / PAGE, as_markdown(report))
    return output / PAGE


def _is_pixels(painter: TextToImage | PixelSpace) -> bool:
    return isinstance(painter, PixelSpace)


def _check_judges(
    arguments: argparse.Namespace, painter: TextToImage | PixelSpace, data: Judged, judges: Judges
) -> None:
    """Raises `UserError` where a network has nothing to judge, or a curve none that judges it."""
    if judges.classifier is not None:
        if not painter.knows_captions:
            raise UserError("--classifier reads what captions name; this model knows none, leave it out")
        named_labels(judges.classifier.names, data.captions)
    of_captions = judges.clip or judges.classifier or data.config.source == "shapes"
    if judges.features is None and not (painter.knows_captions and of_captions):
        for option in ("steps", "guidance_scales"):
            if getattr(arguments, option):
                raise UserError(f"--{option.replace('_', '-')}: nothing here tells the quality of a curve's points; "
                                "name --features, --clip or --classifier")  # fmt: skip


def _check_enough(arguments: argparse.Namespace, data: Judged) -> None:
    """Raises `UserError` where the data have fewer images than the measures need."""
    for split, count in ((data.split, len(data.indices)), (data.reference_split, len(data.reference_indices))):
        if count <= NEIGHBOURS:
            raise UserError(
                f"--data {arguments.data} has {count} images in {split}; precision and recall by {NEIGHBOURS} "
                f"neighbours need at least {NEIGHBOURS + 1}"
            )


def _settings(
    arguments: argparse.Namespace,
    name: str,
    folder: Path,
    painter: TextToImage | PixelSpace,
    data: Judged,
    judges: Judges,
) -> dict[str, Any]:
    """All that the figures are a function of."""
    return {
        "model": name,
        "commit": hub.commit_of(folder),
        "model_sha256": hub.sha256_of_model(folder),
        "data": arguments.data,
        "split": data.split,
        "images_in_split": len(data.images),
        "captions": data.made_of,
        "against": data.against,
        "num_images": arguments.num_images,
        "seed": arguments.seed,
        "captions_sha256": hashlib.sha256("\n".join(data.captions).encode()).hexdigest()[:16],
        **{name: list(value) if isinstance(value, tuple) else value for name, value in painter.settings.items()},
        "features": None if judges.features is None else f"{judges.features.name}, {judges.features.weights}",
        "clip": None if judges.clip is None else f"{judges.clip.images.name}, {judges.clip.images.weights}",
        "classifier": None if judges.classifier is None else f"{judges.classifier.name}, {judges.classifier.weights}",
        "steps": arguments.steps,
        "guidance_scales": arguments.guidance_scales,
        "curve_images": _curve_images(arguments) if arguments.steps or arguments.guidance_scales else None,
    }


# ---- curves ----------------------------------------------------------------------------------------------------------


def _curve_images(arguments: argparse.Namespace) -> int:
    """Of each point: the first of those that are drawn anyway."""
    return min(arguments.curve_images or CURVE_IMAGES, arguments.num_images)


def _curves(
    arguments: argparse.Namespace,
    painter: TextToImage | PixelSpace,
    data: Judged,
    images: Images,
    judges: Judges,
    found: Judgement,
    given: dict[str, Any],
    output: Path,
) -> dict[str, list[dict[str, float]]]:
    """Quality over what is varied, on the first `curve_images` captions, each setting from the same seeds."""
    asked = {"num_inference_steps": arguments.steps, "guidance_scale": arguments.guidance_scales}
    if not any(asked.values()):
        return {}
    captions = data.captions[: _curve_images(arguments)]
    known = None
    if judges.features is not None:
        known = gaussian_of(found.seen(judges.features, images.reference))
    curves = {}
    for name, values in asked.items():
        points = []
        for value in values or []:
            if value == painter.settings[name]:  # which is what was drawn already
                drawn = images.drawn.first(len(captions))
            else:
                settings = (painter.settings if _is_pixels(painter) else given) | {name: value}
                place, what = output / f"{DRAWN}-{name.replace('_', '-')}-{value:g}", f"{VARIED[name]} {value:g}"
                drawn = draw(painter, captions, place, arguments.seed, arguments.batch_size, settings, what)
            told = captions if painter.knows_captions else None
            points.append({VARIED[name]: value, **_quality(drawn, told, data, judges, known)})
        if points:
            curves[VARIED[name]] = points
    return curves


def _quality(
    drawn: Pictures, captions: list[str] | None, data: Judged, judges: Judges, known: Gaussian | None
) -> dict[str, float]:
    """Of one point. captions: None of a model that knows none."""
    quality: dict[str, float] = {}
    if known is not None:
        name = frechet_name(judges.features.name)
        quality[name] = frechet_distance(apply(judges.features, drawn, "features"), known)
    if captions is None:
        return quality
    if judges.clip is not None:
        quality["CLIP score"] = clip_score(apply(judges.clip.images, drawn, "CLIP"), judges.clip.read(captions))
    if judges.classifier is not None:
        right = read_right(apply(judges.classifier, drawn, "reading"), judges.classifier.names, captions)
        quality["accuracy, %"] = 100 * accuracy(right, captions)["accuracy"]
    if data.config.source == "shapes":
        quality["captions right, %"] = shapes_figures(drawn, captions, seed=0)[0].value
    return quality


# ---- pictures --------------------------------------------------------------------------------------------------------


def _draw_pictures(
    output: Path, data: Judged, images: Images, found: Judgement, curves: dict[str, list[dict[str, float]]]
) -> dict[str, str]:
    """Writes them; returns what each file shows."""
    shown = {SAMPLES: "Samples: the first pictures drawn, not selected"}
    pictures.samples(images.drawn, data.captions).save(output / SAMPLES)
    if found.restored is not None:
        pictures.beside(images.real, found.restored).save(output / RESTORED)
        shown[RESTORED] = "Reconstructions: real images, and what the autoencoder keeps of them"
    if found.nearest is not None:
        queries, rows, values = found.nearest
        near = [[images.reference[row] for row in some] for some in rows]
        captions = [data.captions[number] for number in queries.tolist()]
        pictures.neighbours([images.drawn[number] for number in queries.tolist()], captions, near, values).save(
            output / NEAREST
        )
        shown[NEAREST] = (
            f"Nearest neighbours: of {len(images.drawn):,} pictures those that lie nearest to an image of "
            f"{data.reference_split}, and their nearest ones with the distances in features. Are they copies?"
        )
    if curves:
        pictures.curves(curves).savefig(output / CURVES, dpi=110)
        shown[CURVES] = "Curves: quality over settings, all of the same captions and seeds"
    return shown
