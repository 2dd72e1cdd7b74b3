"""Configurations: files of the project load, overrides reach every key, mistakes are one line."""

from pathlib import Path

import pytest

from ldm import configuration
from ldm.config import AutoencoderConfig, CacheConfig, ClipConfig, LdmConfig, PriorConfig
from ldm.errors import UserError, exit_code_of
from ldm.last_step_config import LastStepConfig

ROOT = Path(__file__).parents[2]
KINDS = {
    "autoencoder": AutoencoderConfig,
    "clip": ClipConfig,
    "prior": PriorConfig,
    "ldm": LdmConfig,
    "ldm_text": LdmConfig,
    "cache": CacheConfig,
    "last_step": LastStepConfig,
    **dict.fromkeys(("plain", "denoising", "sparse", "k_sparse", "variational"), AutoencoderConfig),
}


@pytest.mark.parametrize(
    "path",
    sorted(path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name != "accelerate"),
    ids=lambda path: str(path.name),
)
def test_every_shipped_config_loads(path):
    loaded = configuration.load(KINDS[path.stem], path)
    assert loaded.output_dir == f"runs/{path.parent.name}/{path.stem}"


def test_save_and_load_give_an_equal_config(tmp_path):
    first = configuration.load(LdmConfig, ROOT / "configs/shapes/ldm.yaml", ["seed=7", "training.betas=[0.8,0.95]"])
    configuration.save(first, tmp_path / "config.yaml")
    assert configuration.load(LdmConfig, tmp_path / "config.yaml") == first
    assert first.seed == 7 and first.training.betas == [0.8, 0.95]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.max_step=3", ["training.max_step", "did you mean 'training.max_steps'"]),
        ("trainin.max_steps=3", ["trainin"]),
        ("outptu_dir=x", ["did you mean 'output_dir'"]),
        ("training.max_steps=0", ["training.max_steps", "> 0", "got 0"]),
        ("training.max_steps=many", ["many", "Integer"]),
        ("training.precision=bf15", ["training.precision", "did you mean 'bf16'"]),
        ("caption_dropout=1.5", ["caption_dropout", "1.5"]),
        ("joint_dropout=0.5", ["joint_dropout", "0.5"]),
        ("sample_prior_guidance_scale=-1", ["sample_prior_guidance_scale", "-1"]),
        ("max_noise_level=1000", ["max_noise_level", "1000"]),
        ("data.source=''", ["data.source must be", "got ''"]),
        ("data.source=", ["data.source", "needs a value"]),
        ("num_train_timesteps=0", ["num_train_timesteps", "> 0"]),
        ("training.warmup_steps=-5", ["training.warmup_steps", ">= 0", "-5"]),
        ("training.weight_decay=-0.1", ["training.weight_decay", ">= 0"]),
        ("training.betas=[0.9]", ["training.betas", "two numbers in [0, 1)", "[0.9]"]),
        ("training.betas=[0.9,1.5]", ["training.betas", "1.5"]),
        ("average_lengths=[0.0001]", ["average_lengths", "[0.001, 0.28]"]),
        ("average_lengths=[0.05,0.0502]", ["average_lengths", "different thousandths"]),
        ("prior=null", ["sample_prompts", "train_prior.py"]),
        ("training.max_steps", ["key=value"]),
    ],
)
def test_mistakes_are_one_line_that_names_them(override, words):
    with pytest.raises(UserError) as error:
        configuration.load(LdmConfig, ROOT / "configs/shapes/ldm.yaml", [override])
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_noise_on_image_embeddings_has_levels_of_its_own():
    few = ["num_train_timesteps=10", "max_noise_level=999"]
    assert configuration.load(LdmConfig, ROOT / "configs/shapes/ldm.yaml", few).max_noise_level == 999


@pytest.mark.parametrize(
    ("name", "override", "allowed"),
    [
        ("digits/plain", "adversarial_weight=0.5", "left out with kind=plain"),
        ("shapes/autoencoder", "greyscale=true", "left out with kind=kl"),
        ("shapes/autoencoder", "test_split=test", "left out with kind=kl"),
        ("shapes/autoencoder", "discriminator_channels=0", ">= 1"),
        ("shapes/autoencoder", "statistics_images=-1", ">= 1"),
    ],
)
def test_options_of_autoencoders_that_would_do_nothing_or_harm(name, override, allowed):
    with pytest.raises(UserError, match=f"{override.split('=')[0]} must be {allowed}, got "):
        configuration.load(AutoencoderConfig, ROOT / f"configs/{name}.yaml", [override])


@pytest.mark.parametrize(
    "override",
    ["prior=runs/shapes/prior", "image_embedding_dropout=0.2", "joint_dropout=0.1", "max_noise_level=999",
     "sample_prior_guidance_scale=4"],
)  # fmt: skip
def test_what_would_do_nothing_where_captions_alone_guide(override):
    text_only = ROOT / "configs/shapes/ldm_text.yaml"
    with pytest.raises(UserError, match=f"{override.split('=')[0]} must be left out with image_conditioning=false"):
        configuration.load(LdmConfig, text_only, [override])
    assert configuration.load(LdmConfig, text_only, ["caption_dropout=0.01"]).caption_dropout == 0.01


@pytest.mark.parametrize("path", ["lora.yaml", "digits/ldm.yaml"])
def test_captions_alone_are_no_choice_of_adapters_and_pixels(path):
    with pytest.raises(UserError, match="image_conditioning must be left out in pixel space"):
        configuration.load(LdmConfig, ROOT / "configs" / path, ["image_conditioning=false"])


def test_views_that_are_told_apart_must_differ():
    clip, same = ROOT / "configs/shapes/clip.yaml", ["image_image_weight=0.5"]
    with pytest.raises(UserError, match="image_image_weight must be 0 unless random_crop < 1 or colour_jitter > 0"):
        configuration.load(ClipConfig, clip, same)
    assert configuration.load(ClipConfig, clip, [*same, "random_crop=0.5"]).image_image_weight == 0.5


def test_a_missing_file_and_a_missing_key(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        configuration.load(LdmConfig, tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match="output_dir must be set"):
        configuration.load(LdmConfig, tmp_path / "empty.yaml")
    (tmp_path / "broken.yaml").write_text("seed: [1\n")
    with pytest.raises(UserError, match=r"broken\.yaml"):
        configuration.load(LdmConfig, tmp_path / "broken.yaml")


def test_unknown_model_arguments_name_the_nearest():
    from diffusers import UNet2DConditionModel

    configuration.check_arguments("model", {"layers_per_block": 1}, UNet2DConditionModel)
    with pytest.raises(UserError, match=r"model\.layer_per_block.*did you mean 'layers_per_block'"):
        configuration.check_arguments("model", {"layer_per_block": 1}, UNet2DConditionModel)


@pytest.mark.parametrize("arguments", [{"num_layers": -1}, {"hidden_sizes": [8, 0]}, {"latent_channels": 0}])
def test_sizes_that_are_none_are_refused(arguments):
    """A network of -1 layers can be built, and trained."""
    with pytest.raises(UserError, match=rf"model\.{next(iter(arguments))} must be at least 1, got "):
        configuration.check_arguments("model", arguments, lambda num_layers, hidden_sizes, latent_channels: None)


def test_what_a_class_cannot_be_built_of_is_told_in_a_line():
    from diffusers import PriorTransformer, UNet2DModel

    def refused(kind, **arguments):
        with pytest.raises(UserError) as error:
            configuration.built("model", kind, arguments, {"in_channels": 3} if kind is UNet2DModel else {})
        assert "\n" not in str(error.value)
        return str(error.value)

    assert refused(UNet2DModel, block_out_channels=64).startswith("model cannot be built so: TypeError: ")
    assert "ZeroDivisionError" in refused(PriorTransformer, attention_head_dim=0)
    assert refused(UNet2DModel, down_block_types=["Foo"]).startswith("model: Must provide the same number")
    assert refused(UNet2DModel, in_channels=4).startswith("model.in_channels 4: it follows from the data")


def test_exit_codes(capsys):
    def fails(error):
        raise error

    from ldm.errors import RunError

    assert exit_code_of(lambda: None) == 0
    assert exit_code_of(lambda: fails(UserError("the user's"))) == 2
    assert exit_code_of(lambda: fails(RunError("the run's"))) == 1
    assert capsys.readouterr().err == "error: the user's\nfailed: the run's\n"
    assert exit_code_of(lambda: fails(OSError(5, "Input/output error", "file"))) == 1  # which nobody expected
    assert capsys.readouterr().err == "failed: [Errno 5] Input/output error: 'file'\n"
    assert exit_code_of(lambda: fails(PermissionError(13, "Permission denied", "file"))) == 2
    assert capsys.readouterr().err == "error: 'file' may not be opened; change its permissions, or name another\n"
