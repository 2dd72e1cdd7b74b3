"""From a prompt to a picture: the pipeline, its assembly from trained stages, and the command line."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.text_to_image import LatentDiffusionPipeline

__all__ = ["LatentDiffusionPipeline"]


def __getattr__(name: str):
    # The command line checks its arguments before torch is imported, so the package itself must stay cheap.
    if name == "LatentDiffusionPipeline":
        from pipelines.text_to_image import LatentDiffusionPipeline

        return LatentDiffusionPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
