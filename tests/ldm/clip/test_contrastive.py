"""The loss over groups of captions, against open_clip's and written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip import ClipLoss

from ldm.clip.contrastive import NO_CAPTION, caption_groups, each_its_own, grouped_loss

CAPTIONS = ["a cat", "a dog", "a cat", " ", "a bird", ""]
SCALE = 5.0


@pytest.fixture
def embeddings():
    """Of six images and their texts."""
    return F.normalize(
        torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1
    ).unbind()


def loss_of(image, text, groups, own=slice(None)):
    return grouped_loss(SCALE * image[own] @ text.T, SCALE * text[own] @ image.T, groups, own)


def test_captions_that_are_equal_are_a_group_and_empty_ones_are_none():
    groups = caption_groups(CAPTIONS)
    assert groups[0] == groups[2] and len(set(groups.tolist())) == 4
    assert (groups == NO_CAPTION).tolist() == [False, False, False, True, False, True]
    assert each_its_own(groups).tolist() == [0, 1, 2, NO_CAPTION, 4, NO_CAPTION]


def test_with_captions_that_all_differ_it_is_open_clips(embeddings):
    image, text = embeddings
    groups = caption_groups([f"number {number}" for number in range(6)])
    expected = ClipLoss()(image, text, SCALE).item()
    assert loss_of(image, text, groups).item() == pytest.approx(expected, rel=1e-12)
    assert loss_of(image, text, each_its_own(groups)).item() == pytest.approx(expected, rel=1e-12)


def test_equal_captions_are_positives_in_equal_shares(embeddings):
    """Yang et al.'s two sums written out, over the four images with a caption."""
    image, text = embeddings
    kept, losses = [0, 1, 2, 4], []
    for queries, keys in ((image, text), (text, image)):
        for i in kept:
            total = sum(math.exp(SCALE * float(queries[i] @ keys[k])) for k in kept)
            same = [k for k in kept if CAPTIONS[k] == CAPTIONS[i]]
            shares = [math.exp(SCALE * float(queries[i] @ keys[k])) / total for k in same]
            losses.append(-sum(map(math.log, shares)) / len(same))
    assert loss_of(image, text, caption_groups(CAPTIONS)).item() == pytest.approx(sum(losses) / 8, rel=1e-12)


def test_images_without_a_caption_are_as_if_they_were_not_there(embeddings):
    image, text = (part.clone().requires_grad_() for part in embeddings)
    groups = each_its_own(caption_groups(CAPTIONS))
    loss = loss_of(image, text, groups)
    kept = [0, 1, 2, 4]
    assert loss.item() == pytest.approx(ClipLoss()(image[kept], text[kept], SCALE).item(), rel=1e-12)
    loss.backward()
    assert image.grad[[3, 5]].abs().max() == text.grad[[3, 5]].abs().max() == 0
    assert image.grad[kept].abs().min() > 0
    assert loss_of(image, text, torch.full((6,), NO_CAPTION)).item() == 0


def test_processes_together_have_the_loss_of_the_whole_batch(embeddings):
    groups = caption_groups(CAPTIONS)
    parts = [loss_of(*embeddings, groups, slice(first, first + 2)).item() for first in (0, 2, 4)]
    assert sum(parts) / 3 == pytest.approx(loss_of(*embeddings, groups).item(), rel=1e-12)
