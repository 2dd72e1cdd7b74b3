"""How fast, and in how much memory, train/train_ldm.py trains.

    python tests/benchmarks/train_throughput.py [--size small] [--against diffusers] [--rounds 5] [--seconds 10]

Two real trainings of the same U-Net, as processes that take turns: one runs, the other is stopped, so that a busy
machine slows both alike. `--against`:

    diffusers   the loop of diffusers' train_text_to_image.py (diffusers_loop.py says what it is spared)
    fp32        train_ldm.py in plain fp32, not compiled; also compares the losses of the same steps
    processes   one process of train_ldm.py with one thread, against two of them

U-Nets of 6.0, 16.6 and 37.7 million parameters on 4×16×16 latents, batch 64, 77 tokens; the other stages are trained
for one step, since time does not depend on weights.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from ldm.errors import RunError, UserError, exit_code_of
from pipelines.arguments import ArgumentParser

ROOT = Path(__file__).parents[2]
SIZES = {
    "small": [64, 96, 128],
    "medium": [96, 160, 224],
    "large": [96, 192, 384],
}
UNET = [
    "model.down_block_types=[DownBlock2D,CrossAttnDownBlock2D,CrossAttnDownBlock2D]",
    "model.up_block_types=[CrossAttnUpBlock2D,CrossAttnUpBlock2D,UpBlock2D]",
    "model.layers_per_block=1",
    "model.attention_head_dim=4",
    "sample_prompts=[]",
]
LONG = 1_000_000  # steps that no measurement reaches
GIVE_UP = 900  # seconds for a side's first steps, compilation included
LOSS_STEPS = 60


@dataclass
class Side:
    """A training that goes on only while it is its turn: a process and those it started."""

    name: str
    command: list[str]
    output: Path
    threads: int
    speeds: list[float] = field(default_factory=list)

    def start(self) -> None:
        """Up to the third step, which has seen compilation and the first touches of memory."""
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "ACCELERATE_USE_CPU": "true"}
        with self.output.with_suffix(".log").open("w") as log:
            self.process = psutil.Popen(self.command, stdout=log, stderr=log, env=environment, cwd=ROOT)
        begin = time.monotonic()
        while self.steps() < 3:
            if self.process.poll() is not None or time.monotonic() - begin > GIVE_UP:
                raise RunError(f"{self.name} did not train: {self.last_words()}")
            time.sleep(0.05)
        print(f"{self.name}: third step after {time.monotonic() - begin:.0f} s", flush=True)
        self.pause()

    def last_words(self) -> str:
        """How the process ended, and what its log says of why, at best the line of an error."""
        said = self.output.with_suffix(".log").read_text().strip().splitlines() or ["it said nothing"]
        why = [line for line in said if line.startswith(("error:", "failed:"))] or said
        return f"exit code {self.process.poll()}; {why[-1]}"

    def steps(self) -> int:
        path = self.output / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def _processes(self) -> list[psutil.Process]:
        return [*self.process.children(recursive=True), self.process]

    def pause(self) -> None:
        for process in self._processes():
            process.suspend()

    def turn(self, seconds: float, batch_size: int) -> None:
        """Goes on from the end of a step to that of another, `seconds` or more later; notes the samples a second."""
        for process in self._processes():
            process.resume()
        first, begin = self._next_step(self.steps())
        last, end = first, begin
        while end - begin < seconds:
            last, end = self._next_step(last)
        self.speeds.append((last - first) * batch_size / (end - begin))
        self.pause()

    def _next_step(self, before: int) -> tuple[int, float]:
        while (steps := self.steps()) <= before:
            if self.process.poll() is not None:
                raise RunError(f"{self.name} ended: {self.last_words()}")
            time.sleep(0.02)  # more often, and looking takes a twentieth of a core from sides that use all
        return steps, time.monotonic()

    def peak_memory(self) -> float:
        """The most memory that its processes had, in MiB."""
        peaks = [Path(f"/proc/{process.pid}/status").read_text() for process in self._processes()]
        return sum(int(peak.split("VmHWM:")[1].split()[0]) for peak in peaks if "VmHWM:" in peak) / 1024

    def end(self) -> None:
        with suppress(psutil.NoSuchProcess):  # one that died by itself, which is told elsewhere
            for process in self._processes():  # of torchrun too, which no signal to a group reaches
                process.kill()
        self.process.wait()


def main() -> None:
    parser = ArgumentParser(description="Throughput and memory of training the U-Net.")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--against", choices=("diffusers", "fp32", "processes"), default="diffusers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10, help="least length of a turn")
    parser.add_argument("--threads", type=int, default=2, help="of each side, but for processes, which have one each")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for train_ldm.py alone")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.seconds <= 0:
        raise UserError("--rounds must be at least 1, and --seconds more than 0")
    with tempfile.TemporaryDirectory() as folder:
        stages = train_stages(Path(folder))
        sides = sides_of(arguments, stages)
        try:
            for side in sides:
                side.start()
            for turn in range(arguments.rounds):
                for side in sides:
                    side.turn(arguments.seconds, arguments.batch_size)
                print(f"round {turn + 1}: " + ", ".join(f"{s.name} {s.speeds[-1]:.1f}" for s in sides), flush=True)
            report(sides)
            if arguments.against == "fp32":
                compare_losses(sides, arguments)
        finally:
            for side in sides:
                if hasattr(side, "process"):
                    side.end()


def train_stages(folder: Path, images: int = 1024) -> Path:
    """Everything that the U-Net's training reads, in `folder`: one step of each stage, a cache of so many images."""
    data = [
        "data.source=shapes",
        f"data.max_images={images}",
        "data.horizontal_flip=false",
        "data.caption_templates=[]",
    ]
    once = ["training.max_steps=1", *data]
    for script, config, further in (
        ("train_clip", "shapes/clip", ["context_length=77", "model.embedding_dim=256", "model.text_width=256", *once]),
        ("train_autoencoder", "cifar10/autoencoder", once),
        ("cache_latents", "shapes/cache", [f"clip={folder / 'clip'}", f"autoencoder={folder / 'autoencoder'}", *data]),
    ):
        name = config.split("/")[1]
        path = ROOT / "configs" / f"{config}.yaml"
        command = [sys.executable, ROOT / "train" / f"{script}.py", "--config", path, f"output_dir={folder / name}"]
        done = subprocess.run([*command, *further], capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise RunError(f"{script}.py: {done.stderr.strip().splitlines()[-1]}")
    return folder


def sides_of(arguments: argparse.Namespace, stages: Path) -> list[Side]:
    """The baseline, then what is measured against it."""
    config = str(ROOT / "configs" / "cifar10" / "ldm.yaml")
    common = [
        f"model.block_out_channels={SIZES[arguments.size]}".replace(" ", ""),
        f"training.batch_size={arguments.batch_size}",
        f"training.max_steps={LONG}",
        "training.learning_rate_schedule=constant",
        *UNET,
    ]
    ours = [
        *(f"{name}={stages / name}" for name in ("clip", "autoencoder", "cache")),
        *(f"training.{name}_every={LONG}" for name in ("sample", "checkpoint")),
        "training.log_every=1",
        "prior=null",
    ]

    def trained(name: str, threads: int, *further: str, processes: int = 1) -> Side:
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port=0", "--standalone"]
        output = stages / name.replace(" ", "-")
        script = [*(launcher if processes > 1 else []), str(ROOT / "train" / "train_ldm.py"), "--config", config]
        command = [sys.executable, *script, f"output_dir={output}", *common, *ours, *arguments.overrides, *further]
        return Side(name, command, output, threads)

    if arguments.against == "processes":
        return [trained("one process", 1), trained("two processes", 1, processes=2)]
    if arguments.against == "fp32":
        plain = trained("fp32", arguments.threads, "training.precision=fp32", "training.compile=false")
        return [plain, trained("train_ldm", arguments.threads)]
    loop = [sys.executable, str(ROOT / "tests" / "benchmarks" / "diffusers_loop.py"), "--config", config]
    output = stages / "diffusers"
    loop += ["--stages", str(stages), "--output", str(output), *common]
    return [Side("train_text_to_image", loop, output, arguments.threads), trained("train_ldm", arguments.threads)]


def report(sides: list[Side]) -> None:
    floor = imports_memory()
    for side in sides:
        speeds = side.speeds
        print(
            f"{side.name:<22}{statistics.median(speeds):8.1f} samples/s ({min(speeds):.1f} … {max(speeds):.1f}), "
            f"peak {side.peak_memory():,.0f} MiB"
        )
    before, after = sides
    print(f"ratio of speeds {statistics.median(after.speeds) / statistics.median(before.speeds):.2f}")
    memory = [side.peak_memory() for side in sides]
    print(
        f"ratio of memory {memory[1] / memory[0]:.2f}; beyond the {floor:,.0f} MiB that the imports take "
        f"{(memory[1] - floor) / (memory[0] - floor):.2f}"
    )


def imports_memory() -> float:
    """What a process holds that has imported the training script, in MiB."""
    say = "import runpy, resource; runpy.run_path('train/train_ldm.py', run_name='no'); "
    say += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", say], capture_output=True, text=True, check=True, cwd=ROOT)
    return int(done.stdout) / 1024


def compare_losses(sides: list[Side], arguments: argparse.Namespace) -> None:
    """The mean loss of steps 31 … 60, which both sides make with the same samples and noise."""
    means = []
    for side in sides:
        while side.steps() < LOSS_STEPS:
            side.turn(arguments.seconds, arguments.batch_size)
        lines = (side.output / "metrics.jsonl").read_text().splitlines()[:LOSS_STEPS]
        means.append(statistics.mean(json.loads(line)["loss"] for line in lines[LOSS_STEPS // 2 :]))
    difference = 100 * (means[1] / means[0] - 1)
    print(f"loss of steps {LOSS_STEPS // 2 + 1} … {LOSS_STEPS}: {means[0]:.5f} and {means[1]:.5f}, {difference:+.2f} %")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
