"""The autoencoders of vectors as Diffusers models: what each makes of images, and that it comes back from disk."""

import json

import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal

from ldm.autoencoders.denoising import DenoisingAutoencoder
from ldm.autoencoders.k_sparse import KSparseAutoencoder
from ldm.autoencoders.networks import decoder, encoder
from ldm.autoencoders.plain import Autoencoder
from ldm.autoencoders.sparse import SparseAutoencoder, sparsity_penalty
from ldm.autoencoders.variational import VariationalAutoencoder

KINDS = (Autoencoder, DenoisingAutoencoder, SparseAutoencoder, KSparseAutoencoder, VariationalAutoencoder)
ARCHITECTURES = [("mlp", [24, 20]), ("convolutional", [4, 6])]


def images(count=6, shape=(1, 8, 8)):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))


def noise_for(model, count=6):
    return torch.randn(count, *model.noise_shape, generator=torch.Generator().manual_seed(1))


def build(kind, architecture="mlp", hidden_sizes=(24, 20), **further):
    torch.manual_seed(0)
    further = {"k": 3, **further} if kind is KSparseAutoencoder else further
    return kind(architecture=architecture, hidden_sizes=list(hidden_sizes), code_size=12, **further).eval()


@pytest.mark.parametrize(("architecture", "hidden_sizes"), ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_comes_back_from_disk(kind, architecture, hidden_sizes, tmp_path):
    model = build(kind, architecture, hidden_sizes, image_shape=[3, 8, 8])
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == kind.__name__
    again, x = kind.from_pretrained(tmp_path), images(shape=(3, 8, 8))
    assert model.encode(x).shape == (6, 12)
    assert model.decode(model.encode(x)).shape == x.shape
    noise = noise_for(model)
    for name, value in model(x, noise).items():
        assert torch.equal(value, again(x, noise)[name]), name


@pytest.mark.parametrize(("architecture", "hidden_sizes"), ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_trained(kind, architecture, hidden_sizes):
    model = build(kind, architecture, hidden_sizes)
    model(images(), noise_for(model))["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_plain_loss_is_the_squared_norm():
    model, x = build(Autoencoder), images()
    restored = model.decode(model.encode(x))
    assert model(x, noise_for(model))["loss"].item() == pytest.approx(
        sum(torch.dist(a, b).item() ** 2 for a, b in zip(restored, x, strict=True)) / 6, rel=1e-5
    )


def test_denoising_restores_the_original_from_the_corrupted():
    model, x = build(DenoisingAutoencoder, mask_proportion=0.5, noise_deviation=0.2), images()
    noise = noise_for(model)
    corrupted = model.corrupt(x, noise)
    assert ((corrupted == 0).flatten(1).sum(1) == 32).all()
    kept = corrupted != 0
    torch.testing.assert_close(corrupted[kept], (x + 0.2 * noise[:, 0])[kept])
    error = ((model.decode(model.encode(corrupted)) - x) ** 2).flatten(1).sum(1).mean()
    assert model(x, noise)["loss"].item() == pytest.approx(error.item())


def test_sparse_penalises_every_hidden_layer():
    model, x = build(SparseAutoencoder, rho=0.1, sparsity_weight=2.0), images()
    x_hat, activations = model.activations(x)
    assert [a.shape[1] for a in activations] == [24, 20, 12, 20, 24]
    assert all(((a > 0) & (a < 1)).all() for a in activations)
    losses = model(x, noise_for(model))
    expected = ((x_hat - x) ** 2).flatten(1).sum(1).mean() + 2 * sparsity_penalty(activations, 0.1)
    assert losses["loss"].item() == pytest.approx(expected.item())


@pytest.mark.parametrize("k", [1, 5, 12])
def test_k_sparse_codes_have_k_active_units(k):
    model = build(KSparseAutoencoder, k=k)
    assert ((model.encode(images()) != 0).sum(1) == k).all()


@pytest.mark.parametrize("likelihood", ["bernoulli", "fixed_gaussian", "learned_gaussian"])
def test_the_variational_loss_is_that_of_distributions(likelihood):
    model = build(VariationalAutoencoder, likelihood=likelihood, deviation=0.3, beta=0.7).double()
    x, noise = images().double(), noise_for(model).double()
    x = (x > 0.5).double() if likelihood == "bernoulli" else x
    mean, logvar = model.posterior(x)
    posterior = Normal(mean, (0.5 * logvar).exp())
    z = mean + (0.5 * logvar).exp() * noise
    output = model.decoder(z)[0]
    if likelihood == "bernoulli":
        density = Bernoulli(logits=output)
    elif likelihood == "fixed_gaussian":
        density = Normal(output, 0.3)
    else:
        density = Normal(output[:, :1], (0.5 * output[:, 1:]).exp())
    log_likelihood = Independent(density, 3).log_prob(x)
    kl = torch.distributions.kl_divergence(posterior, Normal(0.0, 1.0)).sum(1)
    expected = -(log_likelihood - 0.7 * kl).mean().item()
    assert model(x, noise)["loss"].item() == pytest.approx(expected, rel=1e-10)


def test_the_measured_bound_lies_above_the_elbo_and_counts_active_units():
    model = build(VariationalAutoencoder, binarise=True)
    measured = model.measure(images(40), torch.Generator().manual_seed(2))
    assert measured["iwae_500"] > measured["elbo"]
    assert measured["bits_per_dim"] == pytest.approx(-measured["iwae_500"] / 64 / torch.tensor(2.0).log().item())
    with torch.no_grad():  # a posterior that ignores the image
        model.encoder.output[1].weight.zero_()
    assert model.measure(images(40), torch.Generator())["active_units"] == 0


@pytest.mark.parametrize(
    ("build_it", "said"),
    [
        (lambda: encoder("resnet", (1, 8, 8), [8], 4, "relu"), "architecture must be one of mlp, .*got 'resnet'"),
        (lambda: decoder("mlp", (1, 8, 8), [8], 4, "swish"), "activation must be one of relu.*got 'swish'"),
        (lambda: encoder("convolutional", (1, 6, 6), [8, 8], 4, "relu"), r"\[8, 8\].*6 × 6 must be multiples of 4"),
        (lambda: KSparseAutoencoder(code_size=10, k=11), r"k must be in 1 … 10.*got 11"),
        (lambda: VariationalAutoencoder(likelihood="poisson"), "likelihood must be one of bernoulli.*got 'poisson'"),
        (lambda: VariationalAutoencoder(deviation=0.0), "deviation must be > 0, got 0"),
        (lambda: VariationalAutoencoder(beta=-1.0), "beta must be >= 0, got -1"),
    ],
)
def test_what_cannot_be_built_is_refused(build_it, said):
    with pytest.raises(ValueError, match=said):
        build_it()
