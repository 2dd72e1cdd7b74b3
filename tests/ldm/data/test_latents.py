"""The latent cache: what is read back, how little of it is opened, and what is refused."""

import json
import multiprocessing
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from ldm.clip.parts import parts_of
from ldm.clip.tokenizer import train_tokenizer
from ldm.data import latents
from ldm.data.cache import embedding_statistics
from ldm.data.latents import CachedLatents, CacheIndex, CaptionSettings, ImageSettings, read_index, write_index
from ldm.data.records import Records, write_shard
from ldm.errors import UserError

IMAGES, FLIPS, LATENT, DIM, CAPTIONS, LENGTH = 5, 2, (4, 2, 2), 3, 4, 6


@pytest.fixture
def encoders(tmp_path):
    """Folders with some weights, by the names of the components."""
    for name in ("vae", "text_encoder", "image_encoder"):
        (tmp_path / name).mkdir()
        save_file({"weight": torch.full((2,), float(len(name)))}, tmp_path / name / "model.safetensors")
    (tmp_path / "vae" / "config.json").write_text('{"scaling_factor": 0.5}')
    (tmp_path / "image_encoder" / "config.json").write_text('{"image_size": 4}')
    (tmp_path / "text_encoder" / "config.json").write_text('{"architectures": ["CLIPTextModelWithProjection"]}')
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    return tmp_path


def keys(count):
    return torch.arange(count * 32, dtype=torch.uint8).view(count, 32)


@pytest.fixture
def cache(encoders):
    """Two shards of three and two images whose numbers say which image and flip they are of."""
    folder = encoders / "cache"
    folder.mkdir()
    number = torch.arange(IMAGES * FLIPS, dtype=torch.float32).view(IMAGES, FLIPS, 1)
    mean = number[..., None, None].expand(IMAGES, FLIPS, *LATENT).half()
    tensors = {"latent_mean": mean, "latent_std": mean / 8, "image_embeds": number.expand(IMAGES, FLIPS, DIM)}
    tensors |= {"sizes": number[:, 0].int().expand(IMAGES, 6), "keys": keys(IMAGES)}
    images = [
        write_shard(folder, "images", {name: values[part].clone() for name, values in tensors.items()})
        for part in (slice(0, 3), slice(3, 5))
    ]
    text = torch.arange(CAPTIONS, dtype=torch.float32).view(-1, 1)
    captions = {
        "text_embeds": text.repeat(1, DIM),
        "hidden_states": text[:, :, None].repeat(1, LENGTH, DIM).half(),
        "attention_mask": torch.ones(CAPTIONS, LENGTH, dtype=torch.uint8),
        "keys": keys(CAPTIONS),
    }
    statistics = embedding_statistics(Records(images), np.arange(IMAGES))
    rows = {
        "images": torch.arange(IMAGES),
        "captions": torch.tensor([[1, 2]] * 3 + [[3, 3]] * 2),
        "no_caption": torch.zeros(1, dtype=torch.long),
        **dict(zip(("embedding_mean", "embedding_std"), statistics, strict=True)),
    }
    index = CacheIndex(
        ImageSettings(
            autoencoder=latents.autoencoder_digest(encoders / "vae"),
            image_encoder=latents.weights_digest(encoders / "image_encoder"),
            image_size=4,
            horizontal_flip=True,
            bucket_sizes=[[4, 4]],
            precision="no",
        ),
        CaptionSettings(
            text_encoder=latents.weights_digest(encoders / "text_encoder"),
            tokenizer=latents.tokenizer_digest(encoders / "tokenizer"),
        ),
        num_rows=IMAGES,
        latent_shape=LATENT,
        content="",
        images=[path.name for path in images],
        captions=[write_shard(folder, "captions", captions).name],
        rows=write_shard(folder, "rows", rows).name,
    )
    write_index(folder, index)
    return folder


def test_samples_of_all_shards_with_their_captions(cache, encoders):
    data = CachedLatents(cache, 0, encoders / "vae", parts_of(encoders))
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
    data = CachedLatents(cache, 0, encoders / "vae", parts_of(encoders))
    alone = [data.__getitems__([(epoch, 0)]) for epoch in range(64)]
    beside = [data.__getitems__([(epoch, 4), (epoch, 0)]) for epoch in range(64)]
    for one, other in zip(alone, beside, strict=True):
        assert all(torch.equal(one[name][0], other[name][1]) for name in one)
    seen = {(int(one["image_embeds"][0, 0]), int(one["text_embeds"][0, 0])) for one in alone}
    assert seen == {(flip, caption) for flip in (0, 1) for caption in (1, 2)}


def test_embedding_statistics(cache, encoders):
    mean, std = CachedLatents(cache, 0, encoders / "vae", parts_of(encoders)).embedding_statistics()
    numbers = torch.arange(IMAGES * FLIPS, dtype=torch.float64)
    assert mean.tolist() == pytest.approx([numbers.mean().item()] * DIM)
    assert std.tolist() == pytest.approx([numbers.std().item()] * DIM)


def test_statistics_count_an_image_as_often_as_the_data_hold_it(cache):
    records = Records([cache / name for name in read_index(cache).images])
    mean, std = embedding_statistics(records, np.array([4, 0, 4]))
    numbers = torch.tensor([8.0, 9.0, 0.0, 1.0, 8.0, 9.0], dtype=torch.float64)
    assert mean.tolist() == pytest.approx([numbers.mean().item()] * DIM)
    assert std.tolist() == pytest.approx([numbers.std().item()] * DIM)


def test_the_empty_caption_stands_for_none(cache, encoders):
    text = CachedLatents(cache, 0, encoders / "vae", parts_of(encoders)).no_text()
    assert text["text_embeds"].tolist() == [[0.0] * DIM]


def test_without_an_autoencoder_batches_are_without_latents(cache, encoders):
    batch = CachedLatents(cache, 0, None, parts_of(encoders)).__getitems__([(0, 1)])
    assert "latent_mean" not in batch and batch["image_embeds"].shape == (1, DIM)


def _read_elsewhere(data, queue):
    batch = data.__getitems__([(0, 4)])
    queue.put({name: values.tolist() for name, values in batch.items()})


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_data_worker_gets_the_files_names_and_not_what_is_in_them(cache, encoders, method):
    data = CachedLatents(cache, 0, encoders / "vae", parts_of(encoders))
    assert len(ForkingPickler.dumps(data)) < 4096 < sum(path.stat().st_size for path in cache.iterdir())
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_read_elsewhere, args=(data, queue))
    process.start()
    read = queue.get(timeout=60)
    process.join()
    assert read == {name: values.tolist() for name, values in data.__getitems__([(0, 4)]).items()}


def test_neither_opening_nor_reading_a_cache_keeps_records_in_memory(cache, encoders):
    """What this process holds of a 64 MiB shard."""
    data = CachedLatents(cache, 0, encoders / "vae", parts_of(encoders))
    rows = 2**20
    path = write_shard(cache, "images", {"latent_mean": torch.ones(rows, 16), "keys": keys(1).expand(rows, 32).clone()})

    def resident():
        text = Path("/proc/self/smaps").read_text().split(path.name)[1]
        return int(text.split("Rss:")[1].split()[0]) / 2**10

    data.images = Records([path])
    assert resident() < 4
    assert data.images.shards[0]["latent_mean"].sum() == 16 * rows and resident() > 32
    data.images.read(("latent_mean",), np.arange(0, rows, 16))
    assert resident() < 4


@pytest.mark.parametrize("component", ["vae", "text_encoder", "image_encoder"])
def test_cache_of_another_encoder_is_refused(cache, encoders, component):
    save_file({"weight": torch.zeros(2)}, encoders / component / "model.safetensors")
    with pytest.raises(UserError, match=f"with another .* than .*{component}"):
        CachedLatents(cache, 0, encoders / "vae", parts_of(encoders))


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("vae/config.json", '{"scaling_factor": 0.25}', "another autoencoder than .*vae"),
        ("tokenizer/tokenizer.json", '{"a": 1}', "another tokenizer than"),
    ],
)
def test_cache_of_another_configuration_is_refused(cache, encoders, file, text, words):
    (encoders / file).write_text(text)
    with pytest.raises(UserError, match=words):
        CachedLatents(cache, 0, encoders / "vae", parts_of(encoders))


def test_a_tokenizer_that_was_opened_and_written_again_is_the_same(cache, encoders):
    """As assembled and published folders have it."""
    tokenizer = encoders / "tokenizer"
    train_tokenizer(["a cat", "a dog"], 520, 8).save_pretrained(tokenizer)
    made = latents.tokenizer_digest(tokenizer)
    CLIPTokenizer.from_pretrained(tokenizer).save_pretrained(tokenizer)
    assert json.loads((tokenizer / "tokenizer_config.json").read_text())["is_local"]
    assert latents.tokenizer_digest(tokenizer) == made
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config | {"padding_side": "left"}))
    assert latents.tokenizer_digest(tokenizer) != made


@pytest.mark.parametrize("kind", ["images", "captions", "rows"])
def test_a_changed_bit_is_found(cache, encoders, kind):
    CachedLatents(cache, 0, encoders / "vae", parts_of(encoders))
    path = max(cache.glob(f"{kind}-*"))
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path.name} is damaged"):
        CachedLatents(cache, 0, encoders / "vae", parts_of(encoders))


def test_files_are_read_whole_once_and_then_only_where_they_changed(cache, encoders, monkeypatch):
    read = []
    monkeypatch.setattr(latents, "is_whole", lambda path: read.append(path.name) or True)
    CachedLatents(cache, 0, encoders / "vae", parts_of(encoders))
    assert read == []
    shard = cache / read_index(cache).images[0]
    shard.touch()
    CachedLatents(cache, 0, encoders / "vae", parts_of(encoders))
    (cache / "verified.json").write_text("not json")
    CachedLatents(cache, 0, encoders / "vae", parts_of(encoders))
    assert read[0] == shard.name and sorted(read[1:]) == sorted(read_index(cache).files)


def test_cache_that_is_not_whole_is_refused(cache, encoders):
    with pytest.raises(UserError, match="no such folder"):
        read_index(cache / "absent")
    shard = cache / read_index(cache).images[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="is damaged; run"):
        CachedLatents(cache, 0, encoders / "vae", parts_of(encoders))
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing"):
        CachedLatents(cache, 0, encoders / "vae", parts_of(encoders))
    index = json.loads((cache / "index.json").read_text())
    (cache / "index.json").write_text(json.dumps({**index, "format": 1}))
    with pytest.raises(UserError, match="has format 1, this version reads 2"):
        CachedLatents(cache, 0, encoders / "vae", parts_of(encoders))
    (cache / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        CachedLatents(cache, 0, encoders / "vae", parts_of(encoders))
    (cache / "index.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        CachedLatents(cache, 0, encoders / "vae", parts_of(encoders))
