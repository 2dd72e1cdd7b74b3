"""The scripts of train/, run one after another in one process; as a process of its own, those that it is told of.

Imports take a process longer than a small run does, so that tests of several processes share a pair of them.
"""

import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import distributed

ROOT = Path(__file__).parents[2]
SCRIPT = {
    "clip": "train_clip",
    "autoencoder": "train_autoencoder",
    "cache": "cache_latents",
    "prior": "train_prior",
    "ldm": "train_ldm",
    "last_step": "train_last_step",
}


def run(stage: str, arguments: list[str]) -> int:
    """The exit code of a stage's script, run as `python train/….py` runs it."""
    before = sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [str(ROOT / "train" / f"{SCRIPT[stage]}.py"), *arguments]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before
        for number, action in handlers.items():
            signal.signal(number, action)
        if distributed.is_initialized():  # the script failed
            distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)  # one process, many runs
        GradientState._reset_state()
        torch.backends.cuda.enable_flash_sdp(True)  # which bf16 on a CPU turns off for the whole process
    raise AssertionError("the script ended without an exit code")


class Pair:
    """Two processes that train together, over gloo, one script after another.

    They keep the lock of every folder that they write, as a run's process does until it ends: copy a run before
    another process goes on with it.
    """

    def __init__(self, folder: Path):
        """`folder`: gets what the processes say."""
        self.said = [folder / f"said{rank}" for rank in range(2)]
        self.processes = [self._start(rank, path) for rank, path in enumerate(self.said)]

    @staticmethod
    def _start(rank: int, said: Path) -> subprocess.Popen:
        environment = {
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "MASTER_ADDR": "127.0.0.1",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        with said.open("w") as log:
            return subprocess.Popen([sys.executable, "-m", "tests.train.scripts"], stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | environment,
                                    cwd=ROOT)  # fmt: skip

    def run(self, stage: str, arguments: list[str], **environment: str) -> list[str]:
        """Has both run a stage's script, in at most five minutes; what each said on its standard output and error."""
        before = [path.stat().st_size for path in self.said]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment["MASTER_PORT"] = str(free.getsockname()[1])
        for process in self.processes:
            process.stdin.write(json.dumps([stage, arguments, environment]) + "\n")
            process.stdin.flush()
        codes = [self._answer(process) for process in self.processes]
        said = [path.read_bytes()[start:].decode() for path, start in zip(self.said, before, strict=True)]
        assert codes == ["0\n", "0\n"], "\n".join(said)
        return said

    @staticmethod
    def _answer(process: subprocess.Popen) -> str:
        ready, _, _ = select.select([process.stdout], [], [], 300)
        return process.stdout.readline() if ready else "no answer"

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


def _serve(jobs: IO[str], answers: IO[str]) -> None:
    """Runs the script of every line of `jobs`, and answers with its exit code."""
    for line in jobs:
        stage, arguments, environment = json.loads(line)
        os.environ.update(environment)
        code = run(stage, arguments)
        sys.stdout.flush()
        print(code, file=answers, flush=True)
        for name in environment:
            del os.environ[name]


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what scripts print is no answer
    _serve(sys.stdin, answers)
