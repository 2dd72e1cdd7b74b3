"""Typed configurations of the training scripts; `ldm.configuration` reads them.

Model sections are the keyword arguments of the stock class they build.
"""

from dataclasses import dataclass, field
from math import inf
from typing import Any

from ldm.errors import choose, require
from ldm.lora_config import LoraConfig
from ldm.training_config import TrainingConfig

NOISE_LEVELS = 1000
"""To which image embeddings can be noised, however many timesteps the latents have."""
OF_IMAGES = ("prior", "image_embedding_dropout", "joint_dropout", "max_noise_level", "sample_prior_guidance_scale")
"""Keys of train_ldm.py that are of no use without image embeddings."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where captioned images come from. Images are read as (3, image_size, image_size) in [-1, 1]."""

    source: str = "shapes"
    """`shapes`, `digits` (scikit-learn's), a folder of images, a parquet file or glob, a Hub repository, or webdataset
    tar shards: a file, a folder of them, a glob, a range such as shard-{000..003}.tar, or (streamed) URLs."""
    split: str = "train"
    """Split of a Hub repository or folder; of `shapes`: train, or test (captions never trained on); of `digits`: train,
    or test (every fifth)."""
    image_size: int = 32
    image_column: str | None = None
    """Column with the image, or None for the only one that holds images. Of tar shards: the suffix, or None for
    whichever of jpg, png … a sample has."""
    caption_column: str | None = None
    """Column with the caption, which is empty where a row has none, or a list of captions, of which one is drawn for
    each sample and epoch; or None where templates write it. Of tar shards: a suffix such as txt, or a field of the
    .json member such as json.caption; templates take both, too, and of a list the first."""
    caption_templates: list[str] = field(default_factory=list)
    """Captions over columns, such as "a photo of a {label}"; one is drawn for each sample and epoch, the first is the
    canonical one. Class labels become their names. The first stands in for one over several columns that hold the same
    words."""
    label_names: list[str] = field(default_factory=list)
    """Names of labels that are whole numbers, where the data set does not hold them itself."""
    horizontal_flip: bool = False
    """Mirror half of the images. Leave off where captions name sides."""
    max_images: int | None = None
    """Read only so many; the length of the series with `shapes`."""
    max_bad_fraction: float = 0.05
    """Images that cannot be decoded are skipped; more than this share of all, or of those streamed, stops the run."""
    streaming: bool = False
    """Read tar shards, parquet files or a Hub repository from one end to the other, each process its own shards, rather
    than in any order: for data that fit neither in memory nor on the disk."""
    shuffle_buffer: int = 1000
    """When streaming, so many samples are read ahead and shuffled; shards are shuffled, too."""
    num_workers: int = 0
    """Processes that decode images; when streaming, threads of one process."""
    aspect_buckets: bool = False
    """cache_latents.py cuts each image to the size of about image_size² pixels that is nearest to its aspect ratio."""
    bucket_step: int = 64
    """Sides of these sizes are multiples of so many pixels: the autoencoder's factor, times 2 for every halving of the
    U-Net."""
    max_aspect_ratio: float = 2.0
    """Of the longest of these sizes."""

    def __post_init__(self):
        require(self.source.strip() != "", "data.source", f"{self.source!r}", "the name of a folder, a file or a "
                "repository")  # fmt: skip
        for name in ("image_size", "bucket_step", "shuffle_buffer"):
            require(getattr(self, name) > 0, f"data.{name}", getattr(self, name), "> 0")
        require(not self.streaming or self.max_images is None, "data.max_images", self.max_images,
                 "null with data.streaming, which has no end")  # fmt: skip
        require(self.max_aspect_ratio >= 1, "data.max_aspect_ratio", self.max_aspect_ratio, ">= 1")
        require(not self.aspect_buckets or self.image_size % self.bucket_step == 0, "data.bucket_step",
                 self.bucket_step, f"a divisor of data.image_size {self.image_size}")  # fmt: skip
        require(0 <= self.max_bad_fraction <= 1, "data.max_bad_fraction", self.max_bad_fraction, "in [0, 1]")
        require(self.num_workers >= 0, "data.num_workers", self.num_workers, ">= 0")
        require(self.max_images is None or self.max_images > 0, "data.max_images", self.max_images, "> 0")


@dataclass(frozen=True, kw_only=True)
class ResumeConfig:
    """What --resume permits."""

    allow: list[str] = field(default_factory=list)
    """Keys that may differ from those the run began with, such as [training.max_steps]; not training.optimizer."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training script has."""

    output_dir: str
    seed: int = 0
    init: str = "scratch"
    """`scratch`, or what has the weights that training starts from: a run of the stage, or a pipeline's folder or Hub
    repository. These stand for a run wherever one is named."""
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(RunConfig):
    """train_autoencoder.py: L1 + perceptual + KL, PatchGAN after a delay (Rombach et al. 2022, §3.1, appendix G)."""

    kind: str = "kl"
    """`kl`, the first stage of latent diffusion; or an autoencoder of codes that are vectors, `plain`, `denoising`,
    `sparse`, `k_sparse` or `variational`, whose keys are `model`, `greyscale` and `test_split`."""
    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of diffusers' AutoencoderKL, or of the class of `kind` in `ldm.autoencoders`."""
    kl_weight: float = 1e-6
    """Of the mean KL of a latent's elements, beside the mean L1 of an image's. Rombach et al. weigh sums: their 1e-6 is
    here that times latent elements over image elements, 2e-8 at 3×256×256 to 4×32×32."""
    perceptual_weight: float = 0.0
    perceptual_clip: str | None = None
    """Run of train_clip.py whose image tower measures the perceptual distance."""
    adversarial_weight: float = 0.0
    adversarial_start: int = 0
    """Step from which the discriminator counts."""
    discriminator_channels: int = 32
    discriminator_layers: int = 2
    """How often it halves an image: with each more its patches are twice as large. Latent diffusion has 3."""
    statistics_images: int = 4096
    """Images over which the mean and standard deviation of the latents are measured."""
    greyscale: bool = False
    """Whether autoencoders of any kind but `kl` see grey images."""
    test_split: str | None = None
    """Split on which the finished autoencoder is measured, of any kind but `kl`."""

    def __post_init__(self):
        choose("kind", self.kind, ("kl", "plain", "denoising", "sparse", "k_sparse", "variational"))
        for name, least in (("kl_weight", 0), ("perceptual_weight", 0), ("adversarial_weight", 0),
                            ("discriminator_channels", 1), ("discriminator_layers", 1),
                            ("statistics_images", 1)):  # fmt: skip
            require(getattr(self, name) >= least, name, getattr(self, name), f">= {least}")
        require(self.perceptual_weight == 0 or self.perceptual_clip is not None, "perceptual_weight",
                 self.perceptual_weight, "0 unless perceptual_clip names a run of train_clip.py")  # fmt: skip
        for name, unused in (("greyscale", False), ("test_split", None)) if self.kind == "kl" else (
            ("perceptual_weight", 0), ("adversarial_weight", 0)):  # fmt: skip
            require(getattr(self, name) == unused, name, getattr(self, name), f"left out with kind={self.kind}")
        most = (self.data.image_size // 3).bit_length() - 1  # two more convolutions take 2 of the 3 pixels left
        require(self.adversarial_weight == 0 or self.discriminator_layers <= most, "discriminator_layers",
                self.discriminator_layers, f"<= {most} with data.image_size {self.data.image_size}")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ClipConfig(RunConfig):
    """train_clip.py: open_clip's model and loss (Radford et al. 2021)."""

    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of `ldm.clip.model.build`, less vocabulary_size, context_length and image_size."""
    vocabulary_size: int | None = None
    """Size of a BPE vocabulary trained on the captions; None takes CLIP's own."""
    context_length: int = 77
    random_crop: float = 1.0
    """Least share of an image's area kept by a random resized crop; 1 crops nothing."""
    colour_jitter: float = 0.0
    """Largest relative change of brightness and contrast."""
    image_image_weight: float = 0.0
    """Weight of SLIP's contrast between two augmented views of an image (Mu et al. 2021)."""

    def __post_init__(self):
        require(self.context_length > 2, "context_length", self.context_length, "> 2")
        require(0 < self.random_crop <= 1, "random_crop", self.random_crop, "in (0, 1]")
        require(0 <= self.colour_jitter < 1, "colour_jitter", self.colour_jitter, "in [0, 1)")
        require(self.image_image_weight >= 0, "image_image_weight", self.image_image_weight, ">= 0")
        views_differ = self.random_crop < 1 or self.colour_jitter > 0
        require(self.image_image_weight == 0 or views_differ, "image_image_weight", self.image_image_weight,
                 "0 unless random_crop < 1 or colour_jitter > 0: two views must differ")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PriorConfig(RunConfig):
    """train_prior.py: DALL·E 2's diffusion prior (Ramesh et al. 2022, §2.2)."""

    clip: str = ""
    """Run of train_clip.py."""
    cache: str = ""
    """Folder that cache_latents.py wrote."""
    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of diffusers' PriorTransformer, less those that follow from CLIP."""
    caption_dropout: float = 0.1

    def __post_init__(self):
        require(0 <= self.caption_dropout < 1, "caption_dropout", self.caption_dropout, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class LdmConfig(RunConfig):
    """train_ldm.py: the conditional U-Net in latent space (Rombach et al. 2022; Ramesh et al. 2022, §2.1)."""

    clip: str = ""
    """Run of train_clip.py."""
    autoencoder: str = ""
    """Run of train_autoencoder.py; or `none`: DDPM in pixel space, which reads `data` and needs no other run (Ho et al.
    2020)."""
    prior: str | None = None
    """Run of train_prior.py: with it, sample grids are drawn from text alone."""
    image_conditioning: bool = True
    """Whether the U-Net is told the CLIP embedding of the image, which in drawing a prior makes of the text; or false,
    captions alone, without a prior."""
    cache: str = ""
    """Folder that cache_latents.py wrote."""
    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of diffusers' UNet2DConditionModel, or in pixel space its UNet2DModel, less those that follow from the
    data and the other stages."""
    prediction_type: str = "v_prediction"
    """`v_prediction`, `sample` or `epsilon`, which is drawn from `ldm.training.task.FIRST_LAMBDA` on."""
    beta_schedule: str = "squaredcos_cap_v2"
    """`linear`, `scaled_linear` or `squaredcos_cap_v2` (cosine)."""
    num_train_timesteps: int = 1000
    zero_terminal_snr: bool = False
    """Whether the last timestep is noise and nothing else, as sampling starts (Lin et al. 2024), so that very bright
    and very dark images can be drawn; not for `epsilon`, which then says nothing of the image."""
    objective: str = "simple"
    """`simple`, the squared error (Ho et al. 2020, equation 14); `vlb`, the variational bound; or `hybrid`, both, the
    bound for the variance alone (Nichol & Dhariwal 2021, equation 16)."""
    variance: str = "fixed_small"
    """Of p_θ(x_{t-1} | x_t): `fixed_small`, `fixed_large`, or `learned_range`, which a network in pixel space gives."""
    min_snr_gamma: float | None = None
    """γ of min-SNR weighting of the simple objective (Hang et al. 2023), or None for uniform weights."""
    timestep_sampling: str = "uniform"
    """`uniform`, `logit_normal` (Esser et al. 2024, §3.1), or with objective=vlb `importance` (Nichol & Dhariwal 2021,
    §3.3)."""
    caption_dropout: float = 0.1
    image_embedding_dropout: float = 0.1
    """1: captions alone guide the U-Net."""
    joint_dropout: float = 0.05
    """The part of both in which caption and image embedding are dropped together; more, where both are dropped so often
    that they must coincide."""
    max_noise_level: int = 0
    """Image embeddings are noised to a level drawn from 0 … max_noise_level."""
    validation_cache: str | None = None
    """Folder that cache_latents.py wrote of other images, of the same encoders: their loss at fixed timesteps is logged
    when samples are drawn."""
    validation_split: str | None = None
    """In pixel space, the split of `data.source` for that."""
    average_lengths: list[float] = field(default_factory=list)
    """Lengths of power-function averages of the weights that are kept beside, such as [0.05, 0.1]: from their snapshots
    `ldm average` makes one of any length once training is over (Karras et al. 2024)."""
    snapshot_every: int = 500
    """Steps between those snapshots."""
    sample_guidance_scale: float = 3.0
    """With which sample grids are drawn, and by default the pipeline that `ldm assemble` makes of this run."""
    sample_prior_guidance_scale: float | None = None
    """The same of the prior; None: a pipeline's default, Diffusers' 4."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts of the sample grids; none draws none. In pixel space grids are drawn without."""
    size_conditioning: bool = False
    """Whether the U-Net is told the size each image had, where it was cropped and its size now (Podell et al. 2023,
    §2.2). Stock pipelines cannot tell it: such a U-Net draws with LatentDiffusionPipeline alone."""
    greyscale: bool = False
    """Whether images in pixel space are grey."""
    class_conditional: bool = False
    """Whether the U-Net in pixel space is told the caption, one of few classes; dropped as `caption_dropout` says."""
    lora: LoraConfig | None = None
    """Adapters that are trained instead of the U-Net, on `data`, for the model in `init`: a pipeline's folder or
    repository. Of its parts, those that `autoencoder`, `clip` and `prior` name come from there; the noise schedule and
    what is predicted are its own."""

    def __post_init__(self):
        choose("objective", self.objective, ("simple", "vlb", "hybrid"))
        choose("variance", self.variance, ("fixed_small", "fixed_large", "learned_range"))
        choose("prediction_type", self.prediction_type, ("v_prediction", "epsilon", "sample"))
        choose("beta_schedule", self.beta_schedule, ("linear", "scaled_linear", "squaredcos_cap_v2"))
        choose("timestep_sampling", self.timestep_sampling, ("uniform", "logit_normal", "importance"))
        in_pixels, simple, lora = self.autoencoder == "none", self.objective == "simple", self.lora is not None
        learned, sampling = self.variance == "learned_range", self.timestep_sampling
        text_only = not self.image_conditioning
        for holds, name, allowed in (
            (in_pixels or not learned, "variance", "fixed unless autoencoder is none: stock text-to-image pipelines "
             "know no learned variance"),
            (learned == (self.objective == "hybrid") or self.objective == "vlb", "variance",
             "learned_range with objective=hybrid, and fixed with objective=simple"),
            (sampling != "importance" or self.objective == "vlb", "timestep_sampling",
             "uniform or logit_normal unless objective is vlb"),
            (simple or sampling != "logit_normal", "timestep_sampling",
             "uniform or importance with objective=vlb or hybrid, whose mean is over uniform timesteps"),
            (simple or self.min_snr_gamma is None, "min_snr_gamma", f"null with objective={self.objective}"),
            (self.min_snr_gamma is None or self.min_snr_gamma > 0, "min_snr_gamma", "> 0 or null"),
            (not self.zero_terminal_snr or self.prediction_type != "epsilon", "zero_terminal_snr",
             "false with prediction_type=epsilon: noise without an image says nothing of one; take v_prediction"),
            (simple or not self.zero_terminal_snr, "zero_terminal_snr",
             f"false with objective={self.objective}: the bound is not finite there"),
            (not in_pixels or self.validation_cache is None, "validation_cache",
             "null in pixel space, which reads images; set validation_split"),
            (in_pixels or lora or self.validation_split is None, "validation_split",
             "null unless autoencoder is none; set validation_cache"),
            (all(0.001 <= length <= 0.28 for length in self.average_lengths)
             and len({f"{length:.3f}" for length in self.average_lengths}) == len(self.average_lengths),
             "average_lengths", "different thousandths, each in [0.001, 0.28]"),
            (self.snapshot_every > 0, "snapshot_every", "> 0"),
            *((in_pixels or not getattr(self, name), name, "false unless autoencoder is none")
              for name in ("class_conditional", "greyscale")),
            *((getattr(self, name) is None or 0 <= getattr(self, name) < inf, name, ">= 0")
              for name in ("sample_guidance_scale", "sample_prior_guidance_scale")),
            (not in_pixels or not self.size_conditioning, "size_conditioning", "false in pixel space"),
            (not self.size_conditioning or not self.model.get("addition_embed_type"), "size_conditioning",
             "false unless model.addition_embed_type is null, whose place in the U-Net it takes"),
            (not in_pixels or not self.sample_prompts, "sample_prompts",
             "empty in pixel space, which is drawn without a prompt"),
            (not self.sample_prompts or self.prior is not None or lora or text_only, "sample_prompts",
             "empty unless prior names a run of train_prior.py, or image_conditioning is false"),
            (not text_only or not (in_pixels or lora), "image_conditioning", "left out in pixel space, which knows no "
             "image embeddings, and with lora, where the model in init decides"),
            *((not text_only or getattr(self, name) == type(self).__dataclass_fields__[name].default, name,
               "left out with image_conditioning=false, which reads no image embeddings") for name in OF_IMAGES),
            (not lora or not in_pixels, "lora", "null in pixel space, whose networks no pipeline puts adapters into"),
            (not lora or self.init != "scratch", "init",
             "the folder or repository of a pipeline with lora: adapters are trained for a model that there is"),
            *((not lora or not getattr(self, name), name, f"{empty} with lora, {reason}") for name, empty, reason in (
                ("cache", "empty", "which reads the images and captions of data"),
                ("validation_cache", "null", "which reads images; set validation_split"),
                ("model", "empty", "which trains the model in init"),
                ("average_lengths", "empty", "whose average is that of training.ema_decay"),
                ("size_conditioning", "false", "which trains what stock pipelines draw with"),
                ("zero_terminal_snr", "false", "which keeps the noise schedule of the model in init"),
            )),
            (0 <= self.caption_dropout < 1, "caption_dropout", "in [0, 1)"),
            (0 <= self.image_embedding_dropout <= 1, "image_embedding_dropout", "in [0, 1]"),
            (text_only or 0 <= self.joint_dropout <= min(self.caption_dropout, self.image_embedding_dropout),
             "joint_dropout", "at most caption_dropout and image_embedding_dropout"),
            (self.num_train_timesteps > 0, "num_train_timesteps", "> 0"),
            (simple or self.num_train_timesteps > 1, "num_train_timesteps", f"> 1 with objective={self.objective}"),
            (0 <= self.max_noise_level < NOISE_LEVELS, "max_noise_level", f"in [0, {NOISE_LEVELS})"),
        ):  # fmt: skip
            require(holds, name, getattr(self, name), allowed)


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """cache_latents.py: what the frozen encoders say of every image and caption, written once."""

    output_dir: str
    autoencoder: str = ""
    clip: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    batch_size: int = 256
    precision: str = "fp32"
    shard_size: int = 4096
    """Images or captions a file: what a killed run has to encode again at most."""

    def __post_init__(self):
        require(self.batch_size > 0, "batch_size", self.batch_size, "> 0")
        require(self.shard_size > 0, "shard_size", self.shard_size, "> 0")
        choose("precision", self.precision, ("auto", "fp32", "bf16", "fp16"))
