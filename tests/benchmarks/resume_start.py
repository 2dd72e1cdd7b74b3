"""How long a resumed run takes to the end of its first step, beyond Python's imports.

    python tests/benchmarks/resume_start.py [--repeats 5] [--images 20000]

A U-Net of 6.0 million parameters on a cache of so many images, with its optimiser's state and moving average, resumed
from a checkpoint; in turns with a process that only imports what the script does.
"""

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ldm.errors import RunError, UserError, exit_code_of
from pipelines.arguments import ArgumentParser
from train_throughput import ROOT, SIZES, UNET, train_stages

SCRIPT = ROOT / "train" / "train_ldm.py"
IMPORTS = f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='no'); print('there', flush=True)"
FIRST, LAST = 2, 6  # the checkpoint's step, and the run's last
BATCH_SIZE = 64


def to_the_end_of_imports() -> float:
    """Seconds until the script's imports are there, without the end of the process."""
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", IMPORTS], stdout=subprocess.PIPE, cwd=ROOT)
    process.stdout.readline()
    took = time.monotonic() - begin
    process.communicate()
    return took


def to_first_step(command: list[str | Path], metrics: Path) -> float:
    """Seconds from the start of a resumed run to the line of its first step in metrics.jsonl."""
    begin = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    while not metrics.read_text():
        if process.poll() is not None:
            raise RunError("the resumed run ended before its first step")
        time.sleep(0.005)
    took = time.monotonic() - begin
    process.wait()
    return took


def main() -> None:
    parser = ArgumentParser(description="From the start of a resumed run to its first step.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=20_000)
    arguments = parser.parse_args()
    if arguments.repeats < 1 or arguments.images < BATCH_SIZE:
        raise UserError(f"--repeats must be at least 1, --images at least {BATCH_SIZE}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stages = train_stages(folder, arguments.images)
        command = [sys.executable, SCRIPT, "--config", ROOT / "configs" / "cifar10" / "ldm.yaml", *UNET, "prior=null",
                   f"model.block_out_channels={SIZES['small']}".replace(" ", ""), f"training.batch_size={BATCH_SIZE}",
                   *(f"{stage}={stages / stage}" for stage in ("clip", "autoencoder", "cache")),
                   f"training.max_steps={LAST}", "training.compile=false", "training.log_every=1",
                   f"training.checkpoint_every={FIRST}", "training.keep_checkpoints=9"]  # fmt: skip
        done = subprocess.run([*command, f"output_dir={folder / 'run'}"], capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise RunError(done.stderr.strip().splitlines()[-1])
        starts, imports = [], []
        for repeat in range(arguments.repeats):
            run = folder / f"resumed-{repeat}"
            shutil.copytree(folder / "run", run)
            for path in (run / "checkpoints").glob("step-*"):
                if int(path.name.removeprefix("step-")) > FIRST:
                    shutil.rmtree(path)
            shutil.rmtree(run / "model")
            (run / "metrics.jsonl").write_text("")
            starts.append(to_first_step([*command, f"output_dir={run}", "--resume"], run / "metrics.jsonl"))
            imports.append(to_the_end_of_imports())
        for what, seconds in (("to the end of the first step", starts), ("imports alone", imports)):
            print(f"{what}: median {statistics.median(seconds):.2f} s of {', '.join(f'{s:.2f}' for s in seconds)}")
        print(f"beyond imports: {statistics.median(a - b for a, b in zip(starts, imports, strict=True)):.2f} s")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
