"""Everything that is found out about a model, part by part."""

from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from ldm.evaluation import distances
from ldm.evaluation.features import Classifier, FeatureNetwork
from ldm.evaluation.report import Figure
from pipelines.evaluation import images as measures
from pipelines.evaluation import parts
from pipelines.evaluation.data import Judged, pictures_of
from pipelines.evaluation.model import PixelSpace, TextToImage
from pipelines.evaluation.networks import Judges, apply
from pipelines.evaluation.stored import Pictures

SHOWN_NEIGHBOURS, SHOWN_QUERIES = 5, 8


@dataclass
class Judgement:
    """What `judge` has found out so far."""

    figures: list[Figure] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    per_caption: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    restored: Pictures | None = None
    """What the autoencoder makes of the real images."""
    nearest: tuple[Tensor, list[list[int]], list[list[float]]] | None = None
    """Which pictures lie nearest to training images, to which of them, and how far."""

    _seen: dict[tuple[int, int], tuple[object, Pictures, Tensor]] = field(default_factory=dict)

    def seen(self, network: FeatureNetwork | Classifier, images: Pictures) -> Tensor:
        """What a network makes of pictures, which it looks at once."""
        key = (id(network), id(images))
        if key not in self._seen:  # both are kept, so that no other object gets their numbers
            self._seen[key] = network, images, apply(network, images, f"reading by {network.name}")
        return self._seen[key][2]

    def timed(self, what: str, since: float) -> float:
        """Notes the seconds that `what` took; returns now."""
        now = perf_counter()
        self.seconds[what] = round(now - since, 1)
        return now


@dataclass(frozen=True)
class Images:
    """What was drawn, the images of the first captions, and what both are compared with."""

    drawn: Pictures
    real: Pictures
    reference: Pictures


def images_of(data: Judged, drawn: Pictures) -> Images:
    """Beside what was drawn, the data's own images."""
    return Images(drawn, pictures_of(data.images, data.indices), pictures_of(data.reference, data.reference_indices))


def judge(
    painter: TextToImage | PixelSpace, data: Judged, images: Images, judges: Judges, seed: int, batch_size: int
) -> Judgement:
    """All figures that this model, these data and these networks allow; what they do not is among the warnings."""
    found, now = Judgement(), perf_counter()
    if judges.features is None:
        found.warnings.append(
            "no distances: this model has no image tower of CLIP; name a network, such as --features inception"
        )
    else:
        _distances(found, data, images, judges, seed)
        now = found.timed("distances", now)
    if painter.knows_captions:
        _captions(found, data, images, judges, seed)
        now = found.timed("captions", now)
    else:
        found.warnings.append("this model knows no captions: its pictures are compared as they come")
    if isinstance(painter, PixelSpace):
        found.figures.append(parts.likelihood_figure(painter, images.real, data.captions, seed))
        found.timed("likelihood", now)
        return found
    found.restored = parts.reconstructed(painter, images.real, batch_size)
    figures, left_out = parts.autoencoder_figures(images.real, found.restored, seed, painter.device)
    found.figures += figures
    found.warnings += left_out
    if judges.features is not None:
        original, restored = (found.seen(judges.features, some) for some in (images.real, found.restored))
        found.figures.append(
            parts.reconstruction_distance(original, restored, seed, against="the same images", **_of(judges))
        )
    now = found.timed("autoencoder", now)
    if painter.pipe.prior is not None and judges.own_clip is not None:
        _prior(found, painter, data, images, judges, seed, batch_size)
        found.timed("prior", now)
    return found


def _of(judges: Judges) -> dict[str, str]:
    """What is said beside every figure of the feature network."""
    network = judges.features
    return {"network": network.name, "weights": network.weights, "remark": judges.remark}


def _distances(found: Judgement, data: Judged, images: Images, judges: Judges, seed: int) -> None:
    drawn, real, reference = (
        found.seen(judges.features, some) for some in (images.drawn, images.real, images.reference)
    )
    said = {"against": data.against, **_of(judges)}
    beside = real if data.has_other_reference else None
    if len(drawn) != len(real) and beside is not None:
        found.warnings.append(f"“real” is of {len(real):,} images, as many as there are, beside {len(drawn):,} drawn")
    found.figures += measures.distance_figures("Pictures drawn", drawn, beside, reference, seed, **said)
    away = distances.nearest(drawn, reference)[0]
    others = None if beside is None else distances.nearest(beside, reference)[0]
    found.figures += measures.memory_figures(away, others, seed, **said | {"remark": judges.resizing})
    if warning := distances.few_images(min(len(drawn), len(reference)), drawn.shape[1]):
        found.warnings.append(warning)
    queries = away.argsort()[:SHOWN_QUERIES]
    to_all = torch.cdist(drawn[queries].double(), reference.double())
    values, rows = to_all.topk(min(SHOWN_NEIGHBOURS, len(reference)), dim=1, largest=False)
    found.nearest = queries, rows.tolist(), values.tolist()


def _captions(found: Judgement, data: Judged, images: Images, judges: Judges, seed: int) -> None:
    """Do the pictures show what was asked for?"""
    if judges.clip is not None:
        network = judges.clip.images
        drawn, real = (found.seen(network, some) for some in (images.drawn, images.real))
        said = {"network": network.name, "weights": network.weights}
        texts = judges.clip.read(data.captions)
        found.figures += measures.text_figures(drawn, real, texts, data.captions, seed, **said)
    if judges.classifier is not None:
        drawn, real = (found.seen(judges.classifier, some) for some in (images.drawn, images.real))
        said = {"network": judges.classifier.name, "weights": judges.classifier.weights}
        figure, found.per_caption = measures.accuracy_figure(
            drawn, real, judges.classifier.names, data.captions, seed, **said
        )
        found.figures.append(figure)
    if data.config.source == "shapes":
        found.figures += measures.shapes_figures(images.drawn, data.captions, seed)


def _prior(
    found: Judgement, painter: TextToImage, data: Judged, images: Images, judges: Judges, seed: int, batch_size: int
) -> None:
    clip, captions = judges.own_clip, data.captions[: len(images.real)]
    true, mean = found.seen(clip.images, images.real), found.seen(clip.images, images.reference).mean(dim=0)
    sampled = parts.prior_embeddings(painter, captions, seed, batch_size)
    said = {"network": clip.images.name, "weights": clip.images.weights}
    found.figures += parts.prior_figures(sampled, clip.read(captions), true, mean, seed, **said)
