"""Images of several aspect ratios: each cached at a size like its own, batches of one size, trained and resumed."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm.data.latents import CachedLatents

SIZES = [(32, 32)] * 9 + [(32, 60)] * 10 + [(50, 30)] * 9 + [(20, 33)] * 3  # height, width; 9, 13 and 9 in a bucket
BUCKETS = ["data.aspect_buckets=true", "data.bucket_step=8", "data.horizontal_flip=true"]


@pytest.fixture(scope="module")
def folder(runs, arguments_of, run_script, tmp_path_factory):
    """Runs of both encoders, and a cache of pictures grey on the left and light on the right."""
    folder = tmp_path_factory.mktemp("buckets")
    (folder / "pictures").mkdir()
    for number, (height, width) in enumerate(SIZES):
        image = Image.new("RGB", (width, height), (5 * number, 60, 60))
        image.paste((200, 5 * number, 90), (width // 2, 0, width, height))
        image.save(folder / "pictures" / f"{number:02d}.png")
        (folder / "pictures" / f"{number:02d}.txt").write_text(f"picture {number}")
    for stage in ("clip", "autoencoder", "prior"):
        (folder / stage).symlink_to(runs / stage)
    further = [f"data.source={folder / 'pictures'}", "data.max_images=100", *BUCKETS]
    assert run_script("cache", arguments_of("cache", runs, folder / "cache", *further)) == 0
    return folder


@pytest.fixture
def data(folder):
    return CachedLatents(folder / "cache", 0, folder / "autoencoder/model/vae", folder / "clip/model")


def test_images_are_cached_at_the_size_nearest_to_theirs(data):
    assert data.latent_shapes == [(4, 6, 10), (4, 8, 8), (4, 10, 6)] and data.latent_shape == (4, 8, 8)
    assert [bucket.tolist() for bucket in data.buckets] == [
        [*range(9, 19), *range(28, 31)],
        [*range(9)],
        [*range(19, 28)],
    ]
    batch = data.__getitems__([(0, 9), (0, 28)])
    assert batch["latent_mean"].shape == (2, 4, 6, 10)
    assert batch["sizes"].tolist() == [[32, 60, 0, 2, 24, 40], [20, 33, 0, 0, 24, 40]]


def test_pictures_of_any_shape_are_mirrored(data):
    """Picture 9 is dark on one side; its embedding and latents change sides together, in some of eight epochs."""
    seen = [data.__getitems__([(epoch, 9)]) for epoch in range(8)]
    latents = {tuple(batch["latent_mean"].flatten().tolist()) for batch in seen}
    both = {tuple(torch.cat([batch[name].flatten() for name in ("latent_mean", "image_embeds")]).tolist())
            for batch in seen}  # fmt: skip
    assert len(latents) == len(both) == 2


def test_training_sees_every_shape_and_resumes_exactly(folder, arguments_of, run_script, tmp_path):
    further = ["training.max_steps=8", "training.checkpoint_every=4", "data.horizontal_flip=true"]
    assert run_script("ldm", arguments_of("ldm", folder, tmp_path / "whole", *further)) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000008")
    assert run_script("ldm", arguments_of("ldm", folder, tmp_path / "run", *further, "--resume")) == 0
    for name in ("model", "ema", "optimizer"):
        path = f"checkpoints/step-000008/{name}.safetensors"
        one, two = load_file(tmp_path / "whole" / path), load_file(tmp_path / "run" / path)
        assert all(torch.equal(one[key], two[key]) for key in one)

    # Two micro-batches see what one batch sees
    halves = [*further, "training.gradient_accumulation_steps=2", "sample_prompts=[]"]
    assert run_script("ldm", arguments_of("ldm", folder, tmp_path / "halves", *halves)) == 0

    def losses(name):
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return torch.tensor([line["loss"] for line in lines], dtype=torch.float64)

    assert len(losses("whole")) == 8
    torch.testing.assert_close(losses("halves"), losses("whole"), rtol=1e-5, atol=0)


def test_the_prior_trains_on_all_sizes(folder, arguments_of, run_script, tmp_path):
    assert run_script("prior", arguments_of("prior", folder, tmp_path / "run", "training.max_steps=2")) == 0


def test_a_bucket_smaller_than_a_batch_is_told_of(folder, arguments_of, run_script, fails, tmp_path, capsys):
    further = ["training.batch_size=12", "training.max_steps=1", "sample_prompts=[]"]
    assert run_script("ldm", arguments_of("ldm", folder, tmp_path / "run", *further)) == 0
    assert "warning: 18 images are in buckets smaller than training.batch_size 12" in capsys.readouterr().err
    line = fails("ldm", arguments_of("ldm", folder, tmp_path / "none", "training.batch_size=16"))
    assert "the largest of 3 buckets holds 13 images" in line and not (tmp_path / "none").exists()


def test_a_unet_that_cannot_halve_a_size_is_refused(folder, arguments_of, fails, tmp_path):
    deeper = "model.block_out_channels=[16,16,32]"
    blocks = ["model.down_block_types=[DownBlock2D,DownBlock2D,DownBlock2D]"]
    blocks += ["model.up_block_types=[UpBlock2D,UpBlock2D,UpBlock2D]"]
    line = fails("ldm", arguments_of("ldm", folder, tmp_path / "run", deeper, *blocks))
    assert "latents of 6 × 10" in line and "data.bucket_step a multiple of 4" in line
