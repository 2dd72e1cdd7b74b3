"""Sizes as a condition: what diffusers' U-Net makes of six numbers beside its class embedding."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from ldm.diffusion.size_condition import size_condition, unet_arguments


@pytest.mark.parametrize(("input_dim", "width"), [(32, 4), (12, 2), (2048, 256), (1024, 170)])
def test_six_even_widths_fit_beside_the_class_embedding(input_dim, width):
    assert unet_arguments(input_dim)["addition_time_embed_dim"] == width
    condition = size_condition(torch.ones(3, 6), input_dim, width)
    assert condition["text_embeds"].shape == (3, input_dim - 6 * width)
    assert not condition["text_embeds"].any()


def test_every_number_changes_what_the_unet_predicts():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        cross_attention_dim=8,
        attention_head_dim=4,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=32,
        **unet_arguments(32),
    ).eval()

    @torch.no_grad()
    def predict(*sizes):
        condition = size_condition(torch.tensor([sizes], dtype=torch.float32), 32, unet.config.addition_time_embed_dim)
        x, tokens = torch.ones(1, 4, 4, 4), torch.ones(1, 2, 8)
        return unet(x, 3, tokens, class_labels=torch.zeros(1, 32), added_cond_kwargs=condition).sample

    sizes = [300, 200, 5, 0, 32, 40]
    known = predict(*sizes)
    assert torch.equal(known, predict(*sizes))
    for place in range(6):
        other = [size + 17 * (number == place) for number, size in enumerate(sizes)]
        assert (predict(*other) - known).abs().max() > 1e-4
