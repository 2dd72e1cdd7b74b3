"""Where CLIP's parts lie: in what train_clip.py and `ldm export-clip` leave, and among the components of a pipeline,
whose `text_encoder` is the same tower without its projection. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path

from ldm.components.configs import read_json

WITH_PROJECTION = "CLIPTextModelWithProjection"
TEXT_TOWERS = (("prior_text_encoder", "prior_tokenizer"), ("text_encoder", "tokenizer"))
IMAGE_ENCODER = "image_encoder"
PROCESSORS = ("image_processor", "feature_extractor")
"""The processor's folder, in our folders and in stock ones. `image_processor` is another thing on a pipeline, so that
the component is `feature_extractor`, as in stock."""
WHOLE = "clip"
"""The folder of all of it, as train_clip.py leaves it, in that of a pipeline that has no tower with its projection."""


@dataclass(frozen=True)
class ClipParts:
    """Folders of a CLIP, in transformers' layout."""

    text_encoder: Path
    """With its projection."""
    tokenizer: Path
    image_encoder: Path | None = None
    image_processor: Path | None = None


def parts_of(folder: Path) -> ClipParts | None:
    """The CLIP in a folder, its image tower where there is one; None where no text tower there has its projection."""
    for place in (folder, folder / WHOLE):
        for text_encoder, tokenizer in TEXT_TOWERS:
            config = place / text_encoder / "config.json"
            if config.is_file() and WITH_PROJECTION in (read_json(config).get("architectures") or []):
                image_encoder = place / IMAGE_ENCODER
                return ClipParts(
                    place / text_encoder,
                    place / tokenizer,
                    image_encoder if image_encoder.is_dir() else None,
                    next((place / name for name in PROCESSORS if (place / name).is_dir()), None),
                )
    return None
