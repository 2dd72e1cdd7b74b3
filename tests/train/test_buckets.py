"""Images of several aspect ratios: each cached at a size like its own, batches of one size, trained and resumed."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm.clip.parts import parts_of
from ldm.data.latents import CachedLatents
from ldm.errors import UserError
from pipelines import LatentDiffusionPipeline
from pipelines.cli import main as ldm_command

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
    return CachedLatents(folder / "cache", 0, folder / "autoencoder/model/vae", parts_of(folder / "clip/model"))


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
    further = ["training.max_steps=8", "training.checkpoint_every=4"]
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


def test_validation_and_the_search_for_a_micro_batch_see_one_shape(folder, arguments_of, run_script, tmp_path):
    further = [f"validation_cache={folder / 'cache'}", "training.find_micro_batch=true", "training.max_steps=2"]
    assert run_script("ldm", arguments_of("ldm", folder, tmp_path / "run", *further, "sample_prompts=[]")) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert any("validation_loss" in json.loads(line) for line in lines)


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


def test_two_sizes_of_one_picture_are_two_conditions(runs, arguments_of, run_script, tmp_path):
    """The pixels that are encoded are the same; where they come from is not."""
    (tmp_path / "pictures").mkdir()
    small = Image.radial_gradient("L").resize((32, 32)).convert("RGB")
    small.save(tmp_path / "pictures" / "0.png")
    small.resize((64, 64), Image.Resampling.NEAREST).save(tmp_path / "pictures" / "1.png")
    for number in range(2):
        (tmp_path / "pictures" / f"{number}.txt").write_text("a gradient")
    further = [f"data.source={tmp_path / 'pictures'}", "data.max_images=100"]
    assert run_script("cache", arguments_of("cache", runs, tmp_path / "cache", *further)) == 0
    data = CachedLatents(tmp_path / "cache", 0, runs / "autoencoder/model/vae", parts_of(runs / "clip/model"))
    batch = data.__getitems__([(0, 0), (0, 1)])
    assert batch["sizes"].tolist() == [[32, 32, 0, 0, 32, 32], [64, 64, 0, 0, 32, 32]]


def test_a_unet_that_is_told_sizes_draws_with_our_pipeline(folder, arguments_of, run_script, fails, tmp_path, capsys):
    further = ["size_conditioning=true", "model.addition_embed_type=null", "training.max_steps=2"]
    assert run_script("ldm", arguments_of("ldm", folder, tmp_path / "ldm", *further)) == 0
    options = {"autoencoder": folder, "clip": folder, "prior": folder, "unet": tmp_path}
    arguments = [
        text
        for option, runs in options.items()
        for text in (f"--{option}", str(runs / ("ldm" if option == "unet" else option)))
    ]
    with pytest.raises(SystemExit) as ended:
        ldm_command(["assemble", *arguments, "--output", str(tmp_path / "model")])
    assert ended.value.code == 0
    pipe = LatentDiffusionPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    seen = []
    pipe.unet.register_forward_pre_hook(
        lambda _module, _inputs, given: seen.append(given["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )

    def draw(**sizes):
        given = {"num_inference_steps": 2, "prior_num_inference_steps": 2, "output_type": "pt"}
        generator = torch.Generator().manual_seed(0)
        return pipe("picture 3", height=24, width=40, generator=generator, **given, **sizes).images

    plain = draw()
    assert plain.shape == (1, 3, 24, 40)
    assert seen[-1].tolist() == [[24, 40, 0, 0, 24, 40]] * 2  # both branches of guidance
    assert torch.equal(plain, draw(original_size=(24, 40), target_size=(24, 40)))
    other = draw(original_size=(400, 300), crops_coords_top_left=(7, 0), target_size=(48, 80))
    assert seen[-1][0].tolist() == [400, 300, 7, 0, 48, 80]
    assert not torch.equal(plain, other)
    with pytest.raises(UserError, match=r"original_size is 400; it must be two numbers of pixels"):
        draw(original_size=400)

    again = [*further, "training.max_steps=1", f"init={tmp_path / 'ldm'}"]
    assert run_script("ldm", arguments_of("ldm", folder, tmp_path / "again", *again)) == 0

    # Weights that are told sizes are not those of a run that does not tell them, nor the other way round
    line = fails("ldm", arguments_of("ldm", folder, tmp_path / "none", f"init={tmp_path / 'ldm'}"))
    assert "was trained with size_conditioning=True; set it alike" in line
    line = fails("ldm", arguments_of("ldm", folder, tmp_path / "none", "size_conditioning=true"))
    assert "size_conditioning must be false unless model.addition_embed_type is null" in line
