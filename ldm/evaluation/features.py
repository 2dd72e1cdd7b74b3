"""What looks at pictures for the measures: networks that turn them into features, and classifiers that read them.

    open_features("inception")                              torch-fidelity's, whose Fréchet distance is the FID
    open_features("open_clip:ViT-B-32/laion2b_s34b_b79k")   an image tower that open_clip publishes
    open_features("runs/clip")                              a folder or repository of the Hub, as transformers has it

A folder may hold CLIP (its image embeddings), an image classifier (what its last layer reads) or another tower of
images (its pooled output): `config.json`, `model.safetensors`, `preprocessor_config.json`; or be a run of train_clip.py
or a pipeline with an `image_encoder`. Pictures are resized whole to the network's square, never cropped.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPVisionModelWithProjection, PreTrainedModel

from ldm import hub
from ldm.clip import published
from ldm.components.configs import read_json
from ldm.components.weights import check_finite, read_headers
from ldm.errors import UserError
from ldm.evaluation.downloads import download
from ldm.files import expanded, sha256

OPEN_CLIP = "open_clip:"
BATCH_SIZE = 64
RESAMPLING = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
FILES = [
    f"{place}{file}"
    for place in ("", "image_encoder/", "image_processor/", "feature_extractor/")
    for file in ("config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json")
]
"""Of a repository, what is downloaded."""


@dataclass(frozen=True, kw_only=True)
class _Network:
    name: str
    """As it was asked for."""
    weights: str
    """Which they are: a file's or tag's name, and the start of its sha256."""
    image_size: int
    """Pixels a side of what the network sees."""
    read: Callable[[Tensor], Tensor]
    """Images (B, 3, H, W) in [0, 1], of any size, on any device -> a row of numbers each."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (N, 3 or 1, H, W) in [0, 1] -> (N, …) float32 on the CPU.

        Raises:
            UserError: images of another shape or range, or a result that is not finite.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
            raise UserError(f"'{self.name}' reads images (N, 3, H, W), got {tuple(images.shape)}")
        low, high = images.min().item(), images.max().item()
        if not (low >= -1e-4 and high <= 1 + 1e-4):  # of NaN, too
            raise UserError(f"'{self.name}' reads images in [0, 1], got {low:.4g} to {high:.4g}")
        images = images.float().clamp(0, 1).expand(-1, 3, -1, -1)
        values = torch.cat([self.read(part).float().cpu() for part in images.split(BATCH_SIZE)])
        if not torch.isfinite(values).all():
            raise UserError(f"'{self.name}' makes numbers that are not finite of an image; its weights are damaged")
        return values


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork(_Network):
    """Images -> features (N, size)."""

    size: int


@dataclass(frozen=True, kw_only=True)
class Classifier(_Network):
    """Images -> logits (N, C)."""

    names: tuple[str, ...]
    """Of its C labels."""


def open_features(source: str | Path | FeatureNetwork, device: torch.device | str = "cpu") -> FeatureNetwork:
    """The network that a name or folder (see above) means; one that is open already is returned as it is.

    Raises:
        UserError: no such network, of an unknown layout, not whole, of two minds on its resolution, or what it needs is
            not installed or cannot be downloaded.
    """
    if isinstance(source, FeatureNetwork):
        return source
    name = str(source)
    if name == "inception":
        return _inception(torch.device(device))
    if name.startswith(OPEN_CLIP):
        return _open_clip_tower(name, torch.device(device))
    opened = _open_folder(name, torch.device(device))
    return FeatureNetwork(
        name=name,
        weights=opened.weights,
        image_size=opened.image_size,
        size=_probed(name, opened.image_size, opened.features),
        read=opened.features,
    )


def open_classifier(source: str | Path | Classifier, device: torch.device | str = "cpu") -> Classifier:
    """The image classifier in a folder or repository as transformers has it; one that is open is returned as it is.

    Raises `UserError` as `open_features` does, and where the network has no labels.
    """
    if isinstance(source, Classifier):
        return source
    name = str(source)
    opened = _open_folder(name, torch.device(device))
    if opened.logits is None:
        raise UserError(f"'{name}' is of {opened.architecture}, which has no labels; give an image classifier "
                        "(…ForImageClassification)")  # fmt: skip
    count = _probed(name, opened.image_size, opened.logits)
    if sorted(opened.labels) != list(range(count)):
        raise UserError(
            f"'{name}': its config.json names {len(opened.labels)} labels (id2label), its network has {count}"
        )
    return Classifier(
        name=name,
        weights=opened.weights,
        image_size=opened.image_size,
        names=tuple(opened.labels[number] for number in range(count)),
        read=opened.logits,
    )


def resized(images: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """Images (N, C, H, W) in [0, 1] -> (N, C, size, size), antialiased, in [0, 1]; as they are where they fit."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode=mode, antialias=True, align_corners=False).clamp(0, 1)


def _probed(name: str, image_size: int, read: Callable[[Tensor], Tensor]) -> int:
    """How many numbers a network makes of an image. Raises UserError where it does not take those of its resolution."""
    try:
        with torch.no_grad():
            shape = tuple(read(torch.full((2, 3, image_size, image_size), 0.5)).shape)
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[:160]
        raise UserError(f"'{name}' does not take images of {image_size} × {image_size}, which its "
                        f"preprocessor_config.json makes: {said}; copy both of one model") from None  # fmt: skip
    if len(shape) != 2:
        raise UserError(f"'{name}' makes {shape[1:]} of an image, not one row of features; take another network")
    return shape[1]


def _inception(device: torch.device) -> FeatureNetwork:
    """The Inception that FIDs are told of, with the resizing of its time, in the 2,048 features before its last layer.

    torch-fidelity's port of the weights of Heusel et al. 2017, which torchmetrics takes, too.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except ImportError:
        raise UserError("the features 'inception' need torch-fidelity; pip install \"ldm[evaluation]\"") from None
    # Read here first, by what unpickles no more than tensors: torch-fidelity then unpickles the same file without heed
    download(URL_INCEPTION_V3)
    network = FeatureExtractorInceptionV3("inception", ["2048"]).to(device)

    def read(images: Tensor) -> Tensor:
        return network((images.to(device) * 255).round().byte())[0]  # whole grey levels, which it resizes itself

    return FeatureNetwork(
        name="inception", weights=URL_INCEPTION_V3.rpartition("/")[2], image_size=299, size=2048, read=read
    )


def _open_clip_tower(name: str, device: torch.device) -> FeatureNetwork:
    """'open_clip:MODEL/TAG', 'open_clip:MODEL/FILE.safetensors' or 'open_clip:hf-hub:OWNER/REPOSITORY'."""
    model, _, pretrained = name.removeprefix(OPEN_CLIP).partition("/")
    if model.startswith(published.HUB):
        model, pretrained = name.removeprefix(OPEN_CLIP), ""
    found = published.find(model, pretrained or None)
    tower = published.load(found).visual.to(device).requires_grad_(False)
    size, mode = tower.image_size[0], found.preprocessing["interpolation"]
    mean, std = (torch.tensor(found.preprocessing[key], device=device)[:, None, None] for key in ("mean", "std"))

    def read(images: Tensor) -> Tensor:
        return tower((resized(images.to(device), size, mode) - mean) / std)

    return FeatureNetwork(
        name=name,
        weights=f"{pretrained or found.weights.name}, {fingerprint([found.weights])}",
        image_size=size,
        size=_probed(name, size, read),
        read=read,
    )


class _Opened(NamedTuple):
    """A network of images in transformers' layout."""

    architecture: str
    weights: str
    image_size: int
    features: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor] | None
    labels: dict[int, str]


def _open_folder(name: str, device: torch.device) -> _Opened:
    folder = expanded(name)
    if not folder.is_dir():
        if folder.exists() or not hub.is_repository_name(name):
            raise UserError(f"'{name}' is none of inception, open_clip:MODEL/TAG, a folder, or owner/repository")
        folder = hub.fetch(name, FILES)
    places = (folder, folder / "image_encoder", folder / "model" / "image_encoder")
    root = next((place for place in places if (place / "config.json").is_file()), None)
    if root is None:
        raise UserError(f"'{name}' has neither config.json nor image_encoder/config.json; give CLIP or an image "
                        "classifier as transformers saves them")  # fmt: skip
    model = _load(name, root).to(device)
    size, mean, std, mode = _preprocessing(name, root, model.config)

    def pixel_values(images: Tensor) -> Tensor:
        values = (resized(images.to(device), size, mode) - mean.to(device)) / std.to(device)
        return values.to(model.dtype)

    def embeddings(images: Tensor) -> Tensor:
        output = model(pixel_values=pixel_values(images))
        pooled = output.get("image_embeds", output.get("pooler_output"))
        if pooled is None:
            raise UserError(f"'{name}': {type(model).__name__} pools nothing of an image; take another network")
        return pooled.flatten(1)

    weights = f"{folder.name}, {fingerprint(sorted(root.glob('model*.safetensors')))}"
    if not type(model).__name__.endswith("ForImageClassification"):
        return _Opened(type(model).__name__, weights, size, embeddings, None, {})

    def logits(images: Tensor) -> Tensor:
        return model(pixel_values=pixel_values(images)).logits

    penultimate = _reader_of_penultimate(name, model, logits)
    labels = {int(number): label for number, label in model.config.id2label.items()}
    return _Opened(type(model).__name__, weights, size, penultimate, logits, labels)


def _load(name: str, root: Path) -> PreTrainedModel:
    """The network in `root`, frozen, every weight of it from the file."""
    config = read_json(root / "config.json")
    architecture = (config.get("architectures") or [config.get("_class_name")])[0]
    # Of a whole CLIP the image tower
    kind = CLIPVisionModelWithProjection if architecture == "CLIPModel" else _class_in_transformers(architecture)
    if architecture is None:
        raise UserError(f"'{name}': its config.json names no architecture; give CLIP or an image classifier as "
                        "transformers saves them")  # fmt: skip
    if kind is None or kind.main_input_name != "pixel_values":
        raise UserError(f"'{name}' is of {architecture}, which reads no images in transformers; give CLIP or an image "
                        "classifier")  # fmt: skip
    check_finite(root.name, read_headers(root, "model"))
    try:
        options = {}
        if architecture == "CLIPModel":
            whole = CLIPConfig.from_pretrained(root)
            whole.vision_config.projection_dim = whole.projection_dim  # which the tower's own part may not say
            options["config"] = whole.vision_config
        model, report = kind.from_pretrained(
            root, output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True,
            local_files_only=True, dtype=torch.float32, **options,
        )  # fmt: skip
    except Exception as error:  # of the configuration or the network: transformers wraps neither
        raise UserError(f"'{name}' cannot be opened as {architecture}: {' '.join(str(error).split())[:160]}") from None
    for fault in ("missing_keys", "mismatched_keys"):
        if report[fault]:
            first = sorted(map(str, report[fault]))[0]
            raise UserError(f"'{name}': config and weights disagree, {fault.replace('_', ' ')}: {first}; copy it again")
    return model.eval().requires_grad_(False)


def _class_in_transformers(architecture: object) -> type[PreTrainedModel] | None:
    kind = getattr(transformers, architecture, None) if isinstance(architecture, str) else None
    return kind if isinstance(kind, type) and issubclass(kind, PreTrainedModel) else None


def _preprocessing(name: str, root: Path, config: Any) -> tuple[int, Tensor, Tensor, str]:
    """Resolution, mean and std (3, 1, 1) of pixels in [0, 1], and how they are resized."""
    folders = (root, root.parent / "image_processor", root.parent / "feature_extractor")
    path = next((p for f in folders if (p := f / "preprocessor_config.json").is_file()), None)
    if path is None:
        raise UserError(
            f"'{name}' has no preprocessor_config.json, which says how pixels are to be scaled; copy it, too"
        )
    settings = read_json(path)
    sizes = [_side(settings.get(key)) for key in ("crop_size", "size")]
    if getattr(config, "model_type", "") == "clip_vision_model":  # whose positions are of one resolution
        sizes = [config.image_size]
    size = next((side for side in [*sizes, _side(getattr(config, "image_size", None))] if side), None)
    if size is None:
        raise UserError(f"'{name}': neither config.json nor preprocessor_config.json gives one square resolution")
    mean, std = [0.0] * 3, [1.0] * 3
    if settings.get("do_normalize", True):
        mean, std = settings.get("image_mean"), settings.get("image_std")
        if not all(
            isinstance(x, list) and len(x) == 3 and all(isinstance(n, int | float) for n in x) for x in (mean, std)
        ):
            raise UserError(f"'{path}': image_mean and image_std must be three numbers each; copy it again")
    mean, std = (torch.tensor(x, dtype=torch.float32)[:, None, None] for x in (mean, std))
    return size, mean, std, RESAMPLING.get(settings.get("resample"), "bicubic")


def _side(size: object) -> int | None:
    """Of what a processor calls a size: a number, {"height", "width"} or {"shortest_edge"}."""
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height") if size.get("height") == size.get("width") else None)
    return size if isinstance(size, int) and size > 0 else None


def _reader_of_penultimate(
    name: str, model: PreTrainedModel, logits: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """What the last layer of a classifier reads."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == model.config.num_labels]
    if not layers:
        raise UserError(f"'{name}': {type(model).__name__} has no linear layer of {model.config.num_labels} labels; "
                        "take another network for features")  # fmt: skip
    last: dict[str, Tensor] = {}
    layers[-1].register_forward_pre_hook(lambda _, inputs: last.update(read=inputs[0]))

    def features(images: Tensor) -> Tensor:
        logits(images)
        return last.pop("read")

    return features


def fingerprint(files: list[Path]) -> str:
    """The start of a file's sha256, or that of several files' sha256s one after the other."""
    sums = [sha256(file) for file in files]
    whole = sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()
    return f"sha256 {whole[:12]}"
