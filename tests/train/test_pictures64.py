"""The recipe at 64 pixels as it is shipped, its networks whole; fewer images, smaller batches, two steps a stage."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from ldm import configuration
from ldm.config import AutoencoderConfig, CacheConfig, ClipConfig
from ldm.data.latents import read_index
from ldm.data.records import open_shard
from pipelines import LatentDiffusionPipeline
from pipelines.assemble import assemble

CONFIGS = Path(__file__).parents[2] / "configs" / "pictures64"
THINGS = {"tabby cat": "cat", "goldfish": "fish", "camel": "camel", "African elephant": "elephant"}
DATA = ["data.max_images=8", "data.num_workers=0"]
STEPS = ["training.max_steps=2", "training.batch_size=4", "training.precision=fp32", "training.compile=false"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """A glob of two parquet files of four pictures each, 64 pixels wide, in the columns of the recipe."""
    folder = tmp_path_factory.mktemp("pictures64")
    features = datasets.Features(
        {"image": datasets.Image(), "name": datasets.Value("string"), "concept": datasets.Value("string")}
    )
    random = np.random.default_rng(0)
    for part in range(2):
        pictures = [Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).resize((64, 64)) for _ in THINGS]
        rows = {"image": pictures, "name": list(THINGS), "concept": list(THINGS.values())}
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"train-{part}.parquet")
    return str(folder / "train-*.parquet")


@pytest.fixture(scope="module")
def stages(source, run_script, tmp_path_factory) -> Path:
    """A folder with the runs of all five scripts."""
    folder = tmp_path_factory.mktemp("recipe")
    reads = {
        "cache": ["autoencoder", "clip"],
        "prior": ["clip", "cache"],
        "ldm": ["autoencoder", "clip", "prior", "cache"],
    }
    for stage in ("clip", "autoencoder", "cache", "prior", "ldm"):
        arguments = ["--config", str(CONFIGS / f"{stage}.yaml"), f"output_dir={folder / stage}"]
        arguments += [f"{name}={folder / name}" for name in reads.get(stage, [])]
        if stage in ("clip", "autoencoder", "cache"):
            arguments += [f"data.source={source}", *DATA]
        arguments += ["precision=fp32"] if stage == "cache" else STEPS
        arguments += ["sample_prompts=[a photo of a goldfish]"] if stage == "ldm" else []
        assert run_script(stage, arguments) == 0, stage
    return folder


def test_caching_reads_what_clip_was_trained_on():
    cache = configuration.load(CacheConfig, CONFIGS / "cache.yaml")
    assert cache.data == configuration.load(ClipConfig, CONFIGS / "clip.yaml").data
    autoencoder = configuration.load(AutoencoderConfig, CONFIGS / "autoencoder.yaml").data
    assert (autoencoder.source, autoencoder.image_size) == (cache.data.source, cache.data.image_size)


def test_captions_are_of_both_columns(stages):
    """Nine of each picture; of a camel, whose concept is the same word, five that differ."""
    captions = open_shard(stages / "cache" / read_index(stages / "cache").rows)[0]["captions"]
    assert sorted(len(set(row.tolist())) for row in captions) == [5, 5, 9, 9, 9, 9, 9, 9]


def test_assembled_folder_is_small_and_draws(stages, tmp_path):
    folder = assemble(*(stages / name for name in ("autoencoder", "clip", "prior", "ldm")), tmp_path / "model")
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 32 * 2**20
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "prior_num_inference_steps": 2, "output_type": "np"}
    (picture,) = pipe("a photo of a tabby cat", **settings).images
    assert picture.shape == (64, 64, 3)
    assert picture.std() > 0
