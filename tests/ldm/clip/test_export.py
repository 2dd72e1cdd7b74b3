import pytest
import torch
from transformers import CLIPTextModelWithProjection

from ldm.clip import export
from ldm.clip.model import build
from ldm.clip.parts import parts_of
from ldm.clip.tokenizer import encode, train_tokenizer
from ldm.errors import UserError

CAPTIONS = ["a photo of a cat", "a dog", "", "a cat and a dog and a horse and a boat"]
SHAPE = {
    "embedding_dim": 24,
    "image_size": 16,
    "patch_size": 4,
    "vision_width": 32,
    "vision_layers": 2,
    "vision_heads": 4,
    "text_width": 24,
    "text_layers": 3,
    "text_heads": 2,
    "mlp_ratio": 4.9231,  # the published ViT-bigG-14's; not the text tower's
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS, 530, 10)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    model = build(**SHAPE, vocabulary_size=len(tokenizer), context_length=10).eval()
    for parameter in model.parameters():  # fresh biases are zero and would hide a wrong place
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 3, 16, 16) * 2 - 1


@torch.no_grad()
def test_exported_towers_embed_as_open_clip_does(model, tokenizer, images):
    text_encoder, image_encoder = export.to_transformers(model, tokenizer)
    ids, mask = encode(tokenizer, CAPTIONS)
    text = text_encoder(input_ids=ids, attention_mask=mask).text_embeds
    assert (text - model.encode_text(ids)).abs().max() <= 1e-5
    assert (image_encoder(pixel_values=images).image_embeds - model.encode_image(images)).abs().max() <= 1e-5


@torch.no_grad()
def test_towers_read_back_from_disk_are_the_same_and_train_further(model, tokenizer, images, tmp_path):
    export.save(model, tokenizer, tmp_path)
    towers = export.load(parts_of(tmp_path))
    assert not any(parameter.requires_grad for parameter in towers.text_encoder.parameters())
    again = export.from_transformers(towers.text_encoder, towers.image_encoder).eval()
    ids, _ = encode(towers.tokenizer, CAPTIONS)
    assert torch.equal(ids, encode(tokenizer, CAPTIONS)[0])
    assert torch.equal(again.encode_text(ids), model.encode_text(ids))
    assert torch.equal(again.encode_image(images), model.encode_image(images))


def test_the_image_processor_sees_what_training_sees(images):
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    processed = export.image_processor(16)(images=[image.permute(1, 2, 0).numpy() for image in pixels])
    values = torch.as_tensor(processed["pixel_values"][0])
    assert (values - (pixels[0] / 127.5 - 1)).abs().max() <= 1e-5


def test_missing_keys_are_named(model, tokenizer, tmp_path):
    export.save(model, tokenizer, tmp_path)
    text_encoder, _ = export.to_transformers(model, tokenizer)
    state = text_encoder.state_dict()
    del state["text_model.final_layer_norm.bias"]
    CLIPTextModelWithProjection.save_pretrained(text_encoder, tmp_path / "text_encoder", state_dict=state)
    with pytest.raises(UserError, match=r"missing keys: text_model\.final_layer_norm\.bias"):
        export.load(parts_of(tmp_path))


@pytest.mark.parametrize(
    "change, named",
    [({"vision_heads": 5}, "vision_heads 5"), ({"text_heads": 5}, "text_heads 5"), ({"patch_size": 5}, "patch_size 5")],
)
def test_shapes_that_do_not_fit_are_refused(change, named):
    with pytest.raises(UserError, match=named):
        build(**{**SHAPE, **change}, vocabulary_size=600, context_length=10)
