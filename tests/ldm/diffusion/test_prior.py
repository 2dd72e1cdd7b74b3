"""The prior's transformer as DALL·E 2 §2.2 has it: a causal sequence whose last place is the answer."""

import pytest
import torch
from diffusers import PriorTransformer

LENGTH, DIM = 6, 16


@pytest.fixture(scope="module")
def prior():
    torch.manual_seed(0)
    return PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=3, embedding_dim=DIM, num_embeddings=LENGTH
    ).eval()


@torch.no_grad()
def sequence(prior, **changed):
    """What every place of the sequence holds after the last block, (1, LENGTH + 4, 16)."""
    draw = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(1, DIM, generator=draw),
        "proj_embedding": torch.randn(1, DIM, generator=draw),
        "encoder_hidden_states": torch.randn(1, LENGTH, DIM, generator=draw),
        "timestep": torch.tensor([500]),
        "attention_mask": torch.ones(1, LENGTH, dtype=torch.bool),
    }
    seen = []
    hook = prior.transformer_blocks[-1].register_forward_hook(lambda module, given, output: seen.append(output))
    try:
        prior(**{**inputs, **{name: change(inputs[name]) for name, change in changed.items()}})
    finally:
        hook.remove()
    return seen[0]


def changed_places(before, after):
    return [place for place in range(before.shape[1]) if not torch.equal(before[:, place], after[:, place])]


@pytest.mark.parametrize("token", range(LENGTH))
def test_a_token_is_seen_by_itself_and_later_places_alone(prior, token):
    def change(tokens):
        tokens = tokens.clone()
        tokens[:, token] += 1
        return tokens

    after = sequence(prior, encoder_hidden_states=change)
    assert changed_places(sequence(prior), after) == list(range(token, LENGTH + 4))


@pytest.mark.parametrize(
    ("name", "place"), [("proj_embedding", LENGTH), ("timestep", LENGTH + 1), ("hidden_states", LENGTH + 2)]
)
def test_so_are_the_text_embedding_the_time_and_the_noised_embedding(prior, name, place):
    after = sequence(prior, **{name: lambda value: value + 1})
    assert changed_places(sequence(prior), after) == list(range(place, LENGTH + 4))


def test_the_answer_is_the_last_place(prior):
    """The final query sees all, and its output, projected, is the prediction."""
    draw = torch.Generator().manual_seed(1)
    noised, text = torch.randn(1, DIM, generator=draw), torch.randn(1, DIM, generator=draw)
    tokens = torch.randn(1, LENGTH, DIM, generator=draw)
    with torch.no_grad():
        mask = torch.ones(1, LENGTH, dtype=torch.bool)  # without one, diffusers leaves out the causal mask too
        predicted = prior(noised, torch.tensor([500]), text, tokens, mask).predicted_image_embedding
        last = sequence(prior)[:, -1]
        expected = prior.proj_to_clip_embeddings(prior.norm_out(last))
    torch.testing.assert_close(predicted, expected)
