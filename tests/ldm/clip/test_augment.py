import pytest
import torch

from ldm.clip.augment import NUM_DRAWS, augment

MIDDLE = torch.full((4, NUM_DRAWS), 0.5)


@pytest.fixture
def images():
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_nothing_asked_changes_nothing(images):
    draws = torch.rand(4, NUM_DRAWS, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(augment(images, draws, least_area=1.0, jitter=0.0, mirror=False), images)


def test_mirrors_where_the_draw_says_so(images):
    draws = MIDDLE.clone()
    draws[:, 4] = torch.tensor([0.1, 0.9, 0.4, 0.6])
    seen = augment(images, draws, least_area=1.0, jitter=0.0, mirror=True)
    for image, mirrored, turned in zip(images, seen, (True, False, True, False), strict=True):
        torch.testing.assert_close(mirrored, image.flip(-1) if turned else image)


def test_crop_is_a_part_of_the_picture():
    """On a ramp from left to right, a crop shows a ramp over the share of it that was kept."""
    ramp = torch.linspace(-0.9, 0.9, 64).expand(1, 3, 64, 64)
    draws = torch.full((1, NUM_DRAWS), 0.5)
    draws[:, 0] = 0.0  # the least area, a square in the middle
    seen = augment(ramp, draws, least_area=0.25, jitter=0.0, mirror=False)
    assert (seen.max() - seen.min()).item() == pytest.approx(0.5 * 1.8, abs=0.03)
    assert seen.mean().item() == pytest.approx(0.0, abs=0.01)
    draws[:, 2] = 0.0  # at the left edge
    assert augment(ramp, draws, least_area=0.25, jitter=0.0, mirror=False).mean().item() < -0.4


def test_jitter_moves_brightness_contrast_and_saturation(images):
    grey = images.mean(dim=1, keepdim=True).expand_as(images)
    draws = MIDDLE.clone()
    draws[:, 7] = 0.0  # saturation down by `jitter`
    seen = augment(images, draws, least_area=1.0, jitter=0.5, mirror=False)
    torch.testing.assert_close(seen, grey + 0.5 * (images - grey))
    draws = MIDDLE.clone()
    draws[:, 5] = 0.0  # brightness: black is what stays
    seen = augment(images, draws, least_area=1.0, jitter=0.5, mirror=False)
    torch.testing.assert_close(seen, 0.5 * (images + 1) - 1)


def test_stays_in_range_and_depends_on_each_images_own_draws(images):
    draws = torch.rand(4, NUM_DRAWS, generator=torch.Generator().manual_seed(2))
    options = {"least_area": 0.3, "jitter": 0.9, "mirror": True}
    seen = augment(images, draws, **options)
    assert seen.abs().max() <= 1 and not torch.allclose(seen, images)
    torch.testing.assert_close(augment(images[2:3], draws[2:3], **options), seen[2:3])
