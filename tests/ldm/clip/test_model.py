"""open_clip's model as configured, the temperature's bounds, retrieval, and SLIP's second term."""

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip import ClipLoss

from ldm.clip.model import build, captioned_loss, clamp_temperature, retrieval_at_1
from ldm.clip.slip import Slip, image_image_loss
from ldm.errors import UserError

SHAPE = {
    "embedding_dim": 16,
    "image_size": 16,
    "patch_size": 8,
    "vision_width": 32,
    "vision_layers": 1,
    "vision_heads": 2,
    "text_width": 24,
    "text_layers": 1,
    "text_heads": 3,
    "vocabulary_size": 60,
    "context_length": 10,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vision_heads": 3}, "model.vision_width 32: must be a multiple of model.vision_heads 3"),
        ({"text_heads": 5}, "model.text_width 24: must be a multiple of model.text_heads 5"),
        ({"patch_size": 5}, "model.patch_size 5: must divide data.image_size 16"),
    ],
)
def test_shapes_that_do_not_divide_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        build(**SHAPE | change)


@pytest.mark.parametrize(("scale", "kept"), [(-1.0, 0.0), (2.0, 2.0), (9.0, math.log(100))])
def test_temperature_stays_between_1_and_a_hundredth(scale, kept):
    model = build(**SHAPE)
    model.logit_scale.data.fill_(scale)
    clamp_temperature(model)
    assert model.logit_scale.item() == pytest.approx(kept)


def test_retrieval_counts_the_nearest_and_equal_captions_as_right():
    image = F.normalize(torch.eye(4), dim=-1)
    numbers = torch.arange(4)
    assert retrieval_at_1(image, image, numbers) == (1.0, 1.0)
    swapped = image[[1, 0, 2, 3]]
    assert retrieval_at_1(image, swapped, numbers) == (0.5, 0.5)
    assert retrieval_at_1(image, swapped, torch.tensor([7, 7, 2, 3])) == (1.0, 1.0)


def in_pairs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit-length embeddings of images and texts."""
    draw = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(2, count, 8, dtype=torch.float64, generator=draw), dim=-1).unbind()


def loss_of(image, text, captioned, own=slice(None), scale=5.0):
    return captioned_loss(scale * image[own] @ text.T, scale * text[own] @ image.T, torch.tensor(captioned), own)


def test_images_without_a_caption_are_as_if_they_were_not_there():
    image, text = (part.requires_grad_() for part in in_pairs(6))
    kept, captioned = [0, 1, 4], [True, True, False, False, True, False]
    ours, theirs = (torch.autograd.grad(loss, (image, text)) for loss in (
        loss_of(image, text, [True] * 6), ClipLoss()(image, text, 5.0)))  # fmt: skip
    assert all(map(torch.equal, ours, theirs))
    loss = loss_of(image, text, captioned)
    assert loss.item() == pytest.approx(ClipLoss()(image[kept], text[kept], 5.0).item(), rel=1e-12)
    parts = [loss_of(image, text, captioned, slice(first, first + 2)).item() for first in (0, 2, 4)]  # of processes
    assert sum(parts) / 3 == pytest.approx(loss.item(), rel=1e-12)
    loss.backward()
    assert image.grad[kept].abs().min() > 0 and image.grad[[2, 3, 5]].abs().max() == 0
    nothing = loss_of(image, text, [False] * 6)
    assert nothing.item() == 0 and nothing.requires_grad


def test_equal_captions_as_positives_would_change_nothing():
    """Yang et al.'s loss written out, of texts that are embedded alike where they are equal, and its gradient."""
    groups = torch.tensor([0, 1, 0, 2, 0])
    image, of_group = (part.requires_grad_() for part in in_pairs(5))
    text = of_group[groups]
    shares = (groups[:, None] == groups).double()
    shares /= shares.sum(dim=1, keepdim=True)
    directions = (5.0 * image @ text.T, 5.0 * text @ image.T)
    unified = -sum((shares * logits.log_softmax(dim=1)).sum() for logits in directions) / (2 * len(groups))
    plain = ClipLoss()(image, text, 5.0)
    assert unified.item() == pytest.approx(plain.item(), rel=1e-12)
    for one, other in zip(*(torch.autograd.grad(loss, (image, of_group), retain_graph=True)
                            for loss in (unified, plain)), strict=True):  # fmt: skip
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)


def test_slip_embeds_as_clip_does_and_projects_both_views():
    clip = build(**SHAPE)
    slip = Slip(clip, 16)
    draw = torch.Generator().manual_seed(0)
    images, others = torch.randn(2, 5, 3, 16, 16, generator=draw)
    ids = torch.randint(60, (5, 10), generator=draw)
    image, text, scale, projected = slip(images, ids, others)
    torch.testing.assert_close(image, clip.encode_image(images, normalize=True))
    torch.testing.assert_close(text, clip.encode_text(ids, normalize=True))
    assert scale.item() == pytest.approx(clip.logit_scale.exp().item())
    torch.testing.assert_close(projected.norm(dim=-1), torch.ones(2, 5))
    torch.testing.assert_close(projected[1], F.normalize(slip.head(clip.encode_image(others)), dim=-1))
    alone = slip(images, ids)
    torch.testing.assert_close(alone[0], image)
    assert alone[3] is None


def test_image_image_loss_is_nt_xent():
    """Against the sum of Chen et al.'s equation 1 written out."""
    views = F.normalize(torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1)
    z, temperature, losses = torch.cat([views[0], views[1]]), 0.2, []
    for i in range(6):
        similarity = [math.exp(float(z[i] @ z[k]) / temperature) for k in range(6)]
        others = sum(similarity[k] for k in range(6) if k != i)
        losses.append(-math.log(similarity[(i + 3) % 6] / others))
    assert image_image_loss(views, temperature).item() == pytest.approx(sum(losses) / 6, rel=1e-12)


def test_image_image_loss_is_least_where_views_agree():
    apart = F.normalize(torch.eye(4).repeat(2, 1, 1), dim=-1)
    same = torch.ones(2, 4, 4) / 2
    assert image_image_loss(apart).item() < 0.01
    assert image_image_loss(same).item() == pytest.approx(math.log(7))
