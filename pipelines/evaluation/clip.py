"""CLIP as a judge: a model's own, of which the image tower, or all, lies beside the pipeline's components, or one that
was trained or exported."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from ldm import hub
from ldm.clip.parts import IMAGE_ENCODER, PROCESSORS, WITH_PROJECTION, parts_of
from ldm.errors import UserError
from ldm.evaluation.features import open_features
from ldm.files import expanded

TEXTS_AT_ONCE = 256


class Clip:
    """Both towers, which embed images and captions as vectors of one size, not normalised."""

    def __init__(self, folder: Path, name: str, device: torch.device):
        parts = parts_of(folder)
        self.images, self.device = replace(open_features(parts.image_encoder.parent, device), name=name), device
        hub.check_finite(hub.check_component(parts.text_encoder, (WITH_PROJECTION,)))
        texts = CLIPTextModelWithProjection.from_pretrained(parts.text_encoder, dtype=torch.float32)
        self.texts = texts.to(device).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(parts.tokenizer)

    @torch.no_grad()
    def read(self, captions: list[str]) -> Tensor:
        """(N, D); of captions that are equal one is read."""
        different = list(dict.fromkeys(captions))
        place = {caption: number for number, caption in enumerate(different)}
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        parts = []
        for start in range(0, len(different), TEXTS_AT_ONCE):
            texts = different[start : start + TEXTS_AT_ONCE]
            ids = self.tokenizer(texts, max_length=self.tokenizer.model_max_length, **options).input_ids
            parts.append(self.texts(ids.to(self.device)).text_embeds.float().cpu())
        return torch.cat(parts)[torch.tensor([place[caption] for caption in captions])]


def own_clip(folder: Path, device: torch.device) -> Clip | None:
    """The model's own, where its folder has both towers."""
    return Clip(folder, "the model's own CLIP", device) if _is_whole(folder) else None


def open_clip_folder(name: str, device: torch.device) -> Clip:
    """--clip: a run of train_clip.py, what `ldm export-clip` writes, or a pipeline's folder. Raises `UserError` for
    anything else."""
    run = expanded(name)
    for folder in (run / "model", run):
        if _is_whole(folder):
            return Clip(folder, f"CLIP {run.name}", device)
    raise UserError(
        f"--clip '{name}' is no folder of CLIP's two towers ({IMAGE_ENCODER}, {PROCESSORS[0]}, text_encoder, "
        "tokenizer); give a run of train_clip.py, or what `ldm export-clip` writes"
    )


def _is_whole(folder: Path) -> bool:
    parts = parts_of(folder)
    return parts is not None and None not in (parts.image_encoder, parts.image_processor)
