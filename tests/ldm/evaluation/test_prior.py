"""Cosines of a prior whose embeddings are known."""

import pytest
import torch

from ldm.errors import UserError
from ldm.evaluation.prior import prior_cosines

AXES = torch.eye(3)


def test_cosines_by_hand():
    images, texts = AXES[[0, 1]], torch.stack([AXES[0] + AXES[2], AXES[2]])
    found = prior_cosines(2 * images, texts, images, images.mean(0))
    assert found == pytest.approx({"prior": 1, "text": 0.5 / 2**0.5, "mean": 1 / 2**0.5})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text_embeds": torch.ones(3, 2)}, r"text_embeds must be \(3, 3\), got \(3, 2\)"),
        ({"mean_embed": torch.ones(1, 3)}, r"mean_embed must be \(3,\)"),
        ({"prior_embeds": torch.full((3, 3), torch.nan)}, "prior embeddings hold one that is not finite"),
        ({"image_embeds": torch.zeros(3, 3)}, "image embeddings hold one .* no direction"),
    ],
)
def test_refuses_in_one_line(given, message):
    good = {"prior_embeds": AXES, "text_embeds": AXES, "image_embeds": AXES, "mean_embed": AXES[0]}
    with pytest.raises(UserError, match=message) as refusal:
        prior_cosines(**{**good, **given})
    assert "\n" not in str(refusal.value)
