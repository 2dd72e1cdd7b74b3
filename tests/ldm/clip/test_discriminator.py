"""The discriminator on CLIP's features: closed forms of its penalty and of moved images, and what it sees."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ldm.autoencoders.discriminator import discriminator_loss
from ldm.clip.discriminator import FeatureDiscriminator, gradient_penalty, image_features, mean_over_heads, shifted
from ldm.clip.export import ClipTowers


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                              image_size=16, patch_size=4, projection_dim=8)  # fmt: skip
    tower = CLIPVisionModelWithProjection(config).eval().requires_grad_(False)
    return ClipTowers(tokenizer=None, text_encoder=None, image_encoder=tower)


def images(count, side=16):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_penalty_of_linear_heads_is_their_squared_weights():
    """Of pixels as they are, of features in units of theirs; heads count alike, whatever they look at."""
    features = [torch.randn(3, *shape, requires_grad=True) for shape in ((3, 2, 2), (4, 2, 2), (5, 1, 1))]
    weights = [torch.randn(3, 2, 2), torch.randn(4, 2, 2), torch.randn(5, 1, 1)]
    logits = [(x * w).flatten(1).sum(1, keepdim=True) for x, w in zip(features, weights, strict=True)]
    logits[1] = torch.cat([logits[1], 3 * logits[1]], dim=1)
    scales = [1.0, 2.0, 1.0]  # means over places
    squares = [(w * scale / 3).square().sum() for w, scale in zip(weights, scales, strict=True)]
    torch.testing.assert_close(gradient_penalty(logits, features), squares[0] + 16 * squares[1] + 5 * squares[2])


def test_penalty_has_gradients_of_its_own():
    discriminator = FeatureDiscriminator([4], 3, 8)
    features = [torch.randn(2, 3, 16, 16, requires_grad=True), torch.randn(2, 4, 2, 2, requires_grad=True)]
    gradient_penalty(discriminator(features, torch.randn(2, 3)), features).backward()
    weights = {name: p for name, p in discriminator.named_parameters() if name.endswith("weight")}
    assert all(p.grad is not None and p.grad.any() for p in weights.values())


def test_heads_look_at_every_layer_and_stage_and_say_what_another_condition_makes_of_the_first_images():
    torch.manual_seed(0)
    discriminator = FeatureDiscriminator([4, 6], 3, 8)
    features = [torch.randn(5, 3, 32, 32), torch.randn(5, 4, 8, 8), torch.randn(5, 6, 4, 4)]
    condition, other = torch.randn(5, 3), torch.randn(2, 3)
    judged = discriminator(features, condition, other)
    assert [tuple(logits.shape) for logits in judged] == [(7, n) for n in (64, 16, 256, 64, 16)]
    alone = discriminator([layer[:2] for layer in features], other)
    for both, once, second in zip(judged, discriminator(features, condition), alone, strict=True):
        torch.testing.assert_close(both[:5], once)
        torch.testing.assert_close(both[5:], second)


def test_moved_images_are_crops_of_the_mirrored_ones():
    x = images(3)
    draws = torch.tensor([[0.0, 0.5, 0.999], [0.5, 0.0, 0.999]])  # of a side's 8th: 2 pixels either way, 5 places
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="reflect")
    moved = shifted(x, draws)
    for number, (down, right) in enumerate([(0, 2), (2, 0), (4, 4)]):
        assert torch.equal(moved[number], padded[number, :, down : down + 16, right : right + 16])
    assert torch.equal(shifted(x, torch.full((2, 3), 0.5)), x)


def test_features_are_those_of_every_patch_in_its_place(clip):
    x = images(2).requires_grad_(True)
    features = image_features(clip, x)
    assert features[0] is x and [layer.shape for layer in features[1:]] == [(2, 16, 4, 4)] * 2
    hidden = clip.image_encoder(pixel_values=x, output_hidden_states=True).hidden_states
    torch.testing.assert_close(
        features[2][0, :, 2, 3], torch.nn.functional.layer_norm(hidden[2][0, 1 + 2 * 4 + 3], (16,))
    )
    features[1].square().sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("heads", [slice(0, 2), slice(2, None)], ids=["CLIP's features", "its own"])
def test_it_learns_to_tell_bright_images_of_one_condition_from_those_of_another(clip, heads):
    """Real: bright ones with condition 1, dark ones with -1; drawn: the other way round. Neither says it alone."""
    torch.manual_seed(0)
    bright, dark = images(16) * 0.2 + 0.7, images(16) * 0.2 - 0.7
    features = [layer.detach() for layer in image_features(clip, torch.cat([bright, dark]))]
    condition = torch.ones(32, 1)
    condition[16:] = -1
    discriminator = FeatureDiscriminator([16, 16], 1, 16)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    for _ in range(60):
        judged = [logits.chunk(2) for logits in discriminator(features, condition, -condition)[heads]]
        optimizer.zero_grad()
        mean_over_heads(discriminator_loss(real, drawn) for real, drawn in judged).backward()
        optimizer.step()
    judged = discriminator(features, condition, -condition)[heads]
    real, drawn = mean_over_heads(logits.mean(dim=1) for logits in judged).chunk(2)
    assert (real > 0).all() and (drawn < 0).all()
