"""Runs of several processes that lose one, and launchers that leave one: real processes, ended by their number."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train" / "train_prior.py"
ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
LAUNCH = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"]
LONG = ["training.max_steps=5000", "training.sample_every=5000"]


@pytest.fixture
def start(tmp_path):
    """(launcher, script, arguments) -> the launcher's process; what it says is in tmp_path/said. None is left."""
    started = []

    def run(launcher, arguments, script=SCRIPT):
        with (tmp_path / "said").open("w") as log:
            started.append(subprocess.Popen([sys.executable, *launcher, script, *arguments], env=ENVIRONMENT,
                                            stdout=log, stderr=log))  # fmt: skip
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()


def wait_for_step(folder, process, step, log="said"):
    """Until `step` is logged, at most two minutes."""
    for _ in range(1200):
        metrics = folder / "run" / "metrics.jsonl"
        if metrics.is_file() and metrics.read_text().count("\n") >= step:
            return
        assert process.poll() is None, (folder / log).read_text()
        time.sleep(0.1)
    raise AssertionError(f"step {step} was not reached")


def trainers(folder, process):
    """The processes that train, by rank, once some steps are logged."""
    wait_for_step(folder, process, 3)
    children = psutil.Process(process.pid).children(recursive=True)
    ranked = {int(child.environ().get("RANK", 0)): child for child in children}
    return [ranked[rank] for rank in sorted(ranked)]


def test_a_killed_process_ends_the_job(runs, arguments_of, start, tmp_path):
    process = start(TORCHRUN, arguments_of("prior", runs, tmp_path / "run", *LONG))
    ranks = trainers(tmp_path, process)
    assert len(ranks) == 2
    ranks[0].kill()
    assert process.wait(timeout=60) == 1
    assert not psutil.wait_procs(ranks, timeout=10)[1]
    assert "failed: another process of this run has ended" in (tmp_path / "said").read_text()


def test_a_hung_process_ends_the_others_at_the_timeout(runs, arguments_of, tmp_path):
    """Without torchrun, which gives the hung one half a minute more before it kills it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    arguments = arguments_of("prior", runs, tmp_path / "run", *LONG, "training.timeout_seconds=10")
    ranks = []
    try:
        for rank in ("0", "1"):
            with (tmp_path / f"said{rank}").open("w") as log:
                environment = ENVIRONMENT | master | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
                ranks.append(subprocess.Popen([sys.executable, SCRIPT, *arguments], env=environment, stderr=log))
        wait_for_step(tmp_path, ranks[0], 3, "said0")
        ranks[1].send_signal(signal.SIGSTOP)
        assert ranks[0].wait(timeout=60) == 1
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    said = (tmp_path / "said0").read_text()
    assert said.count("failed: ") == 1 and "has not answered for training.timeout_seconds" in said
    assert "Traceback" not in said


def test_a_loss_that_is_not_finite_on_one_process_ends_all_before_the_update(runs, arguments_of, start, tmp_path):
    """The second process alone sees sample 5, whose embedding is no number, in some step of the first epoch."""
    script = tmp_path / "script.py"
    script.write_text(
        "import runpy, torch\n"
        "from ldm.data.latents import CachedLatents\n"
        "read = CachedLatents.__getitems__\n"
        "def damaged(self, places):\n"
        "    batch = read(self, places)\n"
        "    batch['image_embeds'][batch['indices'] == 5] = torch.nan\n"
        "    return batch\n"
        "CachedLatents.__getitems__ = damaged\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    process = start(TORCHRUN, arguments_of("prior", runs, tmp_path / "run", "training.checkpoint_every=1"), script)
    assert process.wait(timeout=120) == 1
    said = (tmp_path / "said").read_text()
    record = json.loads((tmp_path / "run" / "failure.json").read_text())
    rank, step = record["processes"][0], record["step"]
    assert record["fault"] == "loss" and 5 in record["samples"] and len(record["samples"]) == 4
    assert record["values"][rank] == "nan" and record["values"][1 - rank] != "nan"
    assert said.count("failed: ") == 1
    assert f"failed: step {step}: the loss of process {rank} is nan at learning rate" in said
    checkpoints = sorted((tmp_path / "run").glob("checkpoints/step-*"))
    assert [path.name for path in checkpoints[-1:]] == ([f"step-{step - 1:06d}"] if step > 1 else [])


def test_a_trainer_whose_launcher_is_gone_stops_with_a_checkpoint(runs, arguments_of, start, tmp_path):
    process = start(LAUNCH, arguments_of("prior", runs, tmp_path / "run", *LONG))
    (trainer,) = trainers(tmp_path, process)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)
    assert not psutil.wait_procs([trainer], timeout=30)[1]
    assert "stopped: SIGTERM after step" in (tmp_path / "said").read_text()
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{last:06d}").is_dir()


def test_fewer_processes_than_were_asked_for_are_an_error(runs, arguments_of, fails, tmp_path, monkeypatch):
    arguments = arguments_of("prior", runs, tmp_path / "run")
    assert "training.num_processes 2: 1 train together" in fails("prior", [*arguments, "training.num_processes=2"])
    asked = launch_command_parser().parse_args(["--cpu", "--num_processes=2", str(SCRIPT)])
    _, environment = prepare_simple_launcher_cmd_env(_validate_launch_command(asked)[0])
    for name in environment.keys() - os.environ.keys():  # of the one process that Accelerate starts
        monkeypatch.setenv(name, environment[name])
    line = fails("prior", arguments)
    assert "accelerate launch was asked for several processes and started one; start them with torchrun" in line
    assert not (tmp_path / "run").exists()
