"""The latent cache: what is read back, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ldm.data.latents import CachedLatents, CacheIndex, read_index, weights_digest, write_index
from ldm.errors import UserError

IMAGES, FLIPS, LATENT, DIM, CAPTIONS, LENGTH = 5, 2, (4, 2, 2), 3, 4, 6


@pytest.fixture
def encoders(tmp_path):
    """Folders with some weights, by the names of the components."""
    for name in ("vae", "text_encoder", "image_encoder"):
        (tmp_path / name).mkdir()
        save_file({"weight": torch.full((2,), float(len(name)))}, tmp_path / name / "model.safetensors")
    return tmp_path


@pytest.fixture
def cache(encoders):
    """Two shards of three and two images whose numbers say which image and flip they are of."""
    folder = encoders / "cache"
    folder.mkdir()
    number = torch.arange(IMAGES * FLIPS, dtype=torch.float32).view(IMAGES, FLIPS, 1)
    mean = number[..., None, None].expand(IMAGES, FLIPS, *LATENT).half().contiguous()
    embeds = number.expand(IMAGES, FLIPS, DIM).contiguous()
    for shard, part in enumerate((slice(0, 3), slice(3, 5))):
        tensors = {"latent_mean": mean[part], "latent_std": mean[part] / 8, "image_embeds": embeds[part]}
        save_file(
            {name: values.clone() for name, values in tensors.items()}, folder / f"images-{shard:05d}.safetensors"
        )
    text = torch.arange(CAPTIONS, dtype=torch.float32).view(-1, 1)
    save_file(
        {
            "text_embeds": text.repeat(1, DIM),
            "hidden_states": text[:, :, None].repeat(1, LENGTH, DIM).half(),
            "attention_mask": torch.ones(CAPTIONS, LENGTH, dtype=torch.uint8),
            "caption_ids": torch.tensor([[1, 2]] * 3 + [[3, 3]] * 2, dtype=torch.int32),
        },
        folder / "captions.safetensors",
    )
    digests = [weights_digest(encoders / name) for name in ("vae", "text_encoder", "image_encoder")]
    write_index(folder, CacheIndex(IMAGES, 4, True, LATENT, *digests))
    return folder


def test_samples_of_all_shards_with_their_captions(cache, encoders):
    data = CachedLatents(cache, 0, encoders / "vae", encoders)
    assert len(data) == IMAGES
    for epoch in range(8):
        batch = data.__getitems__([(epoch, index) for index in range(IMAGES)])
        number = batch["image_embeds"][:, 0]
        assert (number // FLIPS).tolist() == list(range(IMAGES))
        assert torch.equal(batch["latent_mean"], number.view(-1, 1, 1, 1).expand(-1, *LATENT))
        assert torch.equal(batch["latent_std"], batch["latent_mean"] / 8)
        captions = batch["text_embeds"][:, 0].tolist()
        assert set(captions[:3]) <= {1.0, 2.0} and captions[3:] == [3.0, 3.0]
        assert torch.equal(batch["hidden_states"][:, 0, 0], batch["text_embeds"][:, 0])
        assert batch["attention_mask"].dtype == torch.bool


def test_flip_and_caption_change_with_the_epoch_and_with_nothing_else(cache, encoders):
    data = CachedLatents(cache, 0, encoders / "vae", encoders)
    alone = [data.__getitems__([(epoch, 0)]) for epoch in range(64)]
    beside = [data.__getitems__([(epoch, 4), (epoch, 0)]) for epoch in range(64)]
    for one, other in zip(alone, beside, strict=True):
        assert all(torch.equal(one[name][0], other[name][1]) for name in one)
    seen = {(int(one["image_embeds"][0, 0]), int(one["text_embeds"][0, 0])) for one in alone}
    assert seen == {(flip, caption) for flip in (0, 1) for caption in (1, 2)}


def test_embedding_statistics(cache, encoders):
    mean, std = CachedLatents(cache, 0, encoders / "vae", encoders).embedding_statistics()
    numbers = torch.arange(IMAGES * FLIPS, dtype=torch.float64)
    assert mean.tolist() == pytest.approx([numbers.mean().item()] * DIM)
    assert std.tolist() == pytest.approx([numbers.std().item()] * DIM)


def test_number_zero_stands_for_no_caption(cache, encoders):
    text = CachedLatents(cache, 0, encoders / "vae", encoders).text(torch.zeros(1, dtype=torch.long))
    assert text["text_embeds"].tolist() == [[0.0] * DIM]


@pytest.mark.parametrize("component", ["vae", "text_encoder", "image_encoder"])
def test_cache_of_another_encoder_is_refused(cache, encoders, component):
    save_file({"weight": torch.zeros(2)}, encoders / component / "model.safetensors")
    with pytest.raises(UserError, match=f"with another .* than .*{component}"):
        CachedLatents(cache, 0, encoders / "vae", encoders)


def test_cache_that_is_not_whole_is_refused(cache, encoders):
    with pytest.raises(UserError, match="no such folder"):
        read_index(cache / "absent")
    (cache / "images-00001.safetensors").unlink()
    with pytest.raises(UserError, match="damaged: 5 images promised, 3 there"):
        CachedLatents(cache, 0, encoders / "vae", encoders)
    assert json.loads((cache / "index.json").read_text())["num_images"] == IMAGES
    (cache / "index.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        CachedLatents(cache, 0, encoders / "vae", encoders)
