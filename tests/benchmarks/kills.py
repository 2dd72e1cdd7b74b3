"""A run that is killed again and again, and resumed, ends as one that was not: bit by bit.

    python tests/benchmarks/kills.py [--kills 20] [--steps 200] [--seed 0]

Trains a small DDPM of handwritten digits twice: undisturbed, and with `kill -9` at random moments, in the middle of
steps and of checkpoints. Prints where each kill came, and whether weights, averages and optimiser are the same.
"""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from ldm.errors import RunError, exit_code_of
from pipelines.arguments import ArgumentParser

ROOT = Path(__file__).parents[2]
SMALL = [
    "model.block_out_channels=[16,32]",
    "model.norm_num_groups=8",
    "training.batch_size=16",
    "training.log_every=1",
    "training.sample_every=1000000",
    "training.checkpoint_every=3",
]
GIVE_UP = 120  # seconds for one start, and for the steps after it


def start(output: Path, steps: int, *further: str) -> subprocess.Popen:
    command = [sys.executable, ROOT / "train" / "train_ldm.py", "--config", ROOT / "configs" / "digits" / "ldm.yaml"]
    arguments = [f"output_dir={output}", f"training.max_steps={steps}", *SMALL, *further]
    with output.with_suffix(".log").open("a") as log:
        return subprocess.Popen([*command, *arguments], stdout=log, stderr=log)


def logged(output: Path) -> int:
    """Steps done, as metrics.jsonl has it."""
    path = output / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def finish(process: subprocess.Popen, output: Path) -> None:
    if process.wait():
        last = output.with_suffix(".log").read_text().splitlines()[-1]
        raise RunError(f"training ended with exit code {process.returncode}: {last}")


def wait_for_metrics(process: subprocess.Popen, output: Path) -> None:
    """Until the run writes metrics.jsonl, which a resumed one does before its first step, or has ended."""
    path, begin = output / "metrics.jsonl", time.time()
    while process.poll() is None and time.time() - begin < GIVE_UP:
        if path.is_file() and path.stat().st_mtime > begin:
            return
        time.sleep(0.01)


def kill_within(process: subprocess.Popen, output: Path, delay: float) -> bool:
    """Kills the run `delay` seconds after it begins to log; false where it ended before."""
    wait_for_metrics(process, output)
    time.sleep(delay)
    if process.poll() is not None:
        return False
    process.kill()
    process.wait()
    return True


def main() -> None:
    parser = ArgumentParser(description="Kill a run many times; it must end as an undisturbed one.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, disturbed = Path(folder) / "undisturbed", Path(folder) / "disturbed"
        process = start(undisturbed, arguments.steps)
        wait_for_metrics(process, undisturbed)
        begin = time.monotonic()
        finish(process, undisturbed)
        pace = (time.monotonic() - begin) / arguments.steps  # seconds a step, without the start
        further: list[str] = []
        kills = []
        for _ in tqdm(range(arguments.kills), unit=" kills"):
            # Short of its share of the steps on average, so that every kill finds a run that is going
            delay = moments.uniform(0, pace * arguments.steps / arguments.kills)
            if not kill_within(start(disturbed, arguments.steps, *further), disturbed, delay):
                break
            kills.append(logged(disturbed))
            further = ["--resume"] if (disturbed / "config.yaml").is_file() else []
        if not (disturbed / "model").exists():
            finish(start(disturbed, arguments.steps, *further), disturbed)
        print(f"{len(kills)} kills, after steps {', '.join(map(str, kills))}")
        checkpoint = f"checkpoints/step-{arguments.steps:06d}"
        for name in ("model", "ema", "optimizer"):
            one, two = (load_file(run / checkpoint / f"{name}.safetensors") for run in (undisturbed, disturbed))
            different = [key for key in one if not torch.equal(one[key], two[key])]
            print(f"{name}: {len(one) - len(different)} of {len(one)} tensors bit-identical")
            if different:
                raise RunError(f"{name} differs, first in {different[0]}")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
