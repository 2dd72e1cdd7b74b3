"""How a pipeline is opened, shared, saved and published: folders and repositories that stock Diffusers opens too."""

import inspect
import json
import sys
import warnings
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_unclip import UnCLIPScheduler

from ldm import hub
from ldm.components.configs import is_older
from ldm.errors import UserError
from ldm.files import make_readable
from pipelines.checks import check_known
from pipelines.settings import DEFAULT_SETTINGS, SETTINGS, Check, check_settings, telling_of

PRIOR_COMPONENTS = (
    "prior_tokenizer",
    "prior_text_encoder",
    "prior",
    "prior_scheduler",
    "image_normalizer",
    "image_noising_scheduler",
)
"""What the layout of StableUnCLIPPipeline has beside that of StableDiffusionPipeline."""
FIRST_OF_OURS = (0, 42)
"""The Diffusers that this package began with: what is older comes from others."""


class LatentDiffusionFolder(DiffusionPipeline):
    """What every pipeline of this package has in common with its folder."""

    commit: str | None = None
    """Of the repository that it was opened from; None where that was a folder."""
    folder: Path | None = None
    """On this machine, that it was opened from."""
    variant: str | None = None
    """Of the weights that it was opened with, such as "fp16"; None for the plain files."""

    @classmethod
    def default(cls) -> Self:
        """The bundled model, without a download."""
        return cls.from_pretrained(Path(__file__).parent / "default")

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None, **kwargs) -> Self:
        """Opens a folder, or a repository of the Hub at `revision`, after a check that it is whole.

        Computes in float32 whatever the files hold, unless `dtype` says otherwise. Further keyword arguments are
        `DiffusionPipeline.from_pretrained`'s, but none that would run a model's own code or open a pickle. Raises
        `UserError` for a name or a folder that cannot be used, `RunError` where a download broke off.
        """
        refuse_code_and_pickles(kwargs)
        variant = kwargs.get("variant")
        options = {key: kwargs.pop(key) for key in hub.DOWNLOAD_OPTIONS if key in kwargs}
        folder = hub.resolve(name, revision, variant, **options)
        components = hub.check_components(folder, leave_out=kwargs, variant=variant)
        index = hub.read_json(folder / cls.config_name)
        with telling_of(folder):
            check_settings(index.get(SETTINGS, {}))
        for component in ("vae", "text_encoder", "tokenizer", "unet", "scheduler"):
            if component not in kwargs and component not in components:
                raise UserError(
                    f"'{folder}' is a {index.get('_class_name')} without '{component}'; "
                    "give a folder in the layout of StableUnCLIPPipeline or StableDiffusionPipeline"
                )
        for component in components.values():
            hub.check_finite(component)
            hub.check_shapes(component)
        if "torch_dtype" not in kwargs:  # the older name of dtype
            kwargs.setdefault("dtype", torch.float32)
        pipeline = super().from_pretrained(str(folder), **{"use_safetensors": True, **kwargs})
        if index.get("_class_name") == "StableDiffusionPipeline":
            correct_as_stock_does(pipeline)
        known = inspect.signature(cls.__init__).parameters
        named = {name for name, entry in index.items() if isinstance(entry, list) and entry[-1] is not None}
        if passed_over := sorted(name for name in named - set(known) if not name.startswith("_")):
            print(f"note: {', '.join(passed_over)} of '{name}' not needed, and passed over", file=sys.stderr)
        pipeline.commit, pipeline.folder, pipeline.variant = hub.commit_of(folder), folder, variant
        if SETTINGS in index:
            with telling_of(folder):
                pipeline.default_settings = index[SETTINGS]
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> Self:
        """A pipeline of this kind with the components of another one, or those given in their place by their names.

        Each stays in the precision that it is in, where Diffusers' method would convert what both use to one; `dtype`
        converts all. Raises `UserError` where the other one lacks a component, and for unknown names.
        """
        dtype = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", dtype)
        known = inspect.signature(cls.__init__).parameters
        names = list(known)[1:]
        check_known(kwargs, names)
        parts = {name: part for name, part in pipeline.components.items() if name in names} | kwargs
        if absent := [name for name in names if known[name].default is inspect.Parameter.empty and name not in parts]:
            raise UserError(f"a {type(pipeline).__name__} has no '{absent[0]}'; give {absent[0]}=")
        own = cls(**parts)
        if "_name_or_path" in pipeline.config:
            own.register_to_config(_name_or_path=pipeline.config["_name_or_path"])
        if SETTINGS in pipeline.config:
            own.default_settings = pipeline.config[SETTINGS]
        for name in ("commit", "folder", "variant"):
            setattr(own, name, getattr(pipeline, name, None))
        return own if dtype is None else own.to(dtype=dtype)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs,
    ) -> None:
        """Writes a folder that stock Diffusers opens, its weights as safetensors, which all may read.

        push_to_hub: then uploads it as the method of this name does, to `repo_id` or the folder's name, and with its
            keyword arguments.
        """
        if not safe_serialization:
            warnings.warn("safe_serialization=False is passed over: pickles are not written", stacklevel=2)
        folder = Path(save_directory)
        super().save_pretrained(str(folder), variant=variant, max_shard_size=max_shard_size)
        for file in folder.rglob("*.safetensors"):
            make_readable(file)
        if push_to_hub:
            from pipelines.publish import publish_folder

            publish_folder(self, folder, self.folder, repo_id or folder.name, **kwargs)
        elif kwargs:
            raise UserError(f"unknown argument '{min(kwargs)}' of save_pretrained")

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        """Writes `model_index.json` under the name of the stock pipeline whose layout this is, which opens it."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        path = Path(save_directory) / self.config_name
        index = json.loads(path.read_text(encoding="utf-8"))
        index.pop("_name_or_path", None)  # a path of this machine
        if self.prior is not None:
            index["_class_name"] = "StableUnCLIPPipeline"
            if isinstance(self.prior_scheduler, UnCLIPScheduler):
                warnings.warn(
                    "stock StableUnCLIPPipeline steps UnCLIPScheduler one timestep at a time, and the prior's samples "
                    "stay noise; set prior_scheduler=DDPMScheduler.from_config(pipe.prior_scheduler.config)",
                    stacklevel=3,
                )
        else:
            index = {key: value for key, value in index.items() if key not in PRIOR_COMPONENTS}
            absent = {key: [None, None] for key in ("safety_checker", "feature_extractor", "image_encoder")}
            index |= {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, **absent}
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        variant: str | None = None,
        sample_prompts: list[str] | None = None,
    ) -> str:
        """Uploads the pipeline to the Hub in one commit, whose address it returns, and makes the repository if need be.

        The README of the folder that it was opened from is kept; where there is none, one is written from what the
        folder holds (`pipelines/card.py`). `sample_prompts`: drawn into its grid of samples. Raises `UserError` where
        the Hub refuses the name or the login, and `RunError` where the upload broke off.
        """
        from pipelines.publish import publish

        options = {"private": private, "commit_message": commit_message, "token": token, "create_pr": create_pr}
        return publish(self, self.folder, repo_id, variant, sample_prompts=sample_prompts, **options)

    @property
    def default_settings(self) -> dict[str, int | float | tuple[float, float]]:
        """What `__call__` takes where it is given nothing: this model's own settings over the general ones."""
        return DEFAULT_SETTINGS | self.config.get(SETTINGS, {})

    @default_settings.setter
    def default_settings(self, settings: dict[str, int | float | tuple[float, float]]) -> None:
        """Saved with the model. Raises `UserError` for those that it cannot draw with."""
        check_settings(settings, self._closer_checks())
        self.register_to_config(**{SETTINGS: dict(settings)})

    def _closer_checks(self) -> dict[str, Check]:
        """Of settings, by what this model is made of."""
        return {}


def refuse_code_and_pickles(options: dict[str, Any]) -> None:
    """Of the keyword arguments of Diffusers' `from_pretrained`, those that would open either."""
    if unwanted := sorted({"custom_pipeline", "trust_remote_code"} & set(options)):
        raise UserError(f"{unwanted[0]} is not taken: no code comes with a model")
    if not options.get("use_safetensors", True):
        raise UserError("use_safetensors must be True: pickles are not opened; convert them to safetensors")


def correct_as_stock_does(pipeline: DiffusionPipeline) -> None:
    """What stock StableDiffusionPipeline sets right in others' folders, so that both draw the same."""
    scheduler, unet = pipeline.scheduler, pipeline.unet
    if is_older(scheduler.config, FIRST_OF_OURS):
        for key, wanted in (("steps_offset", 1), ("clip_sample", False)):
            if key in scheduler.config and scheduler.config[key] != wanted:
                scheduler.register_to_config(**{key: wanted})
    size = unet.config.sample_size
    if is_older(unet.config, (0, 9)) and isinstance(size, int) and size < 64:
        unet.register_to_config(sample_size=64)
