"""Networks compiled block by block, which takes less time than a whole U-Net does, for nearly the same speed."""

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn


def compile_blocks(model: nn.Module, activation_memory: float = 1.0) -> None:
    """Has every block of `model` compiled in place when it is first called; names of weights stay as they are.

    activation_memory: the share, in (0, 1], of what a block would keep for its backward pass; the rest is computed
    again, those activations first that cost least. Holds for the whole process.
    """
    torch._functorch.config.activation_memory_budget = activation_memory
    blocks = outermost(model)
    # One graph for each shape of a block's weights and input, in training and outside; beyond the limit torch stops
    # compiling without a word.
    limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 8 * limit)
    for block in blocks:
        block.compile(dynamic=False)


def outermost(module: nn.Module) -> list[nn.Module]:
    """The blocks, of which the networks of all stages are made, of `module` that are in no other block."""
    from open_clip.transformer import ResidualAttentionBlock  # seconds of imports, for runs that compile alone

    if isinstance(module, (ResnetBlock2D, Transformer2DModel, BasicTransformerBlock, ResidualAttentionBlock)):
        return [module]
    return [block for child in module.children() for block in outermost(child)]
