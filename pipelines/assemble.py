"""From the run folders of the stages to one pipeline folder that stock Diffusers opens."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.clip.parts import IMAGE_ENCODER, PROCESSORS, WHOLE, parts_of
from ldm.components.configs import SCHEDULERS, read_json
from ldm.errors import RunError, UserError
from ldm.files import expanded, make_readable
from ldm.hub import INDEX, check_component, check_shapes, is_repository_name, resolve
from pipelines.card import TRAINING
from pipelines.settings import SETTINGS, SETTINGS_FILE

COMPONENTS = {
    "autoencoder": {"vae": "AutoencoderKL"},
    "clip": {"text_encoder": "CLIPTextModelWithProjection", "tokenizer": "CLIPTokenizer"},
    "prior": {"prior": "PriorTransformer", "prior_scheduler": "DDPMScheduler"},
    "unet": {"unet": "UNet2DConditionModel", "scheduler": "DDIMScheduler"},
}
"""What each stage gives, with the class of it; of schedulers any that fits."""
OF_IMAGE_EMBEDDINGS = {"image_normalizer": "StableUnCLIPImageNormalizer", "image_noising_scheduler": "DDPMScheduler"}
"""The same of a U-Net that image embeddings guide, beside those."""

FLOAT_DTYPES = ("float16", "float32")


def assemble(
    autoencoder: str | Path,
    clip: str | Path,
    prior: str | Path | None,
    unet: str | Path,
    output: str | Path,
    dtype: str = "float16",
) -> Path:
    """Puts the stages' components together in `output`, weights in `dtype` (float16 or float32). Returns the folder.

    Each stage is a run folder, its `model/` folder, or a pipeline's folder or repository, of which that stage is taken;
    `prior` None for a U-Net of captions alone. The pipeline draws with the guidance of the U-Net run's sample grids,
    with the settings that a run of the last step was trained for, or with those of the U-Net's pipeline, and computes
    in float32, whatever the weights are stored in, unless it is opened otherwise. CLIP's image tower is copied beside
    the components: what reads images, and what a cache of further training is made with; without a prior all of CLIP
    is, since no component then has the text tower's projection. Stock pipelines pass over it. Raises `UserError` where
    a stage is incomplete or does not fit the others, or `output` is in use; nothing is left behind then.
    """
    if dtype not in FLOAT_DTYPES:
        raise UserError(f"dtype is {dtype!r}; it must be one of {', '.join(FLOAT_DTYPES)}")
    stages = run_folders({"autoencoder": autoencoder, "clip": clip, "prior": prior, "unet": unet})
    folders = find_components(stages)
    check_fit(folders)
    output = check_output_folder(output)

    with written_whole(output) as partial:
        partial.mkdir(parents=True)
        _save_pipeline(folders, partial, dtype, _settings(stages["unet"], "prior" in folders))
        _keep_training(stages, partial)
        for file in partial.rglob("*.safetensors"):
            make_readable(file)
    return output


@contextmanager
def written_whole(output: Path) -> Iterator[Path]:
    """Gives a folder to write into, beside `output` (`check_output_folder`), which it becomes unless something fails.

    Raises:
        RunError: the disk failed; nothing is left behind.
    """
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        yield partial
        if output.exists():
            output.rmdir()  # empty, as was checked
        partial.rename(output)
    except OSError as error:
        raise RunError(f"'{output}' could not be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_output_folder(output: str | Path) -> Path:
    """A folder that can be made, or an empty one. Raises `UserError` otherwise."""
    output = expanded(output).absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output '{output}' is already in use; name a new folder, or remove it first")
    return check_can_be_made(output)


def check_can_be_made(output: Path) -> Path:
    """An absolute path. Raises `UserError` unless it is, or is under, a folder that can be written."""
    existing = next(folder for folder in (output, *output.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"output '{output}' cannot be written: '{existing}' is not a writable folder; name another")
    return output


def run_folders(stages: dict[str, str | Path | None]) -> dict[str, Path]:
    """Stage to run -> stage to folder on this machine, without those that are None. Raises `UserError` where there is
    none."""
    folders: dict[str | Path, Path] = {}
    given = {stage: name for stage, name in stages.items() if name is not None}
    for stage, name in given.items():
        folder = folders.get(name, expanded(name))
        if not folder.exists() and is_repository_name(name):
            try:
                folder = resolve(name)
            except UserError as error:
                raise UserError(f"{stage}: {error}") from None
        if not folder.is_dir():
            raise UserError(f"{stage} '{name}' is not a folder; give the output_dir of a finished {stage} run")
        folders[name] = folder
    return {stage: folders[name] for stage, name in given.items()}


def find_components(stages: dict[str, Path]) -> dict[str, Path]:
    """Stage to run folder -> component to folder, each whole. Raises `UserError` otherwise, and where there is a prior
    that the U-Net has no use for, or none that it needs."""
    folders = {}
    for stage, run in stages.items():
        folders |= _find(stage, run, COMPONENTS[stage])
    if _is_guided_by_images(folders["unet"], stages.get("prior")):
        folders |= _find("unet", stages["unet"], OF_IMAGE_EMBEDDINGS)
    return folders


def _find(stage: str, run: Path, components: dict[str, str]) -> dict[str, Path]:
    model, folders = run / "model" if (run / "model").is_dir() else run, {}
    clip = parts_of(model) if stage == "clip" else None  # in a pipeline's folder its parts have other names
    for component, class_name in components.items():
        folder = model / component if clip is None else getattr(clip, component)
        if not folder.is_dir():
            if component == "vae" and (model / "autoencoder" / "config.json").is_file():
                kind = read_json(model / "autoencoder" / "config.json").get("_class_name")
                raise UserError(
                    f"{stage} '{run}' holds a {kind}, whose codes are vectors without height and width: it cannot "
                    "be the latent stage of a text-to-image model; give a run of train_autoencoder.py with kind=kl"
                )
            raise UserError(
                f"{stage} '{run}' has no '{component}' in it; give a finished {stage} run "
                f"(its model folder holds {', '.join(components)})"
            )
        try:
            check_component(folder, SCHEDULERS if class_name in SCHEDULERS else (class_name,))
        except UserError as error:
            raise UserError(f"{stage} '{run}': {error}") from None
        folders[component] = folder
    return folders


def _is_guided_by_images(unet: Path, prior: str | Path | None) -> bool:
    """Whether image embeddings guide a U-Net. Raises `UserError` unless `prior` makes them where they do, and there
    alone."""
    is_guided = read_json(unet / "config.json").get("class_embed_type") is not None
    if is_guided and prior is None:
        raise UserError(
            "--prior is missing: image embeddings guide this U-Net, and a prior makes them of captions; give a run of "
            "train_prior.py, or train the U-Net with image_conditioning=false"
        )
    if prior is not None and not is_guided:
        raise UserError(
            f"--prior '{prior}': captions alone guide this U-Net, whose class_embed_type is None; leave it out, or "
            "train the U-Net with image_conditioning=true"
        )
    return is_guided


def check_fit(folders: dict[str, Path]) -> None:
    """Raises `UserError` at the first pair of sizes, one of each of two stages, that should be equal and are not."""
    vae, text, unet = (read_json(folders[name] / "config.json") for name in ("vae", "text_encoder", "unet"))
    tokenizer = read_json(folders["tokenizer"] / "tokenizer_config.json")
    embedding, width = text.get("projection_dim"), text.get("hidden_size")
    length = text.get("max_position_embeddings")

    def equal(left: str, left_value: object, right: str, right_value: object, remedy: str) -> None:
        if left_value != right_value:
            raise UserError(f"{left} is {left_value}, but {right} is {right_value}; {remedy}")

    retrain_unet = "train the U-Net with this autoencoder and CLIP"
    autoencoder_latents = vae.get("latent_channels")
    equal("the U-Net's in_channels", unet.get("in_channels"), "the autoencoder's latent_channels", autoencoder_latents,
          retrain_unet)  # fmt: skip
    equal("the U-Net's cross_attention_dim", unet.get("cross_attention_dim"), "CLIP's text width", width, retrain_unet)
    equal("the tokenizer's model_max_length", tokenizer.get("model_max_length"), "CLIP's context length", length,
          "export CLIP again")  # fmt: skip
    if "prior" not in folders:
        return
    prior, normalizer = (read_json(folders[name] / "config.json") for name in ("prior", "image_normalizer"))
    read_by_prior, retrain_prior = prior.get("embedding_dim"), "train the prior with this CLIP"
    equal("the U-Net's class_embed_type", unet.get("class_embed_type"), "the pipeline's", "projection",
          "train the U-Net with image embeddings")  # fmt: skip
    equal("the U-Net's projection_class_embeddings_input_dim", unet.get("projection_class_embeddings_input_dim"),
          "twice CLIP's embedding size", 2 * embedding, retrain_unet)  # fmt: skip
    equal("the image normaliser's embedding_dim", normalizer.get("embedding_dim"), "CLIP's embedding size", embedding,
          retrain_unet)  # fmt: skip
    for name in ("embedding_dim", "embedding_proj_dim", "clip_embed_dim"):
        equal(f"the prior's {name}", prior.get(name) or read_by_prior, "CLIP's embedding size", embedding,
              retrain_prior)  # fmt: skip
    equal("the prior's embedding_dim", read_by_prior, "CLIP's text width", width,
          "the prior reads both through one size: train CLIP with equal ones")  # fmt: skip
    equal("the prior's num_embeddings", prior.get("num_embeddings"), "CLIP's context length", length, retrain_prior)


def _settings(run: Path, has_prior: bool) -> dict[str, float]:
    """What the U-Net's run says that it is to be drawn with, or else drew its sample grids with: what its pictures were
    judged by while it trained; or the settings of its pipeline."""
    import yaml

    if (run / INDEX).is_file():
        return read_json(run / INDEX).get(SETTINGS, {})
    if (said := (run / "model" if (run / "model").is_dir() else run) / SETTINGS_FILE).is_file():
        return read_json(said)
    if not (run / "config.yaml").is_file():
        return {}
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    known = {name: config.get(f"sample_{name}") for name in ("guidance_scale", "prior_guidance_scale")}
    return {name: value for name, value in known.items() if value is not None and (has_prior or "prior" not in name)}


def _save_pipeline(folders: dict[str, Path], output: Path, dtype: str, settings: dict[str, float]) -> None:
    # Imported here: a mistake in the folders is told without waiting for torch.
    import torch
    from diffusers import AutoencoderKL, PriorTransformer, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    from ldm.clip.export import text_tower
    from pipelines.text_to_image import LatentDiffusionPipeline

    def model(kind: type, name: str):
        return kind.from_pretrained(folders[name], torch_dtype=torch.float32, use_safetensors=True)

    for name, folder in folders.items():
        if name != "tokenizer":
            check_shapes(check_component(folder))
    tokenizer = CLIPTokenizer.from_pretrained(folders["tokenizer"])
    with_projection = CLIPTextModelWithProjection.from_pretrained(folders["text_encoder"], dtype=torch.float32)

    parts = {
        "vae": model(AutoencoderKL, "vae"),
        "text_encoder": text_tower(with_projection),
        "tokenizer": tokenizer,
        "unet": model(UNet2DConditionModel, "unet"),
        "scheduler": _scheduler(folders["scheduler"]),
    }
    if "prior" in folders:
        parts |= {
            "prior_tokenizer": tokenizer,
            "prior_text_encoder": with_projection,
            "prior": model(PriorTransformer, "prior"),
            "prior_scheduler": _skipping(_scheduler(folders["prior_scheduler"])),
            "image_normalizer": model(StableUnCLIPImageNormalizer, "image_normalizer"),
            "image_noising_scheduler": _scheduler(folders["image_noising_scheduler"]),
        }
    else:
        _take_as_stock_does(parts["scheduler"])
    pipeline = LatentDiffusionPipeline(**parts)
    pipeline.default_settings = settings
    pipeline.save_pretrained(output)
    clip = parts_of(folders["text_encoder"].parent)
    beside, kept = output, {IMAGE_ENCODER: clip.image_encoder, PROCESSORS[0]: clip.image_processor}
    if "prior" not in folders:
        beside, kept = output / WHOLE, {"text_encoder": clip.text_encoder, "tokenizer": clip.tokenizer, **kept}
    for name, source in kept.items():
        if source is not None:
            shutil.copytree(source, beside / name)
    _forget_paths(output)
    # Only the files are converted. The text towers' configs keep saying float32, since Transformers computes in what
    # its config says and Diffusers in float32: stock would mix the two.
    for file in output.rglob("*.safetensors"):
        _convert(file, getattr(torch, dtype))


def _keep_training(stages: dict[str, Path], output: Path) -> None:
    """Each stage's configuration, without the paths of this machine, and its last metrics: for the card."""
    import yaml

    for stage, run in stages.items():
        for file in (run / TRAINING).glob(f"{stage}.*"):  # kept by the pipeline that it is of
            (output / TRAINING).mkdir(exist_ok=True)
            shutil.copyfile(file, output / TRAINING / file.name)
        if (run / "config.yaml").is_file():
            (output / TRAINING).mkdir(exist_ok=True)
            config = _without_folders(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
            (output / TRAINING / f"{stage}.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
            if metrics := _last_metrics(run / "metrics.jsonl"):
                (output / TRAINING / f"{stage}.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def _last_metrics(path: Path) -> dict:
    """The last value of everything that a run has logged; {} where it has logged nothing."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {key: value for line in lines if line.endswith("}") for key, value in json.loads(line).items()}


def _without_folders(value):
    """Absolute paths as their last name, wherever they stand."""
    if isinstance(value, dict):
        return {key: _without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_folders(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _scheduler(folder: Path):
    import diffusers

    name = read_json(folder / "scheduler_config.json").get("_class_name")
    kind = getattr(diffusers, str(name), None) if str(name).endswith("Scheduler") else None
    if kind is None:
        raise UserError(f"'{folder}' names {name!r}, which is no scheduler of diffusers; train the stage again")
    return kind.from_pretrained(folder)


def _skipping(scheduler):
    """The same process under a scheduler that may skip timesteps.

    StableUnCLIPPipeline steps UnCLIPScheduler without saying where to, and it then takes one timestep of its 1000 at a
    time: after 25 steps the embedding is still noise. DDPMScheduler knows its steps, and reads the same config.
    """
    from diffusers import DDPMScheduler, UnCLIPScheduler

    return DDPMScheduler.from_config(scheduler.config) if isinstance(scheduler, UnCLIPScheduler) else scheduler


def _take_as_stock_does(scheduler) -> None:
    """Sets what StableDiffusionPipeline sets, with a warning, in any scheduler that says otherwise, so that ours draws
    what that draws."""
    for name, value in (("steps_offset", 1), ("clip_sample", False)):
        if name in scheduler.config:
            scheduler.register_to_config(**{name: value})


def _convert(file: Path, dtype) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in load_file(file).items()
    }
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{file.parent.name}: '{name}' is not finite in {dtype}; the run's weights are damaged")
    save_file(tensors, file, metadata={"format": "pt"})


def _forget_paths(folder: Path) -> None:
    """Takes the paths of this machine out of the components' configs."""
    for file in folder.rglob("*config.json"):
        config = read_json(file)
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
