"""k-sparse autoencoder: of the code only the k largest units are kept (Makhzani & Frey 2013, algorithm 1)."""

import torch
from torch import Tensor


def keep_largest(code: Tensor, k: int) -> Tensor:
    """The code (B, units) with all but each sample's k largest set to 0; the gradient flows through those alone.

    Of equal units, k are kept all the same.

    Raises:
        ValueError: k outside 1 … units.
    """
    if not 1 <= k <= code.shape[1]:
        raise ValueError(f"k must be in 1 … {code.shape[1]}, the units of the code, got {k}")
    largest = code.topk(k, dim=1).indices
    return code * torch.zeros_like(code).scatter_(1, largest, 1.0)
