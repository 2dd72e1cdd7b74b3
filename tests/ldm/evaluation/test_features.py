"""Feature networks and classifiers, opened from folders as transformers and this package write them."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity
from open_clip import CLIP
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModelWithProjection,
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
)

from ldm.clip import published
from ldm.components.weights import read_header
from ldm.errors import UserError
from ldm.evaluation.features import fingerprint, open_classifier, open_features, resized

DEFAULT = Path(__file__).parents[3] / "pipelines" / "default"
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
LABELS = {"id2label": {0: "cat", 1: "dog", 2: "car"}, "label2id": {"cat": 0, "dog": 1, "car": 2}}
NETWORKS = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**SMALL, **LABELS, image_size=16, patch_size=8)),
    "convnext": lambda: ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=2, **LABELS)
    ),
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", **LABELS)
    ),
    "dinov2": lambda: Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    ),
    "masked": lambda: ViTForMaskedImageModeling(ViTConfig(**SMALL, image_size=16, patch_size=8, encoder_stride=8)),
}
PROCESSOR = CLIPImageProcessor(crop_size=16, size={"shortest_edge": 16}, image_mean=[0.4] * 3, image_std=[0.3] * 3)
SIZES = {"vit": 16, "convnext": 12, "resnet": 12, "dinov2": 16}


def images(count: int = 3, side: int = 24) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Path:
    """A folder for each of NETWORKS, that reads 16 × 16 pixels."""
    root = tmp_path_factory.mktemp("networks")
    for name, build in NETWORKS.items():
        torch.manual_seed(1)
        build().save_pretrained(root / name)
        PROCESSOR.save_pretrained(root / name)
    return root


@pytest.mark.parametrize("name", SIZES)
def test_features_are_what_the_last_layer_reads(networks, name):
    network = open_features(networks / name)
    assert (network.size, network.image_size, network.name) == (SIZES[name], 16, str(networks / name))
    assert network.weights == f"{name}, {fingerprint([networks / name / 'model.safetensors'])}"
    found = network(images())
    pixels = (resized(images(), 16) - 0.4) / 0.3
    model = type(NETWORKS[name]()).from_pretrained(networks / name).eval()
    output = model(pixel_values=pixels)
    if name == "dinov2":
        torch.testing.assert_close(found, output.pooler_output)
        return
    head = model.classifier[-1] if name == "resnet" else model.classifier
    torch.testing.assert_close(head(found), output.logits)
    classifier = open_classifier(networks / name)
    assert classifier.names == ("cat", "dog", "car")
    torch.testing.assert_close(classifier(images()), output.logits)


def test_opens_clip_in_each_of_its_folders(tmp_path):
    """A pipeline, a run of train_clip.py, a tower: the same embeddings, those of the tower itself."""
    run = tmp_path / "run" / "model"
    for name in ("image_encoder", "image_processor"):
        shutil.copytree(DEFAULT / name, run / name)
    tower = shutil.copytree(DEFAULT / "image_encoder", tmp_path / "tower")
    shutil.copy(DEFAULT / "image_processor" / "preprocessor_config.json", tower)
    x = images(side=32)
    expected = CLIPVisionModelWithProjection.from_pretrained(tower)(pixel_values=2 * x - 1).image_embeds
    for folder in (DEFAULT, tmp_path / "run", tower):
        network = open_features(folder)
        assert network.size == expected.shape[1] and network.image_size == 32
        torch.testing.assert_close(network(x), expected)


def test_opens_the_image_tower_of_a_whole_clip(tmp_path):
    towers = {
        "text_config": {**SMALL, "vocab_size": 50, "max_position_embeddings": 8},
        "vision_config": {**SMALL, "image_size": 16, "patch_size": 8},
    }
    model = CLIPModel(CLIPConfig(**towers, projection_dim=12)).eval()
    model.save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    x = images(side=16)
    expected = model.visual_projection(model.vision_model(pixel_values=(x - 0.4) / 0.3).pooler_output)
    torch.testing.assert_close(open_features(tmp_path)(x), expected.detach())


def test_greys_and_other_resolutions_are_seen_too(networks):
    network = open_features(networks / "vit")
    grey = images()[:, :1]
    torch.testing.assert_close(network(grey), network(grey.expand(-1, 3, -1, -1)))
    assert network(images(70, 40)).shape == (70, 16)


def test_what_is_open_is_returned(networks):
    network, classifier = open_features(networks / "vit"), open_classifier(networks / "vit")
    assert open_features(network) is network
    assert open_classifier(classifier) is classifier


def test_a_tower_of_open_clip(tmp_path, monkeypatch):
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    }
    monkeypatch.setattr(published.open_clip, "get_model_config", lambda name: config)
    torch.manual_seed(0)
    model = CLIP(12, config["vision_cfg"], config["text_cfg"]).eval()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors", {"format": "pt"})
    network = open_features(f"open_clip:tiny/{tmp_path / 'w.safetensors'}")
    assert (network.size, network.image_size) == (12, 16)
    assert read_header(tmp_path / "w.safetensors") and network.weights.startswith(str(tmp_path / "w.safetensors"))
    settings = published.find("tiny", str(tmp_path / "w.safetensors")).preprocessing
    mean, std = (torch.tensor(settings[name])[:, None, None] for name in ("mean", "std"))
    torch.testing.assert_close(network(images(side=16)), model.encode_image((images(side=16) - mean) / std))


def test_the_inception_is_torch_fidelitys(monkeypatch):
    """With random weights in place of the download: the same features of the same grey levels."""
    states = []

    def weights(*_, **options):
        if not states:
            torch.manual_seed(0)
            with monkeypatch.context() as inner:
                inner.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
                inner.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
                states.append(fidelity.FeatureExtractorInceptionV3("any", ["2048"]).state_dict())
        return states[0]

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", weights)
    monkeypatch.setattr(fidelity, "load_state_dict_from_url", weights)
    network = open_features("inception")
    assert (network.size, network.image_size) == (2048, 299)
    assert network.weights == "weights-inception-2015-12-05-6726825d.pth"
    levels = (images(2, 8) * 255).round().byte()
    expected = fidelity.FeatureExtractorInceptionV3("any", ["2048"])(levels)[0]
    torch.testing.assert_close(network(levels / 255), expected)


def test_without_torch_fidelity_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UserError, match=r'pip install "ldm\[evaluation\]"'):
        open_features("inception")


def test_weights_that_cannot_be_downloaded(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"weights-inception.*cannot be reached \(URLError\); fetch it elsewhere, to /"):
        open_features("inception")


def edit(folder: Path, file: str, **values: object) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | values))


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def of_a_unet(folder: Path) -> None:
    (folder / "config.json").write_text('{"_class_name": "UNet2DModel"}')


def of_a_text_tower(folder: Path) -> None:
    edit(folder, "config.json", architectures=["CLIPTextModel"])


def of_another_resolution(folder: Path) -> None:
    edit(folder, "preprocessor_config.json", crop_size={"height": 20, "width": 20})


def without_resolution(folder: Path) -> None:
    edit(folder, "preprocessor_config.json", crop_size=None, size={"height": 16, "width": 24})


def with_weights_of_another_resolution(folder: Path) -> None:
    edit(folder, "config.json", image_size=32)


def without_preprocessing(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def as_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])


def not_finite(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["classifier.bias"][0] = torch.nan
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def without_a_weight(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["classifier.bias"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_config, "has neither config.json nor image_encoder/config.json"),
        (of_a_unet, "is of UNet2DModel, which reads no images"),
        (of_a_text_tower, "is of CLIPTextModel, which reads no images"),
        (of_another_resolution, "does not take images of 20 × 20, which its preprocessor_config.json makes"),
        (with_weights_of_another_resolution, "config and weights disagree, mismatched keys: .*position_embeddings"),
        (without_preprocessing, "has no preprocessor_config.json"),
        (as_a_pickle, "only a pickle"),
        (cut, "is damaged"),
        (not_finite, "'classifier.bias' is not finite"),
        (without_a_weight, "config and weights disagree, missing keys: classifier.bias"),
    ],
)
def test_refuses_spoilt_folders_in_one_line(networks, tmp_path, spoil, message):
    folder = shutil.copytree(networks / "vit", tmp_path / "vit")
    spoil(folder)
    with pytest.raises(UserError, match=message) as refusal:
        open_features(folder)
    assert "\n" not in str(refusal.value)


def test_refuses_a_network_of_no_resolution(networks, tmp_path):
    folder = shutil.copytree(networks / "resnet", tmp_path / "resnet")
    without_resolution(folder)
    with pytest.raises(UserError, match="gives one square resolution"):
        open_features(folder)


def test_refuses_what_is_none(networks):
    for name, message in (
        ("no such folder", "is none of inception, open_clip:MODEL/TAG, a folder"),
        ("open_clip:ViT-B-23/openai", "did you mean"),
        (str(networks / "masked"), "pools nothing of an image"),
    ):
        with pytest.raises(UserError, match=message):
            open_features(name)
    with pytest.raises(UserError, match="is of Dinov2Model, which has no labels"):
        open_classifier(networks / "dinov2")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (images()[0], r"reads images \(N, 3, H, W\), got \(3, 24, 24\)"),
        (images() * 2 - 1, r"reads images in \[0, 1\], got -"),
        (images() * torch.nan, r"reads images in \[0, 1\], got nan"),
        (images(0), "reads images"),
    ],
)
def test_refuses_images_that_are_none(networks, given, message):
    with pytest.raises(UserError, match=message):
        open_features(networks / "vit")(given)
