"""Options of train_ldm.py: each does what it says in a real run; one that is interrupted and resumed ends alike."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from safetensors.torch import load_file

from ldm.config import LdmConfig
from ldm.diffusion.schedule import alphas_bar
from ldm.training import randomness, task
from pipelines.cli import main as ldm_command

CHECKPOINT = "checkpoints/step-000004"
UNET = "model/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def train(runs, arguments_of, run_script, tmp_path):
    """Runs train_ldm.py with further settings; gives the run folder."""

    def trained(name, *further):
        assert run_script("ldm", arguments_of("ldm", runs, tmp_path / name, "sample_prompts=[]", *further)) == 0
        return tmp_path / name

    return trained


def resumed(train, run, *further):
    """The run again, from its second step."""
    again = run.with_name(f"{run.name}-again")
    shutil.copytree(run, again)
    shutil.rmtree(again / "model")
    shutil.rmtree(again / CHECKPOINT)
    return train(again.name, *further, "--resume")


def assert_same(one, two):
    paths = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert paths
    for path in paths:
        a, b = load_file(one / path), load_file(two / path)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), path


def test_averages_of_any_length(train, tmp_path, capsys):
    options = ["average_lengths=[0.05,0.1]", "snapshot_every=2", "training.ema_decay=0"]
    run = train("averaged", *options)
    names = [path.name for path in sorted((run / "averages").iterdir())]
    assert names == [f"step-{step:06d}-{length}.safetensors" for step in (2, 4) for length in ("0.050", "0.100")]
    assert_same(run, resumed(train, run, *options))
    with pytest.raises(SystemExit) as ended:
        ldm_command(["average", str(run), "--length", "0.1", "--output", str(tmp_path / "out")])
    assert ended.value.code == 0 and "average of length 0.1 at step 4" in capsys.readouterr().out
    tracked = load_file(run / "averages" / "step-000004-0.100.safetensors")
    raw, averaged = load_file(run / UNET), load_file(tmp_path / "out" / UNET)
    for name, value in tracked.items():
        torch.testing.assert_close(averaged[name], value.float(), rtol=0, atol=2e-3)
    assert any(not torch.equal(averaged[name], raw[name]) for name in raw)
    UNet2DConditionModel.from_pretrained(tmp_path / "out" / "model" / "unet")
    assert (tmp_path / "out" / "model" / "scheduler").is_dir()


def test_average_of_a_run_that_kept_none(train, runs, tmp_path, capsys):
    for arguments, words in (
        ([str(runs / "ldm"), "--length", "0.1"], "train with average_lengths=[0.05,0.1]"),
        ([str(runs / "prior"), "--length", "0.1"], "has no model/unet"),
    ):
        with pytest.raises(SystemExit) as ended:
            ldm_command(["average", *arguments, "--output", str(tmp_path / "out")])
        assert ended.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_muon(train, runs):
    run = train("muon", "training.optimizer=muon")
    assert_same(run, resumed(train, run, "training.optimizer=muon"))
    state = load_file(run / CHECKPOINT / "optimizer.safetensors")
    assert {name.split(".")[1] for name in state} == {"momentum_buffer", "step", "exp_avg", "exp_avg_sq"}


def test_zero_terminal_snr_trains_what_its_scheduler_samples(train):
    run = train("zero", "zero_terminal_snr=true", "min_snr_gamma=5")
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < loss < 10 for loss in losses)
    scheduler = DPMSolverMultistepScheduler.from_pretrained(run / "model" / "scheduler")
    assert scheduler.config.rescale_betas_zero_snr and scheduler.config.timestep_spacing == "trailing"
    scheduler.set_timesteps(5)
    assert scheduler.timesteps[0] == 999 and scheduler.alphas_cumprod[-1] < 1e-6
    assert DDIMScheduler.from_config(scheduler.config).alphas_cumprod[-1] == 0
    plain = DPMSolverMultistepScheduler.from_pretrained(Path(str(run)).parents[0] / "zero" / "model" / "scheduler",
                                                        rescale_betas_zero_snr=False)  # fmt: skip
    torch.testing.assert_close(plain.alphas_cumprod, alphas_bar("squaredcos_cap_v2", 1000).float())


def test_epsilon_is_drawn_from_where_it_says_something_of_the_image():
    scheduler = task.solver(LdmConfig(output_dir="", prediction_type="epsilon", beta_schedule="squaredcos_cap_v2"))
    for steps in (1, 10, 50):
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == steps
        assert scheduler.lambda_t[scheduler.timesteps[0]] == pytest.approx(task.FIRST_LAMBDA, abs=0.02)


@pytest.mark.parametrize(
    ("prediction_type", "beta_schedule"),
    [
        ("v_prediction", "squaredcos_cap_v2"),
        ("sample", "squaredcos_cap_v2"),
        ("epsilon", "linear"),
        ("epsilon", "scaled_linear"),
    ],
)
def test_all_else_is_drawn_from_the_last_timestep(prediction_type, beta_schedule):
    config = LdmConfig(output_dir="", prediction_type=prediction_type, beta_schedule=beta_schedule)
    scheduler = task.solver(config)
    assert scheduler.to_json_string() == DPMSolverMultistepScheduler(**task.schedule_settings(config)).to_json_string()
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999


def test_validation_loss_at_fixed_timesteps(train, runs):
    options = [f"validation_cache={runs / 'cache'}", "training.sample_every=2"]
    run = train("validated", *options)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in measured] == [2, 4]
    for line in measured:
        over_t = line["validation_loss_over_t"]
        assert len(over_t) == 10 and sum(over_t) / 10 == pytest.approx(line["validation_loss"])
    assert measured[0]["validation_loss"] != measured[1]["validation_loss"]
    # The same images, noise and timesteps each time: a run that does not learn measures the same
    still = train("still", *options, "training.learning_rate=1e-30")
    lines = [json.loads(line) for line in (still / "metrics.jsonl").read_text().splitlines()]
    first, second = (line["validation_loss_over_t"] for line in lines if "validation_loss" in line)
    assert first == second


def test_micro_batches_that_fit_and_gradient_checkpointing_change_nothing(train):
    plain = train("plain")
    found = train("found", "training.find_micro_batch=true", "training.gradient_checkpointing=true")
    a, b = (load_file(run / CHECKPOINT / "model.safetensors") for run in (plain, found))
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=0, atol=1e-4)
    assert json.loads((found / CHECKPOINT / "state.json").read_text())["accumulation"] == 1


def test_noise_is_drawn_once_a_step(train, monkeypatch):
    purposes, generator = [], randomness.generator
    monkeypatch.setattr(randomness, "generator", lambda *of: purposes.append(of[1:]) or generator(*of))
    train("run", "training.gradient_accumulation_steps=4", "training.max_steps=2")
    assert [purpose for purpose in purposes if purpose[0] == "ldm"] == [("ldm", 0), ("ldm", 1)]


def test_a_step_is_saved_before_it_is_drawn(runs, arguments_of, run_script, tmp_path, monkeypatch):
    """So that what goes wrong in drawing costs no step: here a prior that is deleted while the U-Net is trained."""
    shutil.copytree(runs / "prior", tmp_path / "prior")
    monkeypatch.setattr(randomness, "seed_dropout", lambda *_: shutil.rmtree(tmp_path / "prior", ignore_errors=True))
    arguments = arguments_of("ldm", runs, tmp_path / "run", f"prior={tmp_path / 'prior'}")
    assert run_script("ldm", arguments) == 2
    assert (tmp_path / "run" / CHECKPOINT / "manifest.json").is_file()
    shutil.copytree(runs / "prior", tmp_path / "prior")
    assert run_script("ldm", [*arguments, "--resume"]) == 0
    assert (tmp_path / "run" / UNET).is_file()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("zero_terminal_snr=true prediction_type=epsilon", "must be false with prediction_type=epsilon"),
        ("average_lengths=[0.5]", "average_lengths must be different thousandths, each in [0.001, 0.28]"),
        ("validation_split=test", "validation_split must be null unless autoencoder is none"),
        ("validation_cache=absent", "cache absent: no such folder"),
        ("training.optimizer=adam", "training.optimizer must be one of adamw, adamw_8bit, muon"),
    ],
)  # fmt: skip
def test_what_cannot_be(runs, arguments_of, fails, tmp_path, option, words):
    assert words in fails("ldm", arguments_of("ldm", runs, tmp_path / "run", *option.split()))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["prior", "clip"])
def test_stages_that_search_no_micro_batch(runs, arguments_of, fails, tmp_path, stage):
    arguments = arguments_of(stage, runs, tmp_path / "run", "training.find_micro_batch=true")
    assert "training.find_micro_batch true" in fails(stage, arguments)


def test_a_tracker_that_is_not_installed(runs, arguments_of, fails, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = fails("prior", arguments_of("prior", runs, tmp_path / "run", "training.wandb_project=shapes"))
    assert 'pip install "ldm[wandb]"' in line
    assert not (tmp_path / "run").exists()


def test_a_process_that_does_not_end_in_noise_is_told_of(capsys):
    """The endpoints of linear schedules are those of 1,000 steps, however many there are."""
    for schedule, steps, left in (("linear", 100, "0.60"), ("linear", 1000, None), ("squaredcos_cap_v2", 100, None)):
        config = LdmConfig(output_dir="run", autoencoder="none", beta_schedule=schedule, num_train_timesteps=steps)
        task.configured_alpha_bar(config)
        said = capsys.readouterr().err
        assert (f"ends with {left} of the picture" in said) if left else not said
