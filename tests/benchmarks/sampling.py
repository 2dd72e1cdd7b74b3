"""How fast pictures are drawn, against stock Diffusers with the same weights, seed and schedule.

    python tests/benchmarks/sampling.py [--only warm|cold|evaluations] [--rounds 7] [--data FOLDER] [--output FILE]

    warm         images a second of the open pipeline and of stock `StableUnCLIPPipeline`, batches of 1 and 16
    cold         `ldm generate` as a process, from its start to its end, and a script that draws the same with stock
    evaluations  solvers, steps and guidance intervals against 50 steps of DDIM (sampling_evaluations.py)

Both sides of warm and cold take turns, round by round, so that a busy machine slows both alike; medians are compared,
and the pictures, which must not differ by more than 1/255.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableUnCLIPPipeline
from PIL import Image

import cifar10_classifier
from bundled_model import read_photographs
from ldm.errors import RunError, UserError, exit_code_of
from pipelines import LatentDiffusionPipeline
from pipelines.arguments import ArgumentParser
from pipelines.cli import BUNDLED_MODEL
from sampling_evaluations import HEAD, ROWS, best_of, chart, judged

PROMPT = "a photo of a cat"
FIGURES = ("warm", "cold", "evaluations")
ONLY_OURS = ("num_prior_samples", "guidance_rescale", "guidance_interval")
"""Settings that stock Diffusers does not have. One sample of the prior and guidance throughout are what it does."""
STOCK = """\
import sys
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
image = pipe(
    {prompt!r}, generator=torch.Generator().manual_seed(0), {settings}
).images[0]
image.save(sys.argv[2])
"""


def main() -> None:
    parser = ArgumentParser(description="Speed of drawing, and evaluations that a picture needs.")
    parser.add_argument("--only", choices=FIGURES, help="one of the figures; without it, all")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--model", default=str(BUNDLED_MODEL), help="a pipeline folder; without it, the bundled one")
    parser.add_argument("--data", default=cifar10_classifier.HUB, help="folder with {train,test}.parquet of CIFAR-10")
    parser.add_argument("--images-per-class", type=int, default=50, help="of each row of evaluations")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures of evaluations")
    parser.add_argument("--output", type=Path, help="a PNG for the picture of evaluations; without it, none")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or not 1 <= arguments.images_per_class <= 1000:
        raise UserError("--rounds must be at least 1, and --images-per-class from 1 to 1000")
    if arguments.output is not None and arguments.output.suffix != ".png":
        raise UserError(f"--output '{arguments.output}' must end in .png")
    for figure in FIGURES if arguments.only is None else [arguments.only]:
        {"warm": warm, "cold": cold, "evaluations": evaluations}[figure](arguments)


def warm(arguments: argparse.Namespace) -> None:
    ours, theirs = (
        kind.from_pretrained(arguments.model, dtype=torch.float32)
        for kind in (LatentDiffusionPipeline, DiffusionPipeline)
    )
    assert type(theirs) is StableUnCLIPPipeline
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    settings = shared_settings(ours.default_settings)
    for batch in (1, 16):

        def draw(pipe: DiffusionPipeline, batch: int = batch, **further: object) -> np.ndarray:
            generator = torch.Generator().manual_seed(0)
            return pipe([PROMPT] * batch, generator=generator, output_type="np", **settings, **further).images

        check_same(*compare(
            f"warm, batch {batch}",
            {
                "stock": lambda: draw(theirs),
                "ours": lambda: draw(ours, num_prior_samples=1, guidance_interval=(0.0, 1.0), guidance_rescale=0.0),
            },
            arguments.rounds,
            batch,
        ))  # fmt: skip


def cold(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copytree(arguments.model, folder / "model")
        index = json.loads((folder / "model" / "model_index.json").read_text())
        settings = shared_settings(index["_default_settings"])
        index["_default_settings"] = {**settings, "num_prior_samples": 1}
        (folder / "model" / "model_index.json").write_text(json.dumps(index))
        given = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        (folder / "stock.py").write_text(STOCK.format(prompt=PROMPT, settings=given))
        command = [sys.executable, "-m", "pipelines.cli", "generate", PROMPT, "--seed", "0"]

        def run(name: str, *command: object) -> Callable[[], np.ndarray]:
            def draw() -> np.ndarray:
                with (folder / f"{name}.log").open("w") as log:
                    done = subprocess.run([*map(str, command)], stdout=log, stderr=log)
                if done.returncode:
                    raise RunError(f"{name}: {(folder / f'{name}.log').read_text().strip().splitlines()[-1]}")
                return np.asarray(Image.open(folder / f"{name}.png")).astype(np.float32) / 255

            return draw

        check_same(*compare(
            "cold",
            {
                "stock": run("stock", sys.executable, folder / "stock.py", folder / "model", folder / "stock.png"),
                "ours": run("ours", *command, "--model", folder / "model", "--output", folder / "ours.png"),
            },
            arguments.rounds,
        ))  # fmt: skip
        compare(
            "cold, with the model's own settings",
            {"ours": run("own", *command, "--model", arguments.model, "--output", folder / "own.png")},
            arguments.rounds,
        )


def shared_settings(settings: dict) -> dict:
    """Of a model's settings those that stock Diffusers has, too."""
    return {name: value for name, value in settings.items() if name not in ONLY_OURS}


def compare(
    name: str, sides: dict[str, Callable[[], np.ndarray]], rounds: int, pictures: int | None = None
) -> list[np.ndarray]:
    """Has the sides draw in turns and prints what each takes: seconds, or pictures a second. Returns their pictures.

    The first round is not counted: it warms the files' cache and the libraries.
    """
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    worked: dict[str, list[float]] = {side: [] for side in sides}
    drawn = {side: draw() for side, draw in sides.items()}
    for number in range(rounds):
        for side in list(sides) if number % 2 else reversed(sides):
            begin, before = time.perf_counter(), processor_seconds()
            drawn[side] = sides[side]()
            seconds[side].append(time.perf_counter() - begin)
            worked[side].append(processor_seconds() - before)
    print(name)
    for side, times in seconds.items():
        shown, unit = (times, "s") if pictures is None else ([pictures / each for each in times], "images/s")
        print(
            f"    {side:<8}{statistics.median(shown):8.2f} {unit} ({min(shown):.2f} … {max(shown):.2f}), "
            f"{statistics.median(worked[side]):.2f} s of the processors"
        )
    if len(sides) > 1:
        before, after = seconds.values()
        rates = sorted(b / a for b, a in zip(before, after, strict=True))
        ratio = statistics.median(before) / statistics.median(after)
        print(f"    ratio of medians {ratio:.2f}×; of single rounds {rates[0]:.2f} … {rates[-1]:.2f}", flush=True)
    return list(drawn.values())


def processor_seconds() -> float:
    """What this process and those it waited for have used, which depends less on what else the machine does."""
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def check_same(theirs: np.ndarray, ours: np.ndarray) -> None:
    difference = np.abs(theirs - ours).max() * 255
    print(f"    largest difference of the pictures {difference:.4f}/255", flush=True)
    if not difference <= 1.0001:
        raise RunError(f"the pictures differ by {difference:.1f}/255")


def evaluations(arguments: argparse.Namespace) -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    settings, scheduler = pipe.default_settings, pipe.scheduler
    photographs = read_photographs(arguments.data)
    print(f"evaluations for one picture, judged by {10 * arguments.images_per_class} of each row\n{HEAD}", flush=True)
    rows = judged(pipe, ROWS, arguments.images_per_class, arguments.seed, photographs)
    print(f"as good with the fewest: {best_of(rows).row}")
    steps, interval = settings["num_inference_steps"], settings["guidance_interval"]
    print(f"the model's own settings: {type(scheduler).__name__}, {steps} steps, guided in {interval}")
    if arguments.output is not None:
        chart(rows).savefig(arguments.output, dpi=110)
        print(f"wrote {arguments.output}")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
