"""The training scripts, small and in this process: what they leave is shared by the tests of this folder."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.assemble import assemble
from tests.train.scripts import ROOT, SCRIPT, Pair, run

SHAPES = ROOT / "configs" / "shapes"

FP32 = "training.precision=fp32"
DATA = ["data.max_images=24", FP32]
EVERY = ["training.log_every=1", "training.sample_every=4", "training.checkpoint_every=2"]
SMALL = {
    "clip": [
        *DATA,
        *EVERY,
        "model.embedding_dim=16",
        "model.vision_width=16",
        "model.vision_layers=1",
        "model.vision_heads=2",
        "model.text_width=16",
        "model.text_layers=1",
        "model.text_heads=2",
        "training.batch_size=8",
        "random_crop=0.5",
        "image_image_weight=0.5",
    ],
    "autoencoder": [
        *DATA,
        *EVERY,
        "model.block_out_channels=[8,8,16]",
        "perceptual_weight=0.02",
        "adversarial_weight=0.1",
        "adversarial_start=1",
        "discriminator_channels=4",
        "statistics_images=16",
        "training.batch_size=8",
    ],
    "cache": ["data.max_images=24", "precision=fp32"],
    "prior": [
        FP32,
        *EVERY,
        "model.num_attention_heads=2",
        "model.attention_head_dim=8",
        "model.num_layers=1",
        "model.dropout=0.1",
        "training.batch_size=8",
    ],
    "ldm": [
        FP32,
        *EVERY,
        "model.block_out_channels=[16,32]",
        "model.attention_head_dim=2",
        "model.norm_num_groups=8",
        "sample_prompts=[a small red circle on the left]",
        "training.batch_size=8",
    ],
}
"""Overrides of `configs/shapes` that make every stage a matter of a second."""
SMALL["ldm_text"] = SMALL["ldm"]

READS = {
    "clip": [],
    "autoencoder": ["perceptual_clip"],
    "cache": ["clip", "autoencoder"],
    "prior": ["clip", "cache"],
    "ldm": ["clip", "autoencoder", "cache", "prior"],
    "ldm_text": ["clip", "autoencoder", "cache"],
}


def _arguments(stage: str, runs: Path, output: Path, *further: str) -> list[str]:
    reads = [f"{name}={runs / name.removeprefix('perceptual_')}" for name in READS[stage]]
    steps = [] if stage == "cache" else ["training.max_steps=4"]
    return ["--config", str(SHAPES / f"{stage}.yaml"), f"output_dir={output}", *reads, *SMALL[stage], *steps, *further]


@pytest.fixture(scope="session")
def arguments_of() -> Callable[..., list[str]]:
    """(stage, runs, output, *further) -> the command line of a small stage, one of the files in `configs/shapes`, that
    reads the runs in `runs`."""
    return _arguments


@pytest.fixture(scope="session")
def run_script() -> Callable[[str, list[str]], int]:
    """(stage, command line) -> exit code: runs the stage's script as `python train/….py` does."""
    return run


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> Iterator[Pair]:
    """Two processes, started when the first test wants them, that run scripts together."""
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.close()


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """A folder with all five runs, four steps each, none interrupted. Tests only read it."""
    folder = tmp_path_factory.mktemp("runs")
    for stage in (stage for stage in SCRIPT if stage in READS):
        assert run(stage, _arguments(stage, folder, folder / stage)) == 0, stage
    return folder


@pytest.fixture(scope="session")
def base(runs, tmp_path_factory) -> Path:
    """The pipeline that the small runs make."""
    stages = {"autoencoder": "autoencoder", "clip": "clip", "prior": "prior", "unet": "ldm"}
    output = tmp_path_factory.mktemp("base") / "model"
    return assemble(**{stage: runs / run for stage, run in stages.items()}, output=output)


@pytest.fixture(scope="session")
def logged() -> Callable[[Path], list[dict]]:
    """Run folder -> the lines of its metrics.jsonl, without the figures that differ from one run to the next."""

    def lines_of(run: Path) -> list[dict]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in ("samples_per_second", "memory_gib")} for line in lines]

    return lines_of


@pytest.fixture
def fails(capsys) -> Callable[..., str]:
    """Runs a stage that must be refused: exit code 2 and one line on standard error, which is returned. Only
    warnings and the progress bars of `datasets` may stand before it."""

    def refused(stage: str, arguments: list[str]) -> str:
        capsys.readouterr()
        assert run(stage, arguments) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "examples/s]" not in line]
        lines = [line for line in said if not line.startswith("warning: ")]
        assert len(lines) == 1, lines
        return lines[0]

    return refused
