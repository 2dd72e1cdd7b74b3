"""The section `lora` of train_ldm.py's configuration."""

from dataclasses import dataclass, field
from math import inf

from ldm.errors import choose, require


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters of low rank beside weights that stay as they are: W + α/r · B A (Hu et al. 2021, §4.1)."""

    rank: int = 8
    alpha: float | None = None
    """α; None takes the rank, so that B A is added as it is."""
    dropout: float = 0.0
    """Of what an adapter reads."""
    target_modules: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    """Ends of the names of the U-Net's layers that get one."""
    text_encoder: bool = False
    """Whether the text encoder gets adapters, too."""
    text_target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "out_proj"])
    """The same of its layers."""
    image_embeddings: str = "image"
    """Of U-Nets that these guide: `image`, each picture's own, as they were trained; or `prior`, what the prior makes
    of its caption, as drawing does, so that adapters teach what the prior does not know. That takes longer."""

    def __post_init__(self):
        choose("lora.image_embeddings", self.image_embeddings, ("image", "prior"))
        require(self.rank > 0, "lora.rank", self.rank, "> 0")
        require(self.alpha is None or 0 < self.alpha < inf, "lora.alpha", self.alpha, "> 0 or null")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "in [0, 1)")
        for name in ("target_modules", "text_target_modules"):
            require(len(getattr(self, name)) > 0, f"lora.{name}", getattr(self, name), "a list of at least one name")
