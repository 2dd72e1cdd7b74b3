"""What the pictures are worth that a model draws: how near they come to real ones, and whether they show what their
captions say."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from PIL import Image
from torch import Tensor

from ldm.data import shapes
from ldm.evaluation import distances
from ldm.evaluation.alignment import accuracy, clip_score, read_right, retrieval_recall, retrieved
from ldm.evaluation.distances import bootstrap, frechet_distance, gaussian_of, kernel_distance, kernel_interval
from ldm.evaluation.report import Figure

INCEPTION = "inception"
NEIGHBOURS = 5
"""k of precision, recall, density and coverage; so many images and one more are needed."""
SUBSETS, SUBSET_SIZE = 100, 1000
ROUNDS = 200
COPIES = 0.9
"""Times as far from training images as other real images lie: nearer is a sign of learning by heart."""
LARGE = 256
"""Features beyond which a Fréchet distance takes long: its rounds fall as it rises, with the third power."""


def distance_figures(
    part: str, drawn: Tensor, real: Tensor | None, reference: Tensor, seed: int, **said: str
) -> list[Figure]:
    """Distances of features drawn (N, F) to those of reference (M, F), and of real (K, F) images beside them.

    said: `against`, `network`, `weights`, `remark` of every figure.
    """
    known, size = gaussian_of(reference), min(SUBSET_SIZE, len(drawn), len(reference))
    kernel = kernel_distance(drawn, reference, size, SUBSETS, seed)[0]
    rows = [
        Figure(
            part=part, name=frechet_name(said["network"]), better="lower",
            value=frechet_distance(drawn, known), images=len(drawn),
            interval=frechet_interval(drawn, lambda some: frechet_distance(some, known), drawn.shape[1], seed),
            real=None if real is None else frechet_distance(real, known),
            **also_saying(few_rounds(drawn.shape[1]), said),
        ),
        Figure(
            part=part, name="kernel distance" if said["network"] != INCEPTION else "KID", better="lower",
            value=kernel, images=len(drawn),
            interval=kernel_interval(kernel, reference, drawn, ROUNDS, seed),
            real=None if real is None else kernel_distance(
                real, reference, min(size, len(real)), SUBSETS, seed
            )[0], **also_saying(f"mean over {SUBSETS} subsets of {size:,} images", said),
        ),
    ]  # fmt: skip
    radii = distances.radii(reference, NEIGHBOURS)  # which take longest, of thousands of images
    values = distances.neighbour_measures(reference, drawn, NEIGHBOURS, radii)
    intervals = distances.neighbour_intervals(reference, drawn, NEIGHBOURS, ROUNDS, seed, real_radii=radii)
    others = {} if real is None else distances.neighbour_measures(reference, real, NEIGHBOURS, radii)
    for name, value in values.items():
        rows.append(
            Figure(
                part=part, name=f"{name} (k = {NEIGHBOURS})", better="higher", value=value, images=len(drawn),
                interval=within(intervals[name], high=math.inf if name == "density" else 1.0), real=others.get(name),
                **said,
            )
        )  # fmt: skip
    return rows


def also_saying(remark: str, said: dict[str, str]) -> dict[str, str]:
    """What is said of every figure, with a remark on one."""
    return said | {"remark": "; ".join(filter(None, (remark, said.get("remark"))))}


def frechet_name(network: str) -> str:
    """The field's name is of one network's features alone."""
    return "FID" if network == INCEPTION else "Fréchet distance"


def frechet_interval(rows: Tensor, distance: Callable[[Tensor], float], size: int, seed: int) -> tuple[float, float]:
    """Of the Fréchet `distance` of rows (N, …), one an image, in features of `size` numbers."""
    return within(bootstrap(distance, rows, frechet_rounds(size), seed))


def frechet_rounds(size: int) -> int:
    """Resamples that such an interval is made of."""
    return max(10, min(ROUNDS, int(ROUNDS * (LARGE / size) ** 3)))


def few_rounds(size: int) -> str:
    """What is to be known of a `frechet_interval` in features of `size` numbers, if anything."""
    rounds = frechet_rounds(size)
    return "" if rounds == ROUNDS else f"its interval is a rough one, of {rounds} resamples where others have {ROUNDS}"


def within(interval: tuple[float, float], low: float = 0.0, high: float = math.inf) -> tuple[float, float]:
    """An interval without what the figure cannot be."""
    return max(low, interval[0]), min(high, interval[1])


def memory_figures(nearest: Tensor, real: Tensor | None, seed: int, **said: str) -> list[Figure]:
    """How far pictures lie from their nearest training image, distances (N,), beside real images (K,) of another split:
    a model that has learned images by heart draws nearer to them than those lie."""
    part, median = "Memorisation", nearest.median().item()
    others = None if real is None else real.median().item()
    figures = [
        Figure(
            part=part, name="distance to the nearest neighbour, median", value=median, images=len(nearest),
            interval=mean_interval(nearest, seed, torch.median), real=others, **said,
        )
    ]  # fmt: skip
    if others:
        low, high = mean_interval(nearest / others, seed, torch.median)
        figures.append(
            Figure(
                part=part, name="nearest-neighbour ratio, drawn to real", value=median / others, images=len(nearest),
                interval=within((low, high)), real=1.0,
                **said | {"remark": f"the medians' ratio; below {COPIES} is a sign of copying"},
            )
        )  # fmt: skip
    return figures


def text_figures(
    drawn: Tensor, real: Tensor | None, texts: Tensor, captions: Sequence[str], seed: int, **said: str
) -> list[Figure]:
    """CLIP score and R@1 of embeddings drawn (N, D), and real (K, D), of the first K captions, texts (N, D)."""
    both = torch.cat([drawn, texts], dim=1)  # so that they are resampled together
    width, part = drawn.shape[1], "Pictures and captions"
    found = retrieval_recall(drawn, texts, captions)
    among = f"among {found['captions']:,} different captions: chance is {1 / found['captions']:.2g}"
    others = {} if real is None else retrieval_recall(real, texts[: len(real)], captions[: len(real)])
    hits = dict(zip(("image_to_text", "text_to_image"), retrieved(drawn, texts, captions), strict=True))
    return [
        Figure(
            part=part, name="CLIP score", better="higher", value=clip_score(drawn, texts), images=len(drawn),
            interval=bootstrap(lambda some: clip_score(some[:, :width], some[:, width:]), both, ROUNDS, seed),
            real=None if real is None else clip_score(real, texts[: len(real)]), **said,
        ),
        *(
            Figure(
                part=part, name=f"R@1, {name}", unit="%", better="higher", value=100 * found[key], images=len(drawn),
                interval=within(mean_interval(100 * hits[key].double(), seed), high=100),
                real=100 * others[key] if others else None, remark=among, **said,
            )
            for key, name in (("image_to_text", "picture to caption"), ("text_to_image", "caption to picture"))
        ),
    ]  # fmt: skip


def accuracy_figure(
    drawn: Tensor, real: Tensor | None, names: Sequence[str], captions: Sequence[str], seed: int, **said: str
) -> tuple[Figure, dict[str, float]]:
    """The share of pictures that a classifier reads as what their caption names, from its logits (N, C); and caption by
    caption, both in %."""
    right = read_right(drawn, names, captions)
    found = accuracy(right, captions)
    values = torch.tensor([float(value) for value in right if value is not None])
    others = None
    if real is not None:
        shown = captions[: len(real)]
        others = 100 * accuracy(read_right(real, names, shown), shown)["accuracy"]
    worst = min(found["per_caption"], key=found["per_caption"].get)
    figure = Figure(
        part="Pictures and captions", name="classification accuracy", unit="%", better="higher",
        value=100 * found["accuracy"],
        images=found["images"], interval=within(mean_interval(100 * values, seed), high=100), real=others,
        remark=f"worst: {worst!r}, {100 * found['per_caption'][worst]:.0f} %", **said,
    )  # fmt: skip
    return figure, {caption: 100 * share for caption, share in found["per_caption"].items()}


def shapes_figures(drawn: Iterable[Tensor], captions: Sequence[str], seed: int) -> list[Figure]:
    """On the data of `ldm.data.shapes`: what of the caption can be read back from each picture, uint8 (3, H, W)."""
    seen = [
        shapes.compare(Image.fromarray(picture.permute(1, 2, 0).numpy()), caption)
        for picture, caption in zip(drawn, captions, strict=True)
    ]
    kinds = {
        "colours, shapes and places right": [bool(one) for one in seen],
        **{f"{name}s right": [getattr(one, name) for one in seen] for name in ("colour", "shape", "size", "position")},
    }
    return [
        Figure(
            part="Pictures and captions", name=name, unit="%", better="higher",
            value=100 * sum(values) / len(values), images=len(values),
            interval=within(mean_interval(100 * torch.tensor(values).double(), seed), high=100),
            network="ldm.data.shapes",
        )
        for name, values in kinds.items()
    ]  # fmt: skip


def mean_interval(values: Tensor, seed: int, measure=torch.mean) -> tuple[float, float]:
    """By bootstrap, of the mean of values (N,), or another measure of them."""
    return bootstrap(lambda some: measure(some.double()).item(), values, ROUNDS, seed)
