"""How near a prior comes to the embeddings of images, beside what is had without one."""

import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UserError


def prior_cosines(
    prior_embeds: Tensor, text_embeds: Tensor, image_embeds: Tensor, mean_embed: Tensor
) -> dict[str, float]:
    """Mean cosine to the true image_embeds (N, D) of what a prior makes of their captions, (N, D): `prior`; of the
    captions' own embeddings (N, D): `text`; and of one embedding (D,), the mean of the training images': `mean`.

    A prior that is worth its place is above both. Ramesh et al. 2022, §2.2 and figure 8, compare likewise. Embeddings
    need not be of unit length.

    Raises:
        UserError: shapes that do not match, no embeddings, or one that is not finite or 0.
    """
    size = image_embeds.shape[-1]
    for name, embeds in (("prior_embeds", prior_embeds), ("text_embeds", text_embeds), ("image_embeds", image_embeds)):
        if embeds.ndim != 2 or embeds.shape != image_embeds.shape or not len(embeds):
            raise UserError(f"{name} must be ({len(image_embeds) or 1}, {size}), got {tuple(embeds.shape)}")
    if mean_embed.shape != (size,):
        raise UserError(f"mean_embed must be ({size},), got {tuple(mean_embed.shape)}")
    given = {"prior": prior_embeds, "text": text_embeds, "mean": mean_embed}
    for name, embeds in {**given, "image": image_embeds}.items():
        norms = embeds.double().norm(dim=-1)
        if not norms.isfinite().all() or not norms.all():
            raise UserError(f"the {name} embeddings hold one that is not finite, or 0, which has no direction")
    return {
        name: F.cosine_similarity(embeds.double(), image_embeds.double(), dim=-1).mean().item()
        for name, embeds in given.items()
    }
