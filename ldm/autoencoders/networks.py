"""Encoders and decoders between images (B, C, H, W) and codes (B, units): fully connected or convolutional."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

ARCHITECTURES = ("mlp", "convolutional")
ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "silu": nn.SiLU}


class Layers(nn.Module):
    """Hidden layers, each with its activation, and a linear output layer."""

    def __init__(self, hidden: list[nn.Module], output: nn.Module):
        super().__init__()
        self.hidden, self.output = nn.ModuleList(hidden), output

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The output, and the activations (B, units) of every hidden layer in turn."""
        activations = []
        for layer in self.hidden:
            x = layer(x)
            activations.append(x.flatten(1))
        return self.output(x), activations


def encoder(
    architecture: str, image_shape: Sequence[int], hidden_sizes: Sequence[int], code_size: int, activation: str
) -> Layers:
    """From images to codes (B, code_size). hidden_sizes: units of each `mlp` layer, or channels of each
    `convolutional` one, which halves the resolution.

    Raises:
        ValueError: an unknown architecture or activation, or an image that cannot be halved so often.
    """
    act = _check(architecture, image_shape, hidden_sizes, activation)
    channels, height, width = image_shape
    if architecture == "mlp":
        sizes = [channels * height * width, *hidden_sizes]
        hidden = [nn.Sequential(nn.Flatten(), nn.Linear(a, b), act()) for a, b in pairwise(sizes)]
        return Layers(hidden, nn.Sequential(nn.Flatten(), nn.Linear(sizes[-1], code_size)))
    sizes = [channels, *hidden_sizes]
    hidden = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), act()) for a, b in pairwise(sizes)]
    factor = 2 ** len(hidden_sizes)
    flat = sizes[-1] * (height // factor) * (width // factor)
    return Layers(hidden, nn.Sequential(nn.Flatten(), nn.Linear(flat, code_size)))


def decoder(
    architecture: str, image_shape: Sequence[int], hidden_sizes: Sequence[int], code_size: int, activation: str
) -> Layers:
    """From codes (B, code_size) to images, the layers of `encoder` in reverse. Raises ValueError as `encoder` does."""
    act = _check(architecture, image_shape, hidden_sizes, activation)
    channels, height, width = image_shape
    sizes = list(reversed(hidden_sizes))
    if architecture == "mlp":
        sizes = [code_size, *sizes]
        hidden = [nn.Sequential(nn.Linear(a, b), act()) for a, b in pairwise(sizes)]
        output = nn.Linear(sizes[-1], channels * height * width)
        return Layers(hidden, nn.Sequential(output, nn.Unflatten(1, tuple(image_shape))))
    factor = 2 ** len(hidden_sizes)
    bottom = (sizes[0], height // factor, width // factor)
    flat = bottom[0] * bottom[1] * bottom[2]
    hidden = [nn.Sequential(nn.Linear(code_size, flat), act(), nn.Unflatten(1, bottom))]
    hidden += [nn.Sequential(nn.ConvTranspose2d(a, b, 4, 2, 1), act()) for a, b in pairwise(sizes)]
    return Layers(hidden, nn.ConvTranspose2d(sizes[-1], channels, 4, 2, 1))


def _check(architecture: str, image_shape: Sequence[int], hidden_sizes: Sequence[int], activation: str) -> type:
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if architecture == "convolutional":
        factor = 2 ** len(hidden_sizes)
        if not hidden_sizes or image_shape[1] % factor or image_shape[2] % factor:
            raise ValueError(
                f"hidden_sizes {list(hidden_sizes)}: each of one or more layers halves the image, whose sides "
                f"{image_shape[1]} × {image_shape[2]} must be multiples of {factor}"
            )
    return ACTIVATIONS[activation]
