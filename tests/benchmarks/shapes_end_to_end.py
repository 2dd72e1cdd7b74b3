"""All four stages on drawn scenes, by the README's commands: from nothing to pictures of captions never seen.

    python tests/benchmarks/shapes_end_to_end.py --output FOLDER [--guidance-scale 1.5]

Prints the time of each stage and, of 100 held-out captions, what share of three pictures each shows what of them.
FOLDER, which must be new, gets the runs, the assembled model, report.json (percent) and grid.png.
tests/test_end_to_end.py holds it to its bar.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from ldm.data.shapes import compare, is_held_out, make_scene
from ldm.errors import RunError, UserError, exit_code_of
from pipelines import LatentDiffusionPipeline
from pipelines.arguments import ArgumentParser

ROOT = Path(__file__).parents[2]
CAPTIONS = 100
PICTURES = 3  # of each caption: of one alone, the figure varies by several percent
NAMES = ("colour", "shape", "size", "position")
STAGES = {
    "clip": ("train_clip", ()),
    "autoencoder": ("train_autoencoder", ()),
    "cache": ("cache_latents", ("clip", "autoencoder")),
    "prior": ("train_prior", ("clip", "cache")),
    "ldm": ("train_ldm", ("clip", "autoencoder", "cache", "prior")),
}


def train(folder: Path) -> float:
    """Runs the five scripts and `ldm assemble`, each as its own process; seconds that took. CLIP and the autoencoder,
    which read nothing of each other, train side by side, each with half of the threads."""
    begin = time.perf_counter()
    threads = max(1, torch.get_num_threads() // 2)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    first = {stage: subprocess.Popen(command(folder, stage), env=environment) for stage in ("clip", "autoencoder")}
    codes = {stage: process.wait() for stage, process in first.items()}
    for stage, code in codes.items():
        if code:
            raise RunError(f"{stage} ended with exit code {code}")
    print(f"clip and autoencoder: done after {time.perf_counter() - begin:.0f} s", flush=True)
    for stage in ("cache", "prior", "ldm"):
        run(command(folder, stage))
        print(f"{stage}: done after {time.perf_counter() - begin:.0f} s", flush=True)
    runs = {"clip": "clip", "autoencoder": "autoencoder", "prior": "prior", "unet": "ldm"}
    options = [text for option, stage in runs.items() for text in (f"--{option}", folder / stage)]
    run([sys.executable, "-m", "pipelines.cli", "assemble", *options, "--output", folder / "model"])
    seconds = time.perf_counter() - begin
    print(f"all: {seconds:.0f} s on {torch.get_num_threads()} threads")
    return seconds


def command(folder: Path, stage: str) -> list[str | Path]:
    script, reads = STAGES[stage]
    config = ROOT / "configs" / "shapes" / f"{stage}.yaml"
    overrides = [f"output_dir={folder / stage}", *(f"{name}={folder / name}" for name in reads)]
    return [sys.executable, ROOT / "train" / f"{script}.py", "--config", config, *overrides]


def run(arguments: list[str | Path]) -> None:
    if code := subprocess.run(arguments).returncode:
        raise RunError(f"{' '.join(map(str, arguments[:3]))} … ended with exit code {code}")


def held_out_captions() -> list[str]:
    """The first different ones of another series than the training scenes', none of which was trained on."""
    captions = (make_scene(1, number).caption for number in range(10_000))
    return list(dict.fromkeys(caption for caption in captions if is_held_out(caption)))[:CAPTIONS]


def main() -> None:
    parser = ArgumentParser(description="Train every stage on drawn scenes and read the pictures of unseen captions.")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    arguments = parser.parse_args()
    if arguments.output.exists():
        raise UserError(f"--output {arguments.output}: already in use; name a new folder")
    seconds = train(arguments.output)

    captions = held_out_captions()
    pipeline = LatentDiffusionPipeline.from_pretrained(arguments.output / "model")
    seen = []
    for first_seed in range(0, PICTURES * CAPTIONS, CAPTIONS):
        generators = [torch.Generator().manual_seed(first_seed + number) for number in range(CAPTIONS)]
        images = pipeline(
            captions, generator=generators, guidance_scale=arguments.guidance_scale, prior_guidance_scale=1.0
        ).images
        seen += [compare(image, caption) for image, caption in zip(images, captions, strict=True)]
    share = {name: sum(getattr(agreement, name) for agreement in seen) for name in NAMES}
    share["colour and shape"] = sum(agreement.colour and agreement.shape for agreement in seen)
    report = {name: 100 * number / len(seen) for name, number in share.items()}
    for name, percent in report.items():
        print(f"{name}: right in {percent:.1f} % of {len(seen)} pictures")
    (arguments.output / "report.json").write_text(json.dumps({**report, "seconds": seconds}, indent=2))
    sheet = Image.new("RGB", (10 * 66, 10 * 66), "white")
    for number, image in enumerate(images):
        sheet.paste(image.resize((64, 64), Image.Resampling.NEAREST), (number % 10 * 66, number // 10 * 66))
    sheet.save(arguments.output / "grid.png")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
