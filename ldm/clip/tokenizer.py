"""CLIP's byte-level BPE (Sennrich et al. 2016; Radford et al. 2019), either CLIP's own or trained on captions.

Byte-level: any text can be written, in at most one token a byte.
"""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import CLIPTokenizer

from ldm.errors import UserError

END_OF_WORD = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"
SMALLEST_VOCABULARY = 2 * 256 + 2
"""Every byte, every byte that ends a word, start and end of text."""


def train_tokenizer(captions: Iterable[str], vocabulary_size: int, context_length: int) -> CLIPTokenizer:
    """CLIP's tokenizer with at most `vocabulary_size` tokens, its merges learned from the captions.

    Raises:
        UserError: `vocabulary_size` < 514, too small for every byte.
    """
    if vocabulary_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"vocabulary_size {vocabulary_size}: must be at least {SMALLEST_VOCABULARY}: each byte inside a word, "
            "each byte that ends one, start and end"
        )
    learner = Tokenizer.from_str(CLIPTokenizer().backend_tokenizer.to_str())  # CLIP's way to split text into words
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=vocabulary_size,
        initial_alphabet=alphabet,
        special_tokens=[letter + END_OF_WORD for letter in alphabet],  # numbered here, else in an order left to chance
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"][: vocabulary_size - SMALLEST_VOCABULARY]
    pieces = [*alphabet, *(letter + END_OF_WORD for letter in alphabet), *("".join(merge) for merge in merges)]
    return _tokenizer(pieces, [tuple(merge) for merge in merges], context_length)


def clip_tokenizer(context_length: int = 77) -> CLIPTokenizer:
    """CLIP's own tokenizer of 49,408 tokens, from the file that open_clip brings."""
    from open_clip.tokenizer import SimpleTokenizer

    original = SimpleTokenizer()
    pieces = list(original.encoder)[:-2]  # the last two are open_clip's names for start and end
    return _tokenizer(pieces, list(original.bpe_ranks), context_length)


def encode(tokenizer: CLIPTokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask of captions, each (B, L) integers, cut or padded to the tokenizer's context length L."""
    tokens = tokenizer(
        captions,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return tokens.input_ids, tokens.attention_mask


def lengths(tokenizer: CLIPTokenizer, captions: list[str]) -> list[int]:
    """How many tokens each caption has, start and end among them, whatever the context length."""
    return [len(ids) for ids in tokenizer(captions, verbose=False).input_ids]


def _tokenizer(pieces: list[str], merges: list[tuple[str, str]], context_length: int) -> CLIPTokenizer:
    # end of text gets the highest id: open_clip pools the text where the id is largest
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, START, END]))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=context_length)
