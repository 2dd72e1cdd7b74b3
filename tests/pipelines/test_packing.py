"""Networks with rearranged weights, and those that read their text once, compute what they computed before."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import nn

from pipelines.packing import LEAST, packed
from pipelines.reading_once import told


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2, bias=False),
        nn.Conv2d(8, 4, 1),
        nn.Flatten(2),
        nn.Linear(16, 512),
        nn.Linear(512, 512),  # of five images large enough for oneDNN
        nn.Linear(512, 3, bias=False),
    )


def forwards(network: nn.Module) -> int:
    """How many of its layers are computed otherwise than their class says."""
    return sum("forward" in vars(module) for module in network.modules())


@torch.no_grad()
def test_computes_the_same_for_every_shape_and_leaves_no_trace():
    network = layers()
    inputs = [torch.randn(count, 3, 8, 8) for count in (2, 1, 5, 2)]
    inputs.append(inputs[0].to(memory_format=torch.channels_last))
    assert len(inputs[2]) * 4 * 512**2 >= LEAST
    before = [network(x) for x in inputs]
    with packed(network):
        assert forwards(network) == 6
        inside = [network(x) for x in inputs]
    assert forwards(network) == 0
    for one, other in zip(before, inside, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert list(network.state_dict()) == list(layers().state_dict())


@torch.no_grad()
def test_takes_the_weights_as_they_are_on_entry_and_leaves_after_an_error():
    network, x = layers(), torch.randn(2, 3, 8, 8)
    for _ in range(2):
        for weight in network.parameters():
            weight.data.mul_(1.5)  # which no version counter sees
        with packed(network):
            inside = network(x)
        assert torch.allclose(network(x), inside, atol=1e-6)
    with pytest.raises(KeyError), packed(network):
        raise KeyError
    assert forwards(network) == 0


def test_leaves_alone_what_it_cannot_compute():
    network = layers()
    with packed(network):
        assert forwards(network) == 0  # gradients are asked for
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16), packed(network):
            assert forwards(network) == 0
        half = layers().bfloat16()
        with packed(half):
            assert forwards(half) == 0
        network[0].forward = lambda x: torch.zeros(len(x), 8, 8, 8)  # another's, which stays
        with packed(network):
            assert forwards(network) == 6 and not network[0](torch.ones(1, 3, 8, 8)).any()
        assert forwards(network) == 1
        with packed(None):  # a pipeline without a U-Net
            pass


@torch.no_grad()
def test_attention_reads_a_text_once_and_another_anew():
    torch.manual_seed(0)
    attention = Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4)
    read = []
    attention.to_k.register_forward_hook(lambda *_: read.append(1))
    text, x = torch.randn(2, 5, 6), torch.randn(2, 9, 8)
    with packed(attention):
        inside = [attention(step * x, text) for step in range(3)]
        assert len(read) == 1
        text[0, 0] = 1  # in place, as a callback may
        inside += [attention(x, text), attention(x[:1], text[1:])]
        assert len(read) == 3
        masked = attention(x, text, attention_mask=torch.zeros(2, 1, 5))
    torch.testing.assert_close(inside[3], masked)
    torch.testing.assert_close(inside[3], attention(x, text))
    torch.testing.assert_close(inside[4], attention(x[:1], text[1:]))
    assert not torch.allclose(inside[1], inside[3])


@torch.no_grad()
def test_attention_to_itself_computes_the_same_and_other_ways_to_attend_stay():
    torch.manual_seed(0)
    attention, x = Attention(query_dim=8, heads=2, dim_head=4), torch.randn(2, 9, 8)
    with packed(attention):
        inside = [attention(step * x) for step in range(3)]
    for step in range(3):
        torch.testing.assert_close(inside[step], attention(step * x))
    attention.set_processor(AttnProcessor())
    with packed(attention):
        assert "forward" not in vars(attention)


def test_the_unet_is_packed_throughout_a_call(family):
    """That the pictures are those of stock Diffusers, which packs nothing, test_stock.py says."""
    seen = []

    def look(one, *_):
        seen.append(forwards(one.unet))

    pipe = family["LatentDiffusionPipeline"]
    pipe("a cat", num_inference_steps=3, prior_num_inference_steps=2, callback_on_step_end=look)
    assert seen == [seen[0]] * 3 and seen[0] > 20
    assert forwards(pipe.unet) == 0


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_the_prior_predicts_what_its_forward_does(pipe, batch):
    generator = torch.Generator().manual_seed(batch)
    length, width = pipe.prior.config.num_embeddings, pipe.prior.config.embedding_dim
    embeds = torch.randn(batch, width, generator=generator)
    tokens = torch.randn(batch, length, width, generator=generator)
    mask = torch.arange(length) < torch.tensor([[3], [length], [7]][:batch])
    predict = told(pipe.prior, embeds, tokens, mask)
    assert predict.__name__ == "predict"  # not the plain forward
    for t in (99, 50, 0):
        sample = torch.randn(batch, width, generator=generator)
        expected = pipe.prior(sample, torch.tensor(t), embeds, tokens, mask).predicted_image_embedding
        assert torch.allclose(predict(sample, torch.tensor(t)), expected, atol=1e-5)


@torch.no_grad()
def test_a_prior_that_is_hooked_is_called_as_it_is(pipe):
    calls = []
    length, width = pipe.prior.config.num_embeddings, pipe.prior.config.embedding_dim
    hook = pipe.prior.register_forward_hook(lambda *_: calls.append(1))
    try:
        predict = told(pipe.prior, torch.zeros(1, width), torch.zeros(1, length, width), torch.ones(1, length).bool())
        predict(torch.zeros(1, width), torch.tensor(5))
    finally:
        hook.remove()
    assert calls == [1]
