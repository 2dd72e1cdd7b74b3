"""What a data set holds, before anything is trained on it: `ldm data-check`."""

import dataclasses
from collections.abc import Iterator

import datasets
from tqdm import tqdm

from ldm.clip.tokenizer import clip_tokenizer, lengths
from ldm.config import DataConfig
from ldm.data import tars
from ldm.data.batches import open_data
from ldm.data.captions import CaptionedImages, image_column_of, load_table
from ldm.data.columns import is_bare_number
from ldm.data.text_files import is_folder_of_text_files
from ldm.errors import RunError

CAPTION_NAMES = ("text", "caption", "captions", "prompt", "description", "sentence")
TEXT_SUFFIXES = ("txt", "text", "caption")
ROWS = 3
NAMED = 5
CONTEXT_LENGTH = 77
EXCERPT = 1000


def findings(source: str, split: str) -> Iterator[str]:
    """Line by line: the columns, the `data` section that reads them, three rows, images that cannot be decoded, and
    captions that CLIP's tokenizer would cut.

    Raises:
        UserError: no such source, or nothing in it that holds images or captions.
    """
    config = DataConfig(source=source, split=split, image_size=32, max_bad_fraction=1.0)
    if tars.is_tars(source):
        shards = tars.shards_of(source)
        yield f"{len(shards):,} shard{'s' * (len(shards) > 1)}, columns: " + ", ".join(
            f"{n} ({_tar_kind(n)})" for n in tars.columns_of(shards[0])
        )
        config = proposed_of_tars(config, shards)
    elif not is_folder_of_text_files(source) and source not in ("shapes", "digits"):
        table = load_table(config)
        yield f"{len(table):,} rows, columns: " + ", ".join(f"{n} ({_kind(f)})" for n, f in table.features.items())
        config = proposed(config, table)
    data = open_data(config, seed=0).excerpt(EXCERPT)
    if is_folder_of_text_files(source):
        yield f"{len(data):,} images with a .txt beside them, columns: image (image), text (string)"
    if config.streaming:
        yield f"of URLs, only the first {len(data):,} samples that can be decoded are looked at"
    yield "data:"
    for name in ("source", "split", "streaming", "image_column", "caption_column", "caption_templates"):
        if value := getattr(config, name):
            yield f"  {name}: {value}"
    for index in range(min(ROWS, len(data))):
        size = "" if config.streaming else f"{_size(data, index)}, "  # an excerpt of a stream is scaled already
        yield f"row {index}: {size}{data.captions(index)[0]!r}"
    yield from _unreadable(data, config.streaming)
    yield from _too_long(data)


def proposed(config: DataConfig, table: datasets.Dataset) -> DataConfig:
    """`config` with the image column, and the caption column that its name or its texts' length speaks for; without
    any text, or where `label_names` are given, a template over a class label or a column of whole numbers."""
    image = image_column_of(config, table)
    texts = [name for name, feature in table.features.items() if _kind(feature).endswith("string") and name != image]
    named = [name for name in CAPTION_NAMES if name in texts]
    if texts and not config.label_names:
        first = table.select(range(min(100, len(table))))
        longest = max(texts, key=lambda name: sum(len(str(text)) for text in first[name]))
        return dataclasses.replace(config, image_column=image, caption_column=named[0] if named else longest)
    labels = [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    if config.label_names:
        numbers = [name for name, feature in table.features.items() if is_bare_number(feature)]
        labels += sorted(numbers, key=lambda name: "label" not in name)
    templates = [f"a photo of a {{{labels[0]}}}"] if labels else []
    return dataclasses.replace(config, image_column=image, caption_templates=templates)


def proposed_of_tars(config: DataConfig, shards: list[str]) -> DataConfig:
    """The same for tar shards, whose texts are members or fields of JSON. Those at URLs are streamed."""
    columns = tars.columns_of(shards[0])
    config = dataclasses.replace(config, streaming=any(tars.is_url(shard) for shard in shards))
    texts = [name for name in columns if _tar_kind(name) == "string"]
    named = [name for known in (*TEXT_SUFFIXES, *CAPTION_NAMES) for name in texts if name.split(".")[-1] == known]
    if texts and not config.label_names:
        return dataclasses.replace(config, caption_column=(named or texts)[0])
    labels = [name for name in columns if name == "cls"]
    return dataclasses.replace(config, caption_templates=[f"a photo of a {{{name}}}" for name in labels])


def _tar_kind(column: str) -> str:
    if tars.is_picture(column):
        return "image"
    return "string" if column in TEXT_SUFFIXES or column.startswith(("json.", "jsn.")) else "other"


def _kind(feature: object) -> str:
    if isinstance(feature, datasets.ClassLabel):
        return f"label of {feature.num_classes}"
    if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"}):
        return "image"
    if (inner := getattr(feature, "feature", None)) is not None:
        return f"list of {_kind(inner)}"
    return str(getattr(feature, "dtype", None) or "other")


def _size(data: CaptionedImages, index: int) -> str:
    try:
        image = data.open(index)
        return f"{image.width} × {image.height} {image.mode}"
    except Exception as error:  # damaged files make decoders raise anything
        return f"cannot be decoded: {error}"


def _unreadable(data: CaptionedImages, is_excerpt: bool) -> Iterator[str]:
    bad, sides = [], []
    for index in tqdm(range(len(data)), desc="decoding", unit=" images", leave=False):
        try:
            data.pixels(index)
            if not is_excerpt:
                sides.append(min(data.open(index).size))
        except RunError as error:
            bad.append(str(error))
    if sides:
        yield (
            f"shorter sides of {min(sides):,} to {max(sides):,} pixels, median {sorted(sides)[len(sides) // 2]:,}, "
            "which data.image_size makes one"
        )
    yield f"{len(bad)} of {len(data):,} images cannot be decoded"
    yield from (f"  {error}" for error in bad[:NAMED])
    if len(bad) > NAMED:
        yield f"  … and {len(bad) - NAMED} more"


def _too_long(data: CaptionedImages) -> Iterator[str]:
    tokenizer = clip_tokenizer(CONTEXT_LENGTH)
    captions = list(dict.fromkeys(caption for index in range(len(data)) for caption in data.captions(index)))
    if without := sum(not data.captions(index)[0] for index in range(len(data))):
        yield f"{without:,} images have an empty caption, which stands for none"
    tokens = lengths(tokenizer, captions)
    cut = sum(length > CONTEXT_LENGTH for length in tokens)
    yield (
        f"{len(captions):,} different captions, at most {max(tokens)} of CLIP's tokens long; {cut} are longer than "
        f"its context of {CONTEXT_LENGTH} and would be cut"
    )
