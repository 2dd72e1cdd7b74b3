"""Choosing among several samples of a prior."""

import torch
from torch import Tensor


def best_of(candidates: Tensor, text_embeds: Tensor) -> Tensor:
    """Of each row's image embeddings, the one with the larger dot product with the text's.

    `candidates` (B, n, D) and `text_embeds` (B, D), both unnormalised, -> (B, D); the first of equals.
    DALL·E 2 (arXiv:2204.06125), section 2.2, with n = 2.
    """
    scores = torch.einsum("bnd,bd->bn", candidates, text_embeds)
    return candidates[torch.arange(len(candidates), device=candidates.device), scores.argmax(dim=1)]


def derived_generator(generator: torch.Generator, index: int) -> torch.Generator:
    """A generator for a further sample `index`: a function of the state of `generator`, which is not advanced.

    So whatever is drawn from `generator` afterwards is the same with and without the further samples.
    """
    copy = torch.Generator(generator.device)
    copy.set_state(generator.get_state())
    seed = torch.randint(2**62, (), generator=copy, device=generator.device).item()
    return torch.Generator(generator.device).manual_seed(seed + index)
