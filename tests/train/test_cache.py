"""cache_latents.py: what it leaves out, what it encodes again, and what becomes of it when it is killed."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from ldm.clip import export
from ldm.clip.parts import parts_of
from ldm.data import shapes
from ldm.data.latents import CachedLatents, read_index
from ldm.data.records import open_shard

ROOT = Path(__file__).parents[2]
BROKEN = 5
SMALL_SHARDS = ["shard_size=4", "batch_size=2"]
ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def draw(folder, numbers):
    """Captioned scenes as a folder of pictures."""
    folder.mkdir(exist_ok=True)
    for number in numbers:
        scene = shapes.make_scene(0, number)
        shapes.draw(scene).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(scene.caption)
    return folder


def contents(folder):
    """Every file of a cache by name, but for what is of this machine and moment."""
    own = {".lock", "verified.json"}
    return {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir() if path.name not in own}


@pytest.fixture(autouse=True)
def one_thread():
    """As the processes have that these tests start: another number rounds otherwise, and bytes are compared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path):
    """Twelve drawn scenes with captions; one file is cut off."""
    folder = draw(tmp_path / "pictures", range(12))
    broken = folder / f"{BROKEN:02d}.png"
    broken.write_bytes(broken.read_bytes()[:60])
    return folder


@pytest.fixture
def write(runs, arguments_of, run_script, tmp_path, capsys):
    """(folder of pictures, further arguments) -> what the script said last, of the cache in `tmp_path / name`."""

    def run(pictures, *further, name="cache"):
        source = [f"data.source={pictures}", "data.max_images=100", "data.max_bad_fraction=0.1", *SMALL_SHARDS]
        capsys.readouterr()
        assert run_script("cache", arguments_of("cache", runs, tmp_path / name, *source, *further)) == 0
        return capsys.readouterr()

    return run


@pytest.fixture
def opened(runs):
    """(cache) -> its samples, read with the encoders of `runs`."""
    return lambda cache: CachedLatents(cache, 0, runs / "autoencoder/model/vae", parts_of(runs / "clip/model"))


def samples(data):
    return data.__getitems__([(0, index) for index in range(len(data))])


def test_leaves_out_what_cannot_be_decoded_and_says_so(runs, write, opened, folder, tmp_path):
    said = write(folder)
    assert f"warning: image {BROKEN} of" in said.err
    assert (
        "11 images (11 encoded, 0 reused, 0 duplicates), 1 skipped (image 5), 11 different captions (11 enc" in said.out
    )
    data, whole = opened(tmp_path / "cache"), opened(runs / "cache")
    assert len(data) == 11
    assert samples(data)["text_embeds"].unique(dim=0).shape[0] == 11
    assert data.latent_shape == whole.latent_shape
    same = [index for index in range(12) if index != BROKEN]
    expected = whole.__getitems__([(0, index) for index in same])
    read = samples(data)
    assert read.pop("indices").tolist() == list(range(11))
    for name, values in read.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-3, atol=1e-3)  # other batches, other rounding

    # The second time nothing is encoded, and the image is still told of
    before = contents(tmp_path / "cache")
    assert "11 images (0 encoded, 11 reused, 0 duplicates), 1 skipped (image 5)" in write(folder).out
    assert contents(tmp_path / "cache") == before


def test_rows_may_have_more_captions_than_others(write, opened, tmp_path):
    folder, texts = draw(tmp_path / "lists", range(3)), [["a", "b", "c"], ["d"], ["e", "f"]]
    for path in folder.glob("*.txt"):
        path.unlink()
    rows = [{"file_name": f"{number:02d}.png", "texts": of_row} for number, of_row in enumerate(texts)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "6 different captions" in write(folder, "data.caption_column=texts").out
    data = opened(tmp_path / "cache")
    first, second, third = data.rows["captions"].tolist()
    assert len({*first}) == 3 and len({*second}) == 1 and third[0] == third[2] != third[1]


def test_too_many_stop_it(runs, arguments_of, run_script, folder, tmp_path, capsys):
    further = [f"data.source={folder}", "data.max_images=12"]
    assert run_script("cache", arguments_of("cache", runs, tmp_path / "cache", *further)) == 1
    assert "1 of the 12 images of" in capsys.readouterr().err
    assert not (tmp_path / "cache" / "index.json").exists()


def test_data_that_change_are_encoded_where_they_changed(write, opened, tmp_path):
    pictures = draw(tmp_path / "pictures", range(8))
    write(pictures)
    before, shards = samples(opened(tmp_path / "cache")), read_index(tmp_path / "cache").images
    draw(pictures, range(8, 11))
    (pictures / "02.txt").write_text("another caption")
    shutil.copy(pictures / "03.png", pictures / "99.png")  # a duplicate, with a caption of its own
    (pictures / "99.txt").write_text("the same again")
    said = write(pictures).out
    assert (
        "12 images (3 encoded, 8 reused, 1 duplicates), 0 skipped, 12 different captions (5 encoded, 7 reused)" in said
    )
    after = samples(opened(tmp_path / "cache"))
    assert set(shards) < set(read_index(tmp_path / "cache").images)
    for name in ("latent_mean", "latent_std", "image_embeds"):
        assert torch.equal(after[name][:8], before[name])
        assert torch.equal(after[name][11], before[name][3])
    assert not torch.equal(after["text_embeds"][2], before["text_embeds"][2])
    assert torch.equal(after["text_embeds"][3], before["text_embeds"][3])

    # Fewer, and in another order: nothing is encoded, and shards of which nothing is left are gone
    for number in (0, 1, 2, 3, 99):
        (pictures / f"{number:02d}.png").unlink()
    (pictures / "04.png").rename(pictures / "zz.png")
    (pictures / "04.txt").rename(pictures / "zz.txt")
    assert "7 images (0 encoded, 7 reused, 0 duplicates)" in write(pictures).out
    fewer = samples(opened(tmp_path / "cache"))
    assert torch.equal(fewer["latent_mean"], after["latent_mean"][[5, 6, 7, 8, 9, 10, 4]])
    assert shards[0] not in {path.name for path in (tmp_path / "cache").iterdir()}


def test_a_damaged_shard_is_encoded_again(write, folder, tmp_path):
    write(folder)
    before = contents(tmp_path / "cache")
    for kind in ("images", "captions"):
        shard = tmp_path / "cache" / getattr(read_index(tmp_path / "cache"), kind)[1]
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    said = write(folder)
    assert said.err.count("is damaged; encoding its") == 2
    assert "11 images (3 encoded, 8 reused" in said.out
    assert contents(tmp_path / "cache") == before


def test_what_is_no_number_is_not_written(runs, arguments_of, run_script, tmp_path, capsys):
    shutil.copytree(runs / "autoencoder" / "model", tmp_path / "autoencoder" / "model")
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tmp_path / "autoencoder" / "model" / "vae")
    vae.config["scaling_factor"] = 1e9
    vae.save_pretrained(tmp_path / "autoencoder" / "model" / "vae")
    arguments = arguments_of("cache", runs, tmp_path / "cache", f"autoencoder={tmp_path / 'autoencoder'}")
    assert run_script("cache", arguments) == 1
    assert "latent_mean of image 0 of shapes is not finite; set precision=fp32" in capsys.readouterr().err
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_a_killed_run_goes_on_where_it_was(runs, arguments_of, write, tmp_path):
    """A real process, killed as soon as a number of shards are there; the cache is that of a run left alone."""
    many = ["data.max_images=160"]
    write("shapes", *many, name="whole")
    arguments = arguments_of("cache", runs, tmp_path / "cache", *SMALL_SHARDS, *many)
    with (tmp_path / "said").open("w") as log:
        command = [sys.executable, ROOT / "train" / "cache_latents.py", *arguments]
        process = subprocess.Popen(command, env=ENVIRONMENT, stderr=log, stdout=log)
        for _ in range(12000):
            if len(list((tmp_path / "cache").glob("images-*"))) >= 5:
                break
            assert process.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "cache" / "index.json").exists()
    kept = {path.name for path in (tmp_path / "cache").glob("images-*")}
    reused = sum(len(open_shard(tmp_path / "cache" / name)[0]["keys"]) for name in kept)
    (tmp_path / "cache" / ".images.1.tmp").write_bytes(b"half a shard")
    assert f"160 images ({160 - reused} encoded, {reused} reused" in write("shapes", *many).out
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_two_processes_write_what_one_does(runs, arguments_of, write, pair, folder, tmp_path):
    write(folder, name="one")
    source = [f"data.source={folder}", "data.max_images=100", "data.max_bad_fraction=0.1", *SMALL_SHARDS]
    said = "".join(pair.run("cache", arguments_of("cache", runs, tmp_path / "two", *source)))
    assert "11 images (11 encoded, 0 reused, 0 duplicates), 1 skipped (image 5)" in said
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def tar(path, numbers):
    """The scenes as a webdataset shard."""
    with tarfile.open(path, "w") as file:
        for number in numbers:
            scene = shapes.make_scene(0, number)
            picture = io.BytesIO()
            shapes.draw(scene).save(picture, "PNG")
            for suffix, content in (("png", picture.getvalue()), ("txt", scene.caption.encode())):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))


def test_streamed_data_are_cached_as_they_pass(runs, arguments_of, write, opened, pair, tmp_path):
    (tmp_path / "shards").mkdir()
    for shard, numbers in enumerate((range(7), range(7, 12), range(12, 14))):
        tar(tmp_path / "shards" / f"{shard}.tar", numbers)
    source = [f"data.source={tmp_path / 'shards'}", "data.caption_column=txt", "data.max_images=null"]
    said = write(tmp_path, *source, "data.streaming=true").out
    assert "14 images (14 encoded, 0 reused, 0 duplicates), 0 skipped, 14 different captions" in said
    write(tmp_path, *source, name="indexed")
    whole, streamed = (samples(opened(tmp_path / name)) for name in ("indexed", "cache"))
    assert all(torch.equal(whole[name], streamed[name]) for name in whole)

    # Read by two processes, the data are in the same order; and what grew is encoded, no more
    pair.run("cache", arguments_of("cache", runs, tmp_path / "two", *SMALL_SHARDS, *source, "data.streaming=true"))
    two = samples(opened(tmp_path / "two"))
    assert torch.equal(two["text_embeds"], streamed["text_embeds"])
    torch.testing.assert_close(two["latent_mean"], streamed["latent_mean"], rtol=1e-3, atol=1e-3)
    tar(tmp_path / "shards" / "3.tar", range(14, 17))
    assert "17 images (3 encoded, 14 reused, 0 duplicates)" in write(tmp_path, *source, "data.streaming=true").out


def test_a_resumed_run_reads_what_it_began_with(runs, arguments_of, run_script, fails, tmp_path):
    (tmp_path / "clip").symlink_to(runs / "clip")
    shutil.copytree(runs / "cache", tmp_path / "cache")
    assert run_script("prior", arguments_of("prior", tmp_path, tmp_path / "run")) == 0
    assert run_script("cache", arguments_of("cache", runs, tmp_path / "cache", "data.max_images=23")) == 0
    longer = ["training.max_steps=6", "resume.allow=[training.max_steps]", "--resume"]
    line = fails("prior", arguments_of("prior", tmp_path, tmp_path / "run", *longer))
    assert "no longer holds what it held when step 4 was saved" in line and "resume.allow=[cache]" in line
    longer[1] = "resume.allow=[training.max_steps,cache]"
    assert run_script("prior", arguments_of("prior", tmp_path, tmp_path / "run", *longer)) == 0


def test_one_process_a_folder(runs, arguments_of, fails, tmp_path):
    shutil.copytree(runs / "cache", tmp_path / "cache")
    hold = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=1); input()"
    command = [sys.executable, "-c", hold, tmp_path / "cache" / ".lock"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"1\n"
        assert "is being written by process" in fails("cache", arguments_of("cache", runs, tmp_path / "cache"))
    finally:
        process.kill()
        process.wait()


def test_a_clip_of_another_size_and_normalisation(runs, write, tmp_path):
    """As `ldm export-clip` leaves it."""
    towers = export.load(parts_of(runs / "clip" / "model"))
    config = towers.image_encoder.config
    processor = CLIPImageProcessor(
        size={"shortest_edge": 16},
        crop_size={"height": 16, "width": 16},
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.3] * 3,
    )
    vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**config.to_dict() | {"image_size": 16}))
    clip = shutil.copytree(runs / "clip" / "model", tmp_path / "clip")
    vision.save_pretrained(clip / "image_encoder")
    processor.save_pretrained(clip / "image_processor")
    pictures = draw(tmp_path / "pictures", range(4))
    write(pictures, f"clip={clip}")
    data = CachedLatents(tmp_path / "cache", 0, runs / "autoencoder" / "model" / "vae", parts_of(clip))
    images = [Image.open(pictures / f"{number:02d}.png").convert("RGB") for number in range(4)]
    with torch.no_grad():
        expected = vision.eval()(**processor(images=images, return_tensors="pt")).image_embeds
    read = samples(data)["image_embeds"]
    assert (read - expected).abs().max() < 0.05 * expected.std()
    assert (read - expected.roll(1, 0)).abs().max() > 0.1 * expected.std()
