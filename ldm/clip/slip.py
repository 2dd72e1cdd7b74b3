"""CLIP with SLIP's image–image term (Mu et al. 2021, §3): two views of an image are to be told from all others.

Captions alone make an image embedding carry what they name and nothing more. The second term keeps what tells one
picture from another, which a decoder conditioned on the embedding can use. Here the first view is the one that meets
the caption, so that the term costs one more pass through the image tower and not two.
"""

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Slip(nn.Module):
    """Both towers and the head of the image–image term in one forward pass, so that a wrapper sees every gradient."""

    def __init__(self, clip: open_clip.CLIP, embedding_dim: int):
        super().__init__()
        self.clip = clip
        self.head = nn.Sequential(
            nn.Linear(embedding_dim, 2 * embedding_dim), nn.GELU(), nn.Linear(2 * embedding_dim, embedding_dim)
        )

    def forward(self, images: Tensor, input_ids: Tensor, second_views: Tensor | None = None) -> tuple[Tensor, ...]:
        """images, and other views of the same pictures or None (B, 3, S, S) in [-1, 1]; input_ids (B, L).

        Returns unit-length image and text embeddings (B, D), the factor on their cosines, and both views'
        unit-length projections (2, B, D), or None without second views.
        """
        text = self.clip.encode_text(input_ids, normalize=True)
        scale = self.clip.logit_scale.exp()
        if second_views is None:
            return self.clip.encode_image(images, normalize=True), text, scale, None
        embeddings = torch.stack(self.clip.encode_image(torch.cat([images, second_views])).chunk(2))
        projected = self.head(embeddings)
        return F.normalize(embeddings[0].float(), dim=-1), text, scale, F.normalize(projected.float(), dim=-1)


def image_image_loss(views: Tensor, temperature: float = 0.1) -> Tensor:
    """NT-Xent (Chen et al. 2020, equation 1) of two views' unit-length projections (2, B, D)."""
    both = torch.cat([views[0], views[1]])
    logits = both @ both.T / temperature
    logits.fill_diagonal_(float("-inf"))
    batch = views.shape[1]
    partner = torch.arange(2 * batch, device=views.device).roll(batch)
    return F.cross_entropy(logits, partner)
