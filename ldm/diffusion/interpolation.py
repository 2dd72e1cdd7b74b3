"""Between two embeddings or two noises: along the arc, not the chord."""

import torch
from torch import Tensor


def slerp(start: Tensor, end: Tensor, shares: Tensor) -> Tensor:
    """Two vectors (…) and n shares of the way (n,) -> (n, …): directions along the great circle at equal angles for
    equal shares (Shoemake 1985), norms in proportion.

    The whole of a tensor is one vector. Standard normal noises stay of the norm of noise, which a straight line would
    leave. Opposite vectors, whose circle is not determined, turn by way of the axis of the start's
    smallest element; a vector of norm 0 has no direction, and takes the other's.

    Raises:
        ValueError: vectors of unequal shapes.
    """
    if start.shape != end.shape:
        raise ValueError(f"slerp needs vectors of one shape, got {tuple(start.shape)} and {tuple(end.shape)}")
    # On the CPU, since not every device has float64
    shares = shares.cpu().double()[:, None]  # (n, 1)
    a, b = start.cpu().double().flatten(), end.cpu().double().flatten()
    norms = (1 - shares) * a.norm() + shares * b.norm()
    u, v = (_direction(x, other) for x, other in ((a, b), (b, a)))
    # atan2 is exact near 0 and π, where the arc cosine is not
    angle = 2 * torch.atan2((u - v).norm(), (u + v).norm())
    side = v - (u @ v) * u  # what of v is perpendicular to u
    if side.norm() < 1e-9:
        axis = torch.zeros_like(u)
        axis[u.abs().argmin()] = 1
        side = axis - (u @ axis) * u
    side = _direction(side, side)
    arc = torch.cos(shares * angle) * u + torch.sin(shares * angle) * side
    return (norms * arc).unflatten(1, start.shape).to(start)


def text_diff_direction(text_embeds: Tensor, base_text_embeds: Tensor) -> Tensor:
    """norm(z_t - z_t0), (D,) and (D,) -> (D,): what changes from one text to another, of norm 1, towards which an image
    embedding is turned (Ramesh et al. 2022, arXiv:2204.06125, §3.3). Both texts are taken at norm 1.

    Raises:
        ValueError: texts of the same embedding, between which there is no direction.
    """
    difference = torch.nn.functional.normalize(text_embeds, dim=0) - torch.nn.functional.normalize(
        base_text_embeds, dim=0
    )
    norm = difference.norm()
    if norm == 0:
        raise ValueError("the two texts have the same embedding: there is no direction from one to the other")
    return difference / norm


def _direction(vector: Tensor, otherwise: Tensor) -> Tensor:
    """The vector at norm 1; at norm 0 that of the other one; 0 where both are."""
    norm = vector.norm()
    return vector / norm if norm > 0 else otherwise / otherwise.norm().clamp_min(torch.finfo(vector.dtype).tiny)
