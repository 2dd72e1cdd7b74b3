"""The networks that judge: whose features distances are measured in, which CLIP reads captions, which classifier."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.errors import UserError
from ldm.evaluation.features import Classifier, FeatureNetwork, open_classifier, open_features
from ldm.files import expanded
from pipelines.evaluation.clip import Clip, open_clip_folder, own_clip
from pipelines.evaluation.stored import Pictures

OWN = "own"
NOT_COMPARABLE = "not comparable with others' FID, which is in an Inception's features (--features inception)"
AT_ONCE = 128


@dataclass(frozen=True)
class Judges:
    """None of each where there is none, or none was asked for."""

    features: FeatureNetwork | None
    clip: Clip | None
    own_clip: Clip | None
    """Whose embeddings the model's prior is trained on."""
    classifier: Classifier | None
    resizing: str = ""
    """What is to be said beside every figure of features, where pictures are resized for them …"""
    remark: str = ""
    """… and beside every distance."""


def open_judges(
    folder: Path, features: str | None, clip: str | None, classifier: str | None, side: int, device: torch.device
) -> Judges:
    """For pictures of `side` pixels by the model in `folder`.

    features: as `open_features` names them, `own` for the image tower of the model's own CLIP, or None for the first
    that is there: that, or --clip's.

    Raises:
        UserError: a network that is not there, or reads another size and does not say how to resize.
    """
    own = own_clip(folder, device)
    reader = own if clip is None else open_clip_folder(clip, device)
    judge = None if classifier is None else open_classifier(classifier, device)
    if classifier is not None:
        _check_resolution("--classifier", classifier, judge, side)
    if features in (None, OWN):
        if features == OWN and own is None:
            raise UserError("--features own: this model has no image tower of CLIP; name inception, or another network")
        found = own if features == OWN else own or reader
        network = None if found is None else found.images
    else:
        network = open_features(features, device)
        _check_resolution("--features", features, network, side)
    resizing = comparable = ""
    if network is not None and network.image_size != side:
        resizing = f"pictures of {side} pixels resized to {network.image_size}"
    if network is not None and features != "inception":
        comparable = NOT_COMPARABLE
    return Judges(network, reader, own, judge, resizing, "; ".join(filter(None, (comparable, resizing))))


def apply(network: FeatureNetwork | Classifier, images: Pictures, what: str) -> Tensor:
    """What a network makes of N pictures, (N, …), on the CPU."""
    parts = []
    with tqdm(total=len(images), desc=what, unit=" images", leave=False, disable=None) as bar:
        for part in images.split(AT_ONCE):
            parts.append(network(part.float() / 255))
            bar.update(len(part))
    return torch.cat(parts)


def _check_resolution(option: str, name: str, network: FeatureNetwork | Classifier, side: int) -> None:
    """A network whose folder says nothing of resizing has been trained on one size, and reads nonsense at another."""
    size = network.image_size
    if size == side or network is name or not (folder := expanded(name)).is_dir():
        return
    processor = folder / "preprocessor_config.json"
    if not processor.is_file() or not json.loads(processor.read_text(encoding="utf-8")).get("do_resize", False):
        raise UserError(
            f"{option} '{name}' reads {size}×{size} pixels, and the pictures have {side}×{side}; give a network of "
            "that size, or one whose preprocessor_config.json resizes"
        )
