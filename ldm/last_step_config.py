"""The configuration of train_last_step.py."""

from dataclasses import dataclass, field
from math import inf

from ldm.config import RunConfig
from ldm.errors import choose, require


@dataclass(frozen=True, kw_only=True)
class LastStepConfig(RunConfig):
    """train_last_step.py: the squared error at all timesteps, and an adversarial loss at that of drawing's last step
    (Jolicoeur-Martineau et al. 2021, arXiv:2009.05475)."""

    init: str = ""
    """The pipeline's folder or repository whose U-Net is trained on; all its other parts stay as they are."""
    num_inference_steps: int = 8
    """Steps in which it is to draw, the last one among them."""
    first_sigma: float = 50.0
    last_sigma: float = 0.5
    """Noise over signal, √(1 - ᾱ) / √ᾱ, at which the first and the last step begin; those between them are spread
    evenly on a logarithmic scale."""
    sample_guidance_scale: float = 3.0
    """With which it is to draw."""
    sample_prior_guidance_scale: float | None = None
    """The same of the prior; None: a pipeline's default, Diffusers' 4."""
    num_prior_samples: int = 2
    """The prior's sample is the best of so many."""
    num_states: int = 4096
    """Pictures that are drawn up to the last step before training begins."""
    condition_dropout: float = 0.1
    """Share of the samples of the squared error whose caption and image embedding are dropped."""
    timestep_sampling: str = "logit_normal"
    """Of the squared error: `uniform` or `logit_normal`."""
    adversarial_weight: float = 1.0
    """Of the adversarial loss, beside the squared error."""
    adversarial_start: int = 60
    """Step from which the U-Net is trained: before it the discriminator learns alone."""
    matching_weight: float = 0.5
    """Of what the discriminator loses where it takes photographs for pictures of another's caption (Reed et al. 2016,
    arXiv:1605.05396)."""
    discriminator_updates: int = 3
    """For each update of the U-Net, on the same pictures."""
    discriminator_channels: int = 64
    """Of its heads, and of its first convolution, whose number its stages double twice."""
    discriminator_learning_rate: float = 1.5e-3
    gradient_penalty: float = 4e-3
    """Weight of R1 (Mescheder et al. 2018), on photographs and their features."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts of the sample grids; none draws none."""

    def __post_init__(self):
        choose("timestep_sampling", self.timestep_sampling, ("uniform", "logit_normal"))
        require(self.init not in ("", "scratch"), "init", repr(self.init), "the folder or repository of a pipeline, "
                "whose U-Net is trained on")  # fmt: skip
        require(self.num_inference_steps >= 2, "num_inference_steps", self.num_inference_steps, ">= 2")
        for name in ("num_prior_samples", "num_states", "discriminator_updates"):
            require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        require(self.discriminator_channels >= 2, "discriminator_channels", self.discriminator_channels, ">= 2")
        for name in (
            "sample_guidance_scale",
            "sample_prior_guidance_scale",
            "adversarial_weight",
            "matching_weight",
            "gradient_penalty",
        ):
            require(0 <= (getattr(self, name) or 0) < inf, name, getattr(self, name), ">= 0")
        require(0 < self.last_sigma < self.first_sigma < inf, "last_sigma", self.last_sigma,
                f"above 0 and below first_sigma {self.first_sigma}")  # fmt: skip
        require(0 <= self.condition_dropout < 1, "condition_dropout", self.condition_dropout, "in [0, 1)")
        require(0 <= self.adversarial_start < self.training.max_steps, "adversarial_start", self.adversarial_start,
                "in [0, training.max_steps)")  # fmt: skip
        require(0 < self.discriminator_learning_rate < inf, "discriminator_learning_rate",
                self.discriminator_learning_rate, "> 0")  # fmt: skip
        require(not self.data.streaming, "data.streaming", self.data.streaming, "false here")
        require(self.training.gradient_accumulation_steps == 1, "training.gradient_accumulation_steps",
                self.training.gradient_accumulation_steps, "1 here: two networks take turns")  # fmt: skip
