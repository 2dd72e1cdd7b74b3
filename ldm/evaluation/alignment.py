"""Whether pictures show what their captions say: by CLIP's cosines, by retrieval, and by a classifier's reading."""

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UserError

ROWS_AT_ONCE = 4096


def text_image_scores(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """100 cos (N,) of each picture and its caption, in -100..100; embeddings (N, D), of any length.

    Raises:
        UserError: shapes that do not match, no embeddings, or one that is not finite.
    """
    _check(image_embeds, text_embeds)
    return 100 * F.cosine_similarity(image_embeds.double(), text_embeds.double(), dim=1)


def clip_score(image_embeds: Tensor, text_embeds: Tensor) -> float:
    """The mean of `text_image_scores`, or 0 where that is below: as torchmetrics' CLIPScore (Hessel et al. 2021, with a
    weight of 100 for their 2.5). Comparable within one CLIP alone. Raises as that."""
    return max(0.0, text_image_scores(image_embeds, text_embeds).mean().item())


def retrieval_recall(image_embeds: Tensor, text_embeds: Tensor, captions: Sequence[str]) -> dict[str, float | int]:
    """R@1 among the different captions: `image_to_text`, the share of pictures whose nearest caption is theirs, and
    `text_to_image`, the share of captions whose nearest picture is theirs; of how many `captions` there are. The means
    of `retrieved`, which raises for it."""
    to_text, to_image = retrieved(image_embeds, text_embeds, captions)
    return {
        "image_to_text": to_text.double().mean().item(),
        "text_to_image": to_image.double().mean().item(),
        "captions": len(to_image),
    }


def retrieved(image_embeds: Tensor, text_embeds: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Whether each picture's nearest caption is its own (N,), and the nearest picture of each different caption (K,).

    Radford et al. 2021, §3.1 and table 13, by cosine. Equal captions are one, and any picture of it is right, as in
    training (`ldm.clip.model.retrieval_at_1`). Chance is 1 / `captions`, so that it must be told with the figures.
    embeddings (N, D) of any length, captions N.

    Raises:
        UserError: shapes that do not match, no embeddings, or one that is not finite.
    """
    _check(image_embeds, text_embeds)
    if len(captions) != len(image_embeds):
        raise UserError(f"captions must be {len(image_embeds)}, one a picture, got {len(captions)}")
    numbers: dict[str, int] = {}
    ids = torch.tensor([numbers.setdefault(caption, len(numbers)) for caption in captions], device=image_embeds.device)
    first = torch.tensor([captions.index(caption) for caption in numbers], device=image_embeds.device)
    images, texts = F.normalize(image_embeds.double(), dim=1), F.normalize(text_embeds.double()[first], dim=1)
    right = []
    best, found = torch.full((len(texts),), -torch.inf, dtype=torch.float64, device=images.device), ids[first] * 0
    for start in range(0, len(images), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        cosines = images[part] @ texts.T
        right.append(cosines.argmax(dim=1) == ids[part])
        value, row = cosines.max(dim=0)
        found = torch.where(value > best, ids[part][row], found)
        best = torch.maximum(best, value)
    return torch.cat(right), found == torch.arange(len(texts), device=images.device)


def read_right(logits: Tensor, names: Sequence[str], captions: Sequence[str]) -> list[bool | None]:
    """Of each picture, whether a classifier's likeliest label is one that its caption names; None where it names none.

    logits (N, C); names C, of which each may be several with commas between ("tabby, tabby cat", as ImageNet's are). A
    caption names what stands in it as whole words, in any case, unless as part of a longer name: "tabby cat" is no
    "cat" where both are labels. An underscore is a space.

    Raises:
        UserError: shapes that do not match, logits that are not finite, or captions of which none names a label.
    """
    if logits.ndim != 2 or logits.shape != (len(captions), len(names)) or not len(captions):
        raise UserError(f"logits must be ({len(captions) or 1}, {len(names)}), captions by labels, got "
                        f"{tuple(logits.shape)}")  # fmt: skip
    if not torch.isfinite(logits).all():
        raise UserError("the classifier's logits are not finite; its weights are damaged")
    wanted = named_labels(names, captions)
    return [
        label in wanted[caption] if wanted[caption] else None
        for label, caption in zip(logits.argmax(dim=1).tolist(), captions, strict=True)
    ]


def named_labels(names: Sequence[str], captions: Sequence[str]) -> dict[str, set[int]]:
    """Each different caption -> the labels (their numbers) that it names, as `read_right` has it.

    Raises:
        UserError: captions of which none names a label.
    """
    named = _names_in(names)
    wanted = {caption: named(caption) for caption in dict.fromkeys(captions)}
    if not any(wanted.values()):
        raise UserError(f"no caption names a label of the classifier ({', '.join(names[:5])}, …), the first being "
                        f"{captions[0]!r}; take one that knows what the pictures show")  # fmt: skip
    return wanted


def accuracy(right: Sequence[bool | None], captions: Sequence[str]) -> dict[str, float | int | dict[str, float]]:
    """`accuracy`, the share of True among what is not None, of how many `images`, and that `per_caption`.

    Raises:
        UserError: nothing to count.
    """
    counted: dict[str, list[bool]] = {}
    for is_right, caption in zip(right, captions, strict=True):
        if is_right is not None:
            counted.setdefault(caption, []).append(is_right)
    images = sum(map(len, counted.values()))
    if not images:
        raise UserError("accuracy: no picture has a caption that could be read")
    return {
        "accuracy": sum(map(sum, counted.values())) / images,
        "images": images,
        "per_caption": {caption: sum(values) / len(values) for caption, values in sorted(counted.items())},
    }


def _names_in(names: Sequence[str]):
    """A function from a caption to the labels (their numbers) that it names."""
    labels: dict[str, set[int]] = {}
    for number, name in enumerate(names):
        for synonym in name.split(","):
            if words := _words(synonym):
                labels.setdefault(words, set()).add(number)
    longest_first = sorted(labels, key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)") if labels else None

    def named(caption: str) -> set[int]:
        found = pattern.findall(_words(caption)) if pattern else []
        return set().union(*(labels[words] for words in found))

    return named


def _words(text: str) -> str:
    return " ".join(text.replace("_", " ").casefold().split())


def _check(image_embeds: Tensor, text_embeds: Tensor) -> None:
    if image_embeds.ndim != 2 or image_embeds.shape != text_embeds.shape or not len(image_embeds):
        raise UserError(f"embeddings of pictures {tuple(image_embeds.shape)} and captions {tuple(text_embeds.shape)} "
                        "must be as many, of one size")  # fmt: skip
    for name, embeds in (("pictures", image_embeds), ("captions", text_embeds)):
        if not torch.isfinite(embeds).all():
            raise UserError(f"the embeddings of {name} are not finite; CLIP's weights are damaged")
