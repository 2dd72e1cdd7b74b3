"""cache_latents.py on images of which one cannot be decoded."""

import pytest
import torch
from safetensors.torch import load_file

from ldm.data import shapes
from ldm.data.latents import CachedLatents

BROKEN = 5


@pytest.fixture
def folder(tmp_path):
    """Twelve drawn scenes with captions; one file is cut off."""
    for number in range(12):
        scene = shapes.make_scene(0, number)
        shapes.draw(scene).save(tmp_path / f"{number:02d}.png")
        (tmp_path / f"{number:02d}.txt").write_text(scene.caption)
    broken = tmp_path / f"{BROKEN:02d}.png"
    broken.write_bytes(broken.read_bytes()[:60])
    return tmp_path


def test_leaves_out_what_cannot_be_decoded_and_says_so(runs, arguments_of, run_script, folder, tmp_path, capsys):
    output = tmp_path / "cache"
    further = [f"data.source={folder}", "data.max_bad_fraction=0.1", "data.max_images=12", "batch_size=5"]
    assert run_script("cache", arguments_of("cache", runs, output, *further)) == 0
    printed = capsys.readouterr()
    assert f"warning: image {BROKEN} of" in printed.err
    assert "11 images, 1 skipped, 11 different captions" in printed.out
    shard = load_file(output / "images-00000.safetensors")
    assert shard["indices"].tolist() == [n for n in range(12) if n != BROKEN]

    data = CachedLatents(output, 0, runs / "autoencoder" / "model" / "vae", runs / "clip" / "model")
    whole = CachedLatents(runs / "cache", 0, runs / "autoencoder" / "model" / "vae", runs / "clip" / "model")
    assert len(data) == 11
    assert torch.equal(data.caption_ids[:, 0], torch.arange(1, 12))
    texts = data.text(data.caption_ids[:, 0])["text_embeds"]
    assert texts.unique(dim=0).shape[0] == 11
    assert data.latent_mean.shape[1:] == whole.latent_mean.shape[1:]


def test_too_many_stop_it(runs, arguments_of, run_script, folder, tmp_path, capsys):
    further = [f"data.source={folder}", "data.max_images=12"]
    assert run_script("cache", arguments_of("cache", runs, tmp_path / "cache", *further)) == 1
    assert "1 of the 12 images of" in capsys.readouterr().err
    assert not (tmp_path / "cache" / "index.json").exists()
