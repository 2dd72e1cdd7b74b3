"""Runs that are told to stop, killed, or resumed as another run: real processes, real signals."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train" / "train_prior.py"
STEPS = ["training.max_steps=60", "training.checkpoint_every=7", "training.sample_every=60"]
ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def whole(runs, arguments_of, run_script, tmp_path_factory):
    """Sixty steps that nobody disturbs."""
    output = tmp_path_factory.mktemp("interruption") / "whole"
    assert run_script("prior", arguments_of("prior", runs, output, *STEPS)) == 0
    return output


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes have that are started here: with another number of threads, other sums are rounded."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start(folder, arguments, launcher=()):
    """The script as a process of its own; what it says goes to a file, as a pipe nobody reads would fill and block."""
    with (folder / "said").open("w") as log:
        return subprocess.Popen([sys.executable, *launcher, SCRIPT, *arguments], env=ENVIRONMENT, stderr=log)


def wait_for_step(folder, step, process):
    """Until `step` is logged, at most two minutes."""
    for _ in range(1200):
        path = folder / "metrics.jsonl"
        if path.is_file() and path.read_text().count("\n") >= step:
            return
        assert process.poll() is None, (folder.parent / "said").read_text()
        time.sleep(0.1)
    raise AssertionError(f"step {step} was not reached")


def assert_same_weights(one, two):
    for name in ("model", "ema", "optimizer"):
        path = f"checkpoints/step-000060/{name}.safetensors"
        first, second = load_file(one / path), load_file(two / path)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), name


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_with_a_checkpoint(whole, runs, arguments_of, run_script, tmp_path, number, code):
    arguments = arguments_of("prior", runs, tmp_path / "run", *STEPS)
    process = start(tmp_path, arguments)
    wait_for_step(tmp_path / "run", 10, process)
    process.send_signal(number)
    assert process.wait(timeout=30) == code
    words = rf"stopped: {number.name} after step (\d+), which is saved; go on with --resume"
    step = int(re.search(words, (tmp_path / "said").read_text())[1])
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:06d}").is_dir()
    assert not (tmp_path / "run" / "model").exists()
    assert run_script("prior", [*arguments, "--resume"]) == 0
    assert_same_weights(whole, tmp_path / "run")


def test_a_signal_ends_every_process_of_a_group(runs, arguments_of, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    process = start(tmp_path, arguments_of("prior", runs, tmp_path / "run", "training.max_steps=5000"), launcher)
    wait_for_step(tmp_path / "run", 5, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) != 0
    assert "stopped: SIGTERM after step" in (tmp_path / "said").read_text()
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    steps = [int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert max(steps) == last


def test_a_run_keeps_its_folder_until_it_is_killed_and_resumes_to_the_same_weights(
    whole, runs, arguments_of, run_script, fails, tmp_path
):
    arguments = arguments_of("prior", runs, tmp_path / "run", *STEPS)
    process = start(tmp_path, arguments)
    try:
        wait_for_step(tmp_path / "run", 8, process)
        process.send_signal(signal.SIGSTOP)
        line = fails("prior", [*arguments, "--resume"])
        assert f"is being trained by process {process.pid}; wait for it to end, or choose another" in line
        process.send_signal(signal.SIGCONT)
        wait_for_step(tmp_path / "run", 20, process)
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "run" / ".lock").read_text() == str(process.pid)  # a stale lock, which holds nobody up
    assert run_script("prior", [*arguments, "--resume"]) == 0
    assert_same_weights(whole, tmp_path / "run")


def test_a_run_that_died_before_its_first_checkpoint_begins_again(whole, runs, arguments_of, run_script, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.rmtree(tmp_path / "run" / "model")
    assert run_script("prior", arguments_of("prior", runs, tmp_path / "run", *STEPS, "--resume")) == 0
    metrics = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (whole, tmp_path / "run")]
    assert [json.loads(line)["step"] for line in metrics[0]] == [json.loads(line)["step"] for line in metrics[1]]


def test_a_resumed_run_is_the_run_it_was(whole, runs, arguments_of, run_script, fails, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_text()
    changed = [*STEPS, "training.max_steps=64", "training.learning_rate=0.002", "training.log_every=2"]
    line = fails("prior", arguments_of("prior", runs, tmp_path / "run", *changed, "--resume"))
    assert "training.max_steps was 60, is 64; training.learning_rate was 0.001, is 0.002" in line
    assert "resume.allow=[training.max_steps,training.learning_rate]" in line and "log_every" not in line
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    allowed = [*changed, "resume.allow=[training.max_steps,training.learning_rate]", "--resume"]
    assert run_script("prior", arguments_of("prior", runs, tmp_path / "run", *allowed)) == 0
    assert (tmp_path / "run" / "checkpoints" / "step-000064").is_dir()
