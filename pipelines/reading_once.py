"""The prior, told a text once instead of at every step.

`PriorTransformer` reads [tokens (L), e_t, t, e_i noised, the place of its answer], and none of these sees what comes
after it. So the keys and values of the text, by far the most of the sequence, are those of every step.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.prior_transformer import PriorTransformer
from torch import Tensor

Cache = tuple[Tensor, Tensor]
"""Keys and values of earlier places, each (B, heads, S, width of a head)."""


def told(prior: PriorTransformer, embeds: Tensor, tokens: Tensor, mask: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """(e_i noised (B, D), t) -> the prior's prediction (B, D), as its own `forward` has it.

    embeds: (B, D), e_t. tokens: (B, L, D). mask: (B, L), which tokens are text.
    """
    if not _is_plain(prior):
        return lambda sample, t: prior(sample, t, embeds, tokens, mask).predicted_image_embedding

    dtype = tokens.dtype
    if prior.encoder_hidden_states_proj is not None:
        tokens = prior.encoder_hidden_states_proj(tokens)
    if prior.embedding_proj_norm is not None:
        embeds = prior.embedding_proj_norm(embeds)
    text = torch.cat([tokens, prior.embedding_proj(embeds)[:, None]], dim=1)  # (B, L + 1, W)
    places = prior.positional_embedding.to(dtype)
    before = text.shape[1]
    text = text + places[:, :before]

    # What every place may see: of the places up to its own those that are not padding
    hidden = F.pad((1 - mask.to(dtype)) * -10_000, (0, prior.additional_embeddings))
    visible = (hidden[:, None, None, :] + prior.causal_attention_mask).to(dtype)  # (B, 1, S, S)

    caches: list[Cache] = []
    x = text if prior.norm_in is None else prior.norm_in(text)
    for block in prior.transformer_blocks:
        x, cache = _pass(block, x, visible[..., :before, :before])
        caches.append(cache)

    def predict(sample: Tensor, t: Tensor) -> Tensor:
        time = prior.time_embedding(prior.time_proj(t.reshape(1)).to(dtype)).expand(len(sample), -1)
        x = torch.stack([time, prior.proj_in(sample)], dim=1)
        if prior.prd_embedding is not None:
            x = torch.cat([x, prior.prd_embedding.to(dtype).expand(len(sample), -1, -1)], dim=1)
        x = x + places[:, before:]
        x = x if prior.norm_in is None else prior.norm_in(x)
        for block, cache in zip(prior.transformer_blocks, caches, strict=True):
            x, _ = _pass(block, x, visible[..., before:, :], cache)
        return prior.proj_to_clip_embeddings(prior.norm_out(x)[:, -1])

    return predict


def _is_plain(prior: PriorTransformer) -> bool:
    """Whether it is computed as its configuration says, with weights where they are: nothing hooks into it."""
    hooked = prior._forward_hooks or prior._forward_pre_hooks or hasattr(prior, "_hf_hook") or "forward" in vars(prior)
    sequence = prior.config.num_embeddings + prior.config.additional_embeddings
    complete = prior.positional_embedding.shape[1] == sequence == prior.causal_attention_mask.shape[-1]
    return type(prior) is PriorTransformer and not hooked and complete and prior.prd_embedding is not None


def _pass(
    block: BasicTransformerBlock, x: Tensor, visible: Tensor, earlier: Cache | None = None
) -> tuple[Tensor, Cache]:
    """x (B, S, W) -> x after the block, and the keys and values of all places so far."""
    attention, normed = block.attn1, block.norm1(x)
    query, key, value = (
        project(normed).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for project in (attention.to_q, attention.to_k, attention.to_v)
    )
    if earlier is not None:
        key, value = (torch.cat(parts, dim=2) for parts in zip(earlier, (key, value), strict=True))
    seen = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
    x = x + attention.to_out[0](seen.transpose(1, 2).flatten(2))
    return x + block.ff(block.norm3(x)), (key, value)
