"""Adapters trained by train_ldm.py for a pipeline that there is: what they change, where they open, how they resume."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableUnCLIPPipeline
from safetensors.torch import load_file, save_file

from ldm import hub
from pipelines import LatentDiffusionImg2ImgPipeline, LatentDiffusionPipeline

ROOT = Path(__file__).parents[2]
CHECKPOINT = "checkpoints/step-000004"
SMALL = [
    "data.source=shapes",
    "data.max_images=24",
    "lora.rank=2",
    "lora.target_modules=[to_q,to_k,to_v,to_out.0]",
    "lora.image_embeddings=image",
    "lora.alpha=6",
    "sample_prompts=[a small red circle on the left]",
    "training.precision=fp32",
    "training.max_steps=4",
    "training.batch_size=8",
    "training.learning_rate=0.02",
    "training.warmup_steps=0",
    "training.log_every=1",
    "training.sample_every=4",
    "training.checkpoint_every=2",
]
DRAW = {"prompt": "a small red circle on the left", "guidance_scale": 2.0, "output_type": "np"}
STEPS = {"num_inference_steps": 4, "prior_num_inference_steps": 3}


def arguments(base: Path, output: Path, *further: str) -> list[str]:
    return ["--config", str(ROOT / "configs" / "lora.yaml"), f"init={base}", f"output_dir={output}", *SMALL, *further]


def bytes_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def drawn(pipe, **options) -> np.ndarray:
    if isinstance(pipe, LatentDiffusionPipeline) and pipe.prior is not None:
        options |= {"num_prior_samples": 1, "prior_guidance_scale": 4.0}  # as stock does
    pipe.set_progress_bar_config(disable=True)
    return pipe(**DRAW, **options, generator=torch.Generator().manual_seed(0)).images


def assert_same(one: Path, two: Path) -> None:
    paths = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert paths
    for path in paths:
        a, b = load_file(one / path), load_file(two / path)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), path


@pytest.fixture(scope="module")
def base_without_prior(base, tmp_path_factory) -> Path:
    """In the layout of StableDiffusionPipeline: the U-Net, untrained, is guided by tokens alone and predicts ε."""
    pipe = LatentDiffusionPipeline.from_pretrained(base)
    torch.manual_seed(0)
    config = {key: value for key, value in pipe.unet.config.items() if not key.startswith("_")}
    config |= {"class_embed_type": None, "projection_class_embeddings_input_dim": None}
    folder = tmp_path_factory.mktemp("base") / "model"
    LatentDiffusionPipeline(
        vae=pipe.vae,
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
        unet=type(pipe.unet)(**config),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1,
                                clip_sample=False),
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def run(base, run_script, tmp_path_factory) -> Path:
    """Four steps of adapters for both networks, that leave the base as it is."""
    folder, before = tmp_path_factory.mktemp("lora") / "run", bytes_of(base)
    assert run_script("ldm", arguments(base, folder, "lora.text_encoder=true", "lora.dropout=0.1")) == 0
    assert bytes_of(base) == before
    return folder


def test_a_run_keeps_adapters_alone(run):
    for group in ("model", "ema"):
        stored = load_file(run / CHECKPOINT / f"{group}.safetensors")
        assert stored and all(".lora_" in name for name in stored)
        assert {name.partition(".")[0] for name in stored} == {"unet", "text_encoder"}
    assert len(load_file(run / CHECKPOINT / "optimizer.safetensors")) == 3 * len(stored)
    assert [path.name for path in (run / "model").iterdir()] == [hub.ADAPTERS]
    assert (run / "samples" / "step-000004.png").is_file()
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4 and all(0 < loss < 10 for loss in losses)


def test_the_averaged_adapters_are_what_is_written(run):
    averaged = load_file(run / CHECKPOINT / "ema.safetensors")
    written = load_file(run / "model" / hub.ADAPTERS)
    assert len(written) == len(averaged)
    ups = {
        name.removeprefix("unet.").replace("lora_B.default", "lora.up"): value
        for name, value in averaged.items()
        if name.startswith("unet.") and "lora_B" in name
    }
    assert ups and all(torch.equal(written[f"unet.{name}"], value) for name, value in ups.items())
    assert all(value.any() for value in ups.values())


def test_stock_diffusers_opens_them_and_draws_the_same(base, run):
    ours, stock = LatentDiffusionPipeline.from_pretrained(base), DiffusionPipeline.from_pretrained(base)
    assert type(stock) is StableUnCLIPPipeline
    before = drawn(ours, **STEPS)
    ours.load_lora_weights(run)
    stock.load_lora_weights(run / "model")
    for scale in (None, 0.5):
        options = STEPS if scale is None else STEPS | {"cross_attention_kwargs": {"scale": scale}}
        pictures = drawn(ours, **options)
        assert np.abs(pictures - before).max() > 1 / 255
        assert np.abs(pictures - drawn(stock, **options)).max() <= 1 / 255
    assert not np.allclose(drawn(ours, **STEPS), pictures, atol=1e-3)  # a scale of 0.5 is not one of 1
    nothing = drawn(ours, **STEPS, cross_attention_kwargs={"scale": 0.0})
    assert np.abs(nothing - before).max() <= 1e-5


def test_fused_unfused_and_unloaded(base, run, tmp_path):
    pipe = LatentDiffusionPipeline.from_pretrained(base)
    before = drawn(pipe, **STEPS)
    pipe.load_lora_weights(run, adapter_name="shapes")
    with_adapters = drawn(pipe, **STEPS)
    with pytest.raises(ValueError, match=r"adapters shapes are loaded.*fuse_lora\(\)"):
        pipe.save_pretrained(tmp_path / "model")
    pipe.fuse_lora()
    assert np.abs(drawn(pipe, **STEPS) - with_adapters).max() <= 1e-4
    pipe.unfuse_lora()
    assert np.abs(drawn(pipe, **STEPS) - with_adapters).max() <= 1e-4
    pipe.set_adapters("shapes", 0.0)
    assert np.abs(drawn(pipe, **STEPS) - before).max() <= 1e-4
    pipe.set_adapters("shapes", 1.0)
    redrawing = LatentDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert redrawing.get_active_adapters() == ["shapes"]
    pipe.unload_lora_weights()
    assert np.abs(drawn(pipe, **STEPS) - before).max() <= 1e-4
    pipe.load_lora_weights(run / "model" / hub.ADAPTERS)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "model")
    again = drawn(DiffusionPipeline.from_pretrained(tmp_path / "model"), **STEPS)
    assert np.abs(again - with_adapters).max() <= 1 / 255


def test_resumed_run_equals_the_uninterrupted_one(base, run, run_script, logged, tmp_path):
    again = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(again / "model")
    shutil.rmtree(again / CHECKPOINT)
    further = ["lora.text_encoder=true", "lora.dropout=0.1", "--resume"]
    assert run_script("ldm", arguments(base, again, *further)) == 0
    assert_same(run, again)
    assert logged(again) == logged(run)


def test_adapters_go_on_with_the_base_they_were_begun_on_alone(base, run, fails, tmp_path):
    other, again = shutil.copytree(base, tmp_path / "base"), shutil.copytree(run, tmp_path / "run")
    (other / "report.json").write_text("{}")
    assert hub.sha256_of_model(other) == hub.sha256_of_model(base)
    weights = load_file(path := other / "vae" / "diffusion_pytorch_model.safetensors")
    weights["decoder.conv_out.bias"] += 1
    save_file(weights, path)
    further = ["lora.text_encoder=true", "lora.dropout=0.1", "resume.allow=[init]", "--resume"]
    assert "has changed since the run began" in fails("ldm", arguments(other, again, *further))


def test_a_model_without_a_prior_and_its_own_process(base_without_prior, run_script, tmp_path):
    """ε over scaled-linear noise, neither of them configured; in less memory, and with a loss on other images."""
    further = ["validation_split=test", "training.find_micro_batch=true", "training.gradient_checkpointing=true"]
    assert run_script("ldm", arguments(base_without_prior, tmp_path / "run", *further)) == 0
    assert "prediction_type: epsilon" in (tmp_path / "run" / "config.yaml").read_text()
    assert '"validation_loss"' in (tmp_path / "run" / "metrics.jsonl").read_text()
    ours, stock = (kind.from_pretrained(base_without_prior) for kind in (LatentDiffusionPipeline, DiffusionPipeline))
    assert type(stock) is StableDiffusionPipeline
    before = drawn(ours, num_inference_steps=4)
    ours.load_lora_weights(tmp_path / "run")
    stock.load_lora_weights(tmp_path / "run" / "model")
    pictures = drawn(ours, num_inference_steps=4)
    assert np.abs(pictures - before).max() > 1 / 255
    assert np.abs(pictures - drawn(stock, num_inference_steps=4)).max() <= 1 / 255


def test_gradient_checkpointing_and_compiled_blocks_change_nothing(base, run, run_script, tmp_path):
    further = ["lora.text_encoder=true", "lora.dropout=0.1", "training.gradient_checkpointing=true"]
    assert run_script("ldm", arguments(base, tmp_path / "run", *further)) == 0
    one, two = (load_file(folder / CHECKPOINT / "model.safetensors") for folder in (run, tmp_path / "run"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-4)


def test_parts_from_elsewhere(base, runs, run_script, tmp_path):
    """The same parts, from the runs that the base was assembled of (in half precision)."""
    parts = [f"{option}={runs / option}" for option in ("autoencoder", "clip", "prior")]
    assert run_script("ldm", arguments(base, tmp_path / "run", *parts, "training.max_steps=2")) == 0


def test_bf16_trains_adapters_in_fp32(base, run_script, tmp_path):
    further = ["lora.text_encoder=true", "training.precision=bf16", "training.max_steps=2", "sample_prompts=[]"]
    assert run_script("ldm", arguments(base, tmp_path / "run", *further)) == 0
    stored = load_file(tmp_path / "run" / "model" / hub.ADAPTERS)
    assert {value.dtype for value in stored.values()} == {torch.float32}


def test_two_processes_train_what_one_does(base, run_script, pair, logged, tmp_path):
    further = ["lora.text_encoder=true", "sample_prompts=[]", "training.max_steps=2"]
    halves = "training.gradient_accumulation_steps=2"
    assert run_script("ldm", arguments(base, tmp_path / "one", *further, halves)) == 0
    pair.run("ldm", arguments(base, tmp_path / "two", *further))
    one, two = ([line["loss"] for line in logged(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("lora.rank=0", "lora.rank must be > 0, got 0"),
        ("lora.alpha=nan", "lora.alpha must be > 0 or null, got nan"),
        ("lora.dropout=1", "lora.dropout must be in [0, 1), got 1"),
        ("lora.image_embeddings=none", "lora.image_embeddings must be one of image, prior, got 'none'"),
        ("lora.rnak=4", "unknown key 'lora.rnak'; did you mean 'lora.rank'?"),
        ("lora.target_modules=[to_w]", "lora.target_modules 'to_w': no layer of UNet2DConditionModel is called so"),
        ("lora.text_encoder=true lora.text_target_modules=[to_q]", "'to_q': no layer of CLIPTextModel is called so"),
        ("init=scratch", "init must be the folder or repository of a pipeline with lora"),
        ("init=absent", "init absent: model folder 'absent' does not exist"),
        ("prediction_type=epsilon", "prediction_type epsilon: the model in init"),
        ("data.image_size=31", "data.image_size 31: the networks of init"),
        ("cache=runs/cache", "cache must be empty with lora"),
        ("model.layers_per_block=2", "model must be empty with lora"),
        ("autoencoder=none sample_prompts=[]", "lora must be null in pixel space"),
        ("average_lengths=[0.1]", "average_lengths must be empty with lora"),
    ],
)
def test_what_cannot_be(base, fails, tmp_path, option, words):
    assert words in fails("ldm", arguments(base, tmp_path / "run", *option.split()))
    assert not (tmp_path / "run").exists()


def test_adapters_are_for_the_last_stage(runs, arguments_of, fails, base, tmp_path):
    line = fails("prior", arguments_of("prior", runs, tmp_path / "run", "lora.rank=4"))
    assert "unknown key 'lora'" in line or "unknown key 'lora.rank'" in line
    assert "model_index.json' is missing" in fails("ldm", arguments(runs / "prior" / "model", tmp_path / "run"))


def test_a_model_that_lacks_the_image_tower(base, fails, run_script, tmp_path):
    """What the prior makes of captions can take its part, the same in every division of a batch."""
    without = shutil.copytree(base, tmp_path / "model", ignore=shutil.ignore_patterns("image_encoder"))
    line = fails("ldm", arguments(without, tmp_path / "run"))
    assert "image embeddings guide its U-Net, and it has no image_encoder" in line and "clip=" in line
    further = ["lora.image_embeddings=prior", "training.max_steps=1", "sample_prompts=[]"]
    losses = []
    for name, accumulation in (("whole", 1), ("halves", 2)):
        divided = f"training.gradient_accumulation_steps={accumulation}"
        assert run_script("ldm", arguments(without, tmp_path / name, *further, divided)) == 0
        losses.append(json.loads((tmp_path / name / "metrics.jsonl").read_text())["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_adapters_are_not_divided(base, fails, tmp_path, monkeypatch):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert "its adapters (lora)" in fails("ldm", arguments(base, tmp_path / "run"))
