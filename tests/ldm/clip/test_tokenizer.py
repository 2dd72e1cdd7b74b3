import pytest
from transformers import CLIPTokenizer

from ldm.clip.tokenizer import SMALLEST_VOCABULARY, clip_tokenizer, encode, train_tokenizer
from ldm.data.shapes import make_scene
from ldm.errors import UserError

CAPTIONS = ["a photo of a cat", "a photo of a dog", "two cats and a horse", "it's a naïve café — 東京 🐱"]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return train_tokenizer(CAPTIONS * 3, 540, 12)


def test_learns_the_words_it_sees_often(tokenizer):
    assert len(tokenizer) == 540
    assert tokenizer.tokenize("a photo") == ["a</w>", "photo</w>"]


def test_end_of_text_has_the_highest_id_and_pads(tokenizer):
    ids, mask = encode(tokenizer, ["a cat", ""])
    assert ids.shape == mask.shape == (2, 12)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == len(tokenizer) - 1 == ids.max()
    assert ids[1].tolist() == [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * 11
    assert mask.sum(1).tolist() == [4, 2]


@pytest.mark.parametrize("text", ["a photo of a cat", "ünïcode 東京 🐱", "never seen: xylophone 123"])
def test_spells_any_text(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_same_captions_give_the_same_tokenizer():
    """Ties between pairs, of which drawn scenes have many, are broken the same way every time."""
    captions = [make_scene(0, number).caption for number in range(24)]
    first = train_tokenizer(captions, 600, 24).get_vocab()
    assert all(train_tokenizer(captions, 600, 24).get_vocab() == first for _ in range(30))


def test_survives_the_disk(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again(CAPTIONS).input_ids == tokenizer(CAPTIONS).input_ids
    assert again.model_max_length == 12


def test_long_captions_are_cut_with_their_end_kept(tokenizer):
    ids, _ = encode(tokenizer, ["cat " * 50])
    assert ids.shape == (1, 12) and ids[0, -1] == tokenizer.eos_token_id


def test_few_captions_give_a_smaller_vocabulary():
    assert SMALLEST_VOCABULARY <= len(train_tokenizer(["a cat"], 5000, 8)) < 600


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(UserError, match="vocabulary_size 100"):
        train_tokenizer(CAPTIONS, 100, 12)


def test_clips_own_tokenizer_agrees_with_open_clips():
    from open_clip.tokenizer import SimpleTokenizer

    ours, theirs = clip_tokenizer(), SimpleTokenizer()
    assert len(ours) == 49408
    for caption in ["a photo of a cat", "An Astronaut riding a horse, 4k!", "it's 東京 🐱"]:
        assert ours(caption).input_ids[1:-1] == theirs.encode(caption)
    assert ours("").input_ids == [49406, 49407]
