"""From a prompt or an image to a picture: the pipelines, their assembly from trained stages, and the command line."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.image_to_image import LatentDiffusionImg2ImgPipeline
    from pipelines.inpainting import LatentDiffusionInpaintPipeline
    from pipelines.interpolation import LatentDiffusionInterpolationPipeline
    from pipelines.prior import LatentDiffusionPriorPipeline
    from pipelines.text_diff import LatentDiffusionTextDiffPipeline
    from pipelines.text_to_image import LatentDiffusionPipeline
    from pipelines.variations import LatentDiffusionVariationPipeline

__all__ = [
    "LatentDiffusionImg2ImgPipeline",
    "LatentDiffusionInpaintPipeline",
    "LatentDiffusionInterpolationPipeline",
    "LatentDiffusionPipeline",
    "LatentDiffusionPriorPipeline",
    "LatentDiffusionTextDiffPipeline",
    "LatentDiffusionVariationPipeline",
]

_MODULES = {
    "LatentDiffusionImg2ImgPipeline": "image_to_image",
    "LatentDiffusionInpaintPipeline": "inpainting",
    "LatentDiffusionInterpolationPipeline": "interpolation",
    "LatentDiffusionPipeline": "text_to_image",
    "LatentDiffusionPriorPipeline": "prior",
    "LatentDiffusionTextDiffPipeline": "text_diff",
    "LatentDiffusionVariationPipeline": "variations",
}


def __getattr__(name: str):
    # The command line checks its arguments before torch is imported, so the package itself must stay cheap.
    if name in _MODULES:
        return getattr(importlib.import_module(f"pipelines.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
