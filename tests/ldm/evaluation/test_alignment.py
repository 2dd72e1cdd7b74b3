"""Scores, retrieval and readings of embeddings and logits whose answers are known."""

import pytest
import torch

from ldm.clip.model import retrieval_at_1
from ldm.errors import UserError
from ldm.evaluation import alignment
from ldm.evaluation.alignment import accuracy, clip_score, read_right, retrieval_recall, retrieved, text_image_scores

AXES = torch.eye(4)


def test_scores_are_a_hundred_cosines():
    images = torch.stack([3 * AXES[0], AXES[1], AXES[0] + AXES[1], -AXES[2]])
    texts = torch.stack([AXES[0], 2 * AXES[0], AXES[0], AXES[2]])
    scores = text_image_scores(images, texts)
    assert scores.tolist() == pytest.approx([100, 0, 100 / 2**0.5, -100])
    assert clip_score(images, texts) == pytest.approx(scores.mean().item())
    assert clip_score(images, -images) == 0  # as torchmetrics has it


def test_retrieval_of_embeddings_that_match():
    assert retrieval_recall(AXES, 5 * AXES, ["a", "b", "c", "d"]) == {
        "image_to_text": 1.0,
        "text_to_image": 1.0,
        "captions": 4,
    }
    swapped = retrieval_recall(AXES, AXES[[1, 0, 2, 3]], ["a", "b", "c", "d"])
    assert (swapped["image_to_text"], swapped["text_to_image"]) == (0.5, 0.5)
    to_text, to_image = retrieved(AXES, AXES[[1, 0, 2, 3]], ["a", "b", "c", "d"])
    assert to_text.tolist() == to_image.tolist() == [False, False, True, True]


def test_equal_captions_count_as_right_and_as_one():
    images = torch.stack([AXES[0], AXES[0] + 0.1 * AXES[1], AXES[1], AXES[0]])
    texts = AXES[[0, 0, 1, 1]]
    assert retrieval_recall(images, texts, ["x", "x", "y", "y"]) == {
        "image_to_text": 0.75,
        "text_to_image": 1.0,
        "captions": 2,
    }


def test_retrieval_in_chunks_equals_that_of_training(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(50, 3, generator=draw), dim=1)
    texts = torch.nn.functional.normalize(images + 0.3 * torch.randn(50, 3, generator=draw), dim=1)
    monkeypatch.setattr(alignment, "ROWS_AT_ONCE", 7)
    found = retrieval_recall(images, texts, [f"caption {number}" for number in range(50)])
    expected = retrieval_at_1(images, texts, torch.arange(50))
    assert (found["image_to_text"], found["text_to_image"]) == pytest.approx(expected)
    assert 0.1 < found["image_to_text"] < 0.9


def logits_of(*labels: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(labels), 4).float()


def test_reads_what_captions_name():
    names = ["cat", "tabby, tabby cat", "sports_car", "dog"]
    captions = ["a photo of a Cat", "a photo of a cat", "a tabby cat asleep", "a tabby cat asleep", "a sports car",
                "a cat and a dog", "a category of doggerel"]  # fmt: skip
    right = read_right(logits_of(0, 3, 1, 0, 2, 3, 0), names, captions)
    assert right == [True, False, True, False, True, True, None]
    assert accuracy(right, captions) == {
        "accuracy": 4 / 6,
        "images": 6,
        "per_caption": {
            "a photo of a Cat": 1.0,
            "a photo of a cat": 0.0,
            "a tabby cat asleep": 0.5,
            "a sports car": 1.0,
            "a cat and a dog": 1.0,
        },
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: text_image_scores(torch.zeros(3, 4), torch.zeros(2, 4)), "must be as many"),
        (lambda: clip_score(torch.full((1, 2), torch.nan), torch.zeros(1, 2)), "pictures are not finite"),
        (lambda: retrieval_recall(AXES, AXES, ["a"]), "captions must be 4, one a picture, got 1"),
        (lambda: read_right(logits_of(0), ["a", "b"], ["a"]), r"logits must be \(1, 2\), .* got \(1, 4\)"),
        (lambda: read_right(logits_of(0) / 0, list("abcd"), ["a"]), "logits are not finite"),
        (lambda: read_right(logits_of(0), [f"LABEL_{n}" for n in range(4)], ["a cat"]), "no caption names a label"),
        (lambda: accuracy([None], ["a"]), "no picture has a caption"),
    ],
)
def test_refuses_in_one_line(call, message):
    with pytest.raises(UserError, match=message) as refusal:
        call()
    assert "\n" not in str(refusal.value)
