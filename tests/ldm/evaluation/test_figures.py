"""The documents' figures: each is drawn, from models of the right shape, and says what is missing otherwise."""

import pytest
import torch
from PIL import Image

from ldm.autoencoders.denoising import DenoisingAutoencoder
from ldm.autoencoders.k_sparse import KSparseAutoencoder
from ldm.autoencoders.variational import VariationalAutoencoder
from ldm.diffusion.mixture import two_in_the_plane
from ldm.errors import UserError
from ldm.evaluation import figures
from pipelines.cli import main as ldm_command

OF_FORMULAS = {"sparsity_kl", "schedules", "forward_process", "samplers"}
OF_MODELS = {"k_sparse_filters", "denoising", "vae_samples", "vae_manifold"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Untrained autoencoders, where `ldm figures` looks for trained ones."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    models = {f"k_sparse_{k}": KSparseAutoencoder(code_size=80, k=k) for k in figures.SPARSITIES}
    models |= {"denoising": DenoisingAutoencoder(), "variational": VariationalAutoencoder()}
    models["variational_2d"] = VariationalAutoencoder(code_size=2)
    assert models.keys() == figures.TRAINED_BY.keys()
    for name, model in models.items():
        model.save_pretrained(folder / name / "model" / "autoencoder")
    return folder


def test_the_command_draws_every_figure(runs, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        ldm_command(["figures", "--output", str(tmp_path / "figures"), "--runs", str(runs)])
    assert ended.value.code == 0
    printed = capsys.readouterr()
    assert "not drawn" not in printed.err
    assert {line.rpartition("/")[2] for line in printed.out.splitlines()} == {
        f"{n}.png" for n in OF_FORMULAS | OF_MODELS
    }
    for name in OF_FORMULAS | OF_MODELS:
        low, high = Image.open(tmp_path / "figures" / f"{name}.png").convert("L").getextrema()
        assert low < 60 and high > 200, name


def test_what_was_not_trained_is_left_out_and_named(tmp_path):
    drawn = list(figures.draw_all(tmp_path / "figures", tmp_path / "runs"))
    assert {name for path, name in drawn if path is not None} == OF_FORMULAS
    said = [reason for path, reason in drawn if path is None]
    assert len(said) == len(OF_MODELS)
    assert all("missing; python train/train_autoencoder.py --config configs/digits/" in reason for reason in said)


def test_a_file_is_no_folder(tmp_path, capsys):
    (tmp_path / "figures").write_text("mine")
    for output in (tmp_path / "figures", tmp_path / "figures" / "below"):
        with pytest.raises(SystemExit) as ended:
            ldm_command(["figures", "--output", str(output)])
        assert ended.value.code == 2
        assert "is not a writable folder; name another" in capsys.readouterr().err
    assert (tmp_path / "figures").read_text() == "mine"


@pytest.mark.parametrize("name", figures.SAMPLERS)
def test_paths_lead_from_noise_to_the_data(name):
    make, steps = figures.SAMPLERS[name]
    if steps == 1000:
        steps = 200
    mixture = two_in_the_plane()
    first = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    path = figures.sampled_path(make(), steps, first, mixture.epsilon)
    assert torch.equal(path[0], first)
    mean, covariance = mixture.moments()
    assert (path[-1].mean(0) - mean).abs().max() < 0.15
    assert (path[-1].T.cov() - covariance).abs().max() < 0.2
    assert path[1:].diff(dim=0).norm(dim=-1).max() < 2.5  # nowhere does a path leave the scale of the data


def test_the_manifold_wants_two_dimensions():
    with pytest.raises(UserError, match="wants a code of 2 units, not 8"):
        figures.vae_manifold(VariationalAutoencoder())
