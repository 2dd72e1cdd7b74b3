"""The section `training` of every training script's configuration."""

from dataclasses import dataclass, field

from ldm.errors import choose, require


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One optimiser step sees `batch_size` samples, over all processes and accumulation steps together."""

    max_steps: int = 1000
    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    """Parts of a process's batch computed one after another, so that the activations of one alone take memory."""
    learning_rate: float = 1e-3
    learning_rate_schedule: str = "cosine"
    """`cosine` to 0 at max_steps, or `constant`; both after a linear warm-up."""
    warmup_steps: int = 0
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights, warmed up; 0 exports the raw weights."""
    optimizer: str = "adamw"
    """`adamw`; `adamw_8bit`, bitsandbytes' with 8-bit moments; or `muon` for the matrices of linear layers in the
    network's blocks, AdamW for all else, both at the same learning rate."""
    precision: str = "auto"
    """`fp32`, `bf16`, `fp16`, or `auto`: bf16 where the hardware multiplies it fast, else fp32."""
    compile: bool = False
    """Compile the network's repeated blocks: half a minute or more, then faster steps."""
    activation_memory: float = 1.0
    """Share of a compiled block's activations that is kept for the backward pass; the others are computed again."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more time."""
    find_micro_batch: bool = False
    """Try one step before training, with ever more accumulation steps until it fits in the memory."""
    wandb_project: str | None = None
    """Project of Weights & Biases that the run is logged to as well."""
    log_every: int = 10
    sample_every: int = 500
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    num_processes: int | None = None
    """How many processes must train together, over all machines; None takes as many as were started."""
    timeout_seconds: int = 1800
    """How long processes wait for one that does not answer, before the run ends. Must exceed the time that the main one
    takes to draw samples or to write a checkpoint."""

    def __post_init__(self):
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "learning_rate", "max_grad_norm",
                     "log_every", "sample_every", "checkpoint_every", "keep_checkpoints",
                     "timeout_seconds"):  # fmt: skip
            require(getattr(self, name) > 0, f"training.{name}", getattr(self, name), "> 0")
        for name in ("warmup_steps", "weight_decay"):
            require(getattr(self, name) >= 0, f"training.{name}", getattr(self, name), ">= 0")
        require(len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas), "training.betas", self.betas,
                 "two numbers in [0, 1)")  # fmt: skip
        require(self.num_processes is None or self.num_processes > 0, "training.num_processes", self.num_processes,
                 "> 0 or null")  # fmt: skip
        require(0 <= self.ema_decay < 1, "training.ema_decay", self.ema_decay, "in [0, 1)")
        require(0 < self.activation_memory <= 1, "training.activation_memory", self.activation_memory, "in (0, 1]")
        choose("training.optimizer", self.optimizer, ("adamw", "adamw_8bit", "muon"))
        choose("training.precision", self.precision, ("auto", "fp32", "bf16", "fp16"))
        choose("training.learning_rate_schedule", self.learning_rate_schedule, ("cosine", "constant"))
