"""open_clip's own models, scaled down: built by open_clip, written as its files, exported, and compared with it."""

import json

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer, _clean_lower
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, CLIPTokenizer

from ldm.clip import export, published
from ldm.clip.parts import parts_of
from ldm.errors import UserError
from pipelines import cli

CAPTIONS = ["a photo of a cat", "", "An Astronaut riding a horse, 4k!!!", "it's 東京 🐱 naïve café", "a  b\n\tc " * 40]
NASTY = [
    *CAPTIONS, "  ", "100,000 dollars $5.00", "don't won't I'LL", "a_b-c/d\\e", "zero\u200bwidth", "e\u0301 combining",
    "\u202eשלום مرحبا", "x" * 300, "👨‍👩‍👧‍👦", "İstanbul STRASSE ß", "C++ & C#", "don`t", "<b>bold</b> :(",
    # what open_clip's cleaning changes
    "‘curly’ “quotes”", "rock &amp; roll &lt;3", "ﬁne ＦＵＬＬ", "nul\x00 bell\x07", "\ufeffbom", "â€œmojibakeâ€\u009d",
]  # fmt: skip
SMALL = {
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 8, "image_size": 32},
    "text_cfg": {"layers": 2, "width": 24, "heads": 3},
}


def scaled_down(name: str) -> dict:
    """A published configuration with fewer and narrower layers."""
    config = open_clip.get_model_config(name)
    towers = {tower: config[tower] | SMALL[tower] for tower in SMALL}
    towers["vision_cfg"]["patch_size"] = config["vision_cfg"]["patch_size"] // 2
    return config | towers | {"embed_dim": 16}


def write(folder, config: dict, **preprocessing) -> open_clip.CLIP:
    """As open_clip writes a repository; the model in it."""
    torch.manual_seed(0)
    model = open_clip.CLIP(
        config["embed_dim"], config["vision_cfg"], config["text_cfg"], quick_gelu=config.get("quick_gelu", False)
    )
    for parameter in model.parameters():  # fresh biases are zero and would hide a wrong place
        parameter.data += 0.1 * torch.randn_like(parameter)
    folder.mkdir()
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocessing})
    (folder / published.CONFIG).write_text(text)
    save_file(model.state_dict(), folder / published.WEIGHTS)
    return model.eval()


@pytest.fixture
def repositories(tmp_path, monkeypatch):
    """A folder whose subfolders are the Hub's repositories."""
    monkeypatch.setattr(published.hub, "fetch", lambda name, files: tmp_path / "hub" / name.replace("/", "--"))
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


@torch.no_grad()
@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-L-14-quickgelu"])
def test_towers_tokens_and_pixels_are_open_clips(repositories, tmp_path, name):
    folder = repositories / "user--model"
    model = write(folder, scaled_down(name), mean=[0.4, 0.45, 0.5], std=[0.2, 0.25, 0.3])
    with pytest.raises(SystemExit) as caught:
        cli.main(["export-clip", "hf-hub:user/model", "--output", str(tmp_path / "clip")])
    assert caught.value.code == 0
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    towers = export.load(parts_of(tmp_path / "clip"))
    assert towers.text_encoder.config.hidden_act == ("quick_gelu" if "quick" in name else "gelu")

    tokenizer, length = SimpleTokenizer(), towers.tokenizer.model_max_length
    ids = tokenizer(CAPTIONS)
    ours = towers.tokenizer(CAPTIONS, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    embeds = towers.text_encoder(input_ids=ours.input_ids).text_embeds
    assert (embeds - theirs.eval().encode_text(ids)).abs().max() <= 1e-5 and embeds.std() > 0.1
    assert (towers.text_encoder(input_ids=ids).text_embeds - embeds).abs().max() <= 1e-5

    rng = np.random.default_rng(0)
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "clip" / "image_processor")
    for size in ((32, 32), (90, 47), (47, 90), (33, 32), (20, 71), (500, 401)):
        picture = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        wanted = transform(picture)[None]
        pixels = processor(images=picture, return_tensors="pt").pixel_values
        std = torch.tensor(towers.image_std)[:, None, None]
        difference = (pixels - wanted) * std
        if size == (500, 401):  # 39 pixels wide before 7 are cut off: open_clip leaves 4 at the left, transformers 3
            difference = (pixels[..., 1:] - wanted[..., :-1]) * std
        assert difference.abs().max() <= 1.001 / 255, size
        image_embeds = towers.image_encoder(pixel_values=wanted).image_embeds
        assert (image_embeds - model.encode_image(wanted)).abs().max() <= 1e-5 and image_embeds.std() > 0.1
    assert (
        towers.image_embeds(torch.zeros(1, 3, 32, 32)) - towers.image_embeds(torch.zeros(1, 3, 64, 64))
    ).abs().max() < 1e-5
    plain = (pixels * std + torch.tensor(towers.image_mean)[:, None, None]) * 2 - 1
    assert torch.allclose(towers.pixel_values(plain), pixels, atol=1e-5)


def test_ids_are_those_of_text_that_is_clean(tmp_path):
    published.clip_tokenizer().save_pretrained(tmp_path)
    ours, theirs = CLIPTokenizer.from_pretrained(tmp_path), SimpleTokenizer()
    for caption in NASTY:
        expected = theirs([caption])[0].tolist()
        expected = expected[: expected.index(theirs.eot_token_id) + 1]
        assert ours(_clean_lower(caption), truncation=True, max_length=77).input_ids == expected, caption
    for caption in NASTY[: NASTY.index("‘curly’ “quotes”")]:
        assert ours(caption).input_ids == ours(_clean_lower(caption)).input_ids, caption


def test_a_file_of_a_models_weights(repositories, tmp_path, monkeypatch):
    config = scaled_down("ViT-B-32")
    write(repositories / "small", config)
    write(repositories / "other", scaled_down("ViT-B-16"))
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config)
    weights = repositories / "small" / published.WEIGHTS
    published.export("Small", str(weights), tmp_path / "clip")
    assert export.load(parts_of(tmp_path / "clip")).image_mean == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(UserError, match="is damaged: its header promises"):
        published.export("Small", str(weights), tmp_path / "again")
    with pytest.raises(
        UserError, match=r"is not of 'Small': visual.conv1.weight expects \(32, 3, 16, 16\), the file has"
    ):
        published.export("Small", str(repositories / "other" / published.WEIGHTS), tmp_path / "again")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("RN50", "its image tower is a ResNet"),
        ("coca_ViT-B-32", "it is a CoCa"),
        ("ViT-B-16-SigLIP", "its text tower is"),
        ("xlm-roberta-base-ViT-B-32", "its text tower is xlm-roberta-base"),
        ("convnext_base", "its image tower is timm's convnext_base"),
        ("EVA01-g-14", "its image tower is timm's|its text tower is one of its own"),
    ],
)
def test_what_transformers_has_no_tower_for_is_told(tmp_path, capsys, name, words):
    weights = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(1)}, weights)
    with pytest.raises(SystemExit) as caught:
        cli.main(["export-clip", name, "--pretrained", str(weights), "--output", str(tmp_path / "clip")])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1 and not (tmp_path / "clip").exists()
    with pytest.raises(UserError, match=words):
        published.export(name, str(weights), tmp_path / "clip")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"no_ln_pre": True}, "vision_cfg.no_ln_pre is True"),
        ({"image_size": [32, 64]}, r"vision_cfg.image_size is \[32, 64\], not square"),
        ({"norm_kwargs": {"eps": 1e-6}}, "vision_cfg.norm_kwargs is"),
    ],
)
def test_a_tower_with_what_clip_has_not_is_told(repositories, tmp_path, change, words):
    config = scaled_down("ViT-B-32")
    (repositories / "user--model").mkdir()
    config["vision_cfg"] |= change
    (repositories / "user--model" / published.CONFIG).write_text(json.dumps({"model_cfg": config}))
    (repositories / "user--model" / published.WEIGHTS).write_bytes(b"")
    with pytest.raises(UserError, match=words):
        published.export("hf-hub:user/model", None, tmp_path / "clip")


@pytest.mark.parametrize(
    ("name", "pretrained", "words"),
    [
        ("ViT-B-31", "openai", "model 'ViT-B-31' is none of open_clip's; did you mean 'ViT-B-32'"),
        ("ViT-B-32", None, "'ViT-B-32' has no weights by itself; give --pretrained, .* laion2b_s34b_b79k"),
        ("ViT-B-32", "nothing", "'nothing' is neither a file nor a tag of 'ViT-B-32'; its tags: openai"),
        ("ViT-B-32", "openai", "activation is another; name 'ViT-B-32-quickgelu'"),
        ("ViT-B-32", __file__, "is not safetensors: a pickle is not opened"),
        ("ViT-B-32", "laion2b_s34b_b79k", "'laion/CLIP-ViT-B-32-laion2B-s34B-b79K' has no open_clip_model.safetensors"),
        ("hf-hub:user/model", "openai", "'hf-hub:user/model' brings its own weights"),
        ("hf-hub:user/model", None, "'hf-hub:user/model' has no open_clip_config.json"),
    ],
)
def test_what_is_not_there_is_one_line(repositories, tmp_path, name, pretrained, words):
    with pytest.raises(UserError, match=words) as caught:
        published.export(name, pretrained, tmp_path / "clip")
    assert "\n" not in str(caught.value)
